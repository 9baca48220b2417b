"""The entries of an index as plain numbers: from keys to codes, and from codes to an index.

A *code* is what FAISS keeps of a key, as ``sa_encode`` gives it: the number of its inverted list in
the first bytes, little-endian, where there are lists, and then the key, compressed. An index that
is assembled from codes is, byte for byte, the one that keys would have been added to.

FAISS's own ways to put indexes together (``merge_from``) or to take entries away (``remove_ids``)
are not used: in 1.15 they write past the ends of lists in blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fairseq_knnlm.files import check_mapped
from fairseq_knnlm.index.library import faiss

#: Codes and their ids: (n, S) uint8, and (n,) int64 or, where they follow each other, a range.
Part = tuple[np.ndarray, np.ndarray | range]
#: FAISS's classes whose entries are codes in a row, or in lists one after the other.
FLAT = {"IndexFlat", "IndexFlatL2", "IndexFlatIP", "IndexScalarQuantizer", "IndexPQ"}
ARRAYS = {"IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer", "IndexIVFRaBitQ"}
#: Those whose lists are packed, so many entries together, for a fast scan.
BLOCKS = {"IndexIVFPQFastScan", "IndexIVFRaBitQFastScan"}
#: FAISS packs larger blocks in one way as keys are added, and in another code by code.
PACKED_TOGETHER = 32
#: Entries that a thread puts into their lists at a time.
GROUP = 2**16
#: What parts are called where they are found to be damaged.
MAPPED = "pieces of the index"


def can_be_cut(index: Any) -> bool:
    """Whether the entries of an index, trained or not, can be taken apart and put together.

    What keeps graphs or full keys beside its codes cannot, nor what keeps ids of its own.
    """
    inner = _behind_transforms(index)
    name = type(inner).__name__
    if name in BLOCKS:
        return bool(inner.bbs == PACKED_TOGETHER)
    return name in FLAT | ARRAYS


def encode(index: Any, keys: np.ndarray) -> np.ndarray:
    """The codes of keys.

    The last digits of what transforms (PCA, OPQ) make of a key depend on how many keys are given
    at once. So who wants the same bytes gives the same keys together.

    Args:
        index: trained; ``can_be_cut``.
        keys: (n, D) float32, finite.

    Returns:
        (n, S) uint8; S is ``index.sa_code_size()``.
    """
    codes: np.ndarray = index.sa_encode(np.ascontiguousarray(keys, dtype=np.float32))
    return codes


def assemble(index: Any, parts: Iterable[Part]) -> Any:
    """Fills a trained, empty index with codes, as adding their keys in this order would.

    Codes are read where they lie, a few lists at a time: beside the index that takes 4 bytes of
    memory a row.

    Args:
        index: trained and empty; ``can_be_cut``. It is filled in place.
        parts: codes (n, S) uint8, in memory or mapped, and their n ids. Without lists
            they are 0, 1, ... over all parts.

    Returns:
        The index.

    Raises:
        DatastoreError: where the file of a part became shorter since it was mapped.
        ValueError: where there is no list of a code's number, or ids do not ascend without lists.
    """
    assert index.ntotal == 0, index.ntotal
    parts = list(parts)
    inner = _behind_transforms(index)
    rows = sum(len(codes) for codes, _ in parts)
    if type(inner).__name__ in FLAT:
        _check_in_order(parts)
        _join(parts, _all_codes(inner, rows))
    else:
        _fill_lists(inner, parts)
    _count(index, rows)
    return index


def codes_of(index: Any, rows: int) -> np.ndarray:
    """The codes in a whole index, by their ids.

    Args:
        index: in the CPU's memory; ``can_be_cut``; its ids are 0 to N - 1, in any order.
        rows: N.

    Returns:
        (N, S) uint8.

    Raises:
        ValueError: where it holds other ids.
    """
    inner = _behind_transforms(index)
    if index.ntotal != rows:
        raise ValueError(f"{index.ntotal:,} entries in the place of {rows:,}")
    shape = rows, inner.sa_code_size()
    if type(inner).__name__ in FLAT:
        return _flat_codes(inner, shape).copy()
    codes = np.empty(shape, np.uint8)
    lists, first = faiss.downcast_InvertedLists(inner.invlists), inner.coarse_code_size()
    seen = np.zeros(rows, bool)
    for number in range(lists.nlist):
        if not (held := lists.list_size(number)):
            continue
        ids = faiss.rev_swig_ptr(lists.get_ids(number), held)
        if ids.min() < 0 or ids.max() >= rows or seen[ids].any():
            raise ValueError(f"list {number} holds ids that are not once each of 0 to {rows - 1:,}")
        seen[ids] = True
        name = np.frombuffer(number.to_bytes(8, "little"), np.uint8)
        codes[ids, :first] = name[:first]
        codes[ids, first:] = _codes_in_list(lists, number, held)
    if not seen.all():
        raise ValueError(f"no entry of id {int(np.argmin(seen)):,}")
    return codes


def check_lists(index: Any, codes: np.ndarray) -> None:
    """Refuses codes of lists that an index does not have.

    Args:
        index: trained; ``can_be_cut``.
        codes: (n, S) uint8, in memory or mapped.

    Raises:
        DatastoreError: where their file became shorter since it was mapped.
        ValueError: naming a list that is not there.
    """
    inner = _behind_transforms(index)
    if type(inner).__name__ not in FLAT:
        _numbers(inner, codes)


def _behind_transforms(index: Any) -> Any:
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _count(index: Any, rows: int) -> None:
    """Has an index, and those within it, say that they hold so many entries."""
    index = faiss.downcast_index(index)
    index.ntotal = rows
    if isinstance(index, faiss.IndexPreTransform):
        _count(index.index, rows)


def _all_codes(inner: Any, rows: int) -> np.ndarray:
    """Room for all codes (N, S) of an index without lists, in its own memory."""
    shape = rows, inner.sa_code_size()
    inner.codes.resize(rows * shape[1])
    return _flat_codes(inner, shape)


def _flat_codes(inner: Any, shape: tuple[int, int]) -> np.ndarray:
    """The memory of the codes (N, S) of an index without lists."""
    codes: np.ndarray = faiss.rev_swig_ptr(inner.codes.data(), shape[0] * shape[1])
    return codes.reshape(shape)


def _check_in_order(parts: Sequence[Part]) -> None:
    """Refuses ids other than 0, 1, ... over all parts."""
    done = 0
    for _, ids in parts:
        if not np.array_equal(ids, np.arange(done, done + len(ids))):
            raise ValueError("ids other than 0, 1, ... in an index without lists")
        done += len(ids)


def _join(parts: Sequence[Part], room: np.ndarray) -> None:
    """Puts the codes of all parts one after the other into ``room`` (N, S)."""
    done = 0
    for codes, _ in parts:
        check_mapped(codes, MAPPED)
        room[done : done + len(codes)] = codes
        done += len(codes)


def _fill_lists(inner: Any, parts: Sequence[Part]) -> None:
    """Puts codes into the inverted lists, each list at once and in order."""
    if not parts:
        return
    with ThreadPoolExecutor(faiss.omp_get_max_threads()) as pool:
        # FAISS and NumPy let go of the interpreter lock; threads fill lists of their own.
        by_list = list(pool.map(lambda part: _by_list(inner, part[0]), parts))
        sizes = sum((np.diff(ends) for _, ends in by_list), np.zeros(inner.nlist, np.int64))
        # Lists together that hold about as many entries; a large list is a group by itself.
        cuts = np.searchsorted(np.cumsum(sizes), np.arange(GROUP, sizes.sum(), GROUP))
        cuts = np.unique([0, *cuts, inner.nlist])
        fill = _Filling(inner, parts, by_list)
        list(pool.map(fill, cuts[:-1].tolist(), cuts[1:].tolist()))


def _by_list(inner: Any, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts the codes (n, S) of a part by their lists.

    Returns:
        The places (n,) of its codes, list by list and in order; (lists + 1,) int64, how many there
        are before each list.
    """
    numbers = _numbers(inner, codes)
    sizes = np.bincount(numbers, minlength=inner.nlist)
    order = np.argsort(numbers, kind="stable")
    small = np.uint32 if len(codes) <= 2**32 else np.int64
    return order.astype(small), np.cumsum([0, *sizes])


