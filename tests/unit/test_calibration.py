"""Calibrations: what was fitted comes back as it was, and what does not fit is refused."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load, save
from stores import alter, assert_helps, lengthen, truncate
from torch import Tensor

from fairseq_knnlm.calibration import record as module
from fairseq_knnlm.calibration import settings
from fairseq_knnlm.calibration.record_file import calibrated_sets, read_record
from fairseq_knnlm.calibration.stored import (
    Calibration,
    FittedMixture,
    read_calibration,
    write_calibration,
)
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import fingerprint, write_sealed
from fairseq_knnlm.lm.contexts import CONTEXT
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Bins, Fixed, Gate, Skip

DATASTORE, MODEL = "d" * 64, "e" * 64
KNN = Component("knn", {"suffix": 0, "k": 0, "temperature": 2.0**0.5})
SHARP = Component("knn", {"suffix": 1, "k": 16, "temperature": 0.25})
CACHE = Component("cache", {"suffix": 0, "theta": 0.1, "window": 4000})
WIDTHS = {"knn_distances": 3, "cache_size": 2}


def gate() -> Gate:
    """One whose weights and scales are all its own."""
    torch.manual_seed(4)
    made = Gate((LM, KNN, SHARP, CACHE), tuple(WIDTHS), sum(WIDTHS.values()), hidden=(7, 5))
    with torch.no_grad():
        for weight in (*made.parameters(), *made.buffers()):
            weight.copy_(torch.rand_like(weight) + 0.1)
    return made.eval()


def mixtures() -> tuple[FittedMixture, ...]:
    """The language model alone, and one of each kind of mixer."""
    mixers = {
        (): Fixed((LM,), (1.0,)),
        ("knn",): Fixed((LM, KNN), (0.7, 0.3)),
        ("knn", "cache"): Fixed((LM, KNN, SHARP, CACHE), (0.4, 1 / 3, 0.0, 4 / 15), kind="blend"),
        ("cache", "knn"): Bins(
            (LM, KNN), (1.0, 2.5), [[0.9, 0.1], [1.0, 0.0], [0.0, 1.0]], abstain="lm"
        ),
        ("knn", "cache", "lm2"): gate(),
    }
    figures = (100.0, 90.0, 80.5, 85.0, 70.25)
    return tuple(
        FittedMixture(experts, mixer, perplexity, perplexity / 10, perplexity + 1)
        for (experts, mixer), perplexity in zip(mixers.items(), figures, strict=True)
    )


def on(tokens: int = 1000) -> dict[str, Any]:
    """What a calibration says of the text."""
    context = {"tokens_per_sample": 512, "context_window": 0, "sample_break_mode": "none"}
    counts = {"tokens": tokens, "chosen_on": 100, "held_out": 100}
    return {"split": "valid", **counts, "seed": 0, "context": context}


def calibration() -> Calibration:
    return Calibration(
        datastores=(DATASTORE,),
        model=MODEL,
        fitted_on=on(),
        experts={"knn": {"k": 64, "index": "Flat"}, "cache": {"reset": False}},
        base_perplexity=100.0,
        mixtures=mixtures(),
        default=4,
        versions={"python": "3"},
        skips=(Skip(gate(), np.linspace(-5, 5, 101).tolist()),),
        names=("news",),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A calibration as it is kept."""
    write_calibration(tmp_path / "calibration.json", calibration())
    return tmp_path / "calibration.json"


def read(path: Path) -> Calibration:
    found = read_calibration(path, [DATASTORE])
    assert found is not None
    return found


def test_everything_comes_back(path: Path) -> None:
    found, expected = read(path), calibration()
    assert replace(found, mixtures=(), skips=()) == replace(expected, mixtures=(), skips=())
    (ours,), (theirs,) = expected.skips, found.skips
    assert theirs.quantiles == ours.quantiles
    for one, other in zip(found.mixtures, expected.mixtures, strict=True):
        assert replace(one, mixer=None) == replace(other, mixer=None)
        assert one.mixer.kind == other.mixer.kind
        assert list(one.mixer.components) == list(other.mixer.components)
        assert list(one.mixer.features) == list(other.mixer.features)
        assert one.mixer.abstain == other.mixer.abstain


