"""Receipts whose files are elsewhere, gone or others, and receipts that were altered."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fault_cases import sealed
from fault_cases.stage import BadOutcome, Case, Stage
from fault_cases.typed import HUGE, Command, Table, flag_cases
from fault_cases.world import knnlm

MUST = "refused with a message that names what is wrong; nothing is changed"
FOUND = "refused in one message, though the seal is right"
NAMED = "confirmed, and what computed otherwise then is told"
FREE = "confirmed: it says where, or in how many steps, and no figure"
DIGITS = "refused where a last digit comes of it, else confirmed"
HERE = ("--cpu", "--num-workers", 0)
#: Fields of what a run with fixed weights wrote, of lists the last entry.
FIELDS = """
    tokens tokens_left_out tokens_impossible base_loss base_loss_error base_perplexity loss
    loss_error perplexity gain gain_error errors_by seconds tokens_per_second text/source
    text/words text/bytes text/unknown text/agreement base_word_perplexity base_byte_perplexity
    base_bits_per_byte word_perplexity byte_perplexity bits_per_byte experts/-1 mixed/-1 mixer
    mixture mixture_from weights/-1/expert weights/-1/weight weights/-1/suffix weights/-1/k
    weights/-1/temperature k index distances entries split context/tokens_per_sample
    context/context_window context/sample_break_mode context/precision conditions/stride
    conditions/context_of_queries/-1 conditions/context_of_keys/-1/-1 conditions/datastores_of/-1
    conditions/fitted_on sections/tokens/-1 sections/base_log_prob/-1 sections/log_prob/-1
    sections/rows/-1 receipt/data receipt/reading/--gen-subset receipt/reading/--tokens-per-sample
    receipt/reading/--context-window receipt/reading/--sample-break-mode receipt/flags/knnlm
    receipt/flags/k receipt/flags/lmbda receipt/flags/knn_temp receipt/files/-1/of
    receipt/files/-1/path receipt/files/-1/bytes receipt/files/-1/sha256 receipt/datastores/-1/path
    receipt/datastores/-1/fingerprint receipt/datastores/-1/index receipt/index receipt/calibration
    receipt/model receipt/dictionary receipt/precision receipt/described/knn/k
    receipt/described/knn/index receipt/described/knn/distances
""".split()
#: Those that a run with what was fitted has besides.
OF_FITTED = """
    conditions/fitted_on/split conditions/fitted_on/tokens receipt/flags/experts
    receipt/described/cache/reset receipt/described/ngram/order receipt/described/ngram/tokens
    receipt/calibration mixer mixture
""".split()
#: What computed, which may let last digits differ.
COMPUTED = """
    versions/python versions/fairseq_knnlm versions/fairseq versions/torch versions/faiss
    versions/numpy receipt/processor receipt/threads receipt/score_table
