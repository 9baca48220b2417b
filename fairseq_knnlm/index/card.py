"""What an index is: its card, which lies behind FAISS's bytes in the same file.

A card says how an index was built, of which datastore, and how good it is. FAISS reads from the
front and does not see it. So an index and its card are one file, and no moment leaves one without
the other. Reading a card loads neither FAISS nor torch.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec.structs import asdict

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.files import (
    Checksum,
    Fingerprint,
    chunks_of,
    fingerprint,
    read_sealed,
    unseal,
)
from fairseq_knnlm.index.trailer import text_behind, trailing

FORMAT = "fairseq-knnlm index"
#: Version 3 is in pieces. What is not is written as version 2.
VERSION = 3
BUILD = "build it again: python examples/build_index.py --dstore DSTORE"
#: Share of what the lists hold that compressed keys must find to be trusted with distances.
FAITHFUL = 0.9

#: Types of the card's fields, with their bounds.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class IndexCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an index is.

    Attributes:
        factory: FAISS's factory string.
        metric: ``"l2"`` or ``"ip"``.
        rows: entries, N.
        width: dimensions of a query, D.
        nprobe: inverted lists visited a query, unless said otherwise; 0 without lists.
        exact: the index compares full keys.
        datastore: fingerprint of the datastore it was built of; empty for a foreign index. Of an
            index in pieces, that of the time when it was trained: its pieces say what they are of.
        coverage: share of the true ``recall_at`` nearest that lie in the lists visited, on sampled
            keys; None without lists or unmeasured.
        recall: share of the true ``recall_at`` nearest that it finds, on sampled keys.
        recall_at: that k.
        threads: that FAISS built it with, whose number shows in the last digits of what is
            multiplied; 0 where it is not known.
        faiss: version that built it.
        bytes: length of what FAISS wrote.
        chunks: its checksums.
        piece_bytes: bytes of an entry in the pieces, which lie in the datastore's blocks; 0 where
            the file holds all entries.
    """

    factory: str
    metric: Annotated[str, msgspec.Meta(pattern="^(l2|ip)$")]
    rows: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    width: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    nprobe: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    exact: bool
    datastore: Fingerprint = ""
    coverage: Fraction | None = None
    recall: Fraction | None = None
    recall_at: Count = 0
    threads: Count = 0
    faiss: str = ""
    bytes: Count = 0
    chunks: tuple[Checksum, ...] = ()
    piece_bytes: Count = 0

    @property
    def in_pieces(self) -> bool:
        """Whether the file holds what was trained alone, and the entries lie in pieces."""
        return self.piece_bytes > 0

    @property
    def faithful(self) -> bool:
        """Whether the index's own distances do nearly as well as exact ones.

        An exact index's do. Others' do where compression loses few of the true neighbours that the
        lists visited hold.
        """
        if self.exact:
            return True
        if self.recall is None or self.coverage is None:
            return False
        return self.recall >= FAITHFUL * self.coverage

    def describe(self) -> str:
        """For a report: ``"IVF4096,PQ64, nprobe 32 (covers 0.94), recall@1024 0.87"``."""
        parts = [self.factory]
        if self.nprobe:
            covers = f" (covers {self.coverage:.2f})" if self.coverage is not None else ""
            parts.append(f"nprobe {self.nprobe}{covers}")
        if self.recall is not None and not self.exact:
            parts.append(f"recall@{self.recall_at} {self.recall:.2f}")
        return ", ".join(parts)


def card_path(index_path: Path) -> Path:
    """Where earlier versions kept an index's card: ``knn.index`` -> ``knn.index.json``."""
    return index_path.with_name(f"{index_path.name}.json")


def trailer(card: IndexCard) -> bytes:
    """What follows FAISS's bytes in the file of an index."""
    content = asdict(card)
    if card.in_pieces:
        return trailing(FORMAT, VERSION, content)
    del content["piece_bytes"]  # as versions before pieces had it
    return trailing(FORMAT, 2, content)


def read_card(path: Path, *, foreign: bool = False) -> IndexCard | None:
    """The card of an index; None where it has none and is welcome all the same.

    Args:
        path: the index file.
        foreign: whether an index that another program built, which has no card, is welcome.

    Raises:
        IndexFileError: where the index is missing, or its card is missing or damaged.
    """
    if not path.is_file():
        raise IndexFileError(
            f"no index at {path}",
            expected="an index of the datastore",
            found="another kind of thing" if os.path.lexists(path) else "nothing",
            do=BUILD,
        )
    beside, size = card_path(path), path.stat().st_size
    text = None
    try:
        if (behind := text_behind(path)) is not None:
            text, size = behind
            card, _ = unseal(text, FORMAT, VERSION, IndexCard, _renewed)
        elif beside.is_file():
            card, _ = read_sealed(beside, FORMAT, 1, IndexCard, _renewed)
        elif foreign:
            return None
        else:
            raise IndexFileError(
                f"{path} is damaged or another program's: it has no card",
                expected="an index that fairseq-knnlm wrote: its card is the end of the file, or "
                f"lies beside it as {beside.name}",
                found="neither",
                do=f"{BUILD}; or, if another program built it, name it with --indexfile",
            )
        if len(card.chunks) != chunks_of(card.bytes):
            raise ValueError(f"{len(card.chunks):,} checksums for {card.bytes:,} bytes")
    except ValueError as error:
        where = beside if text is None else path
        raise damaged(where, "the card of an index", str(error)) from None
    if card.bytes != size:
        raise damaged(path, f"{card.bytes:,} bytes", f"{size:,} bytes")
    return card


def index_fingerprint(path: Path) -> str:
    """SHA-256 (hex) of what an index is: of its card, which has the checksums of its bytes.

    Of an index that another program built, which has none, it is that of its bytes.

    Args:
        path: the index file.

    Raises:
        IndexFileError: where it is missing, or its card is damaged.
    """
    card = read_card(path, foreign=True)
    if card is not None:
        return fingerprint(asdict(card))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _renewed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of older versions as of today.

    Version 1 told the time in the place of the threads, and at first no coverage; before version 3
    there were no pieces.
    """
    fields = {"piece_bytes": 0} | fields
    if "seconds" not in fields:
        return fields
    rest = {name: value for name, value in fields.items() if name != "seconds"}
    return {"threads": 0, "coverage": None} | rest


def damaged(file: Path, expected: str, found: str) -> IndexFileError:
    """What a user is told of an index whose bytes are not those that were written."""
    return IndexFileError(
        f"{file} is damaged",
        expected=expected,
        found=found,
        do=BUILD,
    )


def of_another(path: Path, rows: int, width: int, found_rows: int, found: int) -> IndexFileError:
    """What a user is told of an index of another shape than the datastore's."""
    return IndexFileError(
        f"{path} is an index of another datastore",
        expected=f"{rows:,} keys of width {width}",
        found=f"{found_rows:,} keys of width {found}",
        do=BUILD,
    )