@pytest.mark.parametrize("place", range(len(mixtures())))
def test_mixers_weigh_as_before(path: Path, place: int) -> None:
    """To the last bit, also of tokens of which a feature is not known."""
    generator = torch.manual_seed(3)
    features = {
        name: torch.randn(50, width, generator=generator) * 3 + 1 for name, width in WIDTHS.items()
    }
    features["knn_distances"][::5] = torch.nan
    before, after = (each.mixtures[place].mixer for each in (calibration(), read(path)))
    weights = after.log_weights(features)
    assert torch.equal(weights, before.log_weights(features))
    torch.testing.assert_close(weights.exp().sum(-1), torch.ones(weights.shape[:-1]))


def test_a_gate_that_is_read_is_done_learning(path: Path) -> None:
    """Dropout would make the weights depend on chance."""
    found = read(path).best.mixer
    assert isinstance(found, Gate)
    assert not found.training


def test_without_gates(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, replace(calibration(), mixtures=mixtures()[:2], default=1, skips=()))
    assert [one.name for one in read(path).mixtures] == ["language model alone", "knn, fixed"]


def test_the_best_and_the_asked_for(path: Path) -> None:
    found = read(path)
    assert found.best.name == "knn+cache+lm2, gate"

    def named(experts: list[str], kind: str = "auto") -> str | None:
        mixture = found.find(experts, kind)
        return mixture and mixture.name

    assert named(["knn", "cache"]) == named(["cache", "knn"]) == "knn+cache, blend"
    assert named(["knn", "cache"], "bins") == "cache+knn, bins"
    assert named([]) == "language model alone"
    assert named(["knn"], "gate") is None
    assert named(["cache"]) is None


def test_where_there_is_none(tmp_path: Path) -> None:
    assert read_calibration(tmp_path / "calibration.json", [DATASTORE]) is None


def change(path: Path, **fields: object) -> None:
    """By hand, in an editor."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(content))


def no_json(path: Path) -> None:
    path.write_text("lambda = 0.25")


def better_figures(path: Path) -> None:
    change(path, base_perplexity=1000.0)


def of_another_kind(path: Path) -> None:
    change(path, format="fairseq-knnlm datastore")


def from_the_future(path: Path) -> None:
    write_sealed(path, module.FORMAT, module.VERSION + 1, {})


def of_version_1(path: Path) -> None:
    write_sealed(path, module.FORMAT, 1, {"lmbda": 0.25, "temperature": 10.0, "model": MODEL})


def with_a_field_missing(path: Path) -> None:
    content = json.loads(path.read_text())
    dropped = ("format", "version", "fingerprint", "experts")
    kept = {name: value for name, value in content.items() if name not in dropped}
    write_sealed(path, module.FORMAT, module.VERSION, kept)


@pytest.mark.parametrize(
    "spoil",
    [
        *(truncate, alter, no_json, better_figures, of_another_kind, from_the_future),
        *(of_version_1, with_a_field_missing),
    ],
)
def test_a_file_that_is_not_as_it_was(path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(path)
    with pytest.raises(TableError) as caught:
        read(path)
    assert_helps(caught, str(path), "fairseq-knnlm tune")


def test_version_1_is_named(path: Path) -> None:
    of_version_1(path)
    with pytest.raises(TableError, match="version 1"):
        read(path)


@pytest.mark.parametrize(
    "datastores", [["f" * 64], [], [DATASTORE, "f" * 64], ["f" * 64, DATASTORE]]
)
def test_other_datastores(path: Path, datastores: list[str]) -> None:
    with pytest.raises(TableError) as caught:
        read_calibration(path, datastores)
    assert_helps(caught, "another datastore", "found:    datastore dddddddddddd...")


def test_another_model(path: Path) -> None:
    found = read(path)
    found.check_model(MODEL)
    with pytest.raises(TableError) as caught:
        found.check_model("f" * 64)
    assert_helps(caught, "expected: language model ffffffffffff", "found:    language model eeee")


def more() -> Calibration:
    another = FittedMixture(("knn", "cache"), gate(), 80.0, 8.0, 80.0)
    return replace(calibration(), mixtures=(*mixtures(), another))


@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_a_write_that_fails_leaves_the_old_one(
    path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or an end before the file takes its name. Nothing else is left behind."""
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, fails, fail)
        with pytest.raises(OSError, match="no space"):
            write_calibration(path, more())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    assert len(read(path).mixtures) == len(mixtures())
    write_calibration(path, more())
    assert len(read(path).mixtures) == len(mixtures()) + 1


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
from test_calibration import more
from fairseq_knnlm.calibration.stored import write_calibration
from fairseq_knnlm.files import publishing
flushed = publishing.flush_to_disk
def kill(path):
    flushed(path)
    os.kill(os.getpid(), 9)
