"""Windows at a stride that cannot be, or that are others than those of what they meet."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tiny_world import TINY, training

from fault_cases import sealed
from fault_cases.stage import BadOutcome, Case, Stage
from fault_cases.typed import HUGE, Command, Table, flag_cases
from fault_cases.world import K, knnlm

MUST = "refused with a message that names the flag; nothing is changed"
TOLD = "works; what differs is told"
#: Windows of 16 tokens, 8 apart.
WINDOWS = ("--context-window", "0", "--stride", "8")
HERE = ("--cpu", "--num-workers", "0")
#: Where a datastore is saved, or a text evaluated.
READ: Table = {
    "0": ("--stride 0", "--stride"),
    "-4": ("--stride=-4", "--stride"),
    "a word": ("--stride often", "--stride"),
    "one and a half": ("--stride 1.5", "--stride"),
    "nothing": ("--stride=", "--stride"),
    "larger than the window": ("--stride 17", "--stride from 1 to --tokens-per-sample"),
    "30 digits": (f"--stride {HUGE}", "--stride"),
    "windows of one token": ("--tokens-per-sample 1 --stride 1", "--tokens-per-sample"),
    "windows of no token": ("--tokens-per-sample 0 --stride 1", "--tokens-per-sample"),
    "windows longer than the model": ("--tokens-per-sample 64", "--tokens-per-sample up to 17"),
    "windows longer than a batch": ("--max-tokens 12", "--max-tokens"),
    "a context window": ("--context-window 8", "--stride and --context-window"),
    "a context window below 0": ("--context-window=-8", "--context-window"),
    "a line each": ("--sample-break-mode eos", "--sample-break-mode eos"),
    "whole lines": ("--sample-break-mode complete", "--sample-break-mode complete"),
    "a sign before each": ("--add-bos-token", "--add-bos-token"),
}
EVALUATE: Table = {
    **READ,
    "raw text": ("--raw-text TEXT", "--stride"),
    "more shares than windows": ("--num-shards 1000000", "--num-shards"),
}
#: With results, or a datastore, at a stride of 8.
REPLAY: Table = {
    "another": ("--stride 4", "--stride"),
    "the same": ("--stride 8", "--stride"),
    "a context window": ("--context-window 8", "--context-window"),
}
APPEND: Table = {
    "another alone": ("--stride 4", "--tokens-per-sample up to"),
    "larger than the window": ("--tokens-per-sample 16 --stride 17", "--stride from 1"),
    "a context window alone": ("--context-window 8", "--tokens-per-sample"),
}
#: Where no text is read in windows.
TEXT: Table = {"8": ("--stride 8", "--stride does nothing"), "0": ("--stride 0", "--stride")}
#: Fields of results, each told to have been 4.
FIELDS = ("receipt/flags/stride", "context/stride", "conditions/stride")


def cases() -> Iterator[Case]:
    """Flags by command; then what was made at one stride and meets another."""
    commands: tuple[Command, ...] = (
        ("stride", EVALUATE, lambda stage: stage.world.evaluate(*WINDOWS)),
        ("save at a stride", READ, lambda stage: stage.world.save("new", *WINDOWS)),
        ("explain a text at a stride", TEXT, lambda stage: _on(stage, "explain", "--text", "w1")),
        ("generate at a stride", TEXT, _generate),
        ("replay at a stride", REPLAY, _replay),
        ("append at a stride", APPEND, _append),
    )
    yield from flag_cases("flags", MUST, commands, _known)
    for field in FIELDS:
        must = "refused in one message, though the seal is right"
        play = partial(_altered, field=field)
        yield Case("flags", f"strided: {field}", "altered, and sealed again", must, play)
    for name, done, must, step in STEPS:
        yield Case("flags", name, done, must, step)


def _known(stage: Stage) -> Mapping[str, object]:
    return {"TEXT": stage.world.folder / "test.txt"}


def _on(stage: Stage, command: str, *flags: object) -> list[object]:
    """A command on the world's datastore, text and model."""
    world = stage.world
    model = (world.data, "--path", world.checkpoint(), "--cpu")
    return knnlm(command, "--dstore", stage.store(), *model, *flags)


