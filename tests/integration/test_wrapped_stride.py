"""``--stride`` over models of transformers, against the loop of their own page on perplexity."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import eval_lm, must
from hf_models import CONFIGS, POSITIONS, SIZE, save_model
from perplexity_page import page
from tiny_world import PLUGIN, preprocessing

from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.runs.wrapping import wrap

#: The id that ends a line, of every tiny model.
END = 2
#: Lengths of windows, strides and tokens of the text. The last window predicts fewer tokens than
#: the others in most, a single one in the second; the last text ends within its first window.
WINDOWS = [
    *((POSITIONS, 24, 312), (POSITIONS, 24, 313), (POSITIONS, POSITIONS, 300)),
    *((POSITIONS, POSITIONS - 1, 300), (POSITIONS, 7, 303), (20, 3, 90), (16, 16, 100)),
    *((20, 1, 90), (POSITIONS, 24, 31)),
]
#: Every family reads some of them, one all.
CASES = [("gpt2", *how) for how in WINDOWS]
CASES += [(family, *how) for family in sorted({*CONFIGS} - {"gpt2"}) for how in WINDOWS[1:3]]


@dataclass(frozen=True)
class Wrapped:
    """A model of transformers, and where the same one lies as a model of fairseq's."""

    theirs: Any
    folder: Path

    def read(self, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the page calls a model."""
        found = self.theirs(ids, labels=labels)
        return found.loss, found.logits

    def data(self, ids: list[int]) -> Path:
        """A text of lines, as fairseq reads it."""
        data = self.folder / f"bin-{len(ids)}"
        if not data.exists():
            text = "".join("\n" if one == END else f"{one} " for one in ids)
            (path := self.folder / f"{len(ids)}.txt").write_text(text)
            dictionary = ("--srcdict", self.folder / "out" / "dict.txt")
            must(*preprocessing({"test": path}, data), *dictionary)
        return data


@pytest.fixture(scope="module")
def wrapped(request: Any, tmp_path_factory: Any) -> Wrapped:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = save_model(folder / "hf", request.param)
    wrap(folder / "hf", folder / "out", None, None)
    return Wrapped(theirs, folder)


def text_of(length: int) -> list[int]:
    """Ids of a text, the last of which ends a line."""
    rng = random.Random(3)
    ids = [rng.randint(3, SIZE - 1) if rng.random() < 0.9 else END for _ in range(length - 1)]
    return [rng.randint(3, SIZE - 1), *ids[1:], END]


@pytest.mark.parametrize(("wrapped", "length", "stride", "tokens"), CASES, indirect=["wrapped"])
def test_losses_are_those_of_the_page(
    wrapped: Wrapped, tmp_path: Path, length: int, stride: int, tokens: int
) -> None:
    ids = text_of(tokens)
    expected = page(wrapped.read, torch.tensor([ids]), length, stride)
    to, table = tmp_path / "results.json", tmp_path / "table.npz"
    words = [wrapped.data(ids), *PLUGIN, "--path", wrapped.folder / "out" / "checkpoint.pt"]
    words += ["--gen-subset", "test", "--tokens-per-sample", length, "--stride", stride]
    words += ["--sample-break-mode", "none", "--max-tokens", 200, "--cpu", "--num-workers", 0]
    eval_lm([str(word) for word in [*words, "--results-json", to, "--score-table", table]])
    found, log_probs = json.loads(to.read_text()), np.asarray(read_table(table)["lm"])
    assert found["tokens"] == len(log_probs) == expected.n_tokens
    np.testing.assert_allclose(log_probs, expected.log_probs, atol=1e-4)
    mean = expected.nll_sum / expected.n_tokens
    assert -log_probs.mean(dtype=np.float64) == pytest.approx(mean, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)


def test_the_windows_are_of_all_kinds() -> None:
    """What is said of them above, by how many labels the last window has."""
    told = torch.zeros(())

    def read(ids: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return told, torch.zeros(1, ids.shape[1], SIZE)

    found = [page(read, torch.zeros(1, n, dtype=torch.long), *how) for *how, n in WINDOWS]
    lasts = [one.last for one in found]
    assert lasts[:2] == [24, 1]
    assert lasts[-1] == found[-1].n_tokens == 30
    short = [last < stride for last, (_, stride, _) in zip(lasts, WINDOWS, strict=True)]
    assert short == [False, *[True] * 6, False, False]  # of a stride of 1 none is short


@pytest.mark.parametrize("wrapped", ["llama"], indirect=True)
def test_windows_that_are_longer_than_the_positions(wrapped: Wrapped, tmp_path: Path) -> None:
    """Of a window all but the last token is read."""
    ids, to = text_of(60), tmp_path / "results.json"
    words = [wrapped.data(ids), *PLUGIN, "--path", wrapped.folder / "out" / "checkpoint.pt"]
    words += ["--gen-subset", "test", "--stride", 9, "--cpu", "--num-workers", 0]
    longer = [str(one) for one in [*words, "--results-json", to]]
    with pytest.raises(ConfigError, match=f"--tokens-per-sample up to {POSITIONS + 1}"):
        eval_lm([*longer, "--tokens-per-sample", str(POSITIONS + 2)])
    assert not to.exists()
    eval_lm([*longer, "--tokens-per-sample", str(POSITIONS + 1)])
    assert json.loads(to.read_text())["tokens"] == 59
