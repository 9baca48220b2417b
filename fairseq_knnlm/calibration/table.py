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

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import Claim, parse_json, partial_folder, publish, typed
from fairseq_knnlm.files.arrays import Archive, opened, write_card
from fairseq_knnlm.mixture.components import LM, Component, searches

FORMAT = "fairseq-knnlm score table"
VERSION = 2
AGAIN = "write it again, with the flags of the table that the calibration was fitted on"
#: Rows copied at a time from the temporary columns into the table.
STEP = 65536
#: A log-probability above 0 by no more than this is rounding.
ROUNDING = 1e-3
#: Columns of an expert or feature at most: a key's width is the most there is.
MOST_COLUMNS = 10**6

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z]\w{0,63}$")]
Fingerprint = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
#: Also keeps out 1e999, which JSON reads as infinity.
Finite = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of an expert's settings; each expert has some of them."""

    temperature: Annotated[float, msgspec.Meta(gt=0, le=1e30)] = 1.0
    k: Count = 0
    suffix: Annotated[int, msgspec.Meta(ge=0, le=4)] = 0
    theta: Annotated[float, msgspec.Meta(ge=0, le=1e30)] = 1.0
    window: Annotated[int, msgspec.Meta(ge=1, le=2**48)] = 1
    order: Annotated[int, msgspec.Meta(ge=1, le=16)] = 1


class Weighed(Setting, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A component of a fixed mixture, as results tell it."""

    expert: Name
    weight: Share


class Blocks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the text was cut."""

    tokens_per_sample: Count | None = None
    context_window: Count | None = None
    sample_break_mode: str | None = None


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bounds of what a score table says of itself (``docs/format.md``)."""

    split: str
    model: Annotated[str, msgspec.Meta(max_length=64)]
    experts: dict[Name, list[Setting]]
    features: list[Name]
    datastores: list[Fingerprint] = []
    described: dict[Name, dict[str, str | bool | Count | Finite | None]] = {}
    distance_ranks: list[Annotated[int, msgspec.Meta(ge=1, le=2**48)]] = []
    # What the run came to, as in the results JSON.
    tokens: Count = 0
    tokens_left_out: Count = 0
    tokens_impossible: Count = 0
    tokens_recalled: Count = 0
    base_loss: Finite | None = None
    base_perplexity: Finite | None = None
    loss: Finite | None = None
    perplexity: Finite | None = None
    seconds: Finite = 0.0
    tokens_per_second: Finite = 0.0
    context: Blocks | None = None
    mixed: list[Name] = []
    mixer: str = ""
    mixture: str = ""
    mixture_from: str = ""
    weights: list[Weighed] = []
    k: Count = 0
    search_seconds: Finite = 0.0
    index: str = ""
    distances: str = ""
    pointers: str = ""
    searches_saved: Finite = 0.0
    searches_skipped: Share = 0.0
    datastore: str = ""
    entries: Count = 0
    versions: dict[str, str] = {}


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
        card = {"format": FORMAT, "version": VERSION, **card}
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


def read_table(path: Path) -> ScoreTable:
    """Reads a score table.

    Raises:
        TableError: where it is missing, damaged, none, or of another version; it names the field
            or column that is not as it should be.
    """
    expected = "a score table, as --score-table FILE.npz writes it"
    if not path.exists():
        raise TableError(f"no score table at {path}", expected=expected, found="nothing")
    try:
        with opened(path) as archive:
            card = _read_card(path, archive)
            return ScoreTable(_columns(archive, card), card)
    except ValueError as error:
        raise TableError(
            f"{path} cannot be read",
            expected=expected,
            found=error,
            do="write it again, with --score-table",
        ) from None


def _read_card(path: Path, archive: Archive) -> dict[str, Any]:
    """The card, checked; still a dictionary, as it is written into results."""
    card = parse_json(archive.text("card"))
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ValueError("a file of another kind")
    version = card.get("version")
    if version != VERSION:
        raise TableError(
            f"{path} is a score table of another version of fairseq-knnlm",
            expected=f"version {VERSION}",
            found=f"version {version}",
            do="write it again, with --score-table or `fairseq-knnlm tune --data`",
        )
    fields = {key: card[key] for key in card if key not in ("format", "version")}
    checked = typed(fields, Card)
    for name, settings in checked.experts.items():
        if not settings:
            raise ValueError(f"an expert without settings, {name} - at `$.experts`")
        if name not in checked.described:
            raise ValueError(f"nothing of the expert {name} - at `$.described`")
        if searches(name) and not checked.k:
            raise ValueError("no number of neighbours - at `$.k`")
    return {"datastores": [], "described": {}, **card}


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