def _generate(stage: Stage) -> list[object]:
    (stage.folder / "prompts.txt").write_text("w1 w2\n")
    return _on(stage, "generate", "--prompts", "prompts.txt")


def _results(stage: Stage) -> Path:
    """Those of an evaluation at a stride of 8."""
    path = stage.folder / "strided.json"
    stage.works(stage.world.evaluate(*WINDOWS, "--results-json", path))
    return path


def _replay(stage: Stage) -> list[object]:
    return knnlm("replay", _results(stage).name, *HERE)


def _strided(stage: Stage, stride: int = 8) -> Path:
    """A datastore of valid, its windows so far apart, with an exact index."""
    path = stage.folder / f"strided-{stride}"
    windows = ("--context-window", 0, "--stride", stride)
    stage.works(stage.world.save(path, *windows, split="valid"))
    stage.works(knnlm("build-index", "--dstore", path, "--recipe", "Flat"), changes=["strided*"])
    return path


def _append(stage: Stage) -> list[object]:
    world = stage.world
    of = ("--gen-subset", "test", "--path", world.checkpoint(), *HERE)
    return knnlm("append", _strided(stage), world.data, *of)


def _altered(stage: Stage, *, field: str) -> str:
    words = _replay(stage)
    stage.works(words, says="confirmed")
    path = stage.folder / "strided.json"
    found: dict[str, Any] = json.loads(path.read_text())
    *parts, last = field.split("/")
    part = found
    for name in parts:
        part = part[name]
    part[last] = type(part[last])(4)
    path.write_bytes(sealed.sealed(found))
    return stage.refused(words, r"strided\.json")


def _keys_of_another_stride(stage: Stage) -> str:
    """Its keys stand where they stood; results tell both."""
    path = _strided(stage)
    knn = ("--knnlm", "--dstore-filename", path, *K, "--lmbda", 0.3, "--results-json", "r.json")
    quarter = ("--context-window", 0, "--stride", 4)
    stage.works(
        stage.world.evaluate(*knn, *quarter),
        says="12 to 15 tokens before each token, stride 4; keys of valid, 8 to 15 tokens",
    )
    found = json.loads((stage.folder / "r.json").read_text())["conditions"]
    told = found["stride"], found["context_of_queries"], found["context_of_keys"]
    if told != (4, [12, 15], [[8, 15]]):
        raise BadOutcome(f"results tell {told}")
    return "works; results tell 12 to 15 tokens before queries, 8 to 15 before keys"


def _weights_of_another_stride(stage: Stage) -> str:
    """Fitted at 8, used at 4, and in blocks: said each time; at 8 nothing is said."""
    path, world = _strided(stage), stage.world
    tune = knnlm("tune", "--dstore", path, "--data", world.data, "--path", world.checkpoint())
    reading = ("--tokens-per-sample", 16, "--sample-break-mode", "none", *WINDOWS, *HERE, *K)
    stage.works([*tune, "--gen-subset", "test", *reading], changes=["strided-8/*"])
    told = "the calibration was fitted with .*stride 8"
    knn = ("--knnlm", "--dstore-filename", path, *K)
    stage.works(world.evaluate(*knn, *WINDOWS[:2], "--stride", 4), says=f"{told}.*stride 4")
    stage.works(world.evaluate(*knn), says=told)
    same = stage.works(world.evaluate(*knn, *WINDOWS))
    if "was fitted with" in same.out:
        raise BadOutcome(f"something is said at the same stride: {same.last}")
    return "works; told at a stride of 4 and in blocks, and not at 8"


