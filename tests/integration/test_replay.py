"""``fairseq-knnlm replay``: figures are confirmed where all is as it was, and nowhere else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Capture, refuse, said_and_wrong, say
from conftest import BLOCKS, Lab, eval_lm, must
from tiny_world import PLUGIN

from fairseq_knnlm.files import fingerprint
from fairseq_knnlm.runs.joining import join_results
from fairseq_knnlm.runs.receipt import sealed

READ = [*BLOCKS, "--sample-break-mode", "none", "--cpu", "--num-workers", "0"]
KNN = ["--knnlm", "--dstore-filename", "dstore", "--k", "16"]
FIXED = [*KNN, "--lmbda", "0.3", "--knn-temp", "2.0"]
CACHE = ["--experts", "cache", "--cache-lmbda", "0.2", "--cache-theta", "0.5"]
HERE = ["--cpu", "--num-workers", "0"]
#: Runs whose receipts are gone through, by their flags.
RUNS: dict[str, list[str]] = {
    "base": [],
    "fixed": [*FIXED, "--raw-text", "raw.txt"],
    "calibrated": KNN,
    "cache": [*CACHE, "--cache-window", "40"],
    "pointers": [*FIXED, "--pointers", "join"],
    "gate": [*KNN, "--experts", "knn,cache", "--mixer", "gate"],
    "indexfile": [*FIXED, "--indexfile", "other.index"],
    "sentences": [*FIXED, "--sample-break-mode", "eos", "--context-window", "0"],
    "beginnings": [*FIXED, "--add-bos-token", "--context-window", "0"],
    "stride": [*FIXED, "--stride", "5", "--context-window", "0"],
}


def evaluate(name: str, *flags: str, split: str = "test") -> Path:
    """Of the folder that this process is in."""
    to = Path(f"{name}.json")
    words = ["data", *map(str, PLUGIN), "--path", "lm.pt", "--gen-subset", split, *READ, *flags]
    eval_lm([*words, "--results-json", str(to)])
    return to


@pytest.fixture(scope="module")
def world(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that makes figures, and their results, by relative paths."""
    folder = tmp_path_factory.mktemp("receipts") / "world"
    folder.mkdir()
    shutil.copytree(lab.data, folder / "data")
    shutil.copy(lab.checkpoint(), folder / "lm.pt")
    shutil.copy(lab.folder / "test.txt", folder / "raw.txt")
    before = Path.cwd()
    model = ["--path", "lm.pt", *BLOCKS, "--sample-break-mode", "none", "--cpu"]
    os.chdir(folder)
    try:
        must("fairseq-knnlm", "save", "data", "--dstore", "dstore", *model, cwd=folder)
        must("fairseq-knnlm", "build-index", "--dstore", "dstore", cwd=folder)
        tune = ["fairseq-knnlm", "tune", "--dstore", "dstore", "--data", "data", *model, "--k", 16]
        must(*tune, cwd=folder)
        shutil.copy("dstore/knn.index", "other.index")
        for name, flags in RUNS.items():
            evaluate(name, *flags)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which this process is."""
    shutil.copytree(world, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def replay(name: str, *flags: object) -> list[object]:
    return ["replay", f"{name}.json", *flags, *HERE]


@pytest.mark.parametrize("name", list(RUNS))
def test_what_is_as_it_was_is_confirmed(here: Path, name: str, capsys: Capture) -> None:
    """All of it, and any sample: to the last digit, on the machine that computed it."""
    whole = json.loads(Path(f"{name}.json").read_text())
    sections = len(whole["sections"]["tokens"])
    said = say(capsys, *replay(name))
    assert f"{sections} of {sections} sections scored again, {whole['tokens']:,} tokens" in said
    same = "the same to the last digit"
    assert same in said and said.endswith("confirmed\n")
    for seed in range(2):
        said = say(capsys, *replay(name, "--sample", 0.05, "--seed", seed))
        assert f"{round(0.05 * sections)} of {sections} sections scored again" in said
        rounding = name == "sentences"  # whose batches go by length
        assert same in said or (rounding and "the same but for rounding" in said), said
        assert said.endswith("confirmed\n")


def edit(name: str, change: Callable[[dict[str, Any]], None], *, seal: bool = True) -> None:
    """A change that whoever forges results makes, under a seal that is right."""
    path = Path(f"{name}.json")
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(sealed(found) if seal else found))


def test_results_are_sealed(here: Path, capsys: Capture) -> None:
    found = json.loads(Path("fixed.json").read_text())
    seal = found.pop("fingerprint")
    assert seal == fingerprint(found)
    edit("fixed", lambda some: some.update(seconds=1.0), seal=False)
    assert "an altered file (its fingerprint differs)" in refuse(capsys, *replay("fixed"))


def another_temperature(found: dict[str, Any]) -> None:
    found["receipt"]["flags"]["knn_temp"] = 3.0


def another_temperature_everywhere(found: dict[str, Any]) -> None:
    another_temperature(found)
    for one in found["weights"]:
        if one["expert"] == "knn":
            one["temperature"] = 3.0
    found["mixture"] = found["mixture"].replace("temperature 2", "temperature 3")


def another_k(found: dict[str, Any]) -> None:
    found["receipt"]["flags"]["k"] = 8


def another_window(found: dict[str, Any]) -> None:
    found["receipt"]["reading"]["--context-window"] = "4"
    found["receipt"]["reading"]["--tokens-per-sample"] = "12"


def another_split(found: dict[str, Any]) -> None:
    found["receipt"]["reading"]["--gen-subset"] = found["split"] = "valid"


def better(found: dict[str, Any]) -> None:
    found["perplexity"] *= 0.99


def more_words(found: dict[str, Any]) -> None:
    found["text"]["words"] += 1


def another_stride(found: dict[str, Any]) -> None:
    found["conditions"]["stride"] += 1


def another_dictionary(found: dict[str, Any]) -> None:
    found["receipt"]["dictionary"] = "f" * 64


def half_precision(found: dict[str, Any]) -> None:
    found["receipt"]["precision"] = "float16"


def more_left_out(found: dict[str, Any]) -> None:
    found["tokens_left_out"] += 1


def faster(found: dict[str, Any]) -> None:
    found["tokens_per_second"] *= 2


def something_impossible(found: dict[str, Any]) -> None:
    found["tokens_impossible"] = 1


def better_in_one_section(found: dict[str, Any]) -> None:
    """And all figures that follow from it, but for the standard errors."""
    from fairseq_knnlm.runs import replay as module
    from fairseq_knnlm.runs.raw_text import RawText, text_figures
    from fairseq_knnlm.runs.results import losses

    found["sections"]["log_prob"][7] += 0.5
    sections = module.told_sections(found, Path("x")).sections
    totals = sections.base.sum(), sections.mixed.sum()
    found |= losses(
        tokens=found["tokens"],
        base_log_prob=totals[0],
        log_prob=totals[1],
        seconds=1,
        sections=sections,
    )
    found.update(text_figures(RawText(**found["text"]), *totals))


#: Changes under a right seal, and what is said of them.
FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another T": (another_temperature, "temperature 2 then, knn: lambda 0.3, temperature 3 now"),
    "another T everywhere": (another_temperature_everywhere, "sections by up to"),
    "another k": (another_k, "k 16 then, 8 now"),
    "another window": (another_window, "context "),
    "another split": (another_split, "is not the text of valid"),
    "a better figure": (better, "do not fit together"),
    "more words": (more_words, "do not fit together"),
    "another stride": (another_stride, "conditions "),
    "another dictionary": (another_dictionary, "dictionary ffff"),
    "half precision": (half_precision, "precision float16 then, float32 now"),
    "more left out": (more_left_out, "tokens left out 1 then, 0 now"),
    "faster": (faster, "do not fit together"),
    "something impossible": (something_impossible, "tokens_impossible 1"),
    "a better section": (better_in_one_section, "section 7 (rows"),
}


@pytest.mark.parametrize("case", list(FORGED))
def test_forged_receipts_are_found(here: Path, case: str, capsys: Capture) -> None:
    change, says = FORGED[case]
    edit("fixed", change)
    _, said = said_and_wrong(capsys, 1, *replay("fixed"))
    assert says in said, said
    assert said.count("error:") == said.count("expected:") == said.count("to do:") == 1


#: What the runs "fixed", "calibrated" and "indexfile" read.
FILES = [
    *("lm.pt", "raw.txt", "data/dict.txt", "data/test.bin", "data/test.idx", "other.index"),
    *("dstore/manifest.json", "dstore/keys.npy", "dstore/values.npy", "dstore/knn.index"),
    *("dstore/calibration.json", "fixed.json"),
]


def same_values(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.99])
def test_one_altered_byte_is_found(here: Path, name: str, place: float, capsys: Capture) -> None:
    run = {"other.index": "indexfile", "dstore/calibration.json": "calibrated"}.get(name, "fixed")
    path = Path(name)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    if path.suffix == ".json" and same_values(bytes(content), path.read_bytes()):
        content[int(place * len(content))] ^= 16  # of a digit beyond what 64 bits hold
    path.write_bytes(content)
    _, said = said_and_wrong(capsys, 1, *replay(run, "--sample", 0.01))
    assert path.name in said, said
    assert said.count("error:") == said.count("expected:") == 1


def test_another_index_is_found(here: Path, capsys: Capture) -> None:
    build = ["build-index", "--dstore", "dstore", "--recipe", "IVF8,Flat", "--probe", 2]
    say(capsys, *build)
    said = refuse(capsys, *replay("fixed"))
    assert "datastore dstore: another index" in said


def test_another_datastore_is_found(here: Path, capsys: Capture) -> None:
    model = ["--path", "lm.pt", *READ, "--gen-subset", "valid"]
    shutil.rmtree("dstore")
    must("fairseq-knnlm", "save", "data", "--dstore", "dstore", *model, cwd=here)
    assert "datastore dstore: another datastore" in refuse(capsys, *replay("fixed"))


def test_another_calibration_is_found(here: Path, capsys: Capture) -> None:
    model = ["--path", "lm.pt", *BLOCKS, "--sample-break-mode", "none", "--cpu"]
    tune = ["tune", "--dstore", "dstore", "--data", "data", *model, "--k", 16, "--seed", 5]
    must("fairseq-knnlm", *tune, cwd=here)
    _, said = said_and_wrong(capsys, 1, *replay("calibrated", "--sample", 0.01))
    assert "calibration " in said and "then" in said


def test_the_text_of_another_split_is_found(here: Path, capsys: Capture) -> None:
    for end in ("bin", "idx"):
        shutil.copy(f"data/valid.{end}", f"data/test.{end}")
    said = refuse(capsys, *replay("fixed"))
    assert "data data: test.bin of" in said and "test.idx of" in said


def move() -> None:
    Path("elsewhere/deep").mkdir(parents=True)
    shutil.move("data", "elsewhere/text")
    shutil.move("dstore", "elsewhere/deep/memory")
    shutil.move("lm.pt", "elsewhere/deep/checkpoint_9.pt")
    shutil.move("raw.txt", "elsewhere/raw")
    shutil.move("other.index", "elsewhere/some.index")


@pytest.mark.parametrize("name", ["fixed", "indexfile"])
def test_what_moved_is_found_by_its_fingerprint(here: Path, name: str, capsys: Capture) -> None:
    move()
    said = refuse(capsys, *replay(name))
    for what in ("data data: dict.txt gone", "--path lm.pt: gone", "datastore dstore: gone"):
        assert what in said
    assert "--search FOLDER finds it" in said
    said = say(capsys, *replay(name, "--search", "elsewhere"))
    assert "data data: found at elsewhere/text" in said
    assert "--path lm.pt: found at elsewhere/deep/checkpoint_9.pt" in said
    assert "datastore dstore: found at elsewhere/deep/memory" in said
    assert said.endswith("confirmed\n")


def test_what_is_gone_is_one_message(here: Path, capsys: Capture) -> None:
    """Also where other things that look alike are found."""
    move()
    checkpoint = Path("elsewhere/deep/checkpoint_9.pt")
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    said = refuse(capsys, *replay("fixed", "--search", "elsewhere"))
    assert "is not there as it was nor in elsewhere" in said
    assert "--path lm.pt: gone" in said
    assert "data data" not in said and said.count("expected:") == 1


def test_joined_shares_have_a_receipt(here: Path, capsys: Capture) -> None:
    names = [
        evaluate(f"share{n}", *FIXED, "--num-shards", "2", "--shard-id", str(n)) for n in (0, 1)
    ]
    capsys.readouterr()
    assert "results of a share" in refuse(capsys, *replay("share0"))
    say(capsys, "report", "--join", *names, "--results-json", "joined.json")
    assert say(capsys, *replay("joined")).endswith("confirmed\n")
    assert "fingerprint" not in join_results(names)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sample", 0], "--sample is a share"),
        (["--sample", 1.5], "--sample is a share"),
        (["--seed", -1], "--seed"),
        (["--search", "nowhere"], "no folder nowhere"),
        (["--k", 8], "--k is not to be chosen"),
        (["--context-window=4"], "--context-window is not to be chosen"),
    ],
)
def test_bad_flags(here: Path, flags: list[object], says: str, capsys: Capture) -> None:
    assert says in refuse(capsys, *replay("fixed", *flags))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no file"),
        ("{", "no JSON"),
        ("[]", "JSON of another kind"),
        ('{"tokens": 1}', "results without a receipt"),
    ],
)
def test_bad_results(here: Path, content: str | None, says: str, capsys: Capture) -> None:
    if content is not None:
        Path("bad.json").write_text(content)
    said = refuse(capsys, *replay("bad"))
    assert says in said and "bad.json cannot be replayed" in said
