"""A budget of time: costs by hand, steps against every subset there is, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cli_calls import MODEL, Capture, refuse, say, small_store, write_table
from stores import assert_helps

from fairseq_knnlm.calibration.budget import Budget, clock_of
from fairseq_knnlm.calibration.costs import Clock, Costs, ExpertCosts, Group
from fairseq_knnlm.calibration.fitter import Fitter
from fairseq_knnlm.calibration.lean import Steps
from fairseq_knnlm.calibration.record import FORMAT, VERSION
from fairseq_knnlm.calibration.report import TIMED_GAINS, gains, gains_header, prices
from fairseq_knnlm.calibration.search import fit
from fairseq_knnlm.calibration.stored import Calibration, read_calibration, write_calibration
from fairseq_knnlm.calibration.table import ScoreTable, read_table
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.errors import ConfigError, TableError
from fairseq_knnlm.files import write_sealed
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.runs.costs import expert_costs, like
from fairseq_knnlm.runs.mixing import chosen_experts
from fairseq_knnlm.runs.options import DatastoreOptions, MixingOptions, Options

ROWS = 2000
#: Columns of two experts. The long window of the cache takes long, and so does the search of knn.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "knn": [{"suffix": 0, "k": 0, "temperature": t} for t in (1.0, 4.0)],
    "cache": [
        {"suffix": 0, "theta": theta, "window": window}
        for window in (500, 4000)
        for theta in (0.0, 0.5)
    ],
}
#: Seconds a token; all are sums of powers of two, so that no sum is rounded.
COSTS = Costs(
    lm=8.0,
    lm_features=32.0,
    mixing=0.5,
    experts={
        "knn": ExpertCosts([Group([0, 1], 4.0, 0.5, 0.25)], Group([], 2.0, 1.0, 0.0)),
        "cache": ExpertCosts(
            [Group([0, 1], 1.0, 0.5, 0.125), Group([2, 3], 6.0, 1.0, 0.25)],
            Group([], 3.0, 2.0, 0.0),
        ),
    },
)
COLUMNS = [Component(name, setting) for name, some in SETTINGS.items() for setting in some]


def seconds(columns: Sequence[int], features: Sequence[str] = ()) -> float:
    """The rule in words: per expert the most that is shared, and what each group adds."""
    if not columns and not features:
        return 8.0
    total = 8.0 + (0.5 if columns else 0.0)
    groups = {"knn": [(4.0, 0.5, 0.25, {0, 1})], "cache": []}
    groups["cache"] = [(1.0, 0.5, 0.125, {2, 3}), (6.0, 1.0, 0.25, {4, 5})]
    of_features = {"knn": (2.0, 1.0), "cache": (3.0, 2.0)}
    for name, some in groups.items():
        shared, own = [0.0], 0.0
        for most, first, further, places in some:
            if count := len(places & set(columns)):
                shared.append(most)
                own += first + (count - 1) * further
        if name in features:
            shared.append(of_features[name][0])
            own += of_features[name][1]
        total += max(shared) + own
    return total


def subsets(size: int) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(range(size), n) for n in range(size + 1)))


@pytest.mark.parametrize("features", [(), ("knn",), ("knn", "cache")])
def test_the_time_of_a_mixture_is_that_of_its_parts(features: Sequence[str]) -> None:
    clock = Clock(COSTS, SETTINGS)
    names = [f"{name}_entropy" for name in features]
    for columns in subsets(len(COLUMNS)):
        chosen = [LM, *(COLUMNS[one] for one in columns)]
        assert clock.seconds(chosen, names) == seconds(columns, features)
        assert clock.speed(chosen, names) == 8.0 / seconds(columns, features)
    assert clock.seconds([LM], ["lm_entropy"]) == 40.0


@pytest.mark.parametrize("name", ["knn", "cache"])
def test_costs_are_found_by_asking_for_some_columns(name: str) -> None:
    """Of an expert that takes the time that was planted, whatever is asked of it."""
    planted, asked = COSTS.experts[name], 0

    def measure(columns: Sequence[int], features: bool) -> float:
        nonlocal asked
        asked += 1
        assert columns  # an expert is never made without a setting
        return planted.seconds(columns, features=features)

    found = expert_costs(like(SETTINGS[name]), measure, features=True)
    assert asked < 10
    for columns in subsets(len(SETTINGS[name]))[1:]:
        for features in (False, True):
            expected = planted.seconds(columns, features=features)
            assert found.seconds(columns, features=features) == pytest.approx(expected, abs=0.5)
            if len(columns) == 1 and not features:
                assert found.seconds(columns, features=False) == pytest.approx(expected)


def test_columns_that_count_the_same_entries_stand_together() -> None:
    assert like(SETTINGS["knn"]) == [[0, 1]]
    assert like(SETTINGS["cache"]) == [[0, 1], [2, 3]]
    suffixes = [{"suffix": n, "k": 0, "temperature": 1.0} for n in (0, 1, 0)]
    assert like(suffixes) == [[0, 2], [1]]
    assert like([{}]) == [[0]]


def scores(*, gated: bool = False) -> ScoreTable:
    """Each column knows tokens of its own: how many, is what it is worth.

    Args:
        gated: with a feature, so that gates are trained.
    """
    rows = ROWS
    rng = np.random.default_rng(2)
    worth = [0.10, 0.05, 0.06, 0.07, 0.16, 0.02]
    knower = rng.choice(len(worth) + 1, size=rows, p=[*worth, 1 - sum(worth)])
    known = np.where(knower[:, None] == np.arange(len(worth)), math.log(0.9), math.log(0.01))
    columns = {
        "lm": np.where(rng.random(rows) < 0.7, math.log(0.3), math.log(0.02)),
        "knn": known[:, :2],
        "cache": known[:, 2:],
    }
    columns |= {"knn_entropy": rng.random(rows)} if gated else {}
    card = {
        "split": "valid",
        "model": MODEL,
        "datastores": ["d" * 64],
        "described": {name: {"k": 8} for name in SETTINGS},
        "experts": SETTINGS,
        "features": ["knn_entropy"] if gated else [],
        "k": 8,
        "costs": msgspec.to_builtins(COSTS),
    }
    return ScoreTable({name: np.float32(column) for name, column in columns.items()}, card)


def best_loss(table: ScoreTable, columns: Sequence[int]) -> float:
    """Of the best fixed weights of the language model and some columns, by EM in float64."""
    every = np.concatenate([table["lm"][:, None], table["knn"], table["cache"]], axis=1)
    p = np.exp(every[:, [0, *(one + 1 for one in columns)]], dtype=np.float64)
    weights = np.full(p.shape[1], 1 / p.shape[1])
    for _ in range(500):
        shares = p * weights
        weights = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)
    return float(-np.log(p @ weights).mean())


def test_steps_lead_down_and_lose_no_more_than_they_must() -> None:
    """Against every subset of the columns: what is left is the best that takes no more time."""
    table = scores()
    clock = Clock(COSTS, SETTINGS)
    every = {columns: best_loss(table, columns) for columns in subsets(len(COLUMNS))}
    steps = Steps(table, clock, np.arange(ROWS))
    way = list(steps)
    assert way[0].loss == pytest.approx(min(every.values()), abs=1e-3)
    assert way[-1].components == (LM,)
    assert all(one.seconds > after.seconds for one, after in pairwise(way))
    for lean in way:
        columns = tuple(COLUMNS.index(one) for one in lean.components[1:])
        assert lean.seconds == seconds(columns)
        assert lean.loss == pytest.approx(every[columns], abs=2e-3)
    limits = sorted({seconds(columns) for columns in every if columns})
    apart = []
    for limit in limits:
        lean = steps.within(limit, ())
        assert lean is not None
        assert lean.seconds <= limit
        best = min(loss for columns, loss in every.items() if seconds(columns) <= limit)
        apart.append(lean.loss - best)
    # Greedy steps are not always the best; here they nearly are.
    assert max(apart) < 0.05
    assert float(np.mean(apart)) < 0.01
    assert steps.within(min(limits) - 0.01, ()) is None


def test_features_take_their_part_of_the_budget() -> None:
    table = scores()
    clock = Clock(COSTS, SETTINGS)
    steps = Steps(table, clock, np.arange(ROWS))
    for limit in (14.0, 16.0, 20.0):
        lean = steps.within(limit, ["knn_entropy"])
        if lean is not None:
            assert "knn" in lean.experts
            assert clock.seconds(lean.components, ["knn_entropy"]) <= limit
    assert steps.within(13.0, ["knn_entropy"]) is None  # the search and its features take 13.5


def fitted(least_speed: float) -> Calibration:
    """With no gates."""
    table = scores()
    return fit(table, budget=Budget(Fitter(table), least_speed))


def test_what_is_used_is_the_best_that_keeps_the_budget(tmp_path: Path) -> None:
    plain, found = fit(scores()), fitted(0.6)
    speed = plain.speed(plain.best)
    assert speed is not None
    assert speed < 0.6
    best = found.speed(found.best)
    assert best is not None
    assert best >= 0.6
    kept = [one for one in found.mixtures if (found.speed(one) or 0) >= 0.6]
    assert found.best.choice_perplexity == min(one.choice_perplexity for one in kept)
    assert found.best.experts
    assert found.find(found.best.experts) in kept
    # What is fitted without a budget is there all the same.
    assert [one.name for one in found.mixtures][: len(plain.mixtures)] == [
        one.name for one in plain.mixtures
    ]
    path = write_calibration(tmp_path / "calibration.json", found)
    again = read_calibration(path, ["d" * 64])
    assert again is not None
    assert again.least_speed == 0.6
    assert [one.seconds for one in again.mixtures] == [one.seconds for one in found.mixtures]
    assert again.best.name == found.best.name


def test_evaluation_takes_what_keeps_the_budget() -> None:
    found = fitted(0.6)
    options = Options(
        datastores=DatastoreOptions(dstore_filename="store"), mixing=MixingOptions(knnlm=True)
    )
    assert list(chosen_experts(options, found)) == list(found.best.experts)
    best = found.choice(found.mixtures)
    assert best is found.best
    free = replace(found, least_speed=None).choice(found.mixtures)
    assert free is not None
    assert free.choice_perplexity <= found.best.choice_perplexity


def test_times_that_were_not_gone_by_leave_no_trace(tmp_path: Path) -> None:
    """Of two tables that differ by their costs alone the calibrations are the same, to the byte."""
    table = scores()
    bare = ScoreTable(table.columns, {k: x for k, x in table.card.items() if k != "costs"})
    assert clock_of(bare) is None
    files = [tmp_path / "bare.json", tmp_path / "timed.json"]
    found = [fit(one) for one in (bare, table)]
    for file, one in zip(files, found, strict=True):
        write_calibration(file, one)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert found[0].fingerprint == found[1].fingerprint
    assert b"seconds" not in files[0].read_bytes()
    assert found[1].mixtures[0].seconds == 8.0  # which `tune` tells, and forgets


def test_tables_tell_speeds_where_they_were_measured() -> None:
    table = scores(gated=True)
    found = fit(table, budget=Budget(Fitter(table), 0.35))
    assert {"fixed", "blend", "gate"} == {one.mixer.kind for one in found.mixtures}
    assert gains_header(found) == TIMED_GAINS
    rows = gains(found)
    assert rows[0][3:5] == ("0", "1.00")
    for mixture, row in zip(found.mixtures[1:], rows[1:], strict=True):
        columns = [COLUMNS.index(one) for one in mixture.mixer.components[1:]]
        features = ("knn",) if mixture.mixer.kind == "gate" else ()
        assert row[3] == str(len(columns))
        assert row[4] == f"{8 / seconds(columns, features):.2f}"


def test_prices_name_the_fastest_of_those_that_are_about_as_good() -> None:
    clock = Clock(COSTS, SETTINGS)
    steps = Steps(scores(), clock, np.arange(ROWS))
    rows = prices(steps, lambda lean: clock.speed(lean.components))
    speeds = [float(row[3]) for row in rows]
    assert speeds == sorted(speeds)
    assert rows[-1][0] == "language model alone"
    way = [math.exp(lean.loss) for lean in steps]
    assert float(rows[-1][2]) == pytest.approx(way[-1], abs=0.01)


def test_a_budget_that_nothing_keeps_names_the_fastest() -> None:
    with pytest.raises(ConfigError, match="no mixture keeps the budget") as caught:
        Budget(Fitter(scores()), 0.99)
    assert_helps(caught)
    # A column of the cache's short window: 8 of 8 + 0.5 + 1 + 0.5.
    assert "the fastest mixture, of cache, has 0.800" in str(caught.value)
    assert "--speed 0.8 or less" in str(caught.value)
    assert Budget(Fitter(scores()), 0.8).plans


def no_place(costs: dict[str, Any]) -> None:
    costs["experts"]["knn"]["groups"][0]["columns"] = [0]


def doubled(costs: dict[str, Any]) -> None:
    costs["experts"]["knn"]["groups"] *= 2


def of_another(costs: dict[str, Any]) -> None:
    costs["experts"]["lm2"] = costs["experts"].pop("knn")


def negative(costs: dict[str, Any]) -> None:
    costs["mixing"] = -1.0


def endless(costs: dict[str, Any]) -> None:
    costs["lm"] = 1e300


def for_nothing(costs: dict[str, Any]) -> None:
    costs["lm"] = 0.0


def unknown(costs: dict[str, Any]) -> None:
    costs["more"] = 1.0


@pytest.mark.parametrize(
    "spoil", [no_place, doubled, of_another, negative, endless, for_nothing, unknown]
)
def test_costs_that_cannot_be_are_refused(
    tmp_path: Path, spoil: Callable[[dict[str, Any]], None]
) -> None:
    costs = msgspec.to_builtins(COSTS)
    spoil(costs)
    with pytest.raises(TableError, match="cannot be read") as caught:
        read_table(written(tmp_path / "t.npz", "d" * 64, costs=costs))
    assert "$.costs" in str(caught.value)


def written(path: Path, seal: str, **card: Any) -> Path:
    """The table as a file."""
    table = scores()
    ids = np.zeros(ROWS, np.int32)
    writer = ScoreTableWriter(path)
    writer.write({"row": np.arange(ROWS), "token": ids, "context": ids, **table.columns})
    writer.publish({**table.card, "datastores": [seal], **card})
    return path


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return small_store(tmp_path)


def test_the_command_keeps_the_budget(store: Datastore, tmp_path: Path, capsys: Capture) -> None:
    file = written(tmp_path / "valid.npz", store.fingerprint)
    command = ["tune", "--dstore", store.path, "--score-table", file]
    said = say(capsys, *command, "--speed", 0.6)
    (used,) = (line for line in said.splitlines() if "<- used" in line)
    assert float(used.split("|")[5]) >= 0.6
    assert "what less time costs" in said
    found = read_calibration(store.calibration_path, [store.fingerprint])
    assert found is not None
    assert found.least_speed == 0.6
    plain = say(capsys, *command)
    assert "what less time costs" not in plain
    assert "speed" in plain


@pytest.mark.parametrize("speed", ["0", "-0.5", "nan", "inf", "1", "2"])
def test_budgets_that_are_none_are_refused(
    store: Datastore, tmp_path: Path, capsys: Capture, speed: str
) -> None:
    file = written(tmp_path / "valid.npz", store.fingerprint)
    command = ["tune", "--dstore", store.path, "--score-table", file, f"--speed={speed}"]
    said = refuse(capsys, *command)
    assert "above 0 and below 1" in said
    assert f"found:    {speed}" in said


@pytest.mark.parametrize(
    ("costs", "speed", "says"),
    [(True, 0.9, "no mixture keeps the budget"), (False, 0.5, "--table-costs")],
)
def test_what_is_there_stays_where_a_budget_cannot_be_kept(
    store: Datastore, tmp_path: Path, capsys: Capture, costs: bool, speed: float, says: str
) -> None:
    command = ["tune", "--dstore", store.path, "--score-table"]
    plain = write_table(tmp_path / "plain.npz", store.fingerprint)
    say(capsys, *command, plain)
    before = store.calibration_path.read_bytes()
    table = written(tmp_path / "timed.npz", store.fingerprint) if costs else plain
    assert says in refuse(capsys, *command, table, "--speed", speed)
    assert store.calibration_path.read_bytes() == before


def test_times_without_a_budget_and_a_budget_without_times_are_refused(tmp_path: Path) -> None:
    file = write_calibration(tmp_path / "calibration.json", fitted(0.6))
    content = json.loads(file.read_text())
    kept = {name: x for name, x in content.items() if name not in ("format", "version")}
    kept.pop("fingerprint")
    budget = kept.pop("least_speed")
    for spoilt, says in (
        (kept, "stacks[0] has seconds"),
        ({**kept, "least_speed": budget, "stacks": without(kept["stacks"], 2)}, "stacks[2] lacks"),
        ({**kept, "least_speed": 1.0}, "$.least_speed"),
    ):
        write_sealed(file, FORMAT, VERSION, spoilt)
        with pytest.raises(TableError, match="is damaged") as caught:
            read_calibration(file, ["d" * 64])
        assert says in str(caught.value)


def without(stacks: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The same, one of which has no seconds."""
    found = [dict(stack) for stack in stacks]
    del found[number]["seconds"]
    return found
