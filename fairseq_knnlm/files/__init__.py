"""Files that appear whole or not at all, and checksums that tell when one was altered.

A checksum covers a chunk of 64 MiB, so that opening a small file checks every byte of it, while
opening a huge one checks an evenly spaced sample and leaves the rest to ``fairseq-knnlm verify``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import signal
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import msgspec
import numpy as np
from tqdm import tqdm

from fairseq_knnlm.errors import BusyError, DatastoreError, OutputError

T = TypeVar("T")

CHUNK_BYTES = 64 * 2**20
#: Chunks checked when a file is opened: all of a file up to 2 GiB.
CHUNKS_ON_OPEN = 32
#: Bytes of JSON that are read at most; a manifest of a trillion entries has less.
MOST_JSON = 256 * 2**20
#: Bytes of a file's name, so that those of what is temporary beside it have room.
LONGEST_NAME = 200


class Claim:
    """Makes this process the only one that writes ``path``, until released or until it ends.

    A lock that dies with its process (``flock`` on ``.NAME.lock`` beside it). Who holds it owns all
    that is temporary of that name, so what a killed process left there is removed. A process may
    claim a path several times over; other processes are refused meanwhile.

    Args:
        path: what will be written, a file or a folder; its folder is made where it is missing.

    Raises:
        BusyError: where another process writes it.
        OSError: where nothing can be written there.
    """

    #: How many times over this process holds a lock, and its open file.
    _held: ClassVar[dict[Path, tuple[int, IO[bytes]]]] = {}

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.parent.resolve() / f".{path.name}.lock"
        with undisturbed():
            times, file = self._held.get(lock) or (0, _locked(lock, path))
            self._held[lock] = times + 1, file
            # Also where an exception leaves it behind, and at the end of the process.
            self.release = weakref.finalize(self, _let_go, self._held, lock)
        if not times:
            remove_partial(path)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _locked(lock: Path, path: Path) -> IO[bytes]:
    """The lock's file, open and locked."""
    while True:
        file = lock.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        except BlockingIOError:
            file.close()
            raise BusyError(
                f"another process is writing {path}",
                expected="one at a time",
                found=f"a living process that holds {lock}",
                do="wait until it ends, or write somewhere else",
            ) from None
        except FileNotFoundError:
            pass
        file.close()  # it was removed by its owner while this process took hold of it: again


def _let_go(held: dict[Path, tuple[int, IO[bytes]]], lock: Path) -> None:
    times, file = held.pop(lock)
    if times > 1:
        held[lock] = times - 1, file
    else:
        lock.unlink(missing_ok=True)
        file.close()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts off SIGINT and SIGTERM: between making a thing and knowing how to remove it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def partial_prefix(path: Path) -> str:
    """What the names of temporary files and folders of ``path`` begin with."""
    return f".{path.name}.partial-"


def partial_folder(path: Path) -> tempfile.TemporaryDirectory:
    """A temporary folder beside ``path``, removed when it is forgotten or the process ends."""
    prefix = partial_prefix(path)
    with undisturbed():
        return tempfile.TemporaryDirectory(
            prefix=prefix, dir=path.parent, ignore_cleanup_errors=True
        )


def remove_partial(path: Path) -> None:
    """Removes what a process that was killed left of ``path``; for who holds the claim to it."""
    prefix = partial_prefix(path)
    for left in [one for one in path.parent.iterdir() if one.name.startswith(prefix)]:
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it takes the name ``path``.

    On an exception the temporary file is removed and ``path`` is left as it was. Where ``path`` is
    a link, what it leads to is replaced.

    Raises:
        BusyError: where another process is writing ``path``.
    """
    path = path.resolve() if path.is_symlink() else path
    with Claim(path), ExitStack() as cleaning:
        with undisturbed():
            handle, name = tempfile.mkstemp(prefix=partial_prefix(path), dir=path.parent)
            temporary = Path(name)
            cleaning.callback(temporary.unlink, missing_ok=True)
        os.close(handle)
        yield temporary
        flush_to_disk(temporary)
        temporary.chmod(0o644)  # mkstemp makes files private; results are to be shared
        temporary.replace(path)
        flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Asks the system to put a file's bytes, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve(path: Path, size: int) -> None:
    """Makes a file of ``size`` bytes whose room on the disk is taken, so that it can be mapped.

    Writing through a map into room that is not there ends the process without a message.

    Raises:
        OSError: where the disk has no room; the file is left as far as it came.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, max(size, 1))
        else:  # macOS
            for start in range(0, size, CHUNK_BYTES):
                os.pwrite(handle, bytes(min(CHUNK_BYTES, size - start)), start)
        os.ftruncate(handle, size)
    finally:
        os.close(handle)


