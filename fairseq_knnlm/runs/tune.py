"""A datastore, score tables of it, and what was fitted on them: do they belong together?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fairseq_knnlm.calibration.checks import MOST_ITSELF, itself
from fairseq_knnlm.calibration.stored import Calibration, read_calibration
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError


def check_table(table: ScoreTable, store: Datastore | None) -> None:
    """Refuses a score table of another datastore.

    Args:
        table: the score table.
        store: the datastore; None where there is none, as with columns of other systems.

    Raises:
        ConfigError: where it is.
    """
    found = table.card.get("datastores", [])
    if store is None:
        if found:
            raise ConfigError(
                "the score table is of a datastore, beside which its calibration lies",
                expected="--dstore DSTORE in the place of --calibration",
                found=f"datastore {found[0][:12]}...",
            )
    elif store.fingerprint not in found[:1]:
        raise ConfigError(
            "the score table is not of this datastore",
            expected=f"datastore {store.fingerprint[:12]}...",
            found=", ".join(f"datastore {one[:12]}..." for one in found) or "no datastore",
            do="write the table with --knnlm --dstore-filename of this datastore"
            if found
            else "give --calibration FILE in the place of --dstore, or a table of this datastore",
        )


def own_text(table: ScoreTable, store: Datastore | None) -> str | None:
    """Why the datastore seems to hold the text of the score table; None where it does not.

    Weights fitted on such text are worth nothing for other text.
    """
    if store is None:
        return None
    share, split = itself(table), table.card["split"]
    if share > MOST_ITSELF:
        return f"{share:.0%} of its tokens find a neighbour at distance 0"
    if split == store.manifest.origin.split:
        return f"both are of a split named {split!r}"
    return None


def calibration_of(path: Path, fingerprints: Sequence[str]) -> Calibration:
    """What was fitted for a datastore, alone or with others, or for none.

    Args:
        path: of the first one's ``calibration.json``.
        fingerprints: of all the datastores that it was fitted for.

    Raises:
        ConfigError: where nothing was fitted for them.
        TableError: where it is damaged.
    """
    calibration = read_calibration(path, fingerprints)
    if calibration is None:
        raise ConfigError(
            f"{path.parent} has no calibration",
            expected=str(path),
            found="nothing",
            do="fit it on valid text with `fairseq-knnlm tune`",
        )
    return calibration
