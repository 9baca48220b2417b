"""Generating with a memory: fairseq's own search, and the very probabilities that scoring gives."""

from __future__ import annotations

import math
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BLOCKS, ROOT, Lab, must
from fairseq.models.transformer_lm import TransformerLanguageModel

import fairseq_knnlm.tasks  # noqa: F401  for the hub interface
from fairseq_knnlm.errors import ConfigError

#: Of unequal lengths, so that beams of some go on while others are still told what to say.
PROMPTS = ["w1 w2 w3", "w7", "w4 w4 w4 w5 w4", "w9 w2"]
#: Mixtures by flags; each with all of its experts.
MIXTURES: dict[str, dict[str, Any]] = {
    "knn": {"lmbda": 0.4, "knn_temp": 2.0},
    "cache": {"experts": "cache", "cache_lmbda": 0.3, "cache_theta": 0.5, "cache_window": 6},
    "all": {
        "experts": "knn,cache,ngram,suffix,lm2",
        "lmbda": 0.2,
        "knn_temp": 2.0,
        "cache_lmbda": 0.2,
        "cache_theta": 0.5,
        "cache_window": 6,
        "ngram_lmbda": 0.2,
        "suffix_lmbda": 0.15,
        "suffix_half_life": 30.0,
        "expert_lm_lmbda": 0.2,
    },
}


#: Without the penalty that fairseq adds to the scores of a group.
DIVERSE = {"beam": 4, "diverse_beam_groups": 2, "diverse_beam_strength": 0.0}