def check_outputs(outputs: Mapping[str, Path | str | None]) -> None:
    """Tries every file that a run will write, before its work starts. No file of it is left.

    Args:
        outputs: by the flag that names it; None where the flag is not given.

    Raises:
        OutputError: naming the first flag whose file cannot be written, or two that are the same.
        BusyError: where another process is writing one.
    """
    taken: dict[Path, str] = {}
    for flag, name in outputs.items():
        if name is None:
            continue
        path = Path(name)
        check_output(flag, path)
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise OutputError(
                f"{other} and {flag} name the same file",
                expected="a file for each",
                found=name,
                do="give one of them another name",
            )


def check_output(flag: str, path: Path) -> None:
    """Tries a file that will be written, as ``check_outputs`` does."""
    if (found := _obstacle(path)) is None:
        try:
            with Claim(path.resolve() if path.is_symlink() else path):
                return
        except OSError as error:
            found = f"{path}: {error.strerror}"
    raise OutputError(
        f"{flag} cannot be written",
        expected="the path of a file, new or to be replaced, in a folder that can be written to",
        found=found,
        do="name another file",
    )


def _obstacle(path: Path) -> str | None:
    """What there is that is no file; None where there is nothing or a file."""
    if not path.name or path.name in (".", ".."):
        return f"{str(path)!r}, which names no file"
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        return f"{path}, whose name is too long"
    try:
        if path.is_dir():
            return f"{path}, a folder"
        if path.is_symlink() and not path.exists():
            return f"{path}, a link that leads nowhere"
        if path.exists() and not path.is_file():
            return f"{path}, a device or pipe"
        if below := [parent for parent in path.parents if parent.is_file()]:
            return f"{path}, which lies below the file {below[0]}"
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Writes ``content`` as indented JSON, atomically.

    Raises:
        ValueError: where a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with publish(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_sealed(path: Path, kind: str, version: int, content: dict[str, Any]) -> str:
    """Writes a JSON object that tells its kind and version and shows any later change.

    Returns:
        The seal: a fingerprint over kind, version and content.
    """
    sealed = seal(kind, version, content)
    write_json(path, sealed)
    return str(sealed["fingerprint"])


def seal(kind: str, version: int, content: dict[str, Any]) -> dict[str, Any]:
    """A JSON object that tells its kind and version and shows any later change."""
    sealed = {"format": kind, "version": version, **content}
    return {**sealed, "fingerprint": fingerprint(sealed)}


def read_sealed(
    path: Path,
    kind: str,
    versions: range | int,
    shape: type[T],
    renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields,
) -> tuple[T, str]:
    """Reads what ``write_sealed`` wrote.

    Args:
        path: the file.
        kind: its format.
        versions: those that can be read; a number n for all from 1 to n.
        shape: a ``msgspec.Struct`` of the fields, with their bounds; others than these are refused.
        renewed: makes the fields of an older version those of ``shape``.

    Returns:
        The fields, checked, and the seal.

    Raises:
        ValueError: saying what was found, where it is no JSON object of that kind, of another
            version, altered, or has a field that is missing, unknown, of another type or out of
            its bounds.
    """
    return unseal(_bounded(path), kind, versions, shape, renewed)


def unseal(
    text: str,
    kind: str,
    versions: range | int,
    shape: type[T],
    renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields,
) -> tuple[T, str]:
    """The fields and the seal of what ``seal`` made, from JSON text; as ``read_sealed``."""
    content = parse_json(text)
    if not isinstance(content, dict) or content.get("format") != kind:
        raise ValueError("JSON of another kind")
    versions = range(1, versions + 1) if isinstance(versions, int) else versions
    version = content.get("version")
    if type(version) is not int or version >= versions.stop:  # True is an int, too
        raise ValueError(f"version {version!r}, written by a newer fairseq-knnlm")
    if version < versions.start:
        raise ValueError(f"version {version}, written by an older fairseq-knnlm")
    found = content.pop("fingerprint", None)
    if found != fingerprint(content):
        raise ValueError("an altered file (its fingerprint differs)")
    fields = {key: content[key] for key in content if key not in ("format", "version")}
    fields = renewed(fields)
    made = typed(fields, shape)
    _check_complete(fields, msgspec.to_builtins(made))
    return made, found


def _check_complete(given: Any, whole: Any, place: str = "$") -> None:
    """Refuses what was left to a default: a writer of ours leaves no field out."""
    if isinstance(given, list) and isinstance(whole, list):
        for number, pair in enumerate(zip(given, whole, strict=True)):
            _check_complete(*pair, f"{place}[{number}]")
    elif isinstance(given, dict) and isinstance(whole, dict):
        for name, field in whole.items():
            if name not in given:
                raise ValueError(f"Object missing required field `{name}` - at `{place}`")
            _check_complete(given[name], field, f"{place}.{name}")


def _bounded(path: Path) -> str:
    if not path.is_file():
        raise ValueError("no file")
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"more than {human_bytes(MOST_JSON)}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"no JSON (not even UTF-8: {error.reason})") from None


def parse_json(text: str) -> Any:
    """Plain objects of JSON text, as the standard has it: no NaN, no infinity.

    Raises:
        ValueError: saying why it is none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant}, which is no number of JSON's")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None


def typed(fields: Any, shape: type[T]) -> T:
    """Plain objects of JSON as ``shape``, a type that msgspec knows, checked.

    Raises:
        ValueError: naming the field that is missing, unknown, of another type or out of bounds.
    """
    try:
        return msgspec.convert(fields, shape, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ValueError(str(error)) from None


def fingerprint(content: dict[str, Any]) -> str:
    """SHA-256 (hex) of a JSON object, whatever the order of its keys."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def checksums(
    path: Path, chunks: Sequence[int] | None = None, size: int | None = None
) -> list[str]:
    """SHA-256 (first 16 hex digits) of the file's chunks of 64 MiB, read in parallel.

    Args:
        path: the file.
        chunks: which chunks, by number; all of them where left out.
        size: bytes that count, from the first on; all of them where left out.
    """
    size = path.stat().st_size if size is None else size
    if chunks is None:
        chunks = range(chunks_of(size))

    def digest(chunk: int) -> str:
        return _checksum(path, chunk, size)

    # hashlib lets go of the interpreter lock, so threads are enough; four bound the memory.
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = pool.map(digest, chunks)
        label = f"checking {path.name}"
        # Shown only where it takes long enough to wonder.
        return list(tqdm(digests, total=len(chunks), desc=label, unit=" chunks", delay=2))


