"""``fairseq-knnlm explain``: the probabilities of scoring, and sources that are really there."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from cli_calls import Capture, refuse, said_and_wrong, say
from conftest import BLOCKS, ROOT, Lab, must
from fairseq.models.transformer_lm import TransformerLanguageModel

import fairseq_knnlm.tasks  # noqa: F401  for the hub interface
from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.datastore.documents import Documents, write_documents
from fairseq_knnlm.explanation.record import Explained, Run, Source, Token
from fairseq_knnlm.explanation.record_file import read_record

TEXT = "w1 w2 w3 w4 w4 w5 w1 w2"
K, TEMPERATURE = 32, 2.0
#: Mixtures by flags.
KNN = ["--experts", "knn", "--k", K, "--lmbda", 0.4, "--knn-temp", TEMPERATURE]
ALL = [
    *("--experts", "knn,cache,ngram,suffix", "--k", K, "--lmbda", 0.3, "--knn-temp", TEMPERATURE),
    *("--cache-lmbda", 0.2, "--cache-theta", 0.5, "--cache-window", 6, "--ngram-lmbda", 0.2),
    *("--suffix-lmbda", 0.1, "--suffix-half-life", 30),
]
MIXTURES = {"knn": KNN, "all": ALL}
IN_BLOCKS = [*BLOCKS, "--sample-break-mode", "none"]


@pytest.fixture(scope="module")
def named(lab: Lab, datastore: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore of 30 documents of 10 lines each."""
    folder = tmp_path_factory.mktemp("explained") / "named"
    store = open_datastore(Path(shutil.copytree(datastore, folder)))
    ends = np.flatnonzero(np.asarray(store.values) == 2)
    starts = np.concatenate([[0], ends[9:-1:10] + 1])
    write_documents(store, Documents(starts.astype(np.int64), len(store), 2))
    return folder


def explained(
    lab: Lab, store: object, capsys: Capture, folder: Path, *flags: object
) -> tuple[Run, Explained]:
    """What the command writes of one text."""
    path = folder / "out.jsonl"
    say(
        *(capsys, "explain", "--dstore", store, lab.data, "--path", lab.checkpoint(), "--cpu"),
        *("--json", path, *flags),
    )
    record = read_record(path)
    (text,) = record.texts
    return record.run, text


def hub(lab: Lab, datastore: Path, flags: list[object]) -> TransformerLanguageModel:
    pairs = zip(flags[::2], flags[1::2], strict=True)
    named = {str(flag)[2:].replace("-", "_"): value for flag, value in pairs}
    return TransformerLanguageModel.from_pretrained(
        str(lab.checkpoint().parent),
        lab.checkpoint().name,
        str(lab.data),
        user_dir=str(ROOT / "fairseq_knnlm"),
        knnlm=True,
        dstore_filename=str(datastore),
        **named,
    )


@pytest.mark.parametrize("name", list(MIXTURES))
def test_a_text_is_as_likely_as_the_hub_says(
    lab: Lab, datastore: Path, tmp_path: Path, capsys: Capture, name: str
) -> None:
    flags = MIXTURES[name]
    _, text = explained(lab, datastore, capsys, tmp_path, "--text", TEXT, *flags)
    expected = hub(lab, datastore, flags).score(TEXT)["positional_scores"].tolist()
    stock = TransformerLanguageModel.from_pretrained(
        str(lab.checkpoint().parent), lab.checkpoint().name, str(lab.data)
    )
    alone = stock.score(TEXT)["positional_scores"].tolist()
    found = [token.mixture for token in text.tokens]
    assert found == pytest.approx(expected[: len(found)], abs=1e-4)
    assert [token.lm for token in text.tokens] == pytest.approx(alone[: len(found)], abs=1e-4)
    assert "".join(token.text for token in text.tokens) == TEXT
    assert [token.symbol for token in text.tokens] == TEXT.split()
    assert text.given == len(text.tokens) == 8


