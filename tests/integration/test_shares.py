"""An evaluation shared out over processes adds up to that of one, to the last digit.

The oracle is the run of one process over the whole split.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import BLOCKS, Lab, eval_lm, must

from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.runs.joining import join_results, join_tables
from fairseq_knnlm.runs.scorer import KnnScorer

#: And the fingerprint, which is over these, too.
TIMES = ("seconds", "tokens_per_second", "search_seconds", "fingerprint")
KNN = ["--k", 16, "--lmbda", 0.3, "--knn-temp", 2.0]
CACHE = ["--cache-lmbda", 0.2, "--cache-theta", 0.5]
STRIDE = ["--tokens-per-sample", 16, "--stride", 5, "--context-window", 0]
SUFFIX = ["--suffix-lmbda", 0.2, "--suffix-half-life", 30]


def timeless(found: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in found.items() if name not in TIMES}


class Shared:
    """Runs over shares of a split, and one over the whole."""

    def __init__(self, lab: Lab, folder: Path, *flags: object, split: str = "test") -> None:
        self.lab, self.folder, self.flags, self.split = lab, folder, flags, split

    def evaluate(self, name: str, *flags: object) -> None:
        files = "--results-json", self.results(name), "--score-table", self.table(name)
        self.lab.evaluate(self.split, *self.flags, *files, *flags)

    def results(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def table(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    def whole(self) -> tuple[dict[str, Any], ScoreTable]:
        self.evaluate("whole")
        return json.loads(self.results("whole").read_text()), read_table(self.table("whole"))

    def share(self, number: int, of: int, *flags: object) -> None:
        self.evaluate(f"{of}-{number}", "--num-shards", of, "--shard-id", number, *flags)

    def joined(self, of: int) -> tuple[dict[str, Any], ScoreTable]:
        names = [f"{of}-{number}" for number in range(of)]
        found = join_results([self.results(name) for name in names])
        to = self.table(f"joined-{of}")
        join_tables([self.table(name) for name in reversed(names)], to)
        return found, read_table(to)


def assert_same(
    found: tuple[dict[str, Any], ScoreTable], whole: tuple[dict[str, Any], ScoreTable]
) -> None:
    """In every figure but times, and every byte of every column."""
    assert timeless(found[0]) == timeless(whole[0])
    assert list(timeless(found[0])) == list(timeless(whole[0]))
    assert timeless(found[1].card) == timeless(whole[1].card)
    assert list(found[1].card) == list(whole[1].card)
    assert list(found[1].columns) == list(whole[1].columns)
    for name, column in whole[1].columns.items():
        assert found[1][name].dtype == column.dtype
        assert found[1][name].tobytes() == column.tobytes(), name


def memory(datastore: Path, *flags: object) -> list[object]:
    return ["--dstore-filename", datastore, *flags]


CASES: dict[str, list[object]] = {
    "base": [],
    "knn": ["--knnlm", *KNN],
    "cache": ["--experts", "cache", *CACHE, "--cache-window", 50],
    "cache by documents": ["--experts", "cache", *CACHE, "--cache-window", 7, "--cache-reset"],
    "suffix": ["--experts", "suffix", *SUFFIX, "--suffix-window", 50],
    "suffix by documents": [
        *("--experts", "suffix", *SUFFIX, "--suffix-window", 7, "--suffix-reset"),
    ],
    "pointers": ["--knnlm", *KNN, "--pointers", "replace", "--pointer-min", 2],
    "beginnings": [
        *("--experts", "knn,cache", *KNN, *CACHE, "--pointers", "join"),
        *("--add-bos-token", "--tokens-per-sample", 8, "--context-window", 0),
    ],
    "stride": ["--knnlm", *KNN, *STRIDE],
    "stride, with a cache": ["--experts", "cache", *CACHE, "--cache-window", 50, *STRIDE],
    "stride as long as a window": ["--tokens-per-sample", 8, "--stride", 8, "--context-window", 0],
    "no context": ["--knnlm", *KNN, "--tokens-per-sample", 8, "--context-window", 0],
    "sentences": ["--sample-break-mode", "complete", "--skip-invalid-size-inputs-valid-test"],
}


@pytest.mark.parametrize("case", list(CASES))
def test_shares_join_to_the_whole(lab: Lab, datastore: Path, tmp_path: Path, case: str) -> None:
    flags = CASES[case]
    asks = memory(datastore) if "--k" in flags else []
    shared = Shared(lab, tmp_path, *asks, *flags)
    whole = shared.whole()
    for of in (1, 2, 3, 4) if case in ("base", "knn", "cache") else (3,):
        for number in range(of):
            shared.share(number, of)
        assert_same(shared.joined(of), whole)


def losses(lab: Lab, folder: Path, of: int, *flags: object, split: str = "test") -> dict[str, Any]:
    """What shares join to that write results alone: then few settings are asked."""
    files = []
    for number in range(of):
        files.append(folder / f"results-{of}-{number}.json")
        share = ["--num-shards", of, "--shard-id", number] if of > 1 else []
        lab.evaluate(split, *flags, "--results-json", files[-1], *share)
    return timeless(join_results(files))


@pytest.fixture(scope="module")
def tuned(lab: Lab) -> Path:
    """A datastore with a calibration, by the real commands."""
    store = lab.folder / "tuned-for-shares"
    model = ["--path", lab.checkpoint(), *BLOCKS, "--sample-break-mode", "none", "--cpu"]
    must("fairseq-knnlm", "save", lab.data, "--dstore", store, *model)
    must("fairseq-knnlm", "build-index", "--dstore", store)
    must("fairseq-knnlm", "tune", "--dstore", store, "--data", lab.data, *model, "--k", 16)
    return store


#: Fitted, by the flags that name it.
FITTED: dict[str, list[object]] = {
    "default": ["--knnlm"],
    "all experts": ["--experts", "knn,cache,suffix"],
    "gate": ["--experts", "knn,cache", "--mixer", "gate"],
    "fewer searches": ["--experts", "knn,cache", "--skip-searches", 0.5],
    "fewer searches and pointers": [
        *("--experts", "knn,cache", "--skip-searches", 0.5, "--pointers", "join"),
    ],
}


@pytest.mark.parametrize("case", list(FITTED))
def test_a_calibrated_mixture_in_shares(lab: Lab, tuned: Path, tmp_path: Path, case: str) -> None:
    flags = ["--dstore-filename", tuned, "--k", 16, *FITTED[case]]
    whole = losses(lab, tmp_path, 1, *flags)
    if "--experts" in flags:  # the default is what pays on so little text
        assert ",".join(whole["experts"]) == flags[flags.index("--experts") + 1]
        assert {"cache", "suffix"} & set(whole["experts"])  # or no share would have to look back
    assert whole["tokens"] == len(lab.text("test"))
    assert [losses(lab, tmp_path, of, *flags) for of in (2, 4)] == [whole, whole]


#: Which look back less far than the split is long, and how far.
NEAR: dict[str, tuple[list[object], int]] = {
    "cache": (["--experts", "cache", *CACHE, "--cache-window", 200], 201),
    "documents": (["--experts", "cache", *CACHE, "--cache-window", 70, "--cache-reset"], 71),
    "suffix": (["--experts", "suffix", *SUFFIX, "--suffix-window", 70], 76),
    "pointers": (["--knnlm", *KNN, "--pointers", "join"], 63),
    "both": (["--experts", "knn,cache", *KNN, *CACHE, "--pointers", "join"], 4001),
    "neither": (["--knnlm", *KNN], 0),
}


@pytest.mark.parametrize("case", list(NEAR))
def test_a_share_reads_no_more_than_it_looks_back_to(
    lab: Lab, datastore: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the train split, 47 batches: whole ones, and no figure knows of them."""
    flags, looks_back = NEAR[case]
    if "--k" in flags:
        flags = memory(datastore, *flags)
    whole = losses(lab, tmp_path, 1, *flags, split="train")
    read: list[int] = []
    catch_up = KnnScorer.catch_up

    def counted(scorer: KnnScorer, models: Any, sample: Any) -> None:
        read.append(sample["ntokens"])
        catch_up(scorer, models, sample)

    monkeypatch.setattr(KnnScorer, "catch_up", counted)
    assert losses(lab, tmp_path, 3, *flags, split="train") == whole
    third = whole["tokens"] / 3
    before = sum(min(looks_back, third * number) for number in (1, 2))
    assert before - 2 * 64 <= sum(read) <= before + 2 * 64
    assert bool(read) == bool(looks_back)


