"""Score tables: what goes in comes out, in the order of the text."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from stores import assert_helps, truncate

from fairseq_knnlm.calibration import card as module
from fairseq_knnlm.calibration import writer
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.mixture.components import LM, Component

ROWS = 50
EXPERTS = {
    "knn": [{"suffix": 0, "temperature": 1.0}, {"suffix": 1, "temperature": 1.0}],
    "cache": [{"theta": theta} for theta in (0.0, 0.25, 0.5, 1.0, 2.0)],
}


def columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    knn = -rng.random(ROWS, np.float32)
    knn[::7] = -math.inf
    return {
        "row": np.arange(ROWS),
        "token": rng.integers(0, 300, ROWS).astype(np.int32),
        "context": rng.integers(-1, 300, ROWS).astype(np.int32),
        "lm": -rng.random(ROWS, np.float32),
        "knn": np.stack([knn, knn - 1], axis=1),
        "cache": -rng.random((ROWS, 5), np.float32),
        "knn_distances": rng.normal(size=(ROWS, 3)).astype(np.float32),
        "knn_entropy": rng.normal(size=ROWS).astype(np.float32),
    }


def card(**fields: object) -> dict[str, object]:
    """All that a card must hold, and a loss that is infinite."""
    return {
        "split": "valid",
        "model": "a" * 64,
        "k": 8,
        "experts": EXPERTS,
        "described": {"knn": {"k": 8}, "cache": {"reset": False}},
        "features": ["knn_distances", "knn_entropy"],
        "loss": None,
        **fields,
    }


def write(path: Path, *, batches: int = 6, seed: int = 0) -> None:
    """Rows in random batches, as fairseq's sorting by length brings them."""
    made = ScoreTableWriter(path)
    for rows in np.array_split(np.random.default_rng(seed).permutation(ROWS), batches):
        made.write({name: column[rows] for name, column in columns().items()})
    made.publish(card())