def evaluated(lab: Lab, datastore: Path, split: str, *flags: object) -> list[float]:
    """log p of every token, by ``fairseq-eval-lm``."""
    asked = ["--knnlm", "--dstore-filename", datastore, *flags, "--output-word-probs"]
    said = must("fairseq-eval-lm", *lab.command(split, *asked))
    lines = dict(re.findall(r"\|? ?(\d+) (w?\S+ \[-?\d+\.\d+\](?:\t.*)?)$", said, flags=re.M))
    blocks = [lines[key] for key in sorted(lines, key=int)]
    return [float(x) for block in blocks for x in re.findall(r" \[(-?\d+\.\d+)\]", block)]


@pytest.mark.parametrize("name", list(MIXTURES))
def test_rows_are_as_likely_as_the_evaluation_says(
    lab: Lab, datastore: Path, tmp_path: Path, capsys: Capture, name: str
) -> None:
    """From the middle of a block to the middle of another, after their context."""
    everything = evaluated(lab, datastore, "test", *MIXTURES[name])
    words = lab.text("test")
    assert len(everything) == len(words)
    for first, last in ((0, 5), (101, 122), (len(words) - 3, len(words))):
        flags = ["--rows", f"{first}:{last}", *IN_BLOCKS, *MIXTURES[name]]
        _, text = explained(lab, datastore, capsys, tmp_path, *flags)
        assert [token.symbol for token in text.tokens] == words[first:last]
        found = [token.mixture for token in text.tokens]
        assert found == pytest.approx(everything[first:last], abs=1e-4)


def test_parts_add_up(lab: Lab, datastore: Path, tmp_path: Path, capsys: Capture) -> None:
    """Weights to 1, weighted probabilities to the mixture's, bits to what was moved."""
    _, text = explained(lab, datastore, capsys, tmp_path, "--rows", "40:60", *IN_BLOCKS, *ALL)
    assert {len(token.voices) for token in text.tokens} == {5}
    for token in text.tokens:
        assert token.mixture is not None
        assert token.lm is not None
        voices = token.voices
        assert [voice.name for voice in voices] == ["lm", "knn", "cache", "ngram", "suffix"]
        assert sum(voice.weight for voice in voices) == pytest.approx(1)
        spoken = [voice.weight * math.exp(voice.log_prob or -math.inf) for voice in voices]
        assert sum(spoken) == pytest.approx(math.exp(token.mixture), rel=1e-4)
        moved = (token.mixture - token.lm) / math.log(2)
        assert sum(voice.bits for voice in voices) == pytest.approx(moved, abs=1e-4)
        assert voices[0].bits == 0