def test_shares_are_read_by_several_workers(lab: Lab, tmp_path: Path) -> None:
    """Of fairseq's loader: each collates every other batch, windows before it included."""
    flags = ["--experts", "cache", *CACHE, "--cache-window", 60]
    whole = losses(lab, tmp_path, 1, *flags)
    files = [tmp_path / f"{number}.json" for number in range(2)]
    for number, file in enumerate(files):
        share = ["--num-shards", 2, "--shard-id", number, "--results-json", file]
        eval_lm(lab.command("test", *flags, *share, "--num-workers", "2"))
    assert timeless(join_results(files)) == whole


def test_shares_as_processes(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """As people type it, each process by itself; the log says which share it was."""
    flags = memory(datastore, "--experts", "knn,cache", *KNN, *CACHE)
    shared = Shared(lab, tmp_path, *flags)
    whole, table = shared.whole()
    results, tables = [], []
    for number in range(2):
        results.append(tmp_path / f"share-{number}.json")
        tables.append(tmp_path / f"share-{number}.npz")
        share = ["--num-shards", 2, "--shard-id", number]
        written = ["--results-json", results[-1], "--score-table", tables[-1]]
        said = must("fairseq-eval-lm", *lab.command("test", *flags, *share, *written))
        ours, stock = said.index(f"share {number} of 2 (--shard-id)"), said.index("Loss (base 2)")
        assert ours < stock
        assert "fairseq-knnlm report --join FILES" in said
    to = ["--results-json", tmp_path / "joined.json", "--score-table", tmp_path / "joined.npz"]
    said = must("fairseq-knnlm", "report", "--join", *results, *tables, *to)
    assert "test, joined of 2 shares" in said
    assert f"mixture  perplexity {whole['perplexity']:.2f}, loss {whole['loss']:.4f} bits" in said
    found = json.loads(to[1].read_text()), read_table(to[3])  # type: ignore[union-attr, arg-type]
    assert_same(found, (whole, table))


def test_what_is_left_out_is_counted_once(lab: Lab, tmp_path: Path) -> None:
    """Ends of documents in no block, and blocks longer than the model takes."""
    flags = ["--sample-break-mode", "eos", "--tokens-per-sample", 1000, "--context-window", 0]
    flags += ["--max-tokens", 64, "--model-overrides", "{'max_target_positions': 12}"]
    whole = losses(lab, tmp_path, 1, *flags)
    assert whole["tokens_left_out"] > 0
    assert whole["tokens"] + whole["tokens_left_out"] == len(lab.text("test"))
    assert losses(lab, tmp_path, 3, *flags) == whole


def test_shares_of_other_runs_do_not_join(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    flags = memory(datastore, "--knnlm", *KNN)

    def share(number: int, *more: object, split: str = "test") -> Path:
        file = tmp_path / f"{number}-{len(list(tmp_path.iterdir()))}.json"
        of = ["--num-shards", 2, "--shard-id", number, "--results-json", file]
        lab.evaluate(split, *flags, *of, *more)
        return file

    first = share(0)
    others = {
        "--lmbda 0.4": share(1, "--lmbda", 0.4),
        "context_window": share(1, "--context-window", 4),
        "of_batches": share(1, "--max-tokens", 32),
        "precision float16": share(1, "--fp16"),
    }
    for says, other in others.items():
        with pytest.raises(TableError, match="are of different runs") as caught:
            join_results([first, other])
        assert says in str(caught.value)
    assert join_results([first, share(1)])["tokens"] == len(lab.text("test"))
