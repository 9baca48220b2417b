"""Writes score tables (``table`` says what is in one), batch by batch as a run scores them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fairseq_knnlm.calibration.card import FORMAT, version_of
from fairseq_knnlm.files import Claim, partial_folder, publish
from fairseq_knnlm.files.arrays import write_card

#: Rows copied at a time from the temporary columns into the table.
STEP = 65536


class ScoreTableWriter:
    """Collects columns batch by batch, in files, so that memory does not grow with the text.

    Args:
        path: the ``.npz`` to make, replaced whole at the end.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._claim = Claim(path)
        self._folder = partial_folder(path)
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
        card = {"format": FORMAT, "version": version_of(card), **card}
        with publish(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            order = np.argsort(self._column("row"), kind="stable")
            for name in self._kinds:
                _store(archive, name, self._column(name), order)
            _store(archive, "card", write_card(card), np.zeros(1, np.int64))
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
