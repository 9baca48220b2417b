"""Pointers: against RetoMaton in plain Python over brute-force neighbours."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Lab, run
from stores import (
    Question,
    ask,
    asking,
    assert_helps,
    brute_force,
    build_index,
    contexts,
    random_entries,
    write_store,
)

from fairseq_knnlm import cli
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.errors import ConfigError
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.experts.pointers import PART_OF_K, RUN, PointerExpert
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.retrieval.local import LocalRetriever

ROWS, WIDTH, TYPES, K, T = 400, 8, 4, 40, 9.0
#: Rows 30 to 179 of a text, which cross the ends of two runs.
TEXT = list(range(30, 180))
MODES = [None, 1, 8, 1000]


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return write_store(tmp_path / "store", *random_entries(ROWS, WIDTH, TYPES), vocabulary=TYPES)


def expert(store: Datastore, least: int | None, k: int = K, recipe: str = "Flat") -> PointerExpert:
    assert store.keys is not None
    index, card = build_index(store.keys, recipe, nprobe=1)
    retriever = LocalRetriever(SearchIndex(index, card), store, "l2")
    return PointerExpert(retriever, k, [KnnSetting(temperature=T)], least=least)


def text(rows: Sequence[int], seed: int = 4) -> Question:
    """Random queries and targets at these rows."""
    rng = torch.manual_seed(seed)
    keys = torch.randn(len(rows), WIDTH, generator=rng)
    return at_rows(keys, torch.randint(TYPES, (len(rows),), generator=rng), rows)


def at_rows(keys: torch.Tensor, targets: torch.Tensor, rows: Sequence[int]) -> Question:
    """Each comes after the target before it."""
    return asking(keys, targets, contexts(targets.tolist()), torch.tensor(rows))


def batches(whole: Question, size: int) -> list[Question]:
    return [whole[start : start + size] for start in range(0, len(whole.targets), size)]


def plain(
    keys: np.ndarray, values: np.ndarray, asked: Question, least: int | None, k: int = K
) -> tuple[list[list[int]], np.ndarray, int]:
    """Candidates and log p of each token, and how many searches they took."""
    assert asked.contexts.keys is not None
    queries = asked.contexts.keys.double().numpy()
    nearest = brute_force(keys, queries, k, "l2")[1].tolist()
    everybody, log_probs, searches = [], [], 0
    before, last = [], -1
    for place, (row, target) in enumerate(
        zip(asked.contexts.rows.tolist(), asked.targets.tolist(), strict=True)
    ):
        pointers = before if row == last + 1 and row % RUN else []
        found = []
        if least is None or len(pointers) < least:
            found = nearest[place]
            searches += 1
        candidates = [pointer for pointer in pointers if pointer not in found] + found
        followed = [row + 1 for row in candidates if values[row] == target]
        before = [row for row in followed if row < len(values)][: max(1, k // PART_OF_K)]
        last = row
        weights = np.exp(-((keys[candidates].astype("f8") - queries[place]) ** 2).sum(1) / T)
        with np.errstate(divide="ignore"):
            log_probs.append(
                np.log(weights[values[candidates] == target].sum() / weights.sum()),
            )
        everybody.append(sorted(candidates))
    return everybody, np.array(log_probs), searches


def expected(
    store: Datastore, asked: Question, least: int | None
) -> tuple[list[list[int]], np.ndarray, int]:
    assert store.keys is not None
    return plain(store.keys, store.values, asked, least)


def candidates(found: PointerExpert, part: Question) -> list[list[int]]:
    near = found.near(part.contexts)
    return [sorted(ids[valid].tolist()) for ids, valid in zip(near.ids, near.valid, strict=True)]


@pytest.mark.parametrize("least", MODES)
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_candidates_and_probabilities_are_retomatons(
    store: Datastore, least: int | None, size: int
) -> None:
    """Whatever the batches; the last batches begin and end within runs."""
    asked = text(TEXT)
    everybody, log_probs, searches = expected(store, asked, least)
    one, other = expert(store, least), expert(store, least)
    parts = batches(asked, size)
    assert [row for part in parts for row in candidates(one, part)] == everybody
    found = torch.cat([ask(other, part).log_probs for part in parts])
    np.testing.assert_allclose(found[:, 0].numpy(), log_probs, atol=1e-4)
    assert (one.queries, one.searches) == (len(TEXT), searches)


def test_too_few_pointers_are_joined(store: Datastore) -> None:
    """``replace`` with more pointers asked for than there can be."""
    asked = text(TEXT)
    join, replace = expert(store, None), expert(store, K)
    assert candidates(join, asked) == candidates(replace, asked)
    assert join.searches == replace.searches == len(TEXT)


@pytest.mark.parametrize(
    "rows",
    [
        [*range(1, 20), *range(40, 60), *range(100, 110)],
        [*range(70, 90), *range(1, 20), *range(20, 40)],
        [-1, *range(64, 72), -1, *range(72, 80), -1, -1, *range(90, 99)],
        [-1] * 30,
    ],
    ids=["gaps", "backwards", "beginnings of sentences", "no text"],
)
@pytest.mark.parametrize("size", [5, 100])
def test_nothing_leaks_across_gaps(store: Datastore, rows: list[int], size: int) -> None:
    asked = text(rows)
    for least in MODES:
        follower = expert(store, least)
        found = [row for part in batches(asked, size) for row in candidates(follower, part)]
        assert found == expected(store, asked, least)[0]


def test_a_pointer_does_not_know_its_target(store: Datastore) -> None:
    """Other targets from some token on leave the candidates as they were up to that token."""
    asked = text(TEXT)
    assert asked.contexts.keys is not None
    targets = asked.targets.clone()
    targets[70:] = (targets[70:] + 1) % TYPES
    other = at_rows(asked.contexts.keys, targets, TEXT)
    for least in MODES:
        one, two = (candidates(expert(store, least), each) for each in (asked, other))
        assert one[:71] == two[:71]
        assert one[71:] != two[71:]


def test_repeated_text_is_searched_once_a_run(tmp_path: Path) -> None:
    """The text stands in the datastore word for word."""
    keys, values = random_entries(ROWS, WIDTH)
    store = write_store(tmp_path / "store", keys, values)
    asked = at_rows(
        torch.from_numpy(keys[100:300] + 0.01), torch.from_numpy(values[100:300]), range(64, 264)
    )
    follower = expert(store, 1)
    found = candidates(follower, asked)
    assert follower.searches == 4
    assert all(100 + place in ids for place, ids in enumerate(found))


def test_missing_neighbours_and_pointers_stay_missing(store: Datastore) -> None:
    """An index that finds about ten of 40: what is missing counts nothing and leads nowhere."""
    asked = text(TEXT)
    near = expert(store, None, recipe="IVF32,Flat").near(asked.contexts)
    assert not near.valid.all()
    assert torch.equal(near.valid, near.ids >= 0)
    assert torch.equal(near.valid, near.distances.isfinite())
    for ids, valid in zip(near.ids, near.valid, strict=True):
        there = ids[valid].tolist()
        assert len(there) == len(set(there))


def test_a_single_neighbour(store: Datastore) -> None:
    asked = text(TEXT)
    assert store.keys is not None
    everybody, _, _ = plain(store.keys, store.values, asked, 1, k=1)
    assert candidates(expert(store, 1, k=1), asked) == everybody


def evaluate(lab: Lab, datastore: Path, out: Path, *flags: object) -> dict[str, float]:
    base = ("--knnlm", "--dstore-filename", datastore, "--k", 16, "--lmbda", 0.3, "--knn-temp", T)
    lab.evaluate("valid", *base, *flags, "--results-json", out)
    return json.loads(out.read_text())


def test_a_run_is_retomaton(
    lab: Lab, datastore: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``fairseq-eval-lm``, against plain Python over the keys of both splits."""
    lab.evaluate(
        "valid", "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "valid", "--dstore-fp32"
    )
    train, valid = open_datastore(datastore), open_datastore(tmp_path / "valid")
    assert train.keys is not None and valid.keys is not None
    keys, targets = np.array(valid.keys), valid.values.astype(np.int64)
    asked = at_rows(torch.from_numpy(keys), torch.from_numpy(targets), range(len(valid)))
    table, out = tmp_path / "table.npz", tmp_path / "results.json"
    caplog.set_level(logging.INFO)
    for mode, least in (("join", None), ("replace", 2), ("replace", 1000)):
        flags = ["--pointers", mode, *([] if least is None else ["--pointer-min", least])]
        found = evaluate(lab, datastore, out, *flags, "--score-table", table)
        lm = np.load(table)["lm"]
        _, knn, searches = plain(np.array(train.keys), train.values, asked, least, k=16)
        loss = -np.logaddexp(np.log(0.7) + lm, np.log(0.3) + knn).mean() / np.log(2)
        assert found["loss"] == pytest.approx(loss, rel=1e-4)
        assert found["searches_saved"] == pytest.approx(1 - searches / len(valid))
        assert found["distances"].startswith("exact squared L2, recomputed")
        assert found["pointers"] == (mode if least is None else f"replace from {least}")
        said = f"pointers {found['pointers']}: {found['searches_saved']:.1%} searches saved"
        assert said in caplog.messages
    larger = evaluate(lab, datastore, out, *flags, "--max-tokens", 2000)
    assert larger["loss"] == pytest.approx(found["loss"], rel=1e-4)


