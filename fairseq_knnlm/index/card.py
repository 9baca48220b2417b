"""What an index is: its card, which lies behind FAISS's bytes in the same file.

A card says how an index was built, of which datastore, and how good it is. FAISS reads from the
front and does not see it. So an index and its card are one file, and no moment leaves one without
the other. Reading a card loads neither FAISS nor torch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec.structs import asdict

from fairseq_knnlm.errors import IndexFileError
from fairseq_knnlm.files import (
    MOST_JSON,
    Checksum,
    Fingerprint,
    chunks_of,
    read_sealed,
    seal,
    unseal,
)

FORMAT = "fairseq-knnlm index"
VERSION = 2
#: The end of an index file that holds its card: the length of the card (8 bytes, little-endian)
#: and this.
MAGIC = b"kNNcard1"
TAIL_BYTES = 8 + len(MAGIC)
BUILD = "build it again: python examples/build_index.py --dstore DSTORE"
#: Share of what the lists hold that compressed keys must find to be trusted with distances.
FAITHFUL = 0.9

#: Types of the card's fields, with their bounds.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class IndexCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an index is.

    Attributes:
        factory: FAISS's factory string.
        metric: ``"l2"`` or ``"ip"``.
        rows: entries, N.
        width: dimensions of a query, D.
        nprobe: inverted lists visited a query, unless said otherwise; 0 without lists.
        exact: the index compares full keys.
        datastore: fingerprint of the datastore it was built of; empty for a foreign index.
        coverage: share of the true ``recall_at`` nearest that lie in the lists visited, on sampled
            keys; None without lists or unmeasured.
        recall: share of the true ``recall_at`` nearest that it finds, on sampled keys.
        recall_at: that k.
        threads: that FAISS built it with, whose number shows in the last digits of what is
            multiplied; 0 where it is not known.
        faiss: version that built it.
        bytes: length of what FAISS wrote.
        chunks: its checksums.
    """

    factory: str
    metric: Annotated[str, msgspec.Meta(pattern="^(l2|ip)$")]
    rows: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    width: Annotated[int, msgspec.Meta(ge=1, le=10**6)]
    nprobe: Annotated[int, msgspec.Meta(ge=0, le=2**31)]
    exact: bool
    datastore: Fingerprint = ""
    coverage: Share | None = None
    recall: Share | None = None
    recall_at: Count = 0
    threads: Count = 0
    faiss: str = ""
    bytes: Count = 0
    chunks: tuple[Checksum, ...] = ()

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
    text = json.dumps(seal(FORMAT, VERSION, asdict(card)), allow_nan=False).encode()
    return text + len(text).to_bytes(8, "little") + MAGIC


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
        if (text := _card_within(path)) is not None:
            size -= len(text.encode()) + TAIL_BYTES
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


def _card_within(path: Path) -> str | None:
    """The card that an index file ends with, as JSON text; None where it ends otherwise."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        tail = file.read()
        if not tail.endswith(MAGIC) or len(tail) < TAIL_BYTES:
            return None
        length = int.from_bytes(tail[:8], "little")
        if length > min(MOST_JSON, size - TAIL_BYTES):
            raise ValueError(f"one of {length:,} bytes, in a file of {size:,}")
        file.seek(size - TAIL_BYTES - length)
        try:
            return file.read(length).decode()
        except UnicodeDecodeError:
            raise ValueError("bytes that are no text") from None


def _renewed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of version 1, which told the time in the place of the threads, as of today."""
    if "seconds" not in fields:
        return fields
    return {"threads": 0} | {name: fields[name] for name in fields if name != "seconds"}


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