@pytest.fixture(scope="module")
def tuned(lab: Lab, datastore: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with a calibration."""
    store = Path(shutil.copytree(datastore, tmp_path_factory.mktemp("tuned") / "dstore"))
    must(
        *("fairseq-knnlm", "tune", "--dstore", store, "--data", lab.data, "--k", 32),
        *("--path", lab.checkpoint(), *BLOCKS, "--sample-break-mode", "none", "--cpu"),
    )
    return store


def hub(lab: Lab, **task: object) -> Any:
    return TransformerLanguageModel.from_pretrained(
        str(lab.checkpoint().parent),
        lab.checkpoint().name,
        str(lab.data),
        user_dir=str(ROOT / "fairseq_knnlm"),
        **task,
    )


def with_memory(lab: Lab, datastore: Path, name: str, **more: object) -> Any:
    flags = {"knnlm": True, "dstore_filename": str(datastore), "k": 32, **MIXTURES[name]}
    if "lm2" in str(flags.get("experts")):
        flags["expert_lm"] = str(lab.checkpoint("untied"))
    return hub(lab, **{**flags, **more})


def written(interface: Any, beam: int = 1, **how: object) -> list[list[dict[str, Any]]]:
    """All hypotheses of each prompt."""
    how = {"min_len": 9, "max_len_b": 12, **how}
    return interface.generate([interface.encode(one) for one in PROMPTS], beam=beam, **how)


def tokens(found: list[list[dict[str, Any]]]) -> list[list[list[int]]]:
    return [[hypothesis["tokens"].tolist() for hypothesis in each] for each in found]


@pytest.mark.parametrize("beam", [1, 3])
def test_without_weight_it_writes_what_the_stock_model_writes(
    lab: Lab, datastore: Path, beam: int
) -> None:
    stock = written(hub(lab), beam)
    nothing = {"lmbda": 0.0, "cache_lmbda": 0.0, "ngram_lmbda": 0.0, "suffix_lmbda": 0.0}
    nothing["expert_lm_lmbda"] = 0.0
    same = written(with_memory(lab, datastore, "all", **nothing), beam)
    assert tokens(same) == tokens(stock)
    for ours, theirs in zip(same, stock, strict=True):
        torch.testing.assert_close(ours[0]["positional_scores"], theirs[0]["positional_scores"])
    other = written(with_memory(lab, datastore, "knn", lmbda=0.9), beam)
    assert tokens(other) != tokens(stock)


@pytest.mark.parametrize("how", [{"beam": 1}, {"beam": 4}, DIVERSE])
@pytest.mark.parametrize("name", list(MIXTURES))
def test_what_was_written_is_as_likely_as_when_it_is_read(
    lab: Lab, datastore: Path, name: str, how: dict[str, Any]
) -> None:
    """Each hypothesis, whichever beams it came through: as the hub interface scores it."""
    interface = with_memory(lab, datastore, name)
    for hypotheses in written(interface, **how):
        for hypothesis in hypotheses:
            text = interface.decode(hypothesis["tokens"])
            read = interface.score(text)["positional_scores"]
            wrote = hypothesis["positional_scores"][: len(read)]  # the end is not scored there
            torch.testing.assert_close(wrote.cpu(), read, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{}, {"skip_searches": 0.5}], ids=["gate", "skipping"])
def test_so_it_is_with_what_was_fitted(lab: Lab, tuned: Path, more: dict[str, Any]) -> None:
    """The calibrated gate over all experts; and where half of the searches are skipped."""
    memory = {"knnlm": True, "dstore_filename": str(tuned), "k": 32, "mixer": "gate"}
    interface = hub(lab, **memory, experts="knn,cache,ngram,suffix", **more)
    for hypotheses in written(interface, beam=3):
        for hypothesis in hypotheses:
            read = _scores(interface, interface.decode(hypothesis["tokens"]))
            wrote = hypothesis["positional_scores"][: len(read)]
            torch.testing.assert_close(wrote, read, rtol=1e-4, atol=1e-4)


def test_the_same_seed_writes_the_same_and_another_does_not(lab: Lab, datastore: Path) -> None:
    interface, found = with_memory(lab, datastore, "all"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(tokens(written(interface, sampling=True, sampling_topp=0.9)))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_sampled_tokens_are_as_frequent_as_they_are_likely(
    lab: Lab, datastore: Path, temperature: float
) -> None:
    """The first token after a prompt: chi-squared of 2,000 draws, by a fixed seed."""
    interface = with_memory(lab, datastore, "knn")
    types, prompt = len(interface.task.target_dictionary), "w1 w2"
    scores = [
        float(interface.score(f"{prompt} {symbol}")["positional_scores"][-1])
        for symbol in interface.task.target_dictionary.symbols[4:]
    ]
    likely = (torch.tensor(scores, dtype=torch.float64) / temperature).exp()
    torch.manual_seed(5)
    draws = 2000
    sampling = {"sampling": True, "temperature": temperature, "max_len_b": 4, "min_len": 3}
    counts = torch.zeros(types, dtype=torch.float64)
    batch = [interface.encode(prompt)] * 500
    for _ in range(draws // len(batch)):
        for hypothesis in interface.generate(batch, beam=1, **sampling):
            counts[hypothesis[0]["tokens"][2]] += 1
    # Of the tokens that are text; the likely ones apart, all others together.
    expected = likely / likely.sum() * counts[4:].sum()
    common = expected >= 10
    observed = torch.cat([counts[4:][common], counts[4:][~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    chi_squared = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom > 5
    assert chi_squared < freedom + 4 * math.sqrt(2 * freedom)


def test_a_beam_as_wide_as_all_there_is_finds_the_best(lab: Lab, datastore: Path) -> None:
    """Two tokens after a prompt, among the continuations of the likeliest words, all tried."""
    interface = with_memory(lab, datastore, "all")
    words = interface.task.target_dictionary.symbols[4:]
    prompt, how = interface.encode("w1 w2"), {"max_len_b": 4, "min_len": 4, "unnormalized": True}
    best = interface.generate([prompt], beam=len(words), **how)[0][0]
    told = interface.decode(best["tokens"]).split()
    first = sorted(words, key=lambda one: -float(_scores(interface, f"w1 w2 {one}")[-1]))[:8]
    tried = {
        pair: float(_scores(interface, f"w1 w2 {' '.join(pair)}")[2:].sum())
        for pair in product(first, words)
    }
    assert max(tried, key=tried.__getitem__) == tuple(told[2:4])


def _scores(interface: Any, text: str) -> torch.Tensor:
    return interface.score(text)["positional_scores"]


def test_an_added_beginning_of_sentence(lab: Lab, datastore: Path) -> None:
    interface = with_memory(lab, datastore, "all", add_bos_token=True)
    for (hypothesis,) in written(interface):
        read = _scores(interface, interface.decode(hypothesis["tokens"]))
        wrote = hypothesis["positional_scores"][: len(read)]
        torch.testing.assert_close(wrote, read, rtol=1e-4, atol=1e-4)


def test_what_makes_no_sense_is_refused(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--pointers join follows a text"):
        written(with_memory(lab, datastore, "knn", pointers="join"))
    with pytest.raises(ConfigError, match="--score-table does nothing where text is generated"):
        written(with_memory(lab, datastore, "knn", score_table=str(tmp_path / "table.npz")))


def test_the_command_people_type(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """``fairseq-interactive``, lines in and lines out."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    said = must(
        *("fairseq-interactive", lab.data, "--user-dir", ROOT / "fairseq_knnlm"),
        *("--task", "knn_lm", "--path", lab.checkpoint(), "--cpu", "--input", prompts),
        *("--knnlm", "--dstore-filename", datastore, "--k", 32, "--lmbda", 0.4),
        *("--knn-temp", 2.0, "--beam", 1, "--min-len", 9, "--max-len-b", 12, "--buffer-size", 4),
        *("--batch-size", 4),
    )
    lines = [line.split("\t") for line in said.splitlines() if line.startswith("H-")]
    interface = with_memory(lab, datastore, "knn")
    expected = [interface.decode(each[0]["tokens"]) for each in written(interface)]
    assert [text for _, _, text in lines] == expected


@pytest.mark.parametrize("name", list(MIXTURES))
def test_drafts_change_nothing(lab: Lab, datastore: Path, name: str) -> None:
    """Greedy text of fairseq's own search, token by token, and of drafts that were checked."""
    how = {"min_len": 1, "max_len_b": 40}
    plain = written(with_memory(lab, datastore, name, speculate="off"), **how)
    drafted = written(with_memory(lab, datastore, name, speculate="on"), **how)
    assert tokens(drafted) == tokens(plain)
    for ours, theirs in zip(drafted, plain, strict=True):
        torch.testing.assert_close(
            ours[0]["positional_scores"].cpu(),
            theirs[0]["positional_scores"].cpu(),
            rtol=1e-4,
            atol=1e-4,
        )
        assert abs(float(ours[0]["score"] - theirs[0]["score"])) < 1e-4
