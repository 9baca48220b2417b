"""``--stride`` through the commands.

The oracle is the plain model, asked for one window after the other, in the loop of Hugging Face's
page on perplexity.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_calls import Capture, refuse, say
from conftest import Lab, must
from fairseq.checkpoint_utils import load_model_ensemble_and_task
from fairseq.data import Dictionary
from perplexity_page import page

import fairseq_knnlm.tasks  # noqa: F401  for checkpoints of its models
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.explanation.record_file import read_record

#: For windows longer than the blocks that the model was trained on.
LONG = ("--model-overrides", "{'max_target_positions': 4096}")


def at(length: int, stride: int, *flags: object) -> list[object]:
    """Windows of ``length`` tokens, ``stride`` apart, a few of them in a batch."""
    windows = ["--tokens-per-sample", length, "--stride", stride, "--context-window", 0]
    return [*windows, "--max-tokens", max(64, length), *flags]


class Loop:
    """A trained model, asked window by window."""

    def __init__(self, lab: Lab, model: str = "adaptive") -> None:
        overrides = {"data": str(lab.data)}
        path = str(lab.checkpoint(model))
        (found,), _, _ = load_model_ensemble_and_task([path], arg_overrides=overrides)
        self.model: Any = found
        found.train(False)
        self.types = Dictionary.load(str(lab.data / "dict.txt"))

    def tokens(self, lab: Lab, split: str) -> torch.Tensor:
        return torch.tensor([self.types.index(word) for word in lab.text(split)])

    @torch.no_grad()
    def read(
        self, tokens: torch.Tensor, length: int, stride: int
    ) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Places of the text that are predicted, their log-probabilities, and their keys."""
        places: list[int] = []
        losses, keys, reached = [], [], 0
        fed: list[torch.Tensor] = []
        hook = self.model.decoder.layers[-1].fc1.register_forward_pre_hook(
            lambda _, given: fed.append(given[0])
        )
        for begin in range(0, len(tokens), stride):
            end = min(begin + length, len(tokens))
            first = max(reached, begin + 1)
            reached = end
            if first < end:
                out = self.model(tokens[None, begin:end])
                log_probs = self.model.get_normalized_probs(out, log_probs=True)[0]
                here = torch.arange(first, end)
                places += here.tolist()
                losses.append(log_probs[here - 1 - begin, tokens[here]])
                keys.append(fed.pop()[here - 1 - begin, 0])
            if end == len(tokens):
                break
        hook.remove()
        return places, torch.cat(losses).numpy(), torch.cat(keys).numpy()


@pytest.fixture(scope="module")
def loop(lab: Lab) -> Loop:
    return Loop(lab)


def results(lab: Lab, folder: Path, *flags: object, **named: Any) -> tuple[dict[str, Any], Any]:
    """Results and score table of a run over test."""
    to, table = folder / "results.json", folder / "table.npz"
    lab.evaluate("test", *flags, "--results-json", to, "--score-table", table, **named)
    return json.loads(to.read_text()), read_table(table)


@pytest.mark.parametrize(
    ("length", "stride"), [(16, 8), (16, 5), (16, 16), (16, 15), (12, 1), (2, 1), (900, 7), (30, 2)]
)
def test_losses_are_those_of_the_loop(
    lab: Lab, loop: Loop, tmp_path: Path, length: int, stride: int
) -> None:
    tokens = loop.tokens(lab, "test")
    places, log_probs, _ = loop.read(tokens, length, stride)
    found, table = results(lab, tmp_path, *at(length, stride, *LONG))
    assert table["token"].tolist() == tokens[places].tolist()
    assert table["context"].tolist() == tokens[np.array(places) - 1].tolist()
    assert table["row"].tolist() == [*range(len(places))]
    np.testing.assert_allclose(table["lm"], log_probs, atol=1e-4)
    mean = -log_probs.mean(dtype=np.float64)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert found["tokens"] == len(places)
    assert found["tokens_left_out"] == len(tokens) - len(places)
    assert found["conditions"]["stride"] == found["context"]["stride"] == stride
    assert table.card["context"]["stride"] == stride


