"""Raw text to fairseq's binary files, which appear as one folder, whole or not at all."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import data_file_path, index_file_path, make_builder
from tqdm import tqdm

from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.files import Claim, flush_to_disk, partial_folder
from fairseq_knnlm.lm.fingerprints import dictionary_fingerprint
from fairseq_knnlm.runs.encoded import Encoding, Fingerprinting, Split, write_encoding
from fairseq_knnlm.runs.encoding import END, Cut, Cutting, cut_parts, whole_items
from fairseq_knnlm.runs.receipt import sha256
from fairseq_knnlm.runs.text_files import BLANK, Part, empty, parts_of
from fairseq_knnlm.runs.tokenizer import FILES, SENTENCEPIECE, TRANSFORMERS, Tokenizer

#: What fairseq fills a dictionary up with.
FILLING = re.compile(r"madeupword\d+")
#: The split of which the dictionary counts.
TRAIN = "train"


@dataclass(frozen=True)
class Asked:
    """What is to be encoded.

    Attributes:
        splits: files of each, by name.
        tokenizer: model of sentencepiece, or a folder.
        srcdict: dictionary to use; None for one of all that the tokenizer has.
        separator: line between documents, or ``BLANK``; None where nothing was said.
        workers: processes.
    """

    splits: Mapping[str, Sequence[Path]]
    tokenizer: Path
    srcdict: Path | None
    separator: str | None
    workers: int


def encode(asked: Asked, out: Path) -> Encoding:
    """Writes a folder: the splits, the dictionary, the tokenizer and a record of all.

    Args:
        asked: what.
        out: folder that is not there, or empty.

    Returns:
        The record.

    Raises:
        KnnlmError: of the kind that fits what is wrong; nothing is written then.
    """
    with Claim(out), partial_folder(out) as name:
        folder = Path(name)
        work = _Work(asked, folder, *_opened(asked, folder))
        types = work.dictionary()
        types.save(str(folder / "dict.txt"))
        kind = work.cutting.kind
        encoding = Encoding(
            kind,  # type: ignore[arg-type]
            sha256(folder / FILES[kind]),
            work.cutting.special,
            dictionary_fingerprint(types.symbols),
            work.cutting.separator,
            {split: work.write(split, types) for split in asked.splits},
        )
        write_encoding(folder, encoding)
        for file in folder.iterdir():
            flush_to_disk(file)
        folder.chmod(0o755)
        flush_to_disk(folder)
        folder.rename(out)
        flush_to_disk(out.parent)
    return encoding


def _opened(asked: Asked, folder: Path) -> tuple[Cutting, list[str] | None]:
    """How the text is cut, once the tokenizer's file lies in a folder; and its symbols.

    There are none of these where the text has to be counted first.
    """
    if asked.tokenizer.is_dir():
        from fairseq_knnlm.runs.tokenizer_folder import open_folder

        found = open_folder(asked.tokenizer)
        path = folder / FILES[TRANSFORMERS]
        path.write_text(found.text, encoding="utf-8")
        return Cutting(TRANSFORMERS, path, found.special, asked.separator), found.symbols
    path = folder / FILES[SENTENCEPIECE]
    shutil.copyfile(asked.tokenizer, path)
    separator = None if asked.separator == BLANK else asked.separator  # they stay as they are
    return Cutting(SENTENCEPIECE, path, {}, separator), None


class _Work:
    """What is made for one folder."""

    def __init__(
        self, asked: Asked, folder: Path, cutting: Cutting, symbols: list[str] | None
    ) -> None:
        self.asked = asked
        self.folder = folder
        self.cutting = cutting
        self.tokenizer = cutting.opened()
        self._symbols = symbols

    def dictionary(self) -> Dictionary:
        """That which was named, or one of all symbols of the tokenizer.

        Raises:
            ConfigError: where the one is of another tokenizer, or nothing tells which are frequent.
        """
        if self.asked.srcdict is not None:
            return self._named_dictionary(self.asked.srcdict)
        types = Dictionary()
        if self._symbols is not None:
            for symbol in self._symbols:
                types.add_symbol(symbol)
            return types
        _check_storable(self.tokenizer)
        counts = self._counts()
        for one in np.argsort([*self.tokenizer.symbols], kind="stable").tolist():
            types.add_symbol(self.tokenizer.symbols[one], int(counts[one]))
        types.finalize(padding_factor=8)  # the frequent first, as adaptive layers need them
        return types

    def _named_dictionary(self, path: Path) -> Dictionary:
        types = Dictionary.load(str(path))
        ours = set(self._symbols or self.tokenizer.symbols)
        theirs = types.symbols[types.nspecial :]
        strange = [one for one in theirs if one not in ours and not FILLING.fullmatch(one)]
        if self._symbols is not None and not strange and theirs != self._symbols:
            strange = [one for one in self._symbols if one not in types] or theirs
        if strange or not theirs:
            raise ConfigError(
                f"{path} is a dictionary of another tokenizer",
                expected=f"symbols that {self.asked.tokenizer} makes",
                found=f"{len(strange):,} others, such as {strange[0]!r}" if strange else "none",
                do="name the tokenizer that cut the text which that dictionary was made of",
            )
        return types

    def _counts(self) -> np.ndarray:
        """(S,) int64, how often each id of the tokenizer comes in the training text."""
        counts = np.zeros(len(self.tokenizer.symbols), np.int64)
        for _, cut in self._cut(TRAIN, "counting"):
            counts += np.bincount(cut.ids[cut.ids != END], minlength=len(counts))
        return counts

    def _cut(self, split: str, what: str) -> Any:
        files, separator = self.asked.splits[split], self.cutting.separator
        total = sum(path.stat().st_size for path in files)
        parts = (part for path in files for part in parts_of(path, self.tokenizer, separator))
        with tqdm(
            total=total, desc=f"{what} {split}", unit="B", unit_scale=True, delay=2, leave=False
        ) as bar:
            yield from cut_parts(self.cutting, parts, self.asked.workers, bar.update)

    def write(self, split: str, types: Dictionary) -> Split:
        """Writes the two files of a split.

        Raises:
            ConfigError: where there is no word in it.
        """
        symbols = [*self.tokenizer.symbols, types.eos_word]  # the end is the last of them
        places = np.array([types.index(one) for one in symbols], np.int32)
        prefix = str(self.folder / split)
        builder = make_builder(data_file_path(prefix), "mmap", len(types))
        made = _Split(builder, types)
        cuts = ((part, cut.of(places)) for part, cut in self._cut(split, "encoding"))
        for part, cut, items in whole_items(cuts):
            if self.tokenizer.lines:
                made.begin_file(part)
            made.count(cut)
            for item in items:
                made.add(item)
        builder.finalize(index_file_path(prefix))
        if not made.words:
            raise empty(split, self.asked.splits[split])
        return made.told()


class _Split:
    """A split as it is written.

    Args:
        builder: fairseq's, of its files.
        types: the dictionary.
    """

    def __init__(self, builder: Any, types: Dictionary) -> None:
        self._builder = builder
        self._unknown = types.unk()
        self._empty_line = np.array([types.eos()], np.int32)
        self._fingerprint = Fingerprinting()
        self._file: Path | None = None
        self._last = 0
        self.tokens = self.words = self.bytes = self.items = self.unknown = self.changed = 0

    def begin_file(self, part: Part) -> None:
        """Puts an empty line between two files, unless there is one."""
        if self._file not in (None, part.path) and self._last > 1:
            self._take(self._empty_line)
            self.add(self._empty_line)
        self._file = part.path

    def count(self, cut: Cut) -> None:
        """Counts a part, in ids of the dictionary."""
        self.words += cut.words
        self.bytes += cut.bytes
        self.changed += cut.changed
        self._take(cut.ids)

    def _take(self, tokens: np.ndarray) -> None:
        self._fingerprint.take(tokens)
        self.tokens += len(tokens)
        self.unknown += int((tokens == self._unknown).sum())

    def add(self, item: np.ndarray) -> None:
        """Writes a line or document, (n,) int32."""
        self._builder.add_item(torch.from_numpy(item))
        self._last = len(item)
        self.items += 1

    def told(self) -> Split:
        """What is known of it."""
        return Split(
            self.tokens,
            self._fingerprint.found,
            self.words,
            self.bytes,
            self.items,
            self.unknown,
            self.changed,
        )


def _check_storable(tokenizer: Tokenizer) -> None:
    """Refuses symbols that fairseq cannot read in its dictionary's file.

    Raises:
        ConfigError: naming the first.
    """
    for symbol in tokenizer.symbols:
        if not symbol or "\n" in symbol or "\r" in symbol:
            raise ConfigError(
                "the tokenizer has a piece that fairseq's dictionary cannot hold",
                expected="pieces without ends of lines",
                found=repr(symbol),
                do="train it without that symbol; with byte fallback it is a byte",
            )