def test_guesses_are_the_likeliest(
    lab: Lab, datastore: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Each word that might have come, scored by the hub interface, in the place of the last."""
    _, text = explained(lab, datastore, capsys, tmp_path, "--text", TEXT, *KNN)
    interface = hub(lab, datastore, KNN)
    start = TEXT.rpartition(" ")[0]
    words = [word for word in interface.task.target_dictionary.symbols[4:] if word[0] == "w"]
    scores = {
        word: float(interface.score(f"{start} {word}")["positional_scores"][7]) for word in words
    }
    found = [(guess.text.strip(), guess.probability) for guess in text.tokens[-1].mixture_guesses]
    best = sorted(scores, key=scores.__getitem__, reverse=True)
    ours = [(word, probability) for word, probability in found if word in scores]
    assert len(found) == 5
    assert [word for word, _ in ours] == best[: len(ours)]
    expected = [math.exp(scores[word]) for word, _ in ours]
    assert [probability for _, probability in ours] == pytest.approx(expected, rel=1e-3)


def test_sources_are_the_nearest_entries_in_their_text(
    lab: Lab, named: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Rows of the datastore's own text, whose keys are the queries: all by hand, from the files."""
    first, last = 1203, 1211
    flags = ["--gen-subset", "train", "--rows", f"{first}:{last}", *IN_BLOCKS, *KNN]
    run, text = explained(lab, named, capsys, tmp_path, *flags)
    words, keys = lab.text("train"), np.load(named / "keys.npy").astype(np.float64)
    assert (run.memories[0].name, run.memories[0].rows) == ("named", len(words))
    for row, token in zip(range(first, last), text.tokens, strict=True):
        distances = ((keys - keys[row]) ** 2).sum(axis=1)
        nearest = np.argsort(distances, kind="stable")[:K]
        shares = np.exp(-distances[nearest] / TEMPERATURE)
        shares = dict(zip(nearest.tolist(), (shares / shares.sum()).tolist(), strict=True))
        assert len(token.sources) == 8
        assert token.sources[0].row == row
        found = [source.share for source in token.sources]
        assert found == pytest.approx(sorted(shares.values(), reverse=True)[:8], rel=0.02)
        for source in token.sources:
            assert source.distance == pytest.approx(distances[source.row], abs=0.02)
            assert source.share == pytest.approx(shares[source.row], rel=0.02)
            _check_text(words, source)
            assert source.agrees == (words[source.row] == words[row])
            shown = len(str(source.before).replace("\n", " </s> ").split())
            assert source.matched == min(_same(words, row, source.row), shown)
        by_word: dict[str, float] = {}
        for entry, share in shares.items():
            by_word[words[entry]] = by_word.get(words[entry], 0) + share
        assert token.agreement == [pytest.approx(max(by_word.values()), rel=0.02)]
        _check_picture(token, keys, row)


def _check_text(words: list[str], source: Source) -> None:
    row = source.row
    around = f"{source.before}{source.value}{source.after}"
    expected = words[max(row - 12, 0) : row + 9]
    if row > 12 and expected[0] == "</s>":  # what is shown begins with a word
        del expected[0]
    assert around.replace("\n", " </s> ").split() == expected
    assert source.value.replace("\n", " </s> ").split() == [words[row]]
    ends = [place for place, word in enumerate(words) if word == "</s>"]
    starts = [0, *(place + 1 for place in ends[9:-1:10])]
    start = before(starts, row)
    assert source.document_row == start
    assert source.document == " ".join(words[start : words.index("</s>", start)])


def before(starts: list[int], row: int) -> int:
    return max(start for start in starts if start <= row)


def _same(words: list[str], row: int, other: int) -> int:
    return next(n for n in range(13) if n == 12 or words[row - 1 - n] != words[other - 1 - n])


def _check_picture(token: Token, keys: np.ndarray, row: int) -> None:
    """Distances in the picture are at most the true ones, and its plane is the best one."""
    rows = [row, *(source.row for source in token.sources)]
    points = np.array([token.place, *(source.place for source in token.sources)])
    true = keys[rows] - keys[rows].mean(axis=0)
    best = np.linalg.svd(true, compute_uv=False)[:2]
    assert np.linalg.norm(points) == pytest.approx(np.linalg.norm(best), rel=0.02)


def test_two_datastores(
    lab: Lab, datastore: Path, named: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Of the same text: each entry is found twice, in documents of either."""
    starts = np.load(named / "documents.npz", allow_pickle=False)["starts"].tolist()
    both = f"{datastore}:{named}"
    flags = ["--text", TEXT, "--experts", "knn", "--k", K, "--lmbda", 0.2, "--knn-temp", 2.0]
    run, text = explained(lab, both, capsys, tmp_path, *flags, "--sources-per-token", 6)
    assert [memory.expert for memory in run.memories] == ["knn", "knn2"]
    for token in text.tokens:
        assert [voice.name for voice in token.voices] == ["lm", "knn", "knn2"]
        assert token.voices[1].bits == pytest.approx(token.voices[2].bits)
        pairs = [(source.memory, source.row) for source in token.sources]
        assert {pair for pair in pairs if pair[0] == 0} == {(0, row) for n, row in pairs if n == 1}
        assert len(set(pairs)) == 6
        for source in token.sources:  # without empty lines one of them is one document
            assert source.document_row == (0 if source.memory == 0 else before(starts, source.row))
        assert token.agreement[0] == pytest.approx(token.agreement[1])


def test_entries_that_were_merged_have_no_text(
    lab: Lab, datastore: Path, tmp_path: Path, capsys: Capture
) -> None:
    small = tmp_path / "small"
    say(capsys, "compress", "--dstore", datastore, "--out", small, "--merge", 4, "--pca", 12)
    say(capsys, "build-index", "--dstore", small)
    path = tmp_path / "out.jsonl"
    _, warned = said_and_wrong(
        *(capsys, 0, "explain", "--dstore", small, lab.data, "--path", lab.checkpoint(), "--cpu"),
        *("--text", TEXT, *KNN, "--json", path),
    )
    assert "entries of" in warned
    assert "without the text around them" in warned
    (text,) = read_record(path).texts
    for token in text.tokens:
        assert token.place is not None
        for source in token.sources:
            assert (source.before, source.after, source.document) == (None, None, None)
            assert source.value.strip()


def test_without_keys_there_is_no_picture(
    lab: Lab, datastore: Path, tmp_path: Path, capsys: Capture
) -> None:
    flags = ["--text", TEXT, *KNN, "--no-load-keys"]
    _, text = explained(lab, datastore, capsys, tmp_path, *flags)
    for token in text.tokens:
        assert token.place is None
        assert {source.place for source in token.sources} == {None}


def test_an_added_beginning_and_lines(
    lab: Lab, datastore: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A text of two lines, after the beginning of sentence that fairseq adds."""
    lines = "w1 w2\nw3 w4"
    flags = [*KNN, "--add-bos-token"]
    _, text = explained(lab, datastore, capsys, tmp_path, "--text", lines, *flags)
    interface = hub(lab, datastore, [*KNN, "--add-bos-token", True])
    scored = interface.score(lines, replace_newline_with_eos=True)
    expected = scored["positional_scores"].tolist()
    assert "".join(token.text for token in text.tokens) == lines
    assert [token.mixture for token in text.tokens] == pytest.approx(expected[:5], abs=1e-4)


def test_unknown_words_are_named(lab: Lab, datastore: Path, capsys: Capture) -> None:
    out, warned = said_and_wrong(
        *(capsys, 0, "explain", "--dstore", datastore, lab.data, "--path", lab.checkpoint()),
        *("--cpu", "--text", "nobody knows", *KNN),
    )
    assert "the dictionary has none of the text's words" in warned
    assert out.count("<unk>") >= 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--text", "w1 " * 17], ["the text is longer than the model reads", "17 tokens"]),
        (["--rows", "0:99999"], ["--rows are not all in the split test", "0:99999"]),
        (["--text", "w1 w2", "--token", 3], ["--token names a token that is not there", "1 to 2"]),
        (["--text", "w1", "--experts", "rex"], ["--experts names experts"]),
        (["--text", "w1", "--score-table", "t.npz"], ["--score-table does nothing where a text"]),
        (["--text", "w1", "--pointers", "join"], ["--pointers join follows a text"]),
    ],
)
def test_what_cannot_be_explained(
    lab: Lab, datastore: Path, capsys: Capture, flags: list[object], words: list[str]
) -> None:
    said = refuse(
        *(capsys, "explain", "--dstore", datastore, lab.data, "--path", lab.checkpoint()),
        *("--cpu", *flags),
    )
    for word in words:
        assert word in said


def test_the_command_people_type(lab: Lab, named: Path, tmp_path: Path) -> None:
    """As a process: JSON written, then shown from the file, one token in detail."""
    path = tmp_path / "out.jsonl"
    said = must(
        *("fairseq-knnlm", "explain", "--dstore", named, lab.data, "--path", lab.checkpoint()),
        *("--gen-subset", "test", "--rows", "8:40", *IN_BLOCKS, "--cpu", *ALL, "--json", path),
    )
    assert "test, rows 8 to 40:" in said
    assert "| with memory          |     32 |" in said
    assert f"written to {path}" in said
    again = must("fairseq-knnlm", "explain", "--sources", path)
    assert again.strip() in said
    (text,) = read_record(path).texts
    token = text.tokens[4]
    detail = must("fairseq-knnlm", "explain", "--sources", path, "--token", 5)
    assert detail.startswith(f"token 5: {token.symbol}")
    for voice in token.voices:
        assert f"| {voice.name}" in detail
    assert f"{token.sources[0].row:,}" in detail