@pytest.mark.parametrize(("length", "stride"), [(16, 8), (16, 16), (13, 1)])
def test_the_sum_is_that_of_the_page(
    lab: Lab, loop: Loop, tmp_path: Path, length: int, stride: int
) -> None:
    """The loop as it stands there, by labels; ``test_wrapped_stride`` has models of its library."""

    def read(ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        told = loop.model.get_normalized_probs(loop.model(ids), log_probs=True)
        return torch.nn.functional.nll_loss(told[0, :-1], labels[0, 1:]), told

    expected = page(read, loop.tokens(lab, "test")[None], length, stride)
    found, table = results(lab, tmp_path, *at(length, stride))
    assert found["tokens"] == expected.n_tokens
    np.testing.assert_allclose(table["lm"], expected.log_probs, atol=1e-4)
    mean = expected.nll_sum / expected.n_tokens
    assert math.log(found["perplexity"]) == pytest.approx(mean, abs=1e-4)


@pytest.mark.parametrize("model", ["plain", "prenorm", "untied"])
def test_of_other_models(lab: Lab, tmp_path: Path, model: str) -> None:
    other = Loop(lab, model)
    _, log_probs, _ = other.read(other.tokens(lab, "test"), 14, 6)
    _, table = results(lab, tmp_path, *at(14, 6), model=model)
    np.testing.assert_allclose(table["lm"], log_probs, atol=1e-4)


def test_a_text_shorter_than_a_window(lab: Lab, loop: Loop, tmp_path: Path) -> None:
    tokens = loop.tokens(lab, "test")
    _, log_probs, _ = loop.read(tokens, 2000, 1000)
    assert len(log_probs) == len(tokens) - 1 < 1999
    found, table = results(lab, tmp_path, *at(2000, 1000, *LONG))
    np.testing.assert_allclose(table["lm"], log_probs, atol=1e-4)
    assert found["tokens_left_out"] == 1


@pytest.fixture(scope="module")
def store(lab: Lab) -> Path:
    """Of the train split, each token after 8 to 15 in its window; with an exact index."""
    path = lab.folder / "strided"
    lab.evaluate("train", *at(16, 8, "--save-knnlm-dstore", "--dstore-mmap", path, "--dstore-fp32"))
    must("fairseq-knnlm", "build-index", "--dstore", path, "--recipe", "Flat")
    return path


@pytest.mark.parametrize("length", [16, 8])
def test_each_token_is_saved_once_after_its_window(
    lab: Lab, loop: Loop, store: Path, tmp_path: Path, length: int
) -> None:
    if length == 8:  # as long as the stride: the first of each window stays out
        path = tmp_path / "store"
        to = "--save-knnlm-dstore", "--dstore-mmap", path, "--dstore-fp32"
        lab.evaluate("train", *at(8, 8, *to))
        store = path
    tokens = loop.tokens(lab, "train")
    places, _, keys = loop.read(tokens, length, 8)
    saved = open_datastore(store)
    assert np.asarray(saved.values).tolist() == tokens[places].tolist()
    np.testing.assert_allclose(np.asarray(saved.keys), keys, atol=1e-4)
    assert saved.manifest.origin.context["stride"] == 8
    if length == 16:
        assert places == [*range(1, len(tokens))]


def test_neighbours_by_brute_force(lab: Lab, loop: Loop, store: Path, tmp_path: Path) -> None:
    k, temperature, weight = 12, 3.0, 0.4
    knn = ["--knnlm", "--dstore-filename", store, "--k", k, "--knn-temp", temperature]
    to = tmp_path / "results.json"
    lab.evaluate("test", *at(16, 4, *knn, "--lmbda", weight, "--results-json", to))
    tokens = loop.tokens(lab, "test")
    places, log_probs, queries = loop.read(tokens, 16, 4)
    train = loop.tokens(lab, "train")
    there, _, keys = loop.read(train, 16, 8)
    distances = ((queries[:, None].astype(np.float64) - keys[None]) ** 2).sum(-1)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
    near = np.exp(-(np.take_along_axis(distances, nearest, 1)) / temperature)
    right = train.numpy()[there][nearest] == tokens.numpy()[places][:, None]
    neighbours = (near * right).sum(1) / near.sum(1)
    mixed = weight * neighbours + (1 - weight) * np.exp(log_probs.astype(np.float64))
    found = json.loads(to.read_text())
    assert found["loss"] == pytest.approx(-np.log2(mixed).mean(), abs=1e-4)
    assert found["conditions"]["context_of_queries"] == [12, 15]
    assert found["conditions"]["context_of_keys"] == [[8, 15]]


def test_the_cache_finds_the_tokens_in_their_order(lab: Lab, loop: Loop, tmp_path: Path) -> None:
    """By the formula of Grave et al. (2017): what came after the last contexts, by likeness."""
    window, theta, weight = 30, 0.3, 0.2
    cache = ["--experts", "cache", "--cache-window", window, "--cache-theta", theta]
    to = tmp_path / "results.json"
    lab.evaluate("test", *at(16, 5, *cache, "--cache-lmbda", weight, "--results-json", to))
    tokens = loop.tokens(lab, "test").numpy()
    places, log_probs, keys = loop.read(torch.from_numpy(tokens), 16, 5)
    came = tokens[places]
    lm = np.exp(log_probs.astype(np.float64))
    mixed = lm.copy()
    for place in range(1, len(places)):
        before = slice(max(0, place - window), place)
        likeness = np.exp(theta * (keys[before].astype(np.float64) @ keys[place]))
        cached = likeness[came[before] == came[place]].sum() / likeness.sum()
        mixed[place] = weight * cached + (1 - weight) * lm[place]
    found = json.loads(to.read_text())
    assert found["base_loss"] == pytest.approx(-np.log2(lm).mean(), abs=1e-4)
    assert found["loss"] == pytest.approx(-np.log2(mixed).mean(), abs=1e-3)


def test_explain_says_what_scoring_says(
    lab: Lab, store: Path, tmp_path: Path, capsys: Capture
) -> None:
    knn = ["--experts", "knn", "--k", 12, "--lmbda", 0.4, "--knn-temp", 3.0]
    lab.evaluate(
        "test", *at(16, 4, *knn, "--dstore-filename", store, "--score-table", tmp_path / "x.npz")
    )
    table, to = read_table(tmp_path / "x.npz"), tmp_path / "out.jsonl"
    model = ["--path", lab.checkpoint(), "--cpu"]
    where = ["explain", "--dstore", store, lab.data, *model, "--json", to]
    said = say(capsys, *where, "--gen-subset", "test", "--rows", "21:50", *at(16, 4, *knn))
    assert "rows 21 to 50" in said
    (text,) = read_record(to).texts
    assert [token.lm for token in text.tokens] == pytest.approx(table["lm"][21:50], abs=1e-4)
    assert "--stride does nothing" in refuse(capsys, *where, "--text", "w1 w2", *at(16, 4, *knn))


def test_a_mixture_fitted_at_another_stride_is_told(
    lab: Lab, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fitted = ["--dstore", store, "--data", lab.data, "--path", lab.checkpoint(), "--cpu"]
    must("fairseq-knnlm", "tune", *fitted, *at(16, 8), "--sample-break-mode", "none", "--k", 16)
    knn = ["--knnlm", "--dstore-filename", store, "--k", 16]
    told = "the calibration was fitted with"
    lab.evaluate("test", *at(16, 8, *knn))
    assert told not in caplog.text
    lab.evaluate("test", *at(16, 4, *knn))
    assert "stride 8" in caplog.text and "stride 4" in caplog.text and told in caplog.text
    caplog.clear()
    lab.evaluate("test", *knn, "--tokens-per-sample", 16, "--context-window", 0)
    assert "stride 8" in caplog.text and "stride none" in caplog.text


def test_the_stock_scorer_reads_the_same_windows(lab: Lab, loop: Loop) -> None:
    """fairseq's own ``SequenceScorer``, on the batches of the task's data set."""
    from fairseq.sequence_scorer import SequenceScorer

    from fairseq_knnlm.tasks.session import open_session

    flags = ["--path", lab.checkpoint(), "--cpu", *at(16, 5)]
    session = open_session(str(lab.data), [str(word) for word in flags])
    session.task.load_dataset("test")
    dataset = session.task.dataset("test")
    batch = dataset.collater([dataset[number] for number in range(len(dataset))])
    with torch.no_grad():
        hypos = SequenceScorer(loop.types).generate([loop.model], batch)
    found = np.concatenate([hypo["positional_scores"].numpy() for (hypo,) in hypos])
    np.testing.assert_allclose(found, loop.read(loop.tokens(lab, "test"), 16, 5)[1], atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--stride", 4], "--stride and --context-window exclude each other"),
        (at(8, 9), "--stride from 1 to --tokens-per-sample"),
        (at(8, 0), "--stride counts tokens"),
        (at(8, 4, "--sample-break-mode", "eos"), "--sample-break-mode eos exclude each other"),
        (at(8, 4, "--add-bos-token"), "--add-bos-token exclude each other"),
        (
            at(40, 4, "--model-overrides", "{'max_target_positions': 12}"),
            "--tokens-per-sample up to 13",
        ),
        (at(16, 4, "--max-tokens", 12), "--max-tokens is less than a block"),
    ],
)
def test_bad_input(lab: Lab, tmp_path: Path, flags: list[object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        lab.evaluate("test", *flags, "--results-json", tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_raw_text_needs_the_first_token_too(lab: Lab) -> None:
    with pytest.raises(ConfigError, match="--context-window in the place of --stride"):
        lab.evaluate("test", *at(16, 4, "--raw-text", lab.folder / "test.txt"))


def test_what_is_not_predicted_is_said(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    lab.evaluate("test", *at(16, 4))
    assert "the first token of the text has nothing before it" in caplog.text
    lab.evaluate("test", *at(16, 16))
    assert "With --stride 15 it is the first of the text alone" in caplog.text


@pytest.mark.parametrize("shards", [1, 3])
def test_blocks_hold_what_one_datastore_holds(
    lab: Lab, store: Path, tmp_path: Path, shards: int
) -> None:
    path = tmp_path / "store"
    to = ["--save-knnlm-dstore", "--dstore-mmap", path, "--dstore-fp32", "--block-rows", 500]
    for number in range(shards):
        part = ["--num-shards", shards, "--shard-id", number]
        lab.evaluate("train", *at(16, 8, *to, *part))
    ours, whole = open_datastore(path), open_datastore(store)
    assert len(ours.blocks) > shards
    assert np.array_equal(ours.values, whole.values)
    np.testing.assert_allclose(np.array(ours.keys), np.array(whole.keys), atol=1e-4)


def test_text_is_added_at_the_same_stride(
    lab: Lab, loop: Loop, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / "store"
    lab.evaluate("valid", *at(16, 8, "--save-knnlm-dstore", "--dstore-mmap", path, "--dstore-fp32"))
    model = ["--path", lab.checkpoint(), "--cpu", "--num-workers", 0]
    said = must("fairseq-knnlm", "append", path, lab.data, "--gen-subset", "test", *model)
    assert "those that are added" not in said
    tokens = [loop.tokens(lab, split) for split in ("valid", "test")]
    read = [loop.read(some, 16, 8) for some in tokens]
    found = open_datastore(path)
    pairs = zip(tokens, read, strict=True)
    values = np.concatenate([some.numpy()[places] for some, (places, *_) in pairs])
    assert np.array_equal(found.values, values)
    keys = np.concatenate([keys for *_, keys in read])
    np.testing.assert_allclose(np.array(found.keys), keys, atol=1e-4)
    assert "stride 8" in say(capsys, "info", "--dstore", path)
    other = [*model, "--tokens-per-sample", 16, "--stride", 4]
    said = must("fairseq-knnlm", "append", path, lab.data, "--gen-subset", "test", *other)
    assert "8 to 15 tokens of their text, those that are added after 12 to 15 tokens" in said