""".split()
#: Where the datastore lay, and what was counted of searches.
UNTOLD = ["datastore", "search_seconds", "tokens_recalled"]
#: Settings of the expert that happens to stand last in what was fitted. That weights are looked at
#: is seen by those of fixed weights.
SETTINGS = [f"weights/-1/{name}" for name in ("order", "window", "theta", "half_life")]
#: How much was read at a time, of which last digits may come.
BATCHES = "receipt/reading/--max-tokens"
#: ``replay fixed.json``.
FLAGS: Table = {
    "sample 0": ("--sample 0", "--sample"),
    "sample 1.5": ("--sample 1.5", "--sample"),
    "sample -1": ("--sample=-1", "--sample"),
    "sample nan": ("--sample nan", "--sample"),
    "sample a word": ("--sample much", "--sample"),
    "seed -1": ("--seed=-1", "--seed"),
    "seed of 30 digits": (f"--seed {HUGE}", "--seed"),
    "search nowhere": ("--search nowhere", "nowhere"),
    "search a file": ("--search raw.txt", "raw.txt"),
    "search nothing": ("--search=", "--search"),
    "another k": ("--k 8", "--k"),
    "another split": ("--gen-subset valid", "--gen-subset"),
    "another model": ("--path lm.pt", "--path"),
    "another datastore": ("--dstore-filename dstore", "--dstore-filename"),
    "another window": ("--context-window=4", "--context-window"),
    "flag nobody knows": ("--colour red", "--colour"),
}
#: What is written in the place of ``fixed.json``, from what stands there.
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda _: b"",
    "half": lambda data: data[: len(data) // 2],
    "no UTF-8": lambda _: b"\xff" * 100,
    "a list": lambda _: b"[]",
    "no results": lambda _: b'{"tokens": 1}',
    "a number of 400 digits": lambda data: data.replace(b'"tokens": ', b'"tokens": ' + b"9" * 400),
    "NaN": lambda data: data.replace(b'"gain": ', b'"gain": NaN, "x": '),
    "10,000 brackets": lambda _: b"[" * 10_000,
    "a bit of a figure": lambda data: data.replace(b'"perplexity": 1', b'"perplexity": 2'),
}
#: Things that figures come of, in the folder of the receipts.
THINGS = {
    "the text": "data",
    "the model": "lm.pt",
    "the datastore": "dstore",
    "the raw text": "raw.txt",
}

#: What is done with one of them.
Way = Callable[..., str]


def cases() -> Iterator[Case]:
    """Flags and files; then fields, each altered; then what they name, elsewhere or others."""
    commands: tuple[Command, ...] = (("replay", FLAGS, lambda stage: _replay(stage, "fixed")),)
    yield from flag_cases("figures", MUST, commands, lambda _: {})
    for name, content in CONTENTS.items():
        play = partial(_content, content=content)
        yield Case("figures", f"receipt: {name}", f"{name} in its file", MUST, play)
    for run, fields, must, says in (
        ("fixed", FIELDS, FOUND, ""),
        ("fitted", OF_FITTED, FOUND, ""),
        ("fixed", COMPUTED, NAMED, " then"),
        ("fixed", UNTOLD, FREE, "confirmed"),
    ):
        for field in fields:
            play = partial(_altered, run=run, field=field, says=says)
            yield Case("figures", f"{run}: {field}", "altered, and sealed again", must, play)
    ways: tuple[tuple[str, str, Way], ...] = (
        ("moved", "refused; confirmed with --search", _moved),
        ("gone", MUST, _gone),
    )
    for what, name in THINGS.items():
        for how, must, way in ways:
            yield Case(
                "figures", f"{what} is {how}", f"{name} {how}", must, partial(way, name=name)
            )
    for name, done, must, step in STEPS:
        yield Case("figures", name, done, must, step)


def _receipts(stage: Stage) -> Path:
    """The world's receipts, and all that they name, by relative paths."""
    shutil.copytree(stage.world.receipts, stage.folder, dirs_exist_ok=True)
    return stage.folder


def _words(run: str, *flags: object) -> list[object]:
    return knnlm("replay", f"{run}.json", *HERE, *flags)


def _replay(stage: Stage, run: str, *flags: object) -> list[object]:
    _receipts(stage)
    return _words(run, *flags)


def _content(stage: Stage, *, content: Callable[[bytes], bytes]) -> str:
    words = _replay(stage, "fixed")
    path = stage.folder / "fixed.json"
    path.write_bytes(content(path.read_bytes()))
    return stage.refused(words, r"fixed\.json")


# Fields


def _other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.01
    if isinstance(value, str):
        return ("0" if value[0] != "0" else "1") + value[1:]
    return "f" * 64


def _alter(stage: Stage, run: str, field: str) -> None:
    """Changes a field, and seals the results again."""
    path = _receipts(stage) / f"{run}.json"
    found = json.loads(path.read_text())
    parts = [int(part) if part == "-1" else part for part in field.split("/")]
    part = found
    for name in parts[:-1]:
        part = part[name]
    part[parts[-1]] = _other(part[parts[-1]])
    path.write_bytes(sealed.sealed(found))


