"""Sentences by themselves, through the hub interface and --score-reference: each is a text."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Lab, eval_lm, must
from fairseq.data import Dictionary, indexed_dataset
from fairseq.models.transformer_lm import TransformerLanguageModel

import fairseq_knnlm.tasks  # noqa: F401  for the hub interface
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.cache import CacheSetting
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Gate
from fairseq_knnlm.runs import experts as experts_of_a_run
from fairseq_knnlm.runs.mixing import Mixture
from fairseq_knnlm.runs.scorer import KnnScorer

#: Words that come again, over several lines; at most as many tokens as the model takes.
TEXTS = ["w1 w2 w3 w1 w2\nw1 w2 w3 w5", "w7 w7 w8\nw7 w7 w8 w7 w7 w8 w9", "w3", "w4 w4 w4 w4 w4"]
CACHE = {"cache_lmbda": 0.3, "cache_theta": 0.5, "cache_window": 6}


def hub(lab: Lab, **task: object) -> Any:
    folder, data = lab.checkpoint().parent, str(lab.data)
    where = (str(folder), lab.checkpoint().name, data)
    return TransformerLanguageModel.from_pretrained(
        *where, user_dir=str(ROOT / "fairseq_knnlm"), **task
    )


def scores(interface: Any, texts: list[str]) -> list[np.ndarray]:
    found = interface.score(texts, replace_newline_with_eos=True)
    return [one["positional_scores"].numpy() for one in found]


def by_eval_lm(
    lab: Lab, folder: Path, text: str, flags: list[object], monkeypatch: pytest.MonkeyPatch
) -> np.ndarray:
    """What ``fairseq-eval-lm`` says of every token of a data folder with this text alone."""
    folder.mkdir(parents=True)
    shutil.copy(lab.data / "dict.txt", folder)
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    name = str(folder / "test")
    builder = indexed_dataset.make_builder(f"{name}.bin", impl="mmap", vocab_size=len(dictionary))
    for line in text.splitlines():
        builder.add_item(dictionary.encode_line(line, add_if_not_exist=False))
    builder.finalize(f"{name}.idx")
    world, said = Lab(lab.folder), []
    generate = KnnScorer.generate

    def spy(self: KnnScorer, *args: Any, **kwargs: Any) -> Any:
        found = generate(self, *args, **kwargs)
        said.extend(one["positional_scores"].clone() for (one,) in found)
        return found

    words = world.command("test", *flags, "--tokens-per-sample", 16, "--context-window", 0)
    words[0] = str(folder)
    with monkeypatch.context() as patch:
        patch.setattr(KnnScorer, "generate", spy)
        eval_lm([*words, "--num-workers", "0"])
    return torch.cat(said).numpy()


def random_gate(*_: object) -> Mixture:
    """Over columns of neighbours, cache and n-grams, by features of all."""
    components = [
        LM,
        Component("knn", vars(KnnSetting(temperature=2.0))),
        Component("knn", vars(KnnSetting(suffix=1, temperature=4.0))),
        Component("cache", vars(CacheSetting(theta=0.5, window=6))),
        Component("cache", vars(CacheSetting(suffix=1, theta=0.25, window=4))),
        Component("ngram", {"order": 5}),
    ]
    features = ["cache_size", "cache_shared", "knn_shared", "ngram_length"]
    torch.manual_seed(3)
    gate = Gate(components, features, 4 + 3 + 4 + 1)
    torch.nn.init.normal_(gate.layers[-1].weight)  # type: ignore[arg-type]
    return Mixture(gate.eval(), "at random")


@pytest.mark.parametrize("kind", ["knn,cache", "knn,cache,ngram,suffix", "gate"])
def test_a_text_is_scored_as_a_text_of_its_own(
    lab: Lab, datastore: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone or in a batch: token by token what fairseq-eval-lm says of it alone."""
    experts = "knn,cache,ngram" if kind == "gate" else kind
    given: dict[str, Any] = {"experts": experts, "k": 64, "lmbda": 0.2, "knn_temp": 2.0, **CACHE}
    if "ngram" in experts:
        given["ngram_lmbda"] = 0.1
    if "suffix" in experts:
        given |= {"suffix_lmbda": 0.2, "suffix_half_life": 30.0}
    if kind == "gate":
        monkeypatch.setattr(experts_of_a_run, "mixture", random_gate)
    given["dstore_filename"] = str(datastore)
    flags = [word for name, x in given.items() for word in (f"--{name.replace('_', '-')}", x)]
    interface = hub(lab, **given)
    together = scores(interface, TEXTS)
    without = scores(hub(lab), TEXTS)
    for number, text in enumerate(TEXTS):
        expected = by_eval_lm(lab, tmp_path / f"{number}", text, flags, monkeypatch)
        (alone,) = scores(interface, [text])
        for found in (together[number], alone):
            # The interface takes the last line end away.
            np.testing.assert_allclose(found, expected[: len(found)], atol=1e-5)
        assert len(alone) == len(text.split()) + text.count("\n")
        assert np.abs(alone - without[number]).max() > 1e-3