def test_without_pointers_nothing_is_said_of_them(
    lab: Lab, datastore: Path, tmp_path: Path
) -> None:
    assert "searches_saved" not in evaluate(lab, datastore, tmp_path / "results.json")


def test_a_merged_datastore_has_no_successors(
    lab: Lab, datastore: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged, results = tmp_path / "merged", tmp_path / "results.json"
    for command in (
        ["compress", "--dstore", datastore, "--out", merged, "--merge", 2],
        ["build-index", "--dstore", merged, "--recipe", "Flat"],
    ):
        assert cli.main([str(word) for word in command]) == 0, capsys.readouterr().err
    with pytest.raises(ConfigError) as caught:
        evaluate(lab, merged, results, "--pointers", "join")
    assert_helps(caught, "entries were merged", "leave --pointers out")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pointers", "join", "--no-load-keys"], "--no-load-keys"),
        (["--pointers", "replace", "--knn-sim-func", "dot"], "--knn-sim-func dot"),
        (["--pointer-min", 4], "--pointers replace"),
        (["--pointers", "join", "--pointer-min", 4], "--pointers replace"),
        (["--pointers", "replace", "--pointer-min", 0], "1 or more"),
        (["--pointers", "join", "--experts", "cache"], "knn among --experts"),
    ],
)
def test_flags_that_contradict_pointers(
    lab: Lab, datastore: Path, tmp_path: Path, flags: list[object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        lab.evaluate("valid", "--knnlm", "--dstore-filename", datastore, *flags)


def test_sentences_by_themselves_have_no_pointers(lab: Lab, datastore: Path) -> None:
    """The command that scores sentences, whose places in a text are not known."""
    ran = run(
        *("fairseq-generate", lab.data, "--user-dir", ROOT / "fairseq_knnlm", "--task", "knn_lm"),
        *("--path", lab.checkpoint(), "--score-reference", "--gen-subset", "valid", "--cpu"),
        *("--sample-break-mode", "eos", "--knnlm", "--dstore-filename", datastore, "--k", 8),
        *("--pointers", "join"),
    )
    assert ran.code != 0
    assert "--pointers join follows a text" in ran.out


def test_who_follows_another_goes_on_from_its_pointers(store: Datastore) -> None:
    first, second = batches(text(range(30)), 15)
    one, alone, late = (expert(store, 4) for _ in range(3))
    for reader in (one, alone):
        ask(reader, first)
    late.follow(one)
    found = candidates(late, second)  # once: it has read on then
    assert found == candidates(alone, second)
    assert found != candidates(expert(store, 4), second)