@pytest.mark.parametrize("step", [1, 7, 65536])
@pytest.mark.parametrize("batches", [1, 6, 60])
def test_round_trip_in_text_order(
    tmp_path: Path, batches: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order of the batches; some of the 60 are empty."""
    monkeypatch.setattr(writer, "STEP", step)
    write(tmp_path / "new" / "table.npz", batches=batches)
    table = read_table(tmp_path / "new" / "table.npz")
    assert len(table) == ROWS
    assert list(table.columns) == list(columns())
    for name, column in columns().items():
        assert table[name].dtype == column.dtype
        assert np.array_equal(table[name], column)
    assert table.card["split"] == "valid"
    assert table.experts == EXPERTS
    assert table.card["loss"] is None


def test_the_order_of_batches_leaves_no_trace(tmp_path: Path) -> None:
    tables = []
    for seed in (1, 2):
        write(tmp_path / f"{seed}.npz", seed=seed)
        tables.append(read_table(tmp_path / f"{seed}.npz"))
    assert all(np.array_equal(tables[0][name], tables[1][name]) for name in columns())


def test_numpy_opens_it_without_pickle(tmp_path: Path) -> None:
    write(tmp_path / "table.npz")
    with np.load(tmp_path / "table.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {*columns(), "card"}
        assert np.array_equal(archive["lm"], columns()["lm"])
        assert json.loads(str(archive["card"][0]))["format"] == module.FORMAT
    assert zipfile.ZipFile(tmp_path / "table.npz").testzip() is None


def test_the_table_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    path.write_text("older")
    made = ScoreTableWriter(path)
    made.write(columns())
    assert path.read_text() == "older"
    made.publish(card())
    read_table(path)
    assert list(tmp_path.iterdir()) == [path]


def test_an_abandoned_table_leaves_nothing(tmp_path: Path) -> None:
    made = ScoreTableWriter(tmp_path / "table.npz")
    made.write(columns())
    del made
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_batches_must_agree(tmp_path: Path) -> None:
    made = ScoreTableWriter(tmp_path / "table.npz")
    made.write({"row": np.arange(3), "lm": np.zeros(3, np.float32)})
    with pytest.raises(AssertionError):
        made.write({"row": np.arange(3), "lm": np.zeros(3, np.float64)})


def flip_data(file: Path) -> None:
    """One bit of a log-probability."""
    content = file.read_bytes()
    place = content.index(columns()["lm"].tobytes()) + 5
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def no_card(file: Path) -> None:
    np.savez(file, **columns())


def of_version(file: Path, version: int) -> None:
    card = json.dumps({"format": module.FORMAT, "version": version})
    np.savez(file, card=np.array([card]), **columns())


def newer_card(file: Path) -> None:
    of_version(file, module.VERSION + 1)


def older_card(file: Path) -> None:
    of_version(file, 1)


def foreign_card(file: Path) -> None:
    np.savez(file, card=np.array(['{"format": "x", "version": 1}']), **columns())


def pickled(file: Path) -> None:
    np.savez(file, card=np.array([{"format": module.FORMAT}], dtype=object), **columns())


def text(file: Path) -> None:
    file.write_text("lm,knn\n-1,-2\n")


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        flip_data,
        no_card,
        foreign_card,
        pickled,
        text,
        Path.unlink,
    ],
)
def test_damage_is_told(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "table.npz"
    write(path)
    spoil(path)
    with pytest.raises(TableError) as caught:
        read_table(path)
    message = str(caught.value)
    assert str(path) in message
    assert "expected: a score table" in message
    assert "found:" in message


@pytest.mark.parametrize("spoil", [newer_card, older_card])
def test_another_version_is_to_be_written_again(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / "table.npz"
    spoil(path)
    with pytest.raises(TableError) as caught:
        read_table(path)
    version = 1 if spoil is older_card else module.VERSION + 1
    assert_helps(caught, f"version {module.VERSION}", f"version {version}", "write it again")


def test_columns_and_features_by_name(tmp_path: Path) -> None:
    write(tmp_path / "table.npz")
    table = read_table(tmp_path / "table.npz")
    assert np.array_equal(table.column(LM), columns()["lm"])
    for name, settings in EXPERTS.items():
        for place, setting in enumerate(settings):
            found = table.column(Component(name, dict(setting)))
            assert np.array_equal(found, columns()[name][:, place])
    with pytest.raises(TableError) as caught:
        table.column(Component("cache", {"theta": 3.0}))
    assert_helps(caught, "cache", "theta 3")
    found_features = table.features(["knn_entropy", "knn_distances"])
    assert all(type(feature) is np.ndarray for feature in found_features.values())
    assert {name: tuple(x.shape) for name, x in found_features.items()} == {
        "knn_entropy": (ROWS,),
        "knn_distances": (ROWS, 3),
    }
    with pytest.raises(TableError) as caught:
        table.features(["knn_entropy", "lm_top"])
    assert_helps(caught, "lm_top")


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(TableError):
        read_table(tmp_path)


@pytest.mark.parametrize("content", ["empty", "npy", "list", "scalar"])
def test_what_is_no_table_is_told(tmp_path: Path, content: str) -> None:
    """EOFError, TypeError, TypeError and IndexError today."""
    path = tmp_path / "table.npz"
    with path.open("wb") as file:
        if content == "npy":
            np.save(file, np.ones(3))
        elif content == "list":
            np.savez(file, lm=np.ones(3), card=np.array(["[1]"]))
        elif content == "scalar":
            np.savez(file, lm=np.ones(3), card=np.array("{}"))
    with pytest.raises(TableError):
        read_table(path)


def rewrite(
    path: Path,
    change: Callable[[dict[str, np.ndarray]], object] = lambda _: None,
    **fields: object,
) -> None:
    """A table with other columns or another card, whose checksums are right."""
    arrays = dict(columns())
    change(arrays)
    content = {"format": module.FORMAT, "version": module.VERSION, **card(**fields)}
    content = {key: value for key, value in content.items() if value != "missing"}
    np.savez(path, allow_pickle=False, card=np.array([json.dumps(content)]), **arrays)


def test_a_table_rewritten_as_it_was_opens(tmp_path: Path) -> None:
    rewrite(tmp_path / "table.npz")
    assert len(read_table(tmp_path / "table.npz")) == ROWS


#: Of an expert that this package does not know: names and types of its own.
OUTSIDE = {"heat": 0.5, "deep": True, "style": "bold", "temperature": 2.0, "steps": -3}


def outsider(**setting: object) -> dict[str, object]:
    """The cache's columns as those of another expert, in the setting of each but one."""
    settings = [OUTSIDE | {"steps": number} for number in range(4)] + [setting]
    described = {"knn": {"k": 8}, "oracle": {"name": "Delphi"}}
    return {"experts": {"knn": EXPERTS["knn"], "oracle": settings}, "described": described}


def rename_cache(arrays: dict[str, np.ndarray]) -> None:
    arrays["oracle"] = arrays.pop("cache")


def test_an_expert_from_elsewhere_has_settings_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    weights = [{"expert": "lm", "weight": 0.4}, {"expert": "oracle", "weight": 0.6, **OUTSIDE}]
    rewrite(path, rename_cache, **outsider(**OUTSIDE), weights=weights)
    table = read_table(path)
    assert table.card["weights"] == weights
    for place, setting in enumerate(table.experts["oracle"]):
        found = table.column(Component("oracle", dict(setting)))
        assert np.array_equal(found, columns()["cache"][:, place])
    with pytest.raises(TableError) as caught:
        table.column(Component("oracle", OUTSIDE | {"style": "plain"}))
    assert_helps(caught, "oracle", "heat 0.5", "deep True", "style plain")


FIELDS: dict[str, tuple[dict[str, object], str]] = {
    "split is a number": ({"split": 3}, "$.split"),
    "no model": ({"model": "missing"}, "`model`"),
    "no experts": ({"experts": "missing"}, "`experts`"),
    "unknown field": ({"colour": "red"}, "`colour`"),
    "experts is a list": ({"experts": ["knn"]}, "$.experts"),
    "no settings": ({"experts": {**EXPERTS, "knn": []}}, "$.experts"),
    "temperature 0": ({"experts": {**EXPERTS, "knn": [{"temperature": 0}] * 2}}, "temperature"),
    "temperature infinite": (
        {"experts": {**EXPERTS, "knn": [{"temperature": 10**400}] * 2}},
        "temperature",
    ),
    "temperature a text": ({"experts": {**EXPERTS, "knn": [{"temperature": "1"}] * 2}}, "temper"),
    "window 0": ({"experts": {**EXPERTS, "cache": [{"window": 0}] * 5}}, "window"),
    "suffix of 5": ({"experts": {**EXPERTS, "cache": [{"suffix": 5}] * 5}}, "suffix"),
    "theta below 0": ({"experts": {**EXPERTS, "cache": [{"theta": -1}] * 5}}, "theta"),
    "k below 0": ({"experts": {**EXPERTS, "knn": [{"k": -1}] * 2}}, ".k"),
    "a setting of a list": (outsider(lists=[1]), "lists"),
    "a setting of nothing": (outsider(nothing=None), "nothing"),
    "a setting infinite": (outsider(heat=10**400), "heat"),
    "a setting with a name of its own": (outsider(**{"no name": 1}), "no name"),
    "an outsider's temperature 0": (outsider(temperature=0), "temperature"),
    "an outsider's window a text": (outsider(window="wide"), "window"),
    "a weight above 1": ({"weights": [{"expert": "knn", "weight": 2}]}, "weight"),
    "a weight of nobody": ({"weights": [{"weight": 0.5}]}, "expert"),
    "a weight of an impossible setting": (
        {"weights": [{"expert": "knn", "weight": 0.5, "temperature": -1}]},
        "temperature",
    ),
    "a weight of an unknown setting": (
        {"weights": [{"expert": "cache", "weight": 0.5, "heat": 1}]},
        "heat",
    ),
    "unknown setting": ({"experts": {**EXPERTS, "knn": [{"heat": 1}] * 2}}, "heat"),
    "fewer settings": ({"experts": {**EXPERTS, "knn": [{}]}}, "knn"),
    "another expert": ({"experts": {**EXPERTS, "ngram": [{"order": 5}]}}, "ngram"),
    "expert not described": ({"described": {"knn": {"k": 8}}}, "$.described"),
    "described by a list": ({"described": {"knn": {"k": [8]}, "cache": {}}}, "$.described"),
    "no k": ({"k": "missing"}, "$.k"),
    "k a million million million": ({"k": 10**18}, "$.k"),
    "datastore is no fingerprint": ({"datastores": ["x"]}, "$.datastores"),
    "datastores is a text": ({"datastores": "a" * 64}, "$.datastores"),
    "feature twice": ({"features": ["knn_entropy", "knn_entropy"]}, "$.features"),
    "feature not there": ({"features": ["knn_entropy", "lm_top"]}, "no column lm_top"),
    "feature is an expert": ({"features": ["knn", "knn_distances", "knn_entropy"]}, "knn"),
    "loss NaN": ({"loss": math.nan}, "NaN"),
    "loss infinite": ({"loss": -math.inf}, "Infinity"),
}


@pytest.mark.parametrize("case", list(FIELDS))
def test_fields_of_the_card(tmp_path: Path, case: str) -> None:
    fields, says = FIELDS[case]
    rewrite(tmp_path / "table.npz", **fields)
    with pytest.raises(TableError) as caught:
        read_table(tmp_path / "table.npz")
    assert_helps(caught, says)


def test_brackets_without_end(tmp_path: Path) -> None:
    text = "[" * 200_000
    np.savez(tmp_path / "table.npz", allow_pickle=False, card=np.array([text]), **columns())
    with pytest.raises(TableError) as caught:
        read_table(tmp_path / "table.npz")
    assert_helps(caught, "brackets")


LIGHT = """
import sys
from pathlib import Path
from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.calibration.record_file import calibrated_sets, read_record
table = read_table(Path({path!r}))
assert table.features(["knn_entropy"])["knn_entropy"].shape == (50,)
assert read_record(Path("calibration.json"), []) is None
print([name for name in ("torch", "fairseq", "faiss", "fairseq_cli") if name in sys.modules])
"""


def test_reading_takes_neither_torch_nor_fairseq_nor_faiss(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    write(path)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIGHT.format(path=str(path))]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def put(name: str, value: object, place: object = 3) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][place] = value

    return change