def test_the_cache_of_a_text_is_the_formula(lab: Lab) -> None:
    """In float64, from fairseq's own features and distribution."""
    interface = hub(lab, experts="cache", **CACHE)
    theta, weight, window = (CACHE[f"cache_{name}"] for name in ("theta", "lmbda", "window"))
    found = scores(interface, TEXTS)
    (model,) = interface.models
    for text, ours in zip(TEXTS, found, strict=True):
        lines = [interface.encode(line) for line in text.splitlines()]
        tokens = torch.cat(lines)[:-1]
        inputs = torch.cat([torch.tensor([interface.src_dict.eos()]), tokens[:-1]])[None]
        with torch.no_grad():
            h = model(inputs, features_only=True)[0][0].double().numpy()
            output = model(inputs)
            full = model.get_normalized_probs(output, log_probs=True, sample=None)
        p_lm = np.exp(full[0].double().numpy())
        expected = []
        for t, token in enumerate(tokens.tolist()):
            near = range(max(0, t - window), t)
            weights = np.array([math.exp(theta * h[i] @ h[t]) for i in near])
            same = np.array([tokens[i] == token for i in near])
            p = p_lm[t, token]
            if len(near):
                p = weight * weights[same].sum() / weights.sum() + (1 - weight) * p
            expected.append(math.log(p))
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_pointers_need_a_text_of_more(lab: Lab, datastore: Path) -> None:
    memory = {"knnlm": True, "dstore_filename": str(datastore), "k": 64, "pointers": "join"}
    with pytest.raises(ConfigError, match="follows a text"):
        hub(lab, **memory).score("w1 w2 w3")


def test_score_reference_takes_each_sample_as_a_text(lab: Lab) -> None:
    """Counting: theta 0 makes all earlier positions of a block alike, and no others count."""
    said = must(
        *("fairseq-generate", lab.data, "--user-dir", ROOT / "fairseq_knnlm", "--task", "knn_lm"),
        *("--path", lab.checkpoint(), "--gen-subset", "test", "--score-reference", "--cpu"),
        *("--tokens-per-sample", 8, "--sample-break-mode", "none", "--max-tokens", 64),
        *("--experts", "cache", "--cache-lmbda", 1, "--cache-theta", 0, "--cache-window", 50),
    )
    blocks = dict(re.findall(r"^P-(\d+)\t(.*)$", said, re.MULTILINE))
    text = lab.text("test")
    assert len(blocks) >= 40  # fairseq leaves the last batch out
    for number, printed in blocks.items():
        tokens = text[8 * int(number) :][:8]
        found = [2 ** float(score) for score in printed.split()]
        expected = [tokens[:t].count(token) / t for t, token in enumerate(tokens) if t]
        np.testing.assert_allclose(found[1:], expected, atol=2e-4)  # the first is the model's
