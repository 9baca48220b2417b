"""Checkpoints of any age, opened without running anything that they name.

A checkpoint is a pickle, and a pickle may name any function for the reader to call. PyTorch's
reader with ``weights_only`` calls none but those of a list. Here that list is lengthened by what
fairseq wrote into its checkpoints since 0.9, and every name on it stands for something of this file
that holds what it is given and does nothing. No class of fairseq, OmegaConf or NumPy is touched.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fairseq_knnlm.errors import ModelError

#: Pickles at the beginning of a file of PyTorch before 1.6: magic number, protocol, system, the
#: checkpoint, names of its storages. Numbers follow.
PICKLES = 5
#: Names of Python 2, as which a pickle of protocol 2 spells those of today.
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}
RENAMED_TYPES = {"builtins.long": "builtins.int", "builtins.unicode": "builtins.str"}
#: Names that PyTorch itself allows, or refuses while it reads.
PYTORCHS = re.compile(
    r"torch\..*|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|complex|set)"
)
#: Names that an inert ``Record`` stands for.
RECORDS = re.compile(
    r"argparse\.Namespace|(fairseq|omegaconf)\.[\w.]+|typing\.Any"
    r"|builtins\.(bool|bytes|dict|float|int|list|object|str|tuple)"
)
#: NumPy's types of plain numbers, as a pickle spells them.
NUMBER = re.compile(r"[biuf][1248]")


class Record:
    """What a checkpoint says of an object; that object is not made.

    Attributes:
        name: the type that the checkpoint names, such as ``argparse.Namespace``.
        values: what its maker was given, by position.
        state: its attributes, or whatever else it was to be set to.
    """

    name = ""

    def __init__(self, *values: Any) -> None:
        self.values = values
        self.state: Any = {}

    def __new__(cls, *values: Any) -> Record:
        made = super().__new__(cls)
        made.values, made.state = values, {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


def _number(kind: Record, data: bytes | str = b"") -> float | int | bool:
    """A number of NumPy's, from its type and its bytes."""
    spelled = kind.values[0] if isinstance(kind, Record) and kind.values else None
    if not isinstance(spelled, str) or not NUMBER.fullmatch(spelled):
        raise ValueError(f"a number of NumPy's type {spelled!r}")
    raw = data.encode("latin1") if isinstance(data, str) else data
    found: float | int | bool = np.frombuffer(raw, spelled, count=1)[0].item()
    return found


def _mapping(*_: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


def _sequence(*_: Any) -> list[Any]:
    return []


def _path(*parts: str) -> str:
    return str(Path(*parts))


#: Functions that stand for others; what they give is plain.
PLAIN: dict[str, Callable[..., Any]] = {
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    "collections.defaultdict": _mapping,
    "collections.deque": _sequence,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
}


def open_checkpoint(path: Path) -> Any:
    """What is in a checkpoint: tensors, numbers, text and ``Record``s. Nothing is executed.

    Raises:
        ModelError: where it names types that are not on the list, all of which are told, or cannot
            be read.
    """
    try:
        names = set(named_types(path))
    except (ValueError, zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError) as error:
        raise _unreadable(path, error) from None
    check_names(path, names)
    allowed: list[Any] = [(_stand_in(name), name) for name in names if not PYTORCHS.fullmatch(name)]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged pickle anything may come
        raise _unreadable(path, error) from None


def check_names(path: Path, names: set[str]) -> None:
    """Refuses a checkpoint that names types that are not on the list.

    Raises:
        ModelError: naming all of them.
    """
    known = (PYTORCHS.fullmatch, RECORDS.fullmatch, {*PLAIN, "numpy.dtype"}.__contains__)
    refused = sorted(name for name in names if not any(knows(name) for knows in known))
    if refused:
        raise ModelError(
            f"the checkpoint {path} names what could run code when it is opened",
            expected="weights, numbers, text, and settings of fairseq's",
            found=", ".join(refused),
            do="nothing of it was run; ask who made it for one with weights and settings alone",
        )


def named_types(path: Path) -> Iterator[str]:
    """Types and functions that a checkpoint names, read from its bytes alone.

    Raises:
        ValueError: where it is no pickle.
        zipfile.BadZipFile: where it is cut off.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if not parts:
                raise ValueError("an archive that PyTorch did not write")
            for part in parts:
                with archive.open(part) as file:
                    yield from _names_in(file)  # type: ignore[arg-type]
    else:
        with path.open("rb") as file:
            for _ in range(PICKLES):
                yield from _names_in(file)


def _names_in(file: BinaryIO) -> Iterator[str]:
    """The names in one pickle."""
    texts: list[str] = []
    for code, value, _ in pickletools.genops(file):
        if code.name in {"GLOBAL", "INST"}:
            module, _, name = str(value).partition(" ")
            full = f"{RENAMED.get(module, module)}.{name}"
            yield RENAMED_TYPES.get(full, full)
        elif code.name == "STACK_GLOBAL":
            # Nobody who writes checkpoints uses it; PyTorch's reader refuses it.
            yield ".".join(texts[-2:])
        elif isinstance(value, str):
            texts = [*texts[-1:], value]


def _stand_in(name: str) -> Any:
    return PLAIN.get(name) or type("Record", (Record,), {"name": name})


def _unreadable(path: Path, error: BaseException) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # PyTorch tells its reason after advice to trust the file.
    reason = next((line for line in lines if "WeightsUnpickler error" in line), lines[0])
    return ModelError(
        f"the checkpoint {path} cannot be read",
        expected="a checkpoint that fairseq wrote, whole",
        found=reason.strip()[:200],
    )


#: Fields of a node of OmegaConf in which its content is: of a container, and of a value.
CONTENT = ("_content", "_val")
#: In the place of what is left out.
LEFT_OUT = object()


class Plain:
    """Makes plain values of what ``open_checkpoint`` gives.

    Attributes:
        left_out: types of objects that nothing plain stands for, such as fairseq's meters.
    """

    def __init__(self) -> None:
        self.left_out: set[str] = set()

    def __call__(self, value: Any) -> Any:
        """The same in dicts, lists, tensors, numbers and text; ``LEFT_OUT`` where it has none."""
        if isinstance(value, Record):
            return self._of_record(value)
        if isinstance(value, dict):
            made = ((self(key), self(one)) for key, one in value.items())
            return {key: one for key, one in made if _is(key) and _is(one)}
        if isinstance(value, list | tuple | set | frozenset) and not isinstance(value, torch.Size):
            some = [one for one in map(self, value) if _is(one)]
            return some if isinstance(value, list) else type(value)(some)
        return value.detach() if isinstance(value, Tensor) else value

    def _of_record(self, record: Record) -> Any:
        state = record.state[0] if isinstance(record.state, tuple) else record.state
        if record.name == "argparse.Namespace":
            return self(state)
        if record.name.startswith("omegaconf.") and isinstance(state, dict):
            for field in CONTENT:
                if field in state:
                    return self(state[field])
        if not state and len(record.values) == 1 and isinstance(record.values[0], str | int):
            return record.values[0]  # one of the values of an Enum
        self.left_out.add(record.name)
        return LEFT_OUT


def _is(value: Any) -> bool:
    return value is not LEFT_OUT