def replace(name: str, array: np.ndarray) -> Callable[[dict[str, np.ndarray]], object]:
    return lambda arrays: arrays.update({name: array})


COLUMNS: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], str]] = {
    "no lm": (lambda arrays: arrays.pop("lm"), "no column lm"),
    "no row": (lambda arrays: arrays.pop("row"), "no column row"),
    "no knn": (lambda arrays: arrays.pop("knn"), "no column knn"),
    "no feature": (lambda arrays: arrays.pop("knn_entropy"), "no column knn_entropy"),
    "one more": (lambda arrays: arrays.update(more=np.ones(ROWS, "f4")), "more"),
    "a row twice": (put("row", 2), "row"),
    "rows that descend": (lambda arrays: arrays.update(row=arrays["row"][::-1]), "row"),
    "a row below 0": (put("row", -1, 0), "row"),
    "rows as floats": (replace("row", np.arange(ROWS, dtype="f8")), "row"),
    "a token below 0": (put("token", -1), "token"),
    "tokens of 64 bits": (replace("token", np.zeros(ROWS, "i8")), "token"),
    "a context below -1": (replace("context", np.full(ROWS, -2, "i4")), "context"),
    "lm NaN": (put("lm", math.nan), "lm"),
    "lm above 0": (put("lm", 0.5), "lm"),
    "lm infinite": (put("lm", math.inf), "lm"),
    "lm in double": (replace("lm", np.zeros(ROWS)), "lm"),
    "lm too short": (replace("lm", np.zeros(ROWS - 1, "f4")), "lm"),
    "lm too long": (replace("lm", np.zeros(ROWS + 1, "f4")), "lm"),
    "lm of two columns": (replace("lm", np.zeros((ROWS, 2), "f4")), "lm"),
    "knn above 0": (put("knn", 0.5), "knn"),
    "knn flat": (replace("knn", np.zeros(ROWS, "f4")), "knn"),
    "knn of three columns": (replace("knn", np.zeros((ROWS, 3), "f4")), "knn"),
    "a feature of three dimensions": (
        replace("knn_entropy", np.zeros((ROWS, 2, 2), "f4")),
        "knn_entropy",
    ),
    "a feature of texts": (replace("knn_entropy", np.array(["x"] * ROWS)), "knn_entropy"),
}


@pytest.mark.parametrize("case", list(COLUMNS))
def test_what_columns_hold(tmp_path: Path, case: str) -> None:
    change, says = COLUMNS[case]
    rewrite(tmp_path / "table.npz", change)
    with pytest.raises(TableError) as caught:
        read_table(tmp_path / "table.npz")
    assert_helps(caught, says)


def test_probability_0_and_nothing_to_go_by_are_no_faults(tmp_path: Path) -> None:
    path = tmp_path / "table.npz"
    rewrite(path, put("lm", -math.inf))
    assert read_table(path)["lm"][3] == -math.inf
    rewrite(path, put("knn", [math.nan, -math.inf]))
    assert np.isnan(read_table(path)["knn"][3, 0])
    rewrite(path, put("knn_distances", math.nan))
    assert np.isnan(read_table(path)["knn_distances"][3]).all()


def test_a_table_of_no_token(tmp_path: Path) -> None:
    arrays = {name: column[:0] for name, column in columns().items()}
    rewrite(tmp_path / "table.npz", lambda found: found.update(arrays))
    assert len(read_table(tmp_path / "table.npz")) == 0