publishing.flush_to_disk = kill
write_calibration(Path({path!r}), more())
"""


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_one(path: Path) -> None:
    before = path.read_bytes()
    script = KILLED.format(
        tests=str(ROOT / "tests"), here=str(Path(__file__).parent), path=str(path)
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert path.read_bytes() == before
    write_calibration(path, more())
    assert list(path.parent.iterdir()) == [path]


def test_all_is_one_file(path: Path) -> None:
    assert list(path.parent.iterdir()) == [path]


def of_version_2(path: Path) -> None:
    """The same as written then: gates in a file of their own, one figure, no convention."""
    content = json.loads(path.read_text())
    packed = base64.b64decode(content.pop("gates"))
    path.with_suffix(".safetensors").write_bytes(packed)
    for field in ("format", "version", "fingerprint", "names"):
        del content[field]
    del content["fitted_on"]["chosen_on"], content["fitted_on"]["context"]
    for each in (*content["stacks"], *content["skips"]):
        del each["mixer"]["abstain"]
        each.pop("choice_perplexity", None)
    sha256 = hashlib.sha256(packed).hexdigest()
    content["gates"] = {"file": "calibration.safetensors", "sha256": sha256}
    write_sealed(path, module.FORMAT, 2, content)


def test_version_2_still_opens(path: Path) -> None:
    before = read(path)
    of_version_2(path)
    found = read(path)
    assert found.best.name == before.best.name
    assert found.fitted_on == before.fitted_on | {"context": {}}
    features = {name: torch.randn(9, width) for name, width in WIDTHS.items()}
    for one, other in zip(found.mixtures, before.mixtures, strict=True):
        assert one.mixer.abstain == "share"
        assert one.choice_perplexity == one.perplexity == other.perplexity
        assert torch.equal(one.mixer.log_weights(features), other.mixer.log_weights(features))
    write_calibration(path, before)
    assert len(read(path).mixtures) == len(mixtures())


@pytest.mark.parametrize("spoil", [truncate, lengthen, alter, Path.unlink])
def test_gates_of_version_2_that_are_not_as_they_were(
    path: Path, spoil: Callable[[Path], None]
) -> None:
    of_version_2(path)
    spoil(path.with_suffix(".safetensors"))
    with pytest.raises(TableError) as caught:
        read(path)
    assert_helps(caught, str(path), "calibration.safetensors", "fairseq-knnlm tune")


# What stands in the fields


def resealed(path: Path, place: tuple[str | int, ...], value: object) -> None:
    """With one field another, and a seal that fits; ``GONE`` removes it."""
    content = json.loads(path.read_text())
    del content["fingerprint"]
    owner = content
    for step in place[:-1]:
        owner = owner[step]
    if value is GONE:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    content["fingerprint"] = fingerprint(content)
    path.write_text(json.dumps(content))


GONE = object()
BLEND, BINS, GATE = (("stacks", place, "mixer") for place in (2, 3, 4))
NEAR, RECENT = ((*BLEND, "components", place, "setting") for place in (1, 3))
#: A field, what it is spoilt with, and what the message names.
SPOILT: list[tuple[tuple[str | int, ...], object, str]] = [
    (("stacks",), {}, "$.stacks"),
    (("stacks",), [], "$.stacks"),
    (("default",), 5, "default 5 of 5 stacks"),
    (("default",), -1, "$.default"),
    (("default",), True, "$.default"),
    (("datastores",), "d" * 64, "$.datastores"),
    (("names",), ["a", "b"], "2 names of 1 datastores"),
    (("model",), None, "$.model"),
    (("experts",), [], "$.experts"),
    (("base_perplexity",), math.nan, "NaN"),
    (("base_perplexity",), math.inf, "Infinity"),
    (("base_perplexity",), 0.0, "$.base_perplexity"),
    (("fitted_on", "tokens"), "many", "$.fitted_on.tokens"),
    (("fitted_on", "chosen_on"), GONE, "chosen_on"),
    (("stacks", 1, "choice_perplexity"), GONE, "choice_perplexity"),
    (("stacks", 1, "perplexity"), -3.0, "$.stacks[1].perplexity"),
    (("stacks", 1, "experts"), [], "stacks[1].experts lacks knn"),
    (("stacks", 0, "experts"), ["knn"], "stacks[0] is not the language model alone"),
    (("stacks", 1, "colour"), "red", "colour"),
    ((*BLEND, "kind"), "magic", "$.stacks[2].mixer"),
    ((*BLEND, "abstain"), "nobody", "abstain"),
    ((*BLEND, "abstain"), GONE, "abstain"),
    ((*BLEND, "weights"), [0.5, 0.5, 0.5, -0.5], "$.stacks[2].mixer.weights[3]"),
    ((*BLEND, "weights"), [0.5, 0.2, 0.2, 0.2], "stacks[2].mixer.weights sum to 1.1"),
    ((*BLEND, "weights"), [0.5, 0.5], "stacks[2].mixer.weights: 2 weights of 4 components"),
    ((*BLEND, "weights", 0), "half", "$.stacks[2].mixer.weights[0]"),
    ((*BLEND, "components"), [], "$.stacks[2].mixer.components"),
    ((*BLEND, "components", 1, "expert"), "oracle", "stacks[2].mixer.components[1]"),
    ((*BLEND, "components", 0, "expert"), "lm2", "stacks[2].mixer.components do not begin"),
    ((*BLEND, "components", 0, "expert"), "oracle", "oracle"),
    ((*BLEND, "components", 0, "expert"), "knn1", "no expert 'knn1'"),
    ((*BLEND, "components", 1), {"expert": "lm", "setting": {}}, "repeat the language model"),
    ((*NEAR, "temperature"), 0, "temperature"),
    ((*NEAR, "temperature"), -1.0, "temperature"),
    ((*NEAR, "temperature"), math.inf, "Infinity"),
    ((*NEAR, "temperature"), "warm", "temperature"),
    ((*NEAR, "temperature"), GONE, "temperature"),
    ((*NEAR, "suffix"), CONTEXT + 1, "suffix"),
    ((*NEAR, "suffix"), -1, "suffix"),
    ((*NEAR, "k"), -1, "`$.k`"),
    ((*NEAR, "window"), 5, "window"),
    ((*RECENT, "theta"), -0.5, "theta"),
    ((*RECENT, "window"), 0, "window"),
    ((*RECENT, "window"), 10**12, "window"),
    ((*RECENT, "window"), 4000.5, "window"),
    ((*BINS, "edges"), [2.5, 1.0], "stacks[3].mixer.edges do not ascend"),
    ((*BINS, "edges"), [1.0], "stacks[3].mixer.weights: 3 rows"),
    ((*BINS, "weights", 1), [0.5, 0.6], "stacks[3].mixer.weights[1] sum to 1.1"),
    ((*BINS, "features"), [], "stacks[3].mixer.features"),
    ((*GATE, "hidden"), [10**9], "$.stacks[4].mixer.hidden[0]"),
    ((*GATE, "hidden"), [0], "$.stacks[4].mixer.hidden[0]"),
    ((*GATE, "hidden"), [65_536] * 4, "gates"),
    ((*GATE, "inputs"), 10**9, "$.stacks[4].mixer.inputs"),
    ((*GATE, "inputs"), 65_536, "gates"),
    ((*GATE, "components"), [{"expert": "lm", "setting": {}}], "gates"),
    (("skips", 0, "quantiles"), [0.0] * 100, "$.skips[0].quantiles"),
    (("skips", 0, "quantiles", 50), 99.0, "skips[0].quantiles do not ascend"),
    (("skips", 0, "mixer", "kind"), "fixed", "$.skips[0].mixer"),
    (("gates",), "no base64!", "gates"),
    (("gates",), "aGVsbG8=", "gates"),
    (("gates",), 7, "gates"),
    (("gates",), {}, "gates"),
    (("colour",), "red", "colour"),
    (("skips",), GONE, "skips"),
]


#: Those that only make sense, or none, to the network that they are of.
SHAPES = [
    ((*GATE, "hidden"), [65_536] * 4),
    ((*GATE, "inputs"), 65_536),
    ((*GATE, "components"), [{"expert": "lm", "setting": {}}]),
]


@pytest.mark.parametrize(("place", "value", "says"), SPOILT)
def test_fields_that_cannot_be(
    path: Path, place: tuple[str | int, ...], value: object, says: str
) -> None:
    """One message, that names the field; and no gate of another size is made."""
    resealed(path, place, value)
    with pytest.raises(TableError) as caught:
        read(path)
    assert_helps(caught, str(path), "fairseq-knnlm tune")
    assert says.strip("`") in str(caught.value)


@pytest.mark.parametrize(("place", "value", "says"), SPOILT)
def test_what_can_be_told_without_torch_is(
    path: Path, place: tuple[str | int, ...], value: object, says: str
) -> None:
    """All but the shapes of a gate, which torch knows."""
    resealed(path, place, value)
    if (place, value) in SHAPES:
        assert read_record(path, [DATASTORE]) is not None
        return
    with pytest.raises(TableError) as caught:
        read_record(path, [DATASTORE])
    assert_helps(caught, str(path), "fairseq-knnlm tune")
    assert says.strip("`") in str(caught.value)


def test_the_light_record_says_what_the_calibration_says(path: Path) -> None:
    record, whole = read_record(path, [DATASTORE]), read(path)
    assert record is not None
    assert (record.best.name, record.best.perplexity) == (whole.best.name, whole.best.perplexity)
    assert [one.name for one in record.mixtures] == [one.name for one in whole.mixtures]
    assert [one.mixer.kind for one in record.mixtures] == [one.mixer.kind for one in whole.mixtures]
    assert record.base_perplexity == whole.base_perplexity
    assert (record.fitted_on.split, record.fitted_on.tokens) == ("valid", 1000)
    of_version_2(path)
    older = read_record(path, [DATASTORE])
    assert older is not None
    assert [one.name for one in older.mixtures] == [one.name for one in whole.mixtures]


ORACLE = Component("oracle", {"heat": 0.5, "deep": True, "style": "bold", "temperature": 2.0})


def with_oracle(setting: dict[str, Any]) -> Calibration:
    mixer = Fixed((LM, Component("oracle", setting)), (0.5, 0.5))
    another = FittedMixture(("oracle",), mixer, 80.0, 8.0, 80.0)
    return replace(calibration(), mixtures=(*mixtures(), another))


def test_an_expert_from_elsewhere_has_settings_of_its_own(path: Path) -> None:
    write_calibration(path, with_oracle(ORACLE.setting))
    found = read(path).find(["oracle"])
    assert found is not None
    assert list(found.mixer.components) == [LM, ORACLE]


@pytest.mark.parametrize(
    ("name", "value"),
    [("heat", [1]), ("heat", None), ("heat", 10**400), ("temperature", 0), ("k", "many")]
    + [("no name", 1), ("suffix", 99)],
)
def test_settings_that_no_expert_can_have(path: Path, name: str, value: object) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=name) as caught:
        write_calibration(path, with_oracle(ORACLE.setting | {name: value}))
    assert "stacks[5].mixer.components[1].setting" in str(caught.value)
    assert path.read_bytes() == before


def test_the_tokens_that_experts_look_back_are_known_without_torch() -> None:
    assert settings.CONTEXT == CONTEXT


def test_what_is_resealed_unchanged_opens(path: Path) -> None:
    """The test above sees the fields, and not its own seal."""
    resealed(path, ("default",), 4)
    assert read(path).best.name == calibration().best.name


WIDE = sum(WIDTHS.values())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors: tensors.pop("4.mean"),
        lambda tensors: tensors.update({"4.extra": torch.zeros(3)}),
        lambda tensors: tensors.update({"1.mean": torch.zeros(WIDE)}),
        lambda tensors: tensors.update({"9.mean": torch.zeros(WIDE)}),
        lambda tensors: tensors.update({"4.mean": torch.zeros(WIDE + 1)}),
        lambda tensors: tensors.update({"4.mean": torch.zeros(WIDE).double()}),
        lambda tensors: tensors["4.layers.0.weight"].fill_(math.nan),
        lambda tensors: tensors["skip0.scale"].fill_(math.inf),
    ],
    ids=["missing", "extra", "of no gate", "of nobody", "shape", "type", "NaN", "infinite"],
)
def test_gates_that_cannot_be(path: Path, spoil: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load(base64.b64decode(json.loads(path.read_text())["gates"]))
    spoil(tensors)
    resealed(path, ("gates",), base64.b64encode(save(tensors)).decode())
    with pytest.raises(TableError) as caught:
        read(path)
    assert_helps(caught, str(path), "gates: ", "fairseq-knnlm tune")


def test_figures_that_are_no_numbers_are_not_written(path: Path) -> None:
    before = path.read_bytes()
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="base_perplexity"):
            write_calibration(path, replace(calibration(), base_perplexity=wrong))
    assert path.read_bytes() == before


# Sets of datastores

SECOND, THIRD = "f" * 64, "0" * 64


def of(*datastores: str) -> Calibration:
    names = {DATASTORE: "news", SECOND: "books", THIRD: "code"}
    known = tuple(names[one] for one in datastores)
    return replace(
        calibration(), datastores=datastores, names=known, fitted_on=on(tokens=len(datastores))
    )


def test_each_set_of_datastores_has_its_own(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    sets = [(DATASTORE,), (DATASTORE, SECOND), (DATASTORE, THIRD), (DATASTORE, SECOND, THIRD)]
    files = {write_calibration(path, of(*each)) for each in sets}
    assert path in files
    assert set(tmp_path.iterdir()) == files
    assert len(files) == len(sets)
    for each in sets:
        found = read_calibration(path, each)
        assert found is not None
        assert found.datastores == each
        assert found.fitted_on["tokens"] == len(each)


def test_the_message_says_which_sets_there_are(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    file = write_calibration(path, of(DATASTORE, SECOND))
    assert not path.exists()
    for asked in ((DATASTORE,), (DATASTORE, THIRD), (DATASTORE, THIRD, SECOND)):
        with pytest.raises(TableError) as caught:
            read_calibration(path, asked)
        assert_helps(caught, "news:books", file.name, "ffffffffffff...", "another set")


def test_one_for_all_sets_as_older_versions_had_it(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, of(DATASTORE, SECOND)).rename(path)
    of_version_2(path)
    found = read_calibration(path, [DATASTORE, SECOND])
    assert found is not None
    write_calibration(path, of(DATASTORE))
    assert read(path).datastores == (DATASTORE,)


def test_what_was_fitted_before_a_datastore_was_changed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Serves with a warning, the latest first, until something is fitted for it as it is."""
    path, now, older, oldest = tmp_path / "calibration.json", "9" * 64, SECOND, DATASTORE
    write_calibration(path, of(oldest, THIRD))
    before = [[oldest, older], []]
    for each, warns in ((oldest, True), (older, True), (now, False)):
        write_calibration(path, replace(of(oldest, THIRD), datastores=(each, THIRD)))
        caplog.clear()
        found = read_calibration(path, [now, THIRD], before)
        assert found is not None
        assert found.datastores == (each, THIRD)
        assert ("tune again" in caplog.text) == warns
    # The name of the file tells the others, which may have been changed, too.
    found = read_calibration(path, [now, "8" * 64], [[oldest], [THIRD]])
    assert found is not None
    assert found.datastores == (now, THIRD)
    with pytest.raises(TableError, match="another set"):
        read_calibration(path, [now], [[oldest, older]])
    with pytest.raises(TableError, match="another set"):
        read_calibration(path, ["8" * 64, THIRD], [["7" * 64], []])


def test_the_other_sets_are_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    assert calibrated_sets(path) == []
    for each in ((DATASTORE,), (DATASTORE, SECOND)):
        file = write_calibration(path, of(*each))
    (line,) = calibrated_sets(path, but=[DATASTORE])
    assert "news:books" in line
    assert file.name in line
    truncate(file)
    assert calibrated_sets(path, but=[DATASTORE]) == [f"{file.name}, which is damaged"]
    assert read(path).datastores == (DATASTORE,)