def _altered(stage: Stage, *, run: str, field: str, says: str) -> str:
    """It is refused; or, where ``says`` is something, confirmed with these words."""
    _alter(stage, run, field)
    if not says:
        return stage.refused(_words(run), "")
    return stage.works(_words(run), says=rf"{says}(.*\n)*").last


def _batches(stage: Stage) -> str:
    """Products of more rows or fewer may differ in the last digit, by the processor."""
    _alter(stage, "fixed", BATCHES)
    if stage.run(_words("fixed")).code:
        return stage.refused(_words("fixed"), "should come to the last digit")
    return stage.works(_words("fixed"), says="confirmed").last


def _every_field(stage: Stage) -> str:
    """Fields that are in no list above would never be altered."""
    known = {*FIELDS, *OF_FITTED, *COMPUTED, *UNTOLD, *SETTINGS, BATCHES, "fingerprint"}
    folder, count = _receipts(stage), 0
    for run in ("fixed", "fitted"):
        found = set(_leaves(json.loads((folder / f"{run}.json").read_text())))
        if found - known:
            raise BadOutcome(f"nobody looks at {', '.join(sorted(found - known))}")
        count += len(found)
    return f"{count} fields, each of them listed"


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    """The names of the fields of JSON, of lists those of the last entry."""
    inside: list[tuple[str, Any]] = [*value.items()] if isinstance(value, dict) else []
    if isinstance(value, list) and value:
        inside = [("-1", value[-1])]
    for part, one in inside:
        yield from _leaves(one, f"{name}/{part}")
    if not inside:
        yield name.removeprefix("/")


def _left_out(stage: Stage) -> str:
    """A field that is gone is missed, or means what it said."""
    path, meant = _receipts(stage) / "fixed.json", 0
    whole = json.loads(path.read_text())
    for name in ("tokens", "loss", "weights", "sections", "conditions", "context", "receipt"):
        found = {key: value for key, value in whole.items() if key != name}
        path.write_bytes(sealed.sealed(found))
        stage.refused(_words("fixed"), r"fixed\.json", changes=["fixed.json"])
    for name in whole["receipt"]:
        found = copy.deepcopy(whole)
        del found["receipt"][name]
        path.write_bytes(sealed.sealed(found))
        stage.refused(_words("fixed"), name, changes=["fixed.json"])
        meant += 1
    return f"refused, for each of {meant + 7} fields"


# Files


def _moved(stage: Stage, *, name: str) -> str:
    words = _replay(stage, "fixed")
    (stage.folder / "elsewhere" / "deep").mkdir(parents=True)
    shutil.move(stage.folder / name, stage.folder / "elsewhere" / "deep" / "other name")
    stage.refused(words, f"{name}: .*gone")
    stage.works([*words, "--search", "elsewhere"], says=f"{name}: found at .*\\n(.*\\n)*confirmed")
    return "refused; found by its fingerprint, and confirmed"


def _gone(stage: Stage, *, name: str) -> str:
    """And others of its kind are there to be found, which it is not."""
    words = _replay(stage, "fixed")
    path, others = stage.folder / name, stage.folder / "others"
    others.mkdir()
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(stage.world.cut, others / "dstore")
    shutil.copy(stage.world.checkpoint("other"), others / "lm.pt")
    shutil.copy(stage.world.folder / "valid.txt", others / "raw.txt")
    (others / "data").mkdir()
    shutil.copy(stage.world.data / "dict.txt", others / "data" / "dict.txt")
    (others / "manifest.json").write_bytes(b"{")
    (others / "loop").symlink_to("loop")
    os.mkfifo(others / "pipe")
    return stage.refused([*words, "--search", "others"], f"nor in others(.*\\n)*.*{name}: .*gone")


