"""Raw text as it lies in files: which split each is of, and parts that are encoded one by one.

A part begins where a line begins, so no character is cut. Within a document that is encoded as a
whole it begins only where the tokens are the same as without the cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files.arrays import kind_of
from fairseq_knnlm.runs.tokenizer import Tokenizer

#: Bytes of a part, about.
PART = 2**20
#: Bytes on either side of a cut that are looked at, and how many line ends are tried.
AROUND, TRIED = 1024, 64
#: What separates documents where no line is named: empty lines.
BLANK = "blank"
#: The last line end before a part that goes on with a document.
LEAD = "\n"


@dataclass(frozen=True)
class Part:
    """A stretch of a file.

    Attributes:
        path: the file.
        start, stop: bytes of it.
        goes_on: whether a document that began before it goes on in it.
        ends: whether a document ends where it does.
    """

    path: Path
    start: int
    stop: int
    goes_on: bool = False
    ends: bool = True


def named_splits(words: Sequence[str]) -> dict[str, list[Path]]:
    """The files of each split, in the order in which they were typed.

    Args:
        words: paths of files that are called as their splits, or of folders, whose files are
            documents; or ``SPLIT=PATH``.

    Raises:
        ConfigError: where a split has no name, or a path leads to no text.
    """
    found: dict[str, list[Path]] = {}
    for word in words:
        named = re.fullmatch(r"([\w-]+)=(.+)", word, flags=re.ASCII | re.DOTALL)
        path = Path(named[2] if named else word)
        split = named[1] if named else path.name.partition(".")[0]
        if not re.fullmatch(r"[\w-]+", split, flags=re.ASCII) or split == "dict":
            raise ConfigError(
                f"{word} does not say which split it is of",
                expected="a file that is called as its split, such as train.txt, or SPLIT=FILE",
                found=f"the name {split!r}",
                do=f"type train={word}, or the split that it is",
            )
        found.setdefault(split, []).extend(_files(path))
    return found


def _files(path: Path) -> list[Path]:
    kind = kind_of(path)
    if kind == "a file":
        return [path]
    if kind == "a folder":
        files = sorted(one for one in path.iterdir() if not one.name.startswith("."))
        strange = [one for one in files if kind_of(one) != "a file"]
        kind = f"{strange[0]}, {kind_of(strange[0])}" if strange else "a folder without files"
        if files and not strange:
            return files
    raise ConfigError(
        f"there is no text at {path}",
        expected="a file of text in UTF-8, or a folder of such files, each a document",
        found=kind,
        do="check the path",
    )


def check_texts(splits: Mapping[str, Sequence[Path]]) -> None:
    """Refuses splits without a byte.

    Raises:
        ConfigError: naming the first.
    """
    for split, files in splits.items():
        if not any(path.stat().st_size for path in files):
            raise empty(split, files)


def empty(split: str, files: Sequence[Path]) -> ConfigError:
    """What a user is told of a split in which there is no word."""
    return ConfigError(
        f"the text of {split} is empty",
        expected="at least a word",
        found=f"none in {files[0]}" + (f" and {len(files) - 1:,} more" if len(files) > 1 else ""),
    )


def parts_of(path: Path, tokenizer: Tokenizer, separator: str | None) -> Iterator[Part]:
    """The parts of a file, one after the other.

    Args:
        path: the file.
        tokenizer: which cuts it, by lines or by documents.
        separator: a line that stands between documents, or ``BLANK``; None where the file is one.
    """
    size, start, goes_on = path.stat().st_size, 0, False
    with path.open("rb") as file:
        while start < size:
            stop, ends = size, True
            if size - start > 2 * PART:
                file.seek(start + PART)
                file.readline()  # the rest of a line
                if tokenizer.lines:
                    stop = file.tell()
                elif separator is not None:
                    stop = _behind_separator(file, separator)
                else:
                    stop = _seam(file, tokenizer)
                    ends = stop == size
            yield Part(path, start, stop, goes_on, ends)
            start, goes_on = stop, not ends


def _behind_separator(file: IO[bytes], separator: str) -> int:
    """The byte behind the next line that separates documents; the file's end without one."""
    for line in file:
        if is_separator(line.decode(errors="replace").removesuffix("\n"), separator):
            break
    return file.tell()


def _seam(file: IO[bytes], tokenizer: Tokenizer) -> int:
    """The byte of the next line at which a document can be cut; the file's end without one."""
    for _ in range(TRIED):
        at = file.tell()
        file.seek(at - AROUND)
        around = file.read(2 * AROUND)
        left = around[:AROUND].decode(errors="ignore")
        right = around[AROUND:].decode(errors="ignore")
        if not right:
            break
        if left.endswith(LEAD) and not right[0].isspace() and _is_seam(tokenizer, left, right):
            return at
        file.seek(at)
        file.readline()
    return file.seek(0, 2)


def _is_seam(tokenizer: Tokenizer, left: str, right: str) -> bool:
    """Whether two texts are cut into the same tokens side by side and each by itself."""
    lead, behind = tokenizer.ids(LEAD), tokenizer.ids(LEAD + right)
    return (
        behind[: len(lead)] == lead
        and tokenizer.ids(left + right) == tokenizer.ids(left) + behind[len(lead) :]
    )


def read_part(part: Part) -> str:
    """The text of a part.

    Raises:
        ConfigError: where it is not in UTF-8, saying where.
    """
    with part.path.open("rb") as file:
        file.seek(part.start)
        data = file.read(part.stop - part.start)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            at = part.start + error.start
            file.seek(0)
            lines = sum(chunk.count(b"\n") for chunk in _chunks(file, at))
            raise ConfigError(
                f"{part.path} is not in UTF-8",
                expected="text in UTF-8",
                found=f"{error.reason} (0x{data[error.start]:02x}) at byte {at:,}, "
                f"in line {lines + 1:,}",
                do="convert it, as in: iconv -f LATIN1 -t UTF-8",
            ) from None


def _chunks(file: IO[bytes], size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(size, PART))):
        size -= len(chunk)
        yield chunk


def lines_of(text: str) -> list[str]:
    """The lines of a text as fairseq reads them: any of the ends of lines there are ends one.

    Args:
        text: whole lines; the last may lack its end.
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def documents_of(text: str, separator: str | None) -> list[str]:
    """The documents of a text, each without the line end before what separates it from the next.

    Args:
        text: of whole documents.
        separator: a line that stands between them, or ``BLANK``; None where it is one.
    """
    if separator is None:
        return [text]
    found: list[list[str]] = [[]]
    for line in text.removesuffix("\n").split("\n"):
        if is_separator(line, separator):
            found.append([])
        else:
            found[-1].append(line)
    documents = ["\n".join(lines).removesuffix("\r") for lines in found]
    return [one for one in documents if one.strip()]


def is_separator(line: str, separator: str | None) -> bool:
    """Whether a line, without its end, stands between documents."""
    if separator is None:
        return False
    return line.removesuffix("\r") == ("" if separator == BLANK else separator)
