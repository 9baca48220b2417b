"""Score tables: one row a scored token, one column an expert or a feature.

An ``.npz`` that ``numpy.load`` opens without pickle, rows in the order of the text:

* ``row`` (N,) int64, the token's place in the split; ``token`` (N,) int32, its id; ``context`` (N,)
  int32, the token before it;
* ``lm`` (N,) float32, the language model's log-probability of the token (natural log);
* for each other expert (N, S) float32 by its name, the same in each of the S settings that the card
  lists; -inf where it gives the token no probability, NaN where it has nothing to go by;
* features, (N,) or (N, M) float32, by the names in the card: what a mixer may go by; among them,
  where a datastore is searched, ``lm_key`` (N, D) float16, the query itself;
* ``card``, a JSON text: what made the table.

Reading one takes neither torch nor fairseq nor faiss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.calibration.card import read_card
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files.arrays import Archive, opened
from fairseq_knnlm.mixture.components import LM, Component

AGAIN = "write it again, with the flags of the table that the calibration was fitted on"
#: A log-probability above 0 by no more than this is rounding.
ROUNDING = 1e-3
#: Columns of an expert or feature at most: a key's width is the most there is.
MOST_COLUMNS = 10**6


@dataclass(frozen=True)
class ScoreTable:
    """A score table in memory.

    Attributes:
        columns: by name, each with N rows.
        card: what made it.
    """

    columns: dict[str, np.ndarray]
    card: dict[str, Any]

    def __len__(self) -> int:
        return len(self.columns["lm"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    @property
    def experts(self) -> dict[str, list[dict[str, Any]]]:
        """The settings of each expert but the language model, by its name."""
        return self.card["experts"]

    def column(self, component: Component) -> np.ndarray:
        """(N,) log-probabilities of an expert in one setting, natural log.

        Raises:
            TableError: where the table was written without it.
        """
        if component == LM:
            return self["lm"]
        settings = self.experts.get(component.expert, [])
        if component.setting not in settings:
            raise TableError(
                f"the score table has no column of {component.expert} with "
                f"{', '.join(map(_in_words, component.setting.items()))}",
                expected="the settings that the mixture was fitted with",
                found=f"{len(settings)} others",
                do=AGAIN,
            )
        return self[component.expert][:, settings.index(component.setting)]

    def features(
        self, names: Sequence[str], rows: np.ndarray | slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """The named features of some rows: (M,) or (M, F) each, float32 or float16.

        Raises:
            TableError: where the table was written without one.
        """
        if missing := [name for name in names if name not in self.columns]:
            raise TableError(
                "the score table lacks features that the mixture goes by",
                expected=", ".join(missing),
                found=", ".join(self.columns),
                do=AGAIN,
            )
        return {name: self[name][rows] for name in names}


def _in_words(setting: tuple[str, Any]) -> str:
    name, value = setting
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def read_table(path: Path) -> ScoreTable:
    """Reads the score table of a whole run.

    Raises:
        TableError: where it is missing, damaged, none, of another version, or of a share of a run;
            it names the field or column that is not as it should be.
    """
    table = read_part(path)
    if share := table.card.get("share"):
        raise TableError(
            f"{path} is the score table of a share",
            expected="the table of a whole run",
            found=f"share {share['number']} of {share['of']}",
            do="join all of them: fairseq-knnlm report --join TABLES --score-table WHOLE.npz",
        )
    return table


def read_part(path: Path) -> ScoreTable:
    """Reads the score table of a whole run, or of a share.

    Raises:
        TableError: as ``read_table``.
    """
    with _reading(path) as archive:
        card = read_card(path, archive.text("card"))
        return ScoreTable(_columns(archive, card), {"datastores": [], "described": {}, **card})


def read_card_of(path: Path) -> dict[str, Any]:
    """The card alone, of a whole run or of a share, as it is written.

    Raises:
        TableError: as ``read_table``.
    """
    with _reading(path) as archive:
        return read_card(path, archive.text("card"))


@contextmanager
def _reading(path: Path) -> Iterator[Archive]:
    expected = "a score table, as --score-table FILE.npz writes it"
    if not path.exists():
        raise TableError(f"no score table at {path}", expected=expected, found="nothing")
    try:
        with opened(path) as archive:
            yield archive
    except ValueError as error:
        raise TableError(
            f"{path} cannot be read",
            expected=expected,
            found=error,
            do="write it again, with --score-table",
        ) from None


def _columns(archive: Archive, card: dict[str, Any]) -> dict[str, np.ndarray]:
    """All columns, checked."""
    experts, features = card["experts"], card["features"]
    ids = ("token", "context")
    known = ["row", *ids, "lm", *experts, *features]
    if doubled := [name for name in known if known.count(name) > 1]:
        raise ValueError(f"a column named {doubled[0]} twice - at `$.experts` and `$.features`")
    if missing := [name for name in known if name not in archive.names]:
        raise ValueError(f"no column {missing[0]}")
    if unknown := set(archive.names) - {"card", *known}:
        raise ValueError(f"a column that the card does not know, {min(unknown)}")
    row = archive.vector("row", "int64")
    rows = len(row)
    columns = {}
    for name in archive.names:
        if name == "card":
            continue
        if name == "row":
            columns[name] = row
        elif name in ids:
            columns[name] = archive.column(name, ["int32"], rows)
        elif name in features:
            columns[name] = archive.column(name, ["float32", "float16"], rows, MOST_COLUMNS)
        else:
            wide = MOST_COLUMNS if name in experts else 0
            columns[name] = archive.column(name, ["float32"], rows, wide)
    for name, settings in experts.items():
        if columns[name].shape != (rows, len(settings)):
            raise ValueError(f"{name}: shape {columns[name].shape}, of {len(settings)} settings")
    _check_values(columns, experts)
    return columns


def _check_values(columns: Mapping[str, np.ndarray], experts: Sequence[str]) -> None:
    row, lm = columns["row"], columns["lm"]
    if len(row) and (row[0] < 0 or not (np.diff(row) > 0).all()):
        raise ValueError("row: places of the text that do not ascend from 0")
    for name, least in (("token", 0), ("context", -1)):
        if (columns[name] < least).any():
            raise ValueError(f"{name}: an id below {least}")
    if not (lm <= ROUNDING).all():  # NaN is not, either
        raise ValueError("lm: NaN, or a log-probability above 0")
    for name in experts:
        if (columns[name] > ROUNDING).any():
            raise ValueError(f"{name}: a log-probability above 0")
