"""Where the things lie that a receipt names: where they were, or, where asked, wherever they went.

A thing is known by its fingerprint, not by its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

from fairseq_knnlm.datastore import INDEX as INDEX_FILE
from fairseq_knnlm.datastore import MANIFEST, outline
from fairseq_knnlm.datastore.legacy import is_legacy
from fairseq_knnlm.errors import KnnlmError, ReceiptError
from fairseq_knnlm.experts.kind import spelled
from fairseq_knnlm.index.card import index_fingerprint
from fairseq_knnlm.index.trailer import text_behind
from fairseq_knnlm.runs.origins import words
from fairseq_knnlm.runs.receipt import (
    DATA,
    INDEX,
    Receipt,
    SourceFile,
    SourceIndex,
    SourceStore,
    sha256,
)

GONE = "gone"
#: Flags that say where work is done, which leaves it what it is: a search in shards finds the
#: neighbours of the one index.
OF_THE_MACHINE = {"knn_device", "knn_ray", "knn_shards", "knn_replicas"}


@dataclass(frozen=True)
class Places:
    """Where the things of a receipt lie now.

    Attributes:
        data: the folder of the text.
        files: by the flag that names them, but for those in ``data``.
        datastores: folders, or prefixes of urvashik/knnlm.
        index: that of ``--indexfile``; None where none was named.
        moved: those that were found elsewhere, in words, a line each.
    """

    data: Path
    files: dict[str, list[Path]] = field(default_factory=dict)
    datastores: list[Path] = field(default_factory=list)
    index: Path | None = None
    moved: tuple[str, ...] = ()


def typed_again(receipt: Receipt, places: Places) -> list[str]:
    """The flags of the run, as they are typed, with the places where things lie now.

    Args:
        receipt: what made the figures.
        places: of what it names.
    """
    named = {name: os.pathsep.join(map(str, paths)) for name, paths in places.files.items()}
    if places.datastores:
        named["--dstore-filename"] = ":".join(map(str, places.datastores))
    if places.index is not None:
        named[INDEX] = str(places.index)
    given = {
        spelled(name): None if value is True else str(value)
        for name, value in receipt.flags.items()
        if name not in OF_THE_MACHINE and value not in (False, None)
    }
    return words({**receipt.reading, **given, **named})


class Folder:
    """A folder in which things are looked for by their fingerprints.

    Args:
        path: the folder, with all folders in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._hashes: dict[Path, str] = {}

    @cached_property
    def _files(self) -> list[Path]:
        walked = sorted(os.walk(self.path))
        return [Path(folder) / name for folder, _, names in walked for name in sorted(names)]

    def file(self, wanted: SourceFile) -> Iterator[Path]:
        """The files with the bytes of one."""
        for path in self._files:
            if _size(path) != wanted.bytes:
                continue
            if path not in self._hashes:
                self._hashes[path] = sha256(path)
            if self._hashes[path] == wanted.sha256:
                yield path

    def store(self, wanted: SourceStore) -> Iterator[Path]:
        """The datastores with the fingerprint, and the index, of one."""
        for path in self._files:
            if path.name == MANIFEST and not _wrong_store(path.parent, wanted):
                yield path.parent

    def index(self, wanted: SourceIndex) -> Iterator[Path]:
        """The indexes with the fingerprint of one; those of other programs are not looked for."""
        for path in self._files:
            if _has_card(path) and not _wrong_index(path, wanted.fingerprint):
                yield path


class Finding:
    """Finds things one by one, and keeps in mind what is not as it was.

    Args:
        search: folder in which to look for what is not where it was; None to look nowhere.

    Attributes:
        moved: things that were found elsewhere, in words, a line each.
    """

    def __init__(self, search: Path | None) -> None:
        self.moved: list[str] = []
        self._wrong: list[str] = []
        self._search = search
        self._folder = Folder(search) if search is not None else None

    def settle(
        self, what: str, place: Path, fault: str, elsewhere: Callable[[Folder], Iterator[Path]]
    ) -> Path:
        """Where a thing is: at its place if nothing is wrong there, else wherever it is found."""
        if not fault:
            return place
        found = next(elsewhere(self._folder), None) if self._folder is not None else None
        if found is None:
            self._wrong.append(f"{what} {place}: {fault}")
            return place
        self.moved.append(f"{what} {place}: found at {found}")
        return found

    def file(self, wanted: SourceFile) -> Path:
        """Where a file is."""
        place = Path(wanted.path)
        fault = _wrong_file(place, wanted)
        return self.settle(wanted.of, place, fault, partial(Folder.file, wanted=wanted))

    def check(self, path: Path) -> None:
        """Refuses to go on where anything was not found as it was.

        Args:
            path: of the results, for words.

        Raises:
            ReceiptError: naming all that is gone, and all that is not as it was.
        """
        if self._wrong:
            raise _not_as_they_were(path, self._wrong, self._search)


