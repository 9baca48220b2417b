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
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import Claim, partial_prefix, publish
from fairseq_knnlm.mixers import LM, Component

FORMAT = "fairseq-knnlm score table"
VERSION = 2
AGAIN = "write it again, with the flags of the table that the calibration was fitted on"
#: Rows copied at a time from the temporary columns into the table.
STEP = 65536


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
            words = ", ".join(f"{key} {value:g}" for key, value in component.setting.items())
            raise TableError(
                f"the score table has no column of {component.expert} with {words}",
                expected="the settings that the mixture was fitted with",
                found=f"{len(settings)} others",
                do=AGAIN,
            )
        return self[component.expert][:, settings.index(component.setting)]

    def features(
        self, names: Sequence[str], rows: np.ndarray | slice = slice(None)
    ) -> dict[str, Tensor]:
        """The named features, as tensors, of some rows.

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
        return {name: torch.from_numpy(self[name][rows]) for name in names}


class ScoreTableWriter:
    """Collects columns batch by batch, in files, so that memory does not grow with the text.

    Args:
        path: the ``.npz`` to make, replaced whole at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim = Claim(path)
        self._folder = tempfile.TemporaryDirectory(
            prefix=partial_prefix(path), dir=path.parent, ignore_cleanup_errors=True
        )
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Appends a batch; every batch must bring the same columns, ``row`` among them."""
        for name, column in columns.items():
            kind = (column.dtype, column.shape[1:])
            assert self._kinds.setdefault(name, kind) == kind
            with Path(self._folder.name, name).open("ab") as file:
                file.write(np.ascontiguousarray(column).data)

    def publish(self, card: dict[str, Any]) -> None:
        """Writes the table, rows in the order of the text."""
        card = {"format": FORMAT, "version": VERSION, **card}
        with publish(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            order = np.argsort(self._column("row"), kind="stable")
            for name in self._kinds:
                _store(archive, name, self._column(name), order)
            text = np.array(json.dumps(card))
            _store(archive, "card", text[None], np.zeros(1, np.int64))
        self._folder.cleanup()
        self._claim.release()

    def _column(self, name: str) -> np.ndarray:
        dtype, shape = self._kinds[name]
        return np.memmap(Path(self._folder.name, name), dtype=dtype, mode="r").reshape(-1, *shape)


def _store(archive: zipfile.ZipFile, name: str, column: np.ndarray, order: np.ndarray) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(column.dtype),
        "fortran_order": False,
        "shape": (len(order), *column.shape[1:]),
    }
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in _steps(order):
            file.write(np.ascontiguousarray(column[part]).tobytes())


def _steps(order: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(order), STEP):
        yield order[start : start + STEP]


def read_table(path: Path) -> ScoreTable:
    """Reads a score table.

    Raises:
        TableError: where it is missing, not one, or of another version.
    """
    expected = "a score table, as --score-table FILE.npz writes it"
    try:
        with np.load(path, allow_pickle=False) as archive:
            columns = {name: archive[name] for name in archive.files}
        card = json.loads(str(columns.pop("card")[0]))
        if card["format"] != FORMAT:
            raise ValueError(f"a file of another kind, {card['format']}")
        version = card["version"]
    except FileNotFoundError:
        raise TableError(f"no score table at {path}", expected=expected, found="nothing") from None
    except Exception as error:  # NumPy, zipfile and JSON have a dozen ways to say no
        raise TableError(
            f"{path} cannot be read", expected=expected, found=f"{type(error).__name__}: {error}"
        ) from None
    if version != VERSION:
        raise TableError(
            f"{path} is a score table of another version of fairseq-knnlm",
            expected=f"version {VERSION}",
            found=f"version {version}",
            do="write it again, with --score-table or `fairseq-knnlm tune --data`",
        )
    return ScoreTable(columns, card)
