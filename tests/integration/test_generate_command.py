"""``fairseq-knnlm generate``: text that does not depend on how it is made, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_calls import Capture, refuse, said_and_wrong, say
from conftest import ROOT, Lab, must
from fairseq.models.transformer_lm import TransformerLanguageModel

import fairseq_knnlm.tasks  # noqa: F401  for the hub interface
from fairseq_knnlm.explanation.record import Explained
from fairseq_knnlm.explanation.record_file import read_record

PROMPTS = ["w1 w2 w3", "w7", "w4 w4 w4 w5 w4", "w9 w2"]
KNN = ("--experts", "knn", "--k", 32, "--lmbda", 0.4, "--knn-temp", 2.0)
ALL = (
    *("--experts", "knn,cache,ngram,suffix", "--k", 32, "--lmbda", 0.2, "--knn-temp", 2.0),
    *("--cache-lmbda", 0.3, "--cache-theta", 0.5, "--cache-window", 6, "--ngram-lmbda", 0.2),
    *("--suffix-lmbda", 0.2, "--suffix-half-life", 30),
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture
def words(lab: Lab, datastore: Path, prompts: Path) -> list[object]:
    """Enough to continue the prompts by 9 tokens."""
    return [
        *("--dstore", datastore, lab.data, "--path", lab.checkpoint(), "--cpu"),
        *("--prompts", prompts, "--new-tokens", 9),
    ]


def hub(lab: Lab, datastore: Path, flags: tuple[Any, ...]) -> Any:
    named = {
        flag[2:].replace("-", "_"): value
        for flag, value in zip(flags[::2], flags[1::2], strict=True)
    }
    return TransformerLanguageModel.from_pretrained(
        str(lab.checkpoint().parent),
        lab.checkpoint().name,
        str(lab.data),
        user_dir=str(ROOT / "fairseq_knnlm"),
        knnlm=True,
        dstore_filename=str(datastore),
        **named,
    )


@pytest.mark.parametrize("mixture", [KNN, ALL], ids=["knn", "all"])
@pytest.mark.parametrize(
    "how", [(), ("--sampling", "--sampling-topk", 5, "--seed", 7)], ids=["greedy", "sampling"]
)
def test_the_text_depends_on_nothing_else(
    words: list[object], capsys: Capture, mixture: tuple[object, ...], how: tuple[object, ...]
) -> None:
    """Not on drafts, nor on how many texts are written at a time."""
    ways = [
        ("--speculate", speculate, "--batch-size", size)
        for speculate in ("on", "off")
        for size in (1, 3)
    ]
    texts = {say(capsys, "generate", *words, *way, *mixture, *how) for way in ways}
    (text,) = texts
    lines = text.splitlines()
    assert len(lines) == len(PROMPTS)
    for line, prompt in zip(lines, PROMPTS, strict=True):
        assert line.startswith(prompt)
        assert len(prompt.split()) <= len(line.split()) <= len(prompt.split()) + 9
    if how:
        assert say(capsys, "generate", *words, *mixture, *how[:-1], 8) != text


def test_fairseq_writes_the_same(
    lab: Lab, datastore: Path, words: list[object], capsys: Capture, prompts: Path
) -> None:
    """Greedy and by three beams, as ``fairseq-interactive``."""
    for beam in (1, 3):
        ours = say(capsys, "generate", *words, *KNN, "--beam", beam, "--batch-size", 1)
        command = [
            *("fairseq-interactive", lab.data, "--user-dir", ROOT / "fairseq_knnlm"),
            *("--task", "knn_lm", "--path", lab.checkpoint(), "--cpu", "--input", prompts),
            *("--knnlm", "--dstore-filename", datastore, *KNN, "--beam", beam),
            *("--max-len-b", 16),
        ]
        out = must(*command)
        theirs = [line.split("\t")[2] for line in out.splitlines() if line.startswith("H-")]
        for our, their, prompt in zip(ours.splitlines(), theirs, PROMPTS, strict=True):
            if beam == 1:  # the end of a beam search depends on how far it may go
                assert our.split()[: len(prompt.split()) + 9] == their.split()[: len(our.split())]
            assert their.startswith(prompt)
            assert our.startswith(prompt)


def test_sources_are_of_the_very_text(
    lab: Lab, datastore: Path, words: list[object], capsys: Capture, tmp_path: Path
) -> None:
    """Each token is as likely as the hub interface says, and lines end where they do."""
    out = tmp_path / "out.jsonl"
    said = say(capsys, "generate", *words, *KNN, "--sources", out)
    texts = list(read_record(out).texts)
    interface = hub(lab, datastore, KNN)
    for text, line, prompt in zip(texts, said.splitlines(), PROMPTS, strict=True):
        assert text.given == len(prompt.split())
        assert "".join(token.text for token in text.tokens).strip() == line
        likely = interface.score(line)["positional_scores"]
        found = torch.tensor([token.mixture for token in text.tokens][: len(likely)])
        torch.testing.assert_close(found, likely, rtol=1e-4, atol=1e-4)
        written = text.tokens[text.given :]
        assert any(token.sources for token in written)


def test_it_goes_on_through_lines(words: list[object], capsys: Capture) -> None:
    """Every text has all of its new tokens, ends of lines among them."""
    said = say(capsys, "generate", *words, *KNN, "--lines", "--sampling", "--seed", 2)
    texts = said.removesuffix("\n\n").split("\n\n")
    assert len(texts) == len(PROMPTS)
    assert "\n" in said.removesuffix("\n\n").replace("\n\n", "")


def test_unknown_words_and_nothing(words: list[object], capsys: Capture, prompts: Path) -> None:
    prompts.write_text("nobody knows\n\n")
    out, wrong = said_and_wrong(capsys, 0, "generate", *words, *KNN)
    assert "2 of the prompts' 2 tokens are not in the dictionary" in wrong
    first, second = out.splitlines()
    assert first.startswith("<unk> <unk>")
    assert second.strip()  # a text that begins with nothing
    prompts.write_text("")
    assert say(capsys, "generate", *words, *KNN) == ""


def test_prompts_that_are_typed(
    words: list[object], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"w1 w2 w3\n"))
    monkeypatch.setattr("sys.stdin", typed)
    at = words.index("--prompts")
    said = say(capsys, "generate", *words[:at], *words[at + 2 :], *KNN)
    assert said.startswith("w1 w2 w3")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--sampling-topp", 0.9), "--sampling-topp needs --sampling"),
        (("--temperature", 0), "--temperature"),
        (("--max-len-b", 9), "--new-tokens"),
        (("--beam", 2, "--lines"), "--beam 1"),
        (("--beam", 2, "--speculate", "on"), "--beam 1"),
        (("--new-tokens", -1), "--new-tokens"),
        (("--new-tokens", 5000), "prompt 1 is too long for the model"),
        (("--batch-size", 0), "--batch-size"),
        (("--seed", -1), "--seed"),
        (("--prompts", "nowhere.txt"), "no prompts in nowhere.txt"),
        (("--score-table", "x.npz"), "--score-table"),
    ],
)
def test_what_is_refused(
    words: list[object], capsys: Capture, flags: tuple[object, ...], said: str
) -> None:
    assert said in refuse(capsys, "generate", *words, *KNN, *flags)


def test_prompts_that_are_no_text(words: list[object], capsys: Capture, prompts: Path) -> None:
    prompts.write_bytes(b"w1 \xff\xfe\n")
    assert "the prompts are no text" in refuse(capsys, "generate", *words, *KNN)


def test_sources_that_cannot_be_written(
    words: list[object], capsys: Capture, prompts: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert "--sources" in refuse(
        capsys, "generate", *words, *KNN, "--sources", tmp_path / "file" / "out.jsonl"
    )
    assert "--sources" in refuse(capsys, "generate", *words, *KNN, "--sources", prompts)
    assert prompts.read_text().startswith(PROMPTS[0])


def test_a_merged_datastore_has_no_text_around(
    datastore: Path, words: list[object], capsys: Capture, tmp_path: Path
) -> None:
    small, out = tmp_path / "small", tmp_path / "out.jsonl"
    say(capsys, "compress", "--dstore", datastore, "--out", small, "--merge", 4)
    say(capsys, "build-index", "--dstore", small, "--recipe", "Flat")
    changed = [small if word == datastore else word for word in words]
    say(capsys, "generate", *changed, *KNN, "--speculate", "on", "--sources", out)
    texts: list[Explained] = list(read_record(out).texts)
    sources = [one for text in texts for token in text.tokens for one in token.sources]
    assert sources
    assert {one.before for one in sources} == {None}


def test_ten_thousand_prompts(words: list[object], capsys: Capture, prompts: Path) -> None:
    prompts.write_text("".join(f"w{n % 9} w{n % 7}\n" for n in range(10_000)))
    said = say(capsys, "generate", *words, *KNN, "--new-tokens", 1, "--batch-size", 500)
    assert said.count("\n") == 10_000


def test_as_a_process(words: list[object]) -> None:
    """What is written goes to standard output, and all else to standard error."""
    command = [str(word) for word in ("fairseq-knnlm", "generate", *words, *KNN)]
    said = must(*command)
    assert said.splitlines()[0].startswith("w1 w2 w3")
    assert "tokens/s" in said