def _training(stage: Stage) -> str:
    """The task takes its flags there, too; as a process, for what else a fork has loaded."""
    plugin = ("--user-dir", Path(__file__).parents[2] / "fairseq_knnlm", "--task", "knn_lm")
    flags = ("--arch", "transformer_lm", *TINY, "--max-update", 1, "--stride", 8)
    words = training(stage.world.data, Path("trained"), *plugin, *flags)
    return stage.refused(words, "--stride does nothing in training", real=True)


def _added_at_another_stride(stage: Stage) -> str:
    """Keys that stand after more tokens than the others: they can be searched, and it is said."""
    path, world = _strided(stage), stage.world
    add = knnlm("append", path, world.data, "--gen-subset", "test", "--path", world.checkpoint())
    windows = ("--tokens-per-sample", 16, "--stride", 4, *HERE)
    said = "8 to 15 tokens of their text, those that are added after 12 to 15 tokens"
    stage.works([*add, *windows], says=said, changes=["strided-8/*"])
    return f"works, and says: {said}"


def _shares_of_two_strides(stage: Stage) -> str:
    """Shares of one run have one stride."""
    for number, stride in ((0, 8), (1, 4)):
        of = ("--num-shards", 2, "--shard-id", number, "--results-json", f"{number}.json")
        windows = ("--context-window", 0, "--stride", stride, "--max-tokens", 64)
        stage.works(stage.world.evaluate(*of, *windows))
    return stage.refused(knnlm("report", "--join", "0.json", "1.json"), r"1\.json")


def _save_that_goes_on(stage: Stage) -> str:
    """Blocks of a save at 8 are no blocks of one at 4."""
    words = stage.world.save("new", *WINDOWS, "--block-rows", 300)
    stage.works([*words, "--num-shards", 2, "--shard-id", 0], changes=["new*", ".new*"])
    other = [*words, "--stride", 4, "--num-shards", 2, "--shard-id", 1]
    return stage.refused(other, "stride|new", changes=["new*", ".new*"])


def _several_strides(stage: Stage) -> str:
    """Two datastores, each with keys of its own windows, are searched as one."""
    paths = f"{_strided(stage)}:{_strided(stage, 4)}"
    knn = ("--knnlm", "--dstore-filename", paths, *K, "--lmbda", 0.3, "--results-json", "r.json")
    stage.works(stage.world.evaluate(*knn, *WINDOWS))
    found = json.loads((stage.folder / "r.json").read_text())["conditions"]
    if found["context_of_keys"] != [[8, 15], [12, 15]]:
        raise BadOutcome(f"results tell {found['context_of_keys']}")
    return "works; results tell the context of both"


def _verified(stage: Stage) -> str:
    """Keys are computed again at the stride that the datastore says."""
    path, world = _strided(stage), stage.world
    again = knnlm("verify", "--dstore", path, "--recompute", 0.5, "--data", world.data)
    again += ["--path", world.checkpoint(), *HERE]
    stage.works(again, says="bit for bit")
    manifest = path / "manifest.json"
    found = json.loads(manifest.read_text())
    found["origin"]["context"]["stride"] = 4
    manifest.write_bytes(sealed.sealed(found))
    ran = stage.run(again)
    shutil.rmtree(path)
    if ran.code == 0:
        raise BadOutcome(f"a datastore that says another stride was confirmed: {ran.last}")
    return f"bit for bit; not so where another is said: {ran.last}"


STEPS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    ("keys of another stride", "saved at 8, queried at 4", TOLD, _keys_of_another_stride),
    ("weights of another stride", "tuned at 8, used at 4", TOLD, _weights_of_another_stride),
    ("datastores of two strides", "8 and 4, searched together", TOLD, _several_strides),
    ("a text added at another stride", "append at 4 to one at 8", TOLD, _added_at_another_stride),
    ("training at a stride", "fairseq-train --stride 8", MUST, _training),
    ("shares of two strides", "a share at 8 joined with one at 4", MUST, _shares_of_two_strides),
    ("a save that goes on at another stride", "shards at 8 and at 4", MUST, _save_that_goes_on),
    ("another stride in a manifest", "verify --recompute", "it does not agree", _verified),
)
