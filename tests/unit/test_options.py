"""The flags of ``knn_lm`` as people know them, and the way from fairseq's object to options."""

from __future__ import annotations

import dataclasses
import json
import pickle
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import ROOT
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import OmegaConf

from fairseq_knnlm.runs.options import Options
from fairseq_knnlm.tasks.flags import KnnlmConfig, options_of

#: Every flag of version 0.1: its type (or choices), default and help.
KNOWN: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "unit" / "flags.json").read_text(encoding="utf-8")
)


def type_in_words(kind: Any) -> str | list[str]:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return kind.__name__ if isinstance(kind, type) else str(kind)


def test_flags_are_what_they_were() -> None:
    stock = {one.name for one in dataclasses.fields(LanguageModelingConfig)}
    found = {
        one.name: {
            "type": type_in_words(one.type),
            "default": one.default,
            "help": one.metadata["help"],
        }
        for one in dataclasses.fields(KnnlmConfig)
        if one.name not in stock
    }
    assert found == KNOWN


def parsed(*words: str) -> Any:
    """Flags as fairseq makes them of what is typed."""
    import argparse

    parser = argparse.ArgumentParser()
    gen_parser_from_dataclass(parser, KnnlmConfig())
    values = vars(parser.parse_args(["data", *words]))
    return OmegaConf.merge(OmegaConf.structured(KnnlmConfig), values)


def test_what_is_typed_becomes_an_option() -> None:
    words = "--knnlm --k 8 --lmbda 0.5 --mixer gate --pointers join --cache-reset".split()
    options = options_of(parsed(*words, "--score-table", "t.npz", "--dstore-filename", "a:b"))
    assert options.mixing.knnlm is True
    assert (options.knn.k, options.knn.lmbda, options.knn.pointers) == (8, 0.5, "join")
    assert type(options.mixing.mixer) is str and options.mixing.mixer == "gate"
    assert options.experts["cache"].cache_reset is True
    assert options.writing.score_table == "t.npz"
    assert options.named_experts is None
    assert options.default_experts == ["knn", "knn2"]


def test_what_is_left_out_is_as_the_options_say() -> None:
    assert options_of(parsed()) == options_of(SimpleNamespace(**vars(KnnlmConfig()))) == Options()


def test_the_flags_can_be_sent_to_another_process() -> None:
    """As loaders and fairseq's own launchers do."""
    found = pickle.loads(pickle.dumps(KnnlmConfig(k=8)))
    assert found.k == 8
    assert Path(KnnlmConfig.__module__.replace(".", "/")) == Path("fairseq_knnlm/tasks/flags")