def _numbers(inner: Any, codes: np.ndarray) -> np.ndarray:
    """The numbers (n,) of the lists of codes (n, S), once each is known to be there."""
    check_mapped(codes, MAPPED)
    numbers = _list_numbers(codes[:, : inner.coarse_code_size()])
    if len(numbers) and (last := int(numbers.max())) >= inner.nlist:
        raise ValueError(f"list {last:,} of {inner.nlist:,}")
    return numbers


class _Filling:
    """Fills some lists at a time from all parts.

    Args:
        inner: FAISS's, with empty lists.
        parts: codes and ids.
        by_list: of each part, as ``_by_list`` gives it.
    """

    def __init__(
        self,
        inner: Any,
        parts: Sequence[Part],
        by_list: Sequence[tuple[np.ndarray, np.ndarray]],
    ) -> None:
        self._parts = parts
        self._orders = [order for order, _ in by_list]
        #: (parts, lists + 1)
        self._ends = np.array([ends for _, ends in by_list])
        self._first = inner.coarse_code_size()
        self._width = inner.sa_code_size() - self._first
        self._lists = faiss.downcast_InvertedLists(inner.invlists)
        self._packs = type(inner).__name__ in BLOCKS

    def __call__(self, start: int, stop: int) -> None:
        """Fills the lists from ``start`` to before ``stop``."""
        codes, ids, held = self._gathered(start, stop)
        step = held * self._width
        if self._packs:
            codes, step = _packed(self._lists, codes, held)
        _add_lists(self._lists, range(start, stop), held, ids, codes.reshape(-1), step)

    def _gathered(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Codes (n, C) and ids (n,) of lists, list by list; and how many each holds, (L,)."""
        counts = np.diff(self._ends[:, start : stop + 1])  # (parts, L)
        # Within a list parts follow each other; where those of each part begin, (parts, L).
        begins = (np.cumsum(counts.T) - counts.T.reshape(-1)).reshape(counts.T.shape).T
        codes = np.empty((int(counts.sum()), self._width), np.uint8)
        ids = np.empty(len(codes), np.int64)
        for number, (own, named) in enumerate(self._parts):
            check_mapped(own, MAPPED)
            count, ends = counts[number], self._ends[number]
            rows = self._orders[number][ends[start] : ends[stop]]
            shift = begins[number] - (np.cumsum(count) - count)
            places = np.arange(len(rows)) + np.repeat(shift, count)
            codes[places] = own[rows][:, self._first :]
            ids[places] = _at(named, rows)
        return codes, ids, counts.sum(axis=0)


def _at(ids: np.ndarray | range, rows: np.ndarray) -> np.ndarray:
    """The ids (n,) int64 at rows (n,) of a part."""
    if isinstance(ids, range):
        return ids.start + rows.astype(np.int64)
    return ids[rows]


def _list_numbers(names: np.ndarray) -> np.ndarray:
    """Numbers (N,) of the lists that codes begin with, (N, at most 4) bytes."""
    narrow = names.shape[1] <= 2  # for which sorting is faster
    numbers = np.zeros((len(names), 2 if narrow else 4), np.uint8)
    numbers[:, : names.shape[1]] = names
    return numbers.view("<u2" if narrow else "<u4").reshape(-1)


def _add_lists(
    lists: Any,
    numbers: range,
    held: np.ndarray,
    ids: np.ndarray,
    codes: np.ndarray,
    step: np.ndarray,
) -> None:
    """Fills empty lists.

    Args:
        lists: FAISS's.
        numbers: which L of them.
        held: (L,) entries of each.
        ids: (n,) int64, list by list.
        codes: (b,) uint8, list by list, as FAISS has them.
        step: (L,) bytes of each.
    """
    row = byte = 0
    for number, count, size in zip(numbers, held.tolist(), step.tolist(), strict=True):
        if count:
            lists.add_entries(
                number, count, faiss.swig_ptr(ids[row:]), faiss.swig_ptr(codes[byte:])
            )
        row, byte = row + count, byte + size


def _packed(lists: Any, codes: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes as lists in blocks have them, each list from a block of its own on.

    Args:
        lists: FAISS's.
        codes: (n, C) uint8, list by list.
        held: (L,) entries of each list.

    Returns:
        The blocks, (B, bytes of one) uint8, list by list; and the bytes of each list, (L,).
    """
    many, size = lists.n_per_block, lists.block_size
    blocks = -(-held // many)
    starts = np.cumsum(held) - held
    places = np.arange(len(codes)) + np.repeat((np.cumsum(blocks) - blocks) * many - starts, held)
    flat = np.zeros((int(blocks.sum()), many, codes.shape[1]), np.uint8)
    flat.reshape(-1, codes.shape[1])[places] = codes
    packed = np.zeros((len(flat), size), np.uint8)
    pack = lists.packer.pack_all
    for some, block in zip(flat, packed, strict=True):
        pack(faiss.swig_ptr(some), faiss.swig_ptr(block))
    return packed, blocks * size


def _codes_in_list(lists: Any, number: int, held: int) -> np.ndarray:
    """Codes (held, C) uint8 of a list, in its order."""
    if not hasattr(lists, "packer"):
        codes: np.ndarray = faiss.rev_swig_ptr(lists.get_codes(number), held * lists.code_size)
        return codes.reshape(held, -1)
    blocks = -(-held // lists.n_per_block)
    packed = faiss.rev_swig_ptr(lists.get_codes(number), blocks * lists.block_size)
    flat = np.zeros((blocks, lists.n_per_block, lists.packer.code_size), np.uint8)
    for block, some in zip(packed.reshape(blocks, -1), flat, strict=True):
        lists.packer.unpack_all(faiss.swig_ptr(block), faiss.swig_ptr(some))
    return flat.reshape(-1, flat.shape[2])[:held]