def _checksum(path: Path, chunk: int, size: int | None = None) -> str:
    """Of a chunk, as far as it lies within the first ``size`` bytes."""
    start = chunk * CHUNK_BYTES
    count = CHUNK_BYTES if size is None else min(CHUNK_BYTES, max(0, size - start))
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(count)).hexdigest()[:16]


def altered(
    path: Path, expected: Sequence[str], *, everything: bool = False, size: int | None = None
) -> bool:
    """True where the file's bytes, the first ``size``, are not those ``expected`` was taken from.

    Checks at most ``CHUNKS_ON_OPEN`` evenly spaced chunks (the first and last among them) unless
    ``everything`` is asked for.
    """
    chosen = range(len(expected)) if everything else sampled_chunks(len(expected))
    return checksums(path, chosen, size) != [expected[chunk] for chunk in chosen]


def sampled_chunks(total: int) -> Sequence[int]:
    """At most ``CHUNKS_ON_OPEN`` of ``total`` chunks, evenly spaced, first and last among them."""
    if total <= CHUNKS_ON_OPEN:
        return range(total)
    step = (total - 1) / (CHUNKS_ON_OPEN - 1)
    return sorted({round(i * step) for i in range(CHUNKS_ON_OPEN)})


def check_mapped(array: np.ndarray, what: str) -> None:
    """Refuses to read an array whose file became shorter since it was mapped.

    Reading behind its end would end the process without a message.

    Raises:
        DatastoreError: naming ``what`` the array is.
    """
    owner: Any = array
    while owner is not None and not isinstance(owner, mmap.mmap):
        owner = getattr(owner, "base", None)
    if owner is not None and owner.size() < len(owner):
        raise DatastoreError(
            f"the {what} were cut off while they were read",
            expected=f"a file of {len(owner):,} bytes, as when it was opened",
            found=f"{owner.size():,} bytes",
            do="restore it, and let nobody write to a datastore that is in use",
        )


class Checking:
    """Compares the chunks of a file that opening left unread, in a thread, while it is in use.

    Args:
        path: the file.
        expected: the checksums of all its chunks.
    """

    def __init__(self, path: Path, expected: Sequence[str]) -> None:
        self.path = path
        self.checked = 0
        self._expected = expected
        self._left = sorted(set(range(len(expected))) - set(sampled_chunks(len(expected))))
        self._failure: DatastoreError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Says so, if damage was found by now.

        Raises:
            DatastoreError: where it was.
        """
        if self._failure is not None:
            raise self._failure

    def wait(self) -> None:
        """Waits for the last chunk.

        Raises:
            DatastoreError: where the file is damaged.
        """
        self._thread.join()
        self.check()

    def _run(self) -> None:
        try:
            for chunk in self._left:
                if _checksum(self.path, chunk) != self._expected[chunk]:
                    raise ValueError("other ones (checksums differ)")
                self.checked += 1
        except (OSError, ValueError) as error:
            self._failure = DatastoreError(
                f"{self.path} is damaged",
                expected="the bytes that were written",
                found=error,
                do="restore it from a copy, or save the datastore again",
            )


def chunk_count(path: Path) -> int:
    """Chunks of a file, the last one possibly short."""
    return chunks_of(path.stat().st_size)


def chunks_of(size: int) -> int:
    """Chunks of a file of so many bytes."""
    return -(-size // CHUNK_BYTES)


def human_bytes(count: float) -> str:
    """``1536`` -> ``"1.5 KiB"``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
