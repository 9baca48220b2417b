"""The kinds of experts, found by the names of experts, and what they say of their flags."""

from __future__ import annotations

import dataclasses

import pytest

from fairseq_knnlm.errors import TableError
from fairseq_knnlm.experts import registry
from fairseq_knnlm.experts.kind import Kind, flag
from fairseq_knnlm.experts.registry import find_kind, kind_of, kinds, register


@dataclasses.dataclass(frozen=True)
class ToyOptions:
    toy_lmbda: float | None = flag(None, "weight", weight=True)


@dataclasses.dataclass(frozen=True)
class Clash:
    cache_theta: float | None = flag(None, "of another", weight=True)


@dataclasses.dataclass(frozen=True)
class ToySetting:
    heat: float = 1.0


def toy(name: str, options: type = ToyOptions) -> Kind:
    kind = type("Toy", (Kind,), {"name": name, "options": options, "setting": ToySetting})
    found: Kind = kind()
    return found


def test_the_kinds_by_name() -> None:
    assert [kind.name for kind in kinds()] == ["knn", "cache", "ngram", "suffix", "lm2"]
    for kind in kinds():
        assert kind_of(kind.name) is kind
    assert kind_of("knn2") is kind_of("knn17") is kind_of("knn")
    assert kind_of("knn").names(3) == ["knn", "knn2", "knn3"]
    assert kind_of("lm2").names(3) == ["lm2"]
    for name in ("lm", "lm3", "cache2", "oracle", ""):
        assert find_kind(name) is None
        with pytest.raises(KeyError):
            kind_of(name)


def test_another_kind_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    mine = toy("toy")
    register(mine)
    assert kind_of("toy") is mine
    assert kinds()[-1] is mine


@pytest.mark.parametrize(
    "kind", [toy("knn"), toy("toy", Clash), toy("lm"), toy("Toy"), toy("a b"), toy("")]
)
def test_names_and_flags_are_kept_apart(kind: Kind) -> None:
    before = kinds()
    with pytest.raises(ValueError, match=r"expert|already"):
        register(kind)
    assert kinds() == before


def test_what_flags_are_for() -> None:
    cache, knn, second = map(kind_of, ("cache", "knn", "lm2"))
    assert list(cache.flags("weight")) == ["cache_lmbda"]
    assert cache.flags("setting") == {"cache_window": "window", "cache_theta": "theta"}
    assert cache.plain_flags == ["cache_reset"]
    assert list(second.flags("checkpoint")) == ["expert_lm"]
    for kind in kinds():
        fields = {one.name for one in dataclasses.fields(kind.setting)}
        assert set(kind.flags("setting").values()) <= fields
    given = knn.options(lmbda=0.0, k=8)
    assert knn.given(given) == ["lmbda"]
    assert knn.given_weight(given) == 0.0
    assert knn.leaves_open(given)
    assert not knn.leaves_open(knn.options(lmbda=0.0, knn_temp=2.0))
    assert knn.given_settings(knn.options(knn_temp=2.0)) == {"temperature": 2.0}
    assert second.is_equipped(second.options(expert_lm="lm.pt"), 0)
    assert not second.is_equipped(second.options(), 1)
    assert not knn.is_equipped(knn.options(), 0)


def test_settings_of_a_calibration_are_checked() -> None:
    cache = kind_of("cache")
    setting = {"suffix": 1, "theta": 0.5, "window": 9}
    assert vars(cache.read(setting)) == setting
    for bad in (
        {"heat": 1.0},
        {**setting, "heat": 1.0},
        {**setting, "window": "x"},
        {"theta": 1.0},
    ):
        with pytest.raises(TableError, match="in a setting that it does not have"):
            cache.read(bad)
