"""A datastore, score tables of it, and what was fitted on them: do they belong together?"""

from __future__ import annotations

from collections.abc import Sequence

from fairseq_knnlm.calibration.checks import MOST_ITSELF, itself
from fairseq_knnlm.calibration.stored import Calibration, read_calibration
from fairseq_knnlm.calibration.table import ScoreTable
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError


def check_table(table: ScoreTable, store: Datastore) -> None:
    """Refuses a score table of another datastore.

    Raises:
        ConfigError: where it is.
    """
    found = table.card.get("datastores", [])
    if store.fingerprint not in found[:1]:
        raise ConfigError(
            "the score table is not of this datastore",
            expected=f"datastore {store.fingerprint[:12]}...",
            found=", ".join(f"datastore {one[:12]}..." for one in found) or "no datastore",
            do="write the table with --knnlm --dstore-filename of this datastore",
        )


def own_text(table: ScoreTable, store: Datastore) -> str | None:
    """Why the datastore seems to hold the text of the score table; None where it does not.

    Weights fitted on such text are worth nothing for other text.
    """
    share, split = itself(table), table.card["split"]
    if share > MOST_ITSELF:
        return f"{share:.0%} of its tokens find a neighbour at distance 0"
    if split == store.manifest.origin.split:
        return f"both are of a split named {split!r}"
    return None


def calibration_of(store: Datastore, fingerprints: Sequence[str]) -> Calibration:
    """What was fitted for a datastore, alone or with others.

    Args:
        store: beside which it lies.
        fingerprints: of all the datastores that it was fitted for.

    Raises:
        ConfigError: where nothing was fitted for them.
        TableError: where it is damaged.
    """
    calibration = read_calibration(store.calibration_path, fingerprints)
    if calibration is None:
        raise ConfigError(
            f"{store.path} has no calibration",
            expected=str(store.calibration_path),
            found="nothing",
            do="fit it on valid text with `fairseq-knnlm tune`",
        )
    return calibration
