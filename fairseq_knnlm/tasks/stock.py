"""What fairseq is given, checked before it works, and its failures in words that a user can act on.

fairseq checks little of what it reads: a missing file, a text file in the place of a checkpoint or
an empty split end in an assertion or deep in a library. What can be told beforehand is told
beforehand; the rest is told from where it failed.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.file_io import PathManager

from fairseq_knnlm.bounds import check_range, check_seed
from fairseq_knnlm.errors import MEMORY_WORDS, ConfigError, KnnlmError, ModelError
from fairseq_knnlm.runs.encoded import NAME as ENCODING
from fairseq_knnlm.runs.tokenizer import FILES

MOST = 2**31 - 1
MOST_WORKERS = 4096
#: How the index of a binarised split begins, and how long it is before its numbers.
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = 26


def check_numbers(run: Any) -> None:
    """Refuses numbers that fairseq takes as they come.

    Args:
        run: fairseq's whole configuration.

    Raises:
        ConfigError: naming the flag.
    """
    data = run.dataset
    check_range("--num-shards", data.num_shards, 1, MOST, "counts shards")
    check_range("--shard-id", data.shard_id, 0, shards(run) - 1, "names a shard, the first is 0")
    check_range("--max-tokens", data.max_tokens, 1, MOST, "counts the tokens of a batch")
    check_range("--batch-size", data.batch_size, 1, MOST, "counts the blocks of a batch")
    check_range("--num-workers", data.num_workers, 0, MOST_WORKERS, "counts processes that load")
    check_range("--data-buffer-size", data.data_buffer_size, 0, MOST, "counts batches read ahead")
    context = run.eval_lm.context_window
    check_range("--context-window", context, 0, MOST, "counts tokens before a block")
    check_seed(run.common.seed)


def shards(run: Any) -> int:
    """Parts into which fairseq divides the batches, one for each process."""
    return max(run.dataset.num_shards, processes(run))


def processes(run: Any) -> int:
    """Processes that fairseq starts by itself: one for each GPU that it sees."""
    return max(1, int(run.distributed_training.distributed_world_size))


def check_checkpoint(path: str | None, *, one: bool) -> None:
    """Refuses a ``--path`` at which no checkpoint lies.

    Args:
        path: as it was typed; None where it was not.
        one: several, with a colon between them, will not do.

    Raises:
        ConfigError: where it was forgotten, or names several.
        ModelError: where nothing is there.
    """
    if not path:
        raise ConfigError(
            "no language model is named", expected="--path CHECKPOINT", found="no --path"
        )
    paths = path.split(os.pathsep)
    if len(paths) > 1 and one and not PathManager.exists(path):
        raise ConfigError(
            "--path names several checkpoints",
            expected="one language model (a path without a colon)",
            found=path,
            do="name one of them",
        )
    for each in [path] if PathManager.exists(path) else paths:
        parts = f"{Path(each).stem}[-_]*"  # a model may be stored in shards
        if not PathManager.exists(each) and not any(Path(each).parent.glob(parts)):
            raise _no_checkpoint(each)
        if Path(each).is_dir():
            raise ModelError(
                f"{each} is no checkpoint",
                expected="--path FILE, as in checkpoint_best.pt",
                found="a folder",
            )


def check_data(folders: str | None) -> None:
    """Refuses a folder that ``fairseq-preprocess`` did not write.

    Args:
        folders: as typed; several with colons between them.

    Raises:
        ConfigError: naming what is missing.
    """
    if not folders:
        return
    folder = _first(folders)
    if "://" in folders or (folder / "dict.txt").is_file():
        return
    raise ConfigError(
        f"no data in {folder}",
        expected="a folder that fairseq-preprocess wrote, with dict.txt",
        found="no such folder"
        if not folder.exists()
        else "a folder without dict.txt"
        if folder.is_dir()
        else "a file",
        do="run fairseq-preprocess --only-source, or check the path",
    )


def check_split(folders: str, split: str) -> None:
    """Refuses a split that is not in the data, is empty, or is cut off.

    Raises:
        ConfigError: saying what was found.
    """
    folder = _first(folders)
    if "://" in folders or (folder / split).is_file():
        return
    index = folder / f"{split}.idx"
    if not index.is_file():
        there = sorted(file.stem for file in folder.glob("*.idx"))
        raise ConfigError(
            f"the data has no split {split}",
            expected=f"--gen-subset of {', '.join(there) or 'what fairseq-preprocess wrote'}",
            found=f"no {index}",
        )
    text = index.with_suffix(".bin")
    least = _least_bytes(index)
    found = text.stat().st_size if text.is_file() else 0
    if least is None or found < least:
        raise _unreadable(split, folder, f"{index if least is None else text}, cut off")
    if not found:
        raise _unreadable(split, folder, "no tokens")


def _least_bytes(index: Path) -> int | None:
    """Where the last sentence of a split begins; None where the index is cut off.

    Its numbers stand behind a header of 26 bytes: lengths in 4 bytes, places in 8. Of another kind
    of index nothing is said.
    """
    with index.open("rb") as file:
        header = file.read(INDEX_HEADER)
        if not header.startswith(INDEX_MAGIC[: len(header)]):
            return 0
        if len(header) < INDEX_HEADER:
            return None
        end = INDEX_HEADER + 12 * int.from_bytes(header[-8:], "little")
        if index.stat().st_size < end:
            return None
        if end == INDEX_HEADER:
            return 0
        file.seek(end - 8)
        return int.from_bytes(file.read(8), "little")


def _unreadable(split: str, folder: object, found: str) -> ConfigError:
    return ConfigError(
        f"the split {split} cannot be read",
        expected=f"text, in {folder}, as fairseq-preprocess wrote it",
        found=found,
        do="run fairseq-preprocess again",
    )


def data_files(folders: str, split: str) -> list[str]:
    """Files that are read of a split."""
    names = ["dict.txt", f"{split}.bin", f"{split}.idx", split]
    if (_first(folders) / ENCODING).is_file():
        names += [ENCODING, *FILES.values()]
    return [str(_first(folders) / name) for name in names]


def _first(folders: str) -> Path:
    """The folder that evaluation reads; fairseq takes others, after colons, for later epochs."""
    return Path(folders if Path(folders).is_dir() else folders.split(os.pathsep)[0])


def folder(folders: str) -> str:
    """The folder that evaluation reads, of those that were typed."""
    return str(_first(folders))


def check_batches(longest: int, tokens: int, max_tokens: int | None) -> None:
    """Refuses what would leave nothing to read, or batches too small for a block.

    Args:
        longest: tokens in the longest block that will be read; 0 where there is none.
        tokens: in all blocks that will be read.
        max_tokens: in a batch.

    Raises:
        ConfigError: saying which.
    """
    if not tokens:
        raise ConfigError(
            "there are no tokens to read",
            expected="a split with text, in blocks that the model takes",
            found="none",
            do="check --gen-subset and --tokens-per-sample",
        )
    if max_tokens is not None and max_tokens < longest:
        raise ConfigError(
            "--max-tokens is less than a block",
            expected=f"at least {longest:,}, the tokens of the longest block",
            found=f"{max_tokens:,}",
            do=f"pass --max-tokens {longest} or more, or a smaller --tokens-per-sample",
        )


def omitted(dataset: Any) -> int:
    """Tokens of the text that fairseq put into no block: ends of documents, and the shortest."""
    text = getattr(getattr(dataset, "dataset", None), "dataset", None)
    sizes = getattr(text, "sizes", None)
    return 0 if sizes is None else max(0, int(np.sum(sizes)) - int(np.sum(dataset.sizes)))


def in_our_words(error: BaseException) -> BaseException:
    """What a user can mend of a failure within fairseq; ``error`` itself where nobody knows."""
    if isinstance(error, (KnnlmError, KeyboardInterrupt, MemoryError)):
        return error
    if any(words in str(error) for words in MEMORY_WORDS):
        return error
    for frame, _ in traceback.walk_tb(error.__traceback__):
        explain = FAILURES.get((_module(frame.f_globals), frame.f_code.co_name))
        found = explain(frame.f_locals, error) if explain is not None else None
        if found is not None:
            return found
    return error


def _module(names: Mapping[str, Any]) -> str:
    return str(names.get("__name__", "")).rpartition(".")[2]


def _loading(names: Mapping[str, Any], error: BaseException) -> KnnlmError | None:
    """A failure within ``load_model_ensemble_and_task``."""
    path = names.get("filename") or names.get("orig_filename")
    if path is None:
        return ConfigError(
            "no language model is named", expected="--path CHECKPOINT", found="no --path"
        )
    text = str(error)
    if isinstance(error, OSError) and text.startswith("Model file not found"):
        return _no_checkpoint(path)
    called = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    named = re.search(r"Weights only load failed.*GLOBAL (\S+)", text, re.DOTALL)
    if named is not None:
        return ModelError(
            f"the checkpoint {path} holds objects, which PyTorch does not open without trust",
            expected="weights, numbers and text alone",
            found=named[1],
            do=f"fairseq-knnlm convert-checkpoint {path} NEW, which runs nothing of it; pass NEW",
        )
    if "load_checkpoint_to_cpu" in called or "Neither args nor cfg" in text:
        return ModelError(
            f"the checkpoint {path} cannot be read",
            expected="a checkpoint that fairseq-train wrote, whole",
            found=_first_line(error),
        )
    if "load_state_dict" in called:
        return ModelError(
            f"the checkpoint {path} does not fit the data's dictionary, or its own settings",
            expected="the data that the model was trained on, or its dict.txt",
            found=next((line for line in text.splitlines() if "size mismatch" in line), text)[:300],
        )
    return ModelError(
        f"the model of {path} cannot be made",
        expected="a language model that this fairseq knows, and its --user-dir if it has one",
        found=_first_line(error),
    )


def _no_checkpoint(path: str) -> ModelError:
    return ModelError(
        f"no checkpoint {path}",
        expected="--path FILE, as in checkpoint_best.pt",
        found="no such file",
        do="check the path",
    )


def _data(names: Mapping[str, Any], error: BaseException) -> KnnlmError | None:
    """A failure within ``load_dataset``."""
    split, folder = (
        names.get("split"),
        getattr(getattr(names.get("self"), "args", None), "data", ""),
    )
    if isinstance(error, FileNotFoundError):
        return ConfigError(
            f"the data has no split {split}",
            expected="--gen-subset of a split that fairseq-preprocess wrote",
            found=_first_line(error),
        )
    empty = "dataset" in names and not len(names["dataset"] or ())
    return _unreadable(str(split), folder, "no tokens" if empty else _first_line(error))


def _dictionary(names: Mapping[str, Any], error: BaseException) -> KnnlmError | None:
    """A failure within ``Dictionary.load``."""
    return ConfigError(
        f"the dictionary {names.get('f')} cannot be read",
        expected="dict.txt, a type and its count a line, as fairseq-preprocess wrote it",
        found=_first_line(error),
    )


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0][:160]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


#: Who tells a failure that passed through a function, by its module and name; the outermost first.
def _blocks(_: Mapping[str, Any], error: BaseException) -> KnnlmError | None:
    """A failure within ``filter_indices_by_size``: fairseq does not leave out blocks unasked."""
    found = re.search(r"invalid \(=(.*?)\) since max_positions=(\S+),", str(error))
    if found is None:
        return None
    return ConfigError(
        "a block of the text is longer than the model takes",
        expected=f"at most {found[2]} tokens",
        found=found[1],
        do="pass a smaller --tokens-per-sample; or, to leave such blocks out, "
        "--skip-invalid-size-inputs-valid-test",
    )


def _flags(_: Mapping[str, Any], error: BaseException) -> KnnlmError | None:
    """Flags that contradict each other, which fairseq asserts that they do not."""
    if not isinstance(error, AssertionError) or not str(error).startswith("--"):
        return None
    return ConfigError(str(error), do="change one of these flags")


FAILURES: dict[tuple[str, str], Callable[[Mapping[str, Any], BaseException], KnnlmError | None]] = {
    ("checkpoint_utils", "load_model_ensemble_and_task"): _loading,
    ("language_modeling", "load_dataset"): _data,
    ("dictionary", "load"): _dictionary,
    ("fairseq_task", "filter_indices_by_size"): _blocks,
    ("generate", "main"): _flags,
    ("interactive", "main"): _flags,
}