def find_places(receipt: Receipt, path: Path, search: Path | None) -> Places:
    """Finds all that a receipt names.

    Args:
        receipt: what made the figures.
        path: the results, for words.
        search: folder in which to look for what is not where it was; None to look nowhere.

    Raises:
        ReceiptError: naming all that is gone, and all that is not as it was.
    """
    finding = Finding(search)
    places = Places(Path(receipt.data))
    texts = receipt.of(DATA)
    faults = "; ".join(filter(None, map(_wrong_in_data, texts)))
    places = replace(
        places, data=finding.settle(DATA, places.data, faults, partial(_data_folders, texts))
    )
    for file in receipt.files:
        if file.of != DATA:
            places.files.setdefault(file.of, []).append(finding.file(file))
    for store in receipt.datastores:
        fault = _wrong_store(Path(store.path), store)
        at = finding.settle(
            "datastore", Path(store.path), fault, partial(Folder.store, wanted=store)
        )
        places.datastores.append(at)
    if (index := receipt.index) is not None:
        fault = _wrong_index(Path(index.path), index.fingerprint)
        at = finding.settle(INDEX, Path(index.path), fault, partial(Folder.index, wanted=index))
        places = replace(places, index=at)
    finding.check(path)
    return replace(places, moved=tuple(finding.moved))


def _not_as_they_were(path: Path, wrong: list[str], search: Path | None) -> ReceiptError:
    here = f" nor in {search}" if search is not None else ""
    return ReceiptError(
        f"what made the figures of {path} is not there as it was{here}",
        expected="each thing with its fingerprint",
        found="\n            ".join(wrong),
        do="restore it"
        + ("" if search is not None else "; or, where it was moved, --search FOLDER finds it"),
    )


def _data_folders(texts: list[SourceFile], folder: Folder) -> Iterator[Path]:
    """The folders that hold all files of a text, by the names that they had."""
    if not texts:
        return
    for path in folder.file(texts[0]):
        at = [path.parent / Path(file.path).name for file in texts]
        if not any(_wrong_file(one, file) for one, file in zip(at, texts, strict=True)):
            yield path.parent


def _wrong_in_data(file: SourceFile) -> str:
    path = Path(file.path)
    fault = _wrong_file(path, file)
    return fault and f"{path.name} {fault}"


def _wrong_file(path: Path, file: SourceFile) -> str:
    """What is wrong with a file; empty where nothing is."""
    if not path.is_file():
        return GONE
    if (size := path.stat().st_size) != file.bytes:
        return f"of {size:,} bytes, in the place of {file.bytes:,}"
    if (found := sha256(path)) != file.sha256:
        return f"of other bytes (sha256 {found[:12]}..., in the place of {file.sha256[:12]}...)"
    return ""


def _wrong_store(path: Path, store: SourceStore) -> str:
    """What is wrong with a datastore, or its index, as far as their manifests tell."""
    if is_legacy(path):  # whose fingerprint is made when it is opened
        return _wrong_index(path.with_name(f"{path.name}_{INDEX_FILE}"), store.index)
    if not (path / MANIFEST).is_file():
        return GONE
    try:
        found = outline(path)
    except KnnlmError as error:
        return str(error).splitlines()[0]
    if found.fingerprint != store.fingerprint:
        return _another("datastore", found.fingerprint, store.fingerprint)
    return _wrong_index(found.index_path, store.index) if store.index is not None else ""


def _wrong_index(path: Path, wanted: str | None) -> str:
    if wanted is None:
        return ""
    try:
        found = index_fingerprint(path)
    except KnnlmError as error:
        return GONE if not os.path.lexists(path) else str(error).splitlines()[0]
    return "" if found == wanted else _another("index", found, wanted)


def _another(what: str, found: str, wanted: str) -> str:
    return f"another {what} ({found[:12]}..., in the place of {wanted[:12]}...)"


def _has_card(path: Path) -> bool:
    try:
        return text_behind(path) is not None
    except (OSError, ValueError):
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # such as a link to nothing
        return -1