def _another(stage: Stage) -> str:
    """In the place of each thing another of its kind, none of which is taken for it."""
    words = _replay(stage, "fixed")
    world, folder = stage.world, stage.folder
    shutil.copy(world.checkpoint("other"), folder / "lm.pt")
    shutil.copy(world.folder / "valid.txt", folder / "raw.txt")
    shutil.rmtree(folder / "dstore")
    shutil.copytree(world.cut, folder / "dstore")
    for end in ("bin", "idx"):
        shutil.copy(world.data / f"valid.{end}", folder / "data" / f"test.{end}")
    names = ("data data: test.bin", r"--path lm\.pt", r"--raw-text raw\.txt", "datastore dstore")
    return stage.refused(words, r"(.*\n)*.*".join(names))


def _another_calibration(stage: Stage) -> str:
    words = _replay(stage, "fitted")
    table = stage.world.tables / "valid.npz"
    tune = knnlm("tune", "--dstore", "dstore", "--score-table", table, "--seed", 3)
    stage.works(tune, changes=["dstore/calibration*"])
    return stage.refused(words, "calibration")


def _share(stage: Stage) -> str:
    shutil.copy(stage.world.shares / "0.json", stage.folder / "0.json")
    return stage.refused(_words("0"), "share")


def _several(stage: Stage) -> str:
    """What is wrong with one does not keep others from being looked at."""
    _receipts(stage)
    (stage.folder / "a.json").write_text("{")
    words = knnlm("replay", "a.json", "fixed.json", "fitted.json", *HERE)
    stage.refused(words, "1 of 3 results are not confirmed")
    ran = stage.works(words[:1] + ["replay", "fixed.json", "fitted.json", *HERE])
    if ran.out.count("confirmed\n") != 2:
        raise BadOutcome(f"not both are confirmed: {ran.last}")
    return "the one is named, the others are confirmed"


def _report(stage: Stage) -> str:
    """The receipt of a report: its table elsewhere, then altered."""
    store, table = stage.store(), stage.folder / "t.npz"
    shutil.copy(stage.world.tables / "test.npz", table)
    words = knnlm("report", "--dstore", store.name, "--score-table", table.name)
    stage.works([*words, "--results-json", "r.json"])
    stage.works(_words("r"), says="confirmed")
    (stage.folder / "elsewhere").mkdir()
    table.rename(stage.folder / "elsewhere" / "t")
    stage.refused(_words("r"), r"--score-table t\.npz: gone")
    stage.works(_words("r", "--search", "elsewhere"), says="confirmed")
    data = bytearray((stage.folder / "elsewhere" / "t").read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    stage.refused(_words("r"), r"t\.npz: of other bytes")
    table.write_bytes((stage.folder / "elsewhere" / "t").read_bytes())
    found = json.loads((stage.folder / "r.json").read_text())
    for field in ("perplexity", "gain_error", "tokens"):
        changed = {**found, field: _other(found[field])}
        (stage.folder / "r.json").write_bytes(sealed.sealed(changed))
        stage.refused(_words("r"), rf"{field} .*in the place of")
    return "confirmed, found where it was moved, and five changes refused"


STEPS: tuple[tuple[str, str, str, Callable[[Stage], str]], ...] = (
    (f"fixed: {BATCHES}", "altered, and sealed again", DIGITS, _batches),
    ("every field of a receipt", "fields of two results, listed", "each is listed", _every_field),
    ("a field left out", "one field after another", MUST, _left_out),
    ("others in their place", "text, model, datastore, raw text", "all are named", _another),
    ("another calibration", "tune --seed 3", MUST, _another_calibration),
    ("a receipt of a share", "replay of a share's results", MUST, _share),
    ("several receipts", "replay of three, one of them garbage", "it alone is named", _several),
    ("the receipt of a report", "moved, altered", "refused; confirmed with --search", _report),
)
