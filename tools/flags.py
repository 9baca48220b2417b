#!/usr/bin/env python3
"""Prints docs/flags.md: every flag of the task and of ``fairseq-knnlm``, as the code has it.

    python tools/flags.py > docs/flags.md

A flag of the task that no group below names goes to the experts, so a new expert needs no line
here.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

HEAD = """\
# Flags

Made by `python tools/flags.py > docs/flags.md` from the code, and held together with it by a test.
What the flags are for is in the [guide](guide.md).

## Flags of the task `knn_lm`

These stand beside those of fairseq's `language_modeling`, in `fairseq-eval-lm`, `fairseq-generate
--score-reference` and the hub interface. Those known from urvashik/knnlm keep their names and
meaning.
"""

COMMAND = """\
## The command `fairseq-knnlm`

`save`, and `tune` with `--data`, pass all further flags on to `fairseq-eval-lm`, and `verify
--recompute` to fairseq. `python examples/build_index.py` takes what `build-index` takes.
"""

TAIL = "Next: [what it does not do](limits.md)."

REST: tuple[str, ...] = ()
#: In the order in which a user meets them: title, and the fields of the dataclass.
GROUPS: dict[str, tuple[str, ...]] = {
    "Saving a datastore": (
        *("save_knnlm_dstore", "dstore_mmap", "knn_keytype", "dstore_fp32"),
        *("no_save_keys", "recipe", "max_bytes_per_key", "document_boundary"),
    ),
    "Evaluating with it": (
        *("knnlm", "dstore_filename", "indexfile", "k", "results_json", "raw_text"),
        *("score_table", "lm_features", "progress_file"),
    ),
    "The language model, and how it reads": ("lm_dtype", "stride"),
    "Experts and their mixture": REST,
    "Searching": ("probe", "knn_sim_func", "faiss_metric_type", "knn_device"),
    "Searching less": ("skip_searches", "pointers", "pointer_min"),
    "Searching on Ray": ("knn_ray", "knn_shards", "knn_replicas"),
    "Memory": ("no_load_keys", "move_dstore_to_mem", "mmap_index"),
    "Files of urvashik/knnlm": ("dstore_size", "dstore_fp16"),
}

#: What stands for a value, where its type does not say enough.
VALUES = {
    "data": "DATA",
    "dictionary": "DATA",
    "document_boundary": "REGEX",
    "dstore": "DSTORE",
    "dstore_filename": "DSTORE",
    "dstore_mmap": "DSTORE",
    "expert_lm": "CKPT",
    "experts": "LIST",
    "gen_subset": "SPLIT",
    "indexfile": "FILE",
    "knn_device": "DEVICE",
    "knn_ray": "ADDRESS",
    "out": "DSTORE",
    "path": "CKPT",
    "plot": "FILE.png",
    "raw_text": "FILE.txt",
    "ray": "ADDRESS",
    "recipe": "RECIPE",
    "progress_file": "FILE.json",
    "results_json": "FILE.json",
    "score_table": "FILE.npz",
}
OF_TYPES = {int: "N", float: "X", str: "TEXT", Path: "FILE"}


@dataclasses.dataclass(frozen=True)
class Flag:
    """A row: what is typed, what stands for its value, its default, and what it does."""

    name: str
    value: str
    default: str
    help: str

    def row(self) -> str:
        """The line of a Markdown table."""
        text = re.sub(r"--[a-z][a-z-]*(?: [A-Z]+)?", r"`\g<0>`", self.help)
        return f"| `{self.name}` | {self.value} | {self.default} | {text} |"


def task_flags() -> dict[str, Flag]:
    """The flags of the task, by the field's name, without those of fairseq's own task."""
    from fairseq.tasks.language_modeling import LanguageModelingConfig

    from fairseq_knnlm.tasks.flags import KnnlmConfig

    stock = {field.name for field in dataclasses.fields(LanguageModelingConfig)}
    return {
        field.name: _of_field(field)
        for field in dataclasses.fields(KnnlmConfig)
        if field.name not in stock
    }


def subcommands() -> dict[str, argparse.ArgumentParser]:
    """By name, in their order; behind one that has subcommands of its own, these."""
    from fairseq_knnlm.cli.main import command_parser

    found = {}
    for name, parser in _choices(command_parser()).items():
        found[name] = parser
        found |= {f"{name} {inner}": one for inner, one in _choices(parser).items()}
    return found


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _of_field(field: dataclasses.Field[typing.Any]) -> Flag:
    kind = _plain(field.type)
    text, default = _without_default(str(field.metadata["help"]))
    if kind is bool:
        value, default = "", "on" if field.default else "off"
    else:
        choices = [str(one.value) for one in kind] if issubclass(kind, enum.Enum) else None
        value = _value(field.name, kind, choices)
        if not default and field.default is not None:
            default = str(getattr(field.default, "value", field.default))
    return Flag(f"--{field.name.replace('_', '-')}", value, default, text)


def _of_action(action: argparse.Action) -> Flag:
    text, default = _without_default(action.help or "")
    name = action.option_strings[-1] if action.option_strings else action.dest
    if action.nargs == 0:
        return Flag(name, "", "off", text)
    choices = [str(one) for one in action.choices] if action.choices else None
    kind = action.type if isinstance(action.type, type) else str
    if action.required:
        default = "must be given"
    value = f"`{action.metavar}`" if action.metavar else _value(action.dest, kind, choices)
    return Flag(name, value, default, text or action.dest.replace("_", " "))


def _plain(annotation: typing.Any) -> type:
    """Of an optional type the type."""
    some = [one for one in typing.get_args(annotation) if one is not types.NoneType]
    kind = some[0] if some else annotation
    assert isinstance(kind, type), annotation
    return kind


def _value(name: str, kind: type, choices: Iterable[str] | None) -> str:
    if choices is not None:
        return ", ".join(f"`{one}`" for one in choices)
    return f"`{VALUES.get(name) or OF_TYPES[kind]}`"


def _without_default(text: str) -> tuple[str, str]:
    """A help text, and the default that it tells of."""
    found = re.search(r"(?:^| ?\()default: (.*?)(?:\)|$)", text)
    if not found:
        return text, ""
    return (text[: found.start()] + text[found.end() :]).strip(), found[1]


def _table(flags: Iterable[Flag]) -> Iterator[str]:
    yield "| flag | value | default | what it does |"
    yield "| --- | --- | --- | --- |"
    for flag in flags:
        yield flag.row()


def page() -> Iterator[str]:
    """The lines of docs/flags.md."""
    yield HEAD
    flags = task_flags()
    grouped = {name for group in GROUPS.values() for name in group}
    assert grouped <= set(flags), f"not flags of the task any more: {grouped - set(flags)}"
    for title, group in GROUPS.items():
        yield f"### {title}\n"
        names = [name for name in flags if name not in grouped] if group is REST else group
        yield from _table(flags[name] for name in names)
        yield ""
    yield COMMAND
    for name, parser in subcommands().items():
        yield f"{'####' if ' ' in name else '###'} {name}\n"
        yield f"{parser.description}\n"
        unlisted = (argparse._HelpAction, argparse._SubParsersAction)
        actions = [one for one in parser._actions if not isinstance(one, unlisted)]
        if actions:
            yield from _table(map(_of_action, actions))
        if parser.epilog:
            yield f"\n{parser.epilog.replace('example: ', 'Example: `')}`\n"
    yield TAIL


if __name__ == "__main__":
    print("\n".join(page()))
