"""Whether a report on a score table is what its receipt says: measured again, and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from fairseq_knnlm.calibration.report import measured
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.runs.encoded import NAME as ENCODING
from fairseq_knnlm.runs.encoded import read_encoded
from fairseq_knnlm.runs.receipt import (
    CALIBRATION,
    DICTIONARY,
    RAW_TEXT,
    TABLE,
    TableReceipt,
    source_file,
)
from fairseq_knnlm.runs.receipt_places import Finding
from fairseq_knnlm.runs.replay import equal
from fairseq_knnlm.runs.table_figures import table_figures, text_of_table
from fairseq_knnlm.runs.tune import calibration_of

#: By how much figures of the same table may differ between processors, as a share.
ROUNDING = 1e-6


def table_receipt(
    table: Path,
    calibration: Path,
    dictionary: Path | None,
    raw_text: Path | None,
    encoding: Path | None = None,
) -> dict[str, Any]:
    """What makes the figures of a report: a ``TableReceipt``, as JSON.

    Args:
        table, calibration: files.
        dictionary, raw_text, encoding: files, where figures a word and a byte are told by them.
    """
    named = {TABLE: table, CALIBRATION: calibration, DICTIONARY: dictionary, RAW_TEXT: raw_text}
    named[ENCODING] = encoding
    files = [source_file(of, path) for of, path in named.items() if path is not None]
    receipt = TableReceipt([file for file in files if file is not None])
    return dict(msgspec.to_builtins(receipt))


class ReportAgain:
    """A report, made again of the files that a receipt names.

    Args:
        receipt: that names them.
        path: of the results, for words.
        search: folder in which to look for what is not where it was; None to look nowhere.

    Attributes:
        moved: files that were found elsewhere, in words, a line each.

    Raises:
        ReceiptError: naming all that is gone, and all that is not as it was.
    """

    def __init__(self, receipt: TableReceipt, path: Path, search: Path | None) -> None:
        finding = Finding(search)
        self._places = {file.of: finding.file(file) for file in receipt.table_files}
        finding.check(path)
        self.moved = tuple(finding.moved)

    @property
    def dictionary(self) -> Path | None:
        """What tokens are spelled by, where figures a word and a byte are told."""
        return self._places.get(DICTIONARY)

    def figures(self, symbols: Sequence[str], eos: int) -> dict[str, Any]:
        """All that the report tells.

        Args:
            symbols: of the dictionary; empty where there is none.
            eos: the id that ends a line.

        Raises:
            KnnlmError: where the files do not belong together.
        """
        table = read_table(self._places[TABLE])
        calibration = calibration_of(self._places[CALIBRATION], table.card["datastores"])
        raw = self._places.get(RAW_TEXT)
        encoding = self._places.get(ENCODING)
        encoded = read_encoded(encoding, dictionary_fingerprint(symbols)) if encoding else None
        text = text_of_table(table, symbols, eos, raw, encoded) if symbols else None
        return table_figures(calibration, measured(calibration, table), table, text)


def other_figures(found: Mapping[str, Any], again: Mapping[str, Any]) -> list[str]:
    """What results tell that another report does not, in words; nothing where nothing is.

    Args:
        found: the results.
        again: the figures of the same files.
    """
    told = {name: x for name, x in found.items() if name not in ("receipt", "fingerprint")}
    now = msgspec.to_builtins(dict(again))
    return [
        f"{name} {told.get(name)}, in the place of {now.get(name)}"
        for name in dict.fromkeys([*told, *now])
        if not equal(told.get(name), now.get(name), ROUNDING)
    ]
