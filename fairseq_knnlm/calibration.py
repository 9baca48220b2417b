"""The lambda and temperature fitted for a datastore, kept beside it as ``calibration.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import read_sealed, write_sealed

FORMAT = "fairseq-knnlm calibration"
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What was fitted, on what, and what it gained there.

    Attributes:
        lmbda: weight of the neighbours, 0 to 1.
        temperature: T.
        datastore: fingerprint of the datastore.
        model: fingerprint of the language model.
        split: the data split it was fitted on.
        tokens: how many of its tokens.
        k: neighbours at the time.
        index: the index at the time, in words.
        distances: exact or approximate, in words.
        base_perplexity: of the language model alone on those tokens.
        perplexity: of the mixture on those tokens.
    """

    lmbda: float
    temperature: float
    datastore: str
    model: str
    split: str
    tokens: int
    k: int
    index: str
    distances: str
    base_perplexity: float
    perplexity: float


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Writes ``calibration.json``, atomically."""
    write_sealed(path, FORMAT, VERSION, asdict(calibration))


def read_calibration(path: Path, datastore: str) -> Calibration | None:
    """Reads ``calibration.json``, None where there is none.

    Raises:
        TableError: where it is damaged or was fitted for another datastore.
    """
    if not path.is_file():
        return None
    remedy = "fit it again with `fairseq-knnlm tune`, or pass --lmbda and --knn-temp"
    try:
        calibration, _ = read_sealed(path, FORMAT, VERSION, Calibration)
    except ValueError as error:
        raise TableError(
            f"{path} is damaged", expected="a calibration", found=error, do=remedy
        ) from None
    if calibration.datastore != datastore:
        raise TableError(
            f"{path} was fitted for another datastore",
            expected=f"datastore {datastore[:12]}...",
            found=f"datastore {calibration.datastore[:12]}...",
            do=remedy,
        )
    return calibration
