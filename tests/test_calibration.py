"""Calibrations: what was fitted comes back as it was, and what does not fit is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import alter, assert_helps, lengthen, truncate

from fairseq_knnlm import calibration as module
from fairseq_knnlm.calibration import Calibration, Stack, read_calibration, write_calibration
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.files import write_sealed
from fairseq_knnlm.mixers import LM, Bins, Component, Fixed, Gate

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


def stacks() -> tuple[Stack, ...]:
    """The language model alone, and one of each kind of mixer."""
    mixers = {
        (): Fixed((LM,), (1.0,)),
        ("knn",): Fixed((LM, KNN), (0.7, 0.3)),
        ("knn", "cache"): Fixed((LM, KNN, SHARP, CACHE), (0.4, 1 / 3, 0.0, 4 / 15), kind="blend"),
        ("cache", "knn"): Bins((LM, KNN), (1.0, 2.5), [[0.9, 0.1], [1.0, 0.0], [0.0, 1.0]]),
        ("knn", "cache", "lm2"): gate(),
    }
    figures = (100.0, 90.0, 80.5, 85.0, 70.25)
    return tuple(
        Stack(experts, mixer, perplexity, perplexity / 10)
        for (experts, mixer), perplexity in zip(mixers.items(), figures, strict=True)
    )


def calibration() -> Calibration:
    return Calibration(
        datastores=(DATASTORE,),
        model=MODEL,
        fitted_on={"split": "valid", "tokens": 1000, "held_out": 100, "seed": 0},
        experts={"knn": {"k": 64, "index": "Flat"}, "cache": {"reset": False}},
        base_perplexity=100.0,
        stacks=stacks(),
        default=4,
        versions={"python": "3"},
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
    assert replace(found, stacks=()) == replace(expected, stacks=())
    for one, other in zip(found.stacks, expected.stacks, strict=True):
        assert replace(one, mixer=None) == replace(other, mixer=None)
        assert one.mixer.kind == other.mixer.kind
        assert list(one.mixer.components) == list(other.mixer.components)
        assert list(one.mixer.features) == list(other.mixer.features)


@pytest.mark.parametrize("place", range(len(stacks())))
def test_mixers_weigh_as_before(path: Path, place: int) -> None:
    """To the last bit, also of tokens of which a feature is not known."""
    generator = torch.manual_seed(3)
    features = {
        name: torch.randn(50, width, generator=generator) * 3 + 1 for name, width in WIDTHS.items()
    }
    features["knn_distances"][::5] = torch.nan
    before, after = (each.stacks[place].mixer for each in (calibration(), read(path)))
    weights = after.log_weights(features)
    assert torch.equal(weights, before.log_weights(features))
    torch.testing.assert_close(weights.exp().sum(-1), torch.ones(weights.shape[:-1]))


def test_a_gate_that_is_read_is_done_learning(path: Path) -> None:
    """Dropout would make the weights depend on chance."""
    found = read(path).best.mixer
    assert isinstance(found, Gate)
    assert not found.training


def test_without_gates_there_is_nothing_in_the_file_of_weights(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, replace(calibration(), stacks=stacks()[:2], default=1))
    assert [stack.name for stack in read(path).stacks] == ["language model alone", "knn, fixed"]


def test_the_best_and_the_asked_for(path: Path) -> None:
    found = read(path)
    assert found.best.name == "knn+cache+lm2, gate"

    def named(experts: list[str], kind: str = "auto") -> str | None:
        stack = found.find(experts, kind)
        return stack and stack.name

    assert named(["knn", "cache"]) == named(["cache", "knn"]) == "knn+cache, blend"
    assert named(["knn", "cache"], "bins") == "cache+knn, bins"
    assert named([]) == "language model alone"
    assert named(["knn"], "gate") is None
    assert named(["cache"]) is None


def test_where_there_is_none(tmp_path: Path) -> None:
    assert read_calibration(tmp_path / "calibration.json", [DATASTORE]) is None


@pytest.mark.parametrize("spoil", [truncate, lengthen, alter, Path.unlink])
def test_gates_that_are_not_as_they_were(path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(path.with_suffix(".safetensors"))
    with pytest.raises(TableError) as caught:
        read(path)
    assert_helps(caught, str(path), "calibration.safetensors", "fairseq-knnlm tune")


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


@pytest.mark.parametrize("name", ["calibration.safetensors", "calibration.json"])
def test_a_write_that_fails_leaves_no_mixture_of_old_and_new(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before the file takes its name; the gates go first."""
    replace_file = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError("no space left on device")
        return replace_file(self, target)

    other = replace(calibration(), stacks=(*stacks(), Stack(("knn",), gate(), 80.0, 8.0)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            write_calibration(path, other)
    assert {file.name for file in path.parent.iterdir()} == {
        "calibration.json",
        "calibration.safetensors",
    }
    if name == "calibration.safetensors":
        assert len(read(path).stacks) == len(stacks())
    else:
        with pytest.raises(TableError, match="altered"):
            read(path)
    write_calibration(path, other)
    assert len(read(path).stacks) == len(stacks()) + 1
