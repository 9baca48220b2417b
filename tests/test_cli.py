"""The command ``fairseq-knnlm`` in this process, on small datastores."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores import alter, random_entries, truncate, write_compressed, write_store

from fairseq_knnlm import cli, files
from fairseq_knnlm.calibration import (
    Calibration,
    Stack,
    read_calibration,
    write_calibration,
)
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.mixers import LM, Component, Fixed
from fairseq_knnlm.tables import ScoreTableWriter

ROWS, WIDTH = 400, 8


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """``main`` sets up logging for a process of its own."""
    before = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:], logging.root.level = before


@pytest.fixture
def store(tmp_path: Path) -> Datastore:
    return write_store(tmp_path / "store", *random_entries(ROWS, WIDTH), dtype="float16")


@pytest.fixture
def indexed(store: Datastore, capsys: pytest.CaptureFixture[str]) -> Datastore:
    say(capsys, "build-index", "--dstore", store.path, "--recipe", "IVF8,Flat", "--probe", 4)
    return store


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A datastore of urvashik/knnlm."""
    keys, values = random_entries(ROWS, WIDTH)
    keys.astype(np.float16).tofile(tmp_path / "old_keys.npy")
    values.astype(np.int16).tofile(tmp_path / "old_vals.npy")
    return tmp_path / "old"


def say(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that succeeds prints."""
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def refuse(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that fails says, on standard error and nowhere else."""
    code = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


MODEL = "m" * 64


def calibration(datastore: str) -> Calibration:
    """The language model alone, and neighbours that lower its perplexity."""
    alone = Stack((), Fixed((LM,), (1.0,)), 150.0, 7.2)
    knn = Component("knn", {"suffix": 0, "k": 0, "temperature": 12.0})
    mixed = Stack(("knn",), Fixed((LM, knn), (0.875, 0.125)), 120.25, 6.9)
    fitted_on = {"split": "valid", "tokens": 1000, "held_out": 100, "seed": 0}
    stacks = (alone, mixed)
    return Calibration((datastore,), MODEL, fitted_on, {"knn": {"k": 8}}, 150.0, stacks, 1)


def write_table(
    path: Path, datastore: str, *, helpful: bool = True, split: str = "valid", **card: Any
) -> Path:
    """960 tokens; the neighbours know half of them for certain at temperature 2, or nothing."""
    rows = np.arange(960)
    lm = np.full(960, -2.0, np.float32)
    sharp = np.where(rows % 2, 0.0, -np.inf).astype(np.float32)
    other = lm - 1
    writer = ScoreTableWriter(path)
    columns = np.stack([other, sharp if helpful else other], axis=1)
    distances = np.random.default_rng(1).random((960, 2), np.float32)
    writer.write({"row": rows, "lm": lm, "knn": columns, "knn_distances": distances})
    settings = [{"suffix": 0, "k": 0, "temperature": t} for t in (1.0, 2.0)]
    writer.publish(
        {
            "datastores": [datastore],
            "model": MODEL,
            "split": split,
            "k": 8,
            "experts": {"knn": settings},
            "described": {"knn": {"k": 8, "index": "Flat"}},
            "features": ["knn_distances"],
        }
        | card
    )
    return path


def test_info_says_what_the_manifest_says(
    store: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    said = say(capsys, "info", "--dstore", store.path)
    size = sum(file["bytes"] for file in store.manifest.files.values())
    for words in (
        f"{ROWS} entries of width {WIDTH}",
        "float16, last_ffn_input",
        "uint16, below 50",
        "split        train",
        f"model        {'a' * 64}",
        f"dictionary   {'b' * 64}",
        f"fingerprint  {store.fingerprint}",
        files.human_bytes(size),
        "index        none; build it with `fairseq-knnlm build-index`",
        "calibration  none; fit it with `fairseq-knnlm tune`",
    ):
        assert words in said


def test_info_knows_index_and_calibration(
    indexed: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    write_calibration(indexed.calibration_path, calibration(indexed.fingerprint))
    said = say(capsys, "info", "--dstore", indexed.path)
    assert "index        IVF8,Flat, nprobe 4 (covers 0.51), recall@399 0.51" in said
    fitted = "knn, fixed, fitted on valid, 1,000 tokens; perplexity 150.00 -> 120.25"
    assert f"calibration  {fitted}" in said


def test_compress_says_what_it_saved(
    indexed: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """400 entries of 16 bytes and 2; the projection takes 8 x 4 floats, a weight 4 bytes."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere.index"
    shutil.move(indexed.path / "knn.index", elsewhere)
    compress = ["compress", "--dstore", indexed.path, "--out"]
    said = say(capsys, *compress, out, "--pca", 4)
    assert said.startswith(f"{out}: 400 -> 400 entries, 7.0 KiB -> 4.0 KiB\n")
    assert "fairseq-knnlm build-index" in said
    merged = tmp_path / "merged"
    assert "build-index" in refuse(capsys, *compress, merged, "--merge", 100)
    say(capsys, *compress, merged, "--merge", 100, "--indexfile", elsewhere, "--seed", 2)
    assert "compressed   from 400 entries of width 8 by --merge 100 --seed 2" in say(
        capsys, "info", "--dstore", merged
    )
    assert "exists already" in refuse(capsys, *compress, out, "--pca", 4)
    assert "--pca P" in refuse(capsys, *compress, tmp_path / "new")


def test_info_and_verify_of_a_compressed_datastore(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_compressed(tmp_path / "store")
    said = say(capsys, "info", "--dstore", store.path)
    assert "100 entries of width 6" in said
    assert "compressed   from 250 entries of width 9 by --merge 4 --pca 6 --seed 1" in said
    assert "(keys.npy, values.npy, projection.npy, weights.npy)" in say(
        capsys, "verify", "--dstore", store.path
    )
    say(capsys, "build-index", "--dstore", store.path)
    assert "Flat, of this datastore" in say(capsys, "verify", "--dstore", store.path)
    alter(store.path / "weights.npy")
    assert "weights.npy is damaged" in refuse(capsys, "verify", "--dstore", store.path)


def test_info_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no datastore at" in refuse(capsys, "info", "--dstore", tmp_path / "nowhere")


def test_info_of_an_old_datastore(prefix: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--dstore-size" in refuse(capsys, "info", "--dstore", prefix)
    said = say(capsys, "info", "--dstore", prefix, "--dstore-size", ROWS, "--dstore-fp16")
    assert f"{ROWS} entries of width {WIDTH}" in said
    assert "model        unknown" in said


def test_verify_finds_everything_in_order(
    indexed: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    said = say(capsys, "verify", "--dstore", indexed.path)
    assert f"{ROWS} entries, every byte as it was written" in said
    assert "IVF8,Flat" in said
    assert "of this datastore" in said


@pytest.mark.parametrize("spoil", [truncate, alter])
@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "manifest.json", "knn.index"])
def test_verify_finds_damage(
    indexed: Datastore,
    name: str,
    spoil: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(indexed.path / name)
    cli.main(["verify", "--dstore", str(indexed.path)])
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert f"{name} is damaged" in said


@pytest.mark.parametrize("name", ["keys.npy", "knn.index"])
def test_verify_reads_every_byte(
    tmp_path: Path,
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also what opening a huge datastore leaves unread: here all but both ends."""
    monkeypatch.setattr(files, "CHUNK_BYTES", 64)
    path = tmp_path / "store"
    write_store(path, *random_entries(ROWS, WIDTH))
    say(capsys, "build-index", "--dstore", path, "--recipe", "IVF8,Flat")
    monkeypatch.setattr(files, "CHUNKS_ON_OPEN", 2)
    alter(path / name)
    say(capsys, "info", "--dstore", path)
    cli.main(["verify", "--dstore", str(path)])
    assert f"{name} is damaged" in capsys.readouterr().err


def test_verify_refuses_the_index_of_another_datastore(
    indexed: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, values = random_entries(ROWS, WIDTH)
    other = write_store(indexed.path.with_name("other"), keys + 1, values, dtype="float16")
    shutil.copy(indexed.path / "knn.index", other.path / "knn.index")
    cli.main(["verify", "--dstore", str(other.path)])
    assert "index of another datastore" in capsys.readouterr().err


def test_build_index_reports_what_it_made(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "elsewhere" / "my.index"
    said = say(capsys, "build-index", "--dstore", store.path, "--indexfile", path)
    assert said.startswith(f"{path}: Flat\n{ROWS} keys, 32 bytes a key, built in")
    assert path.is_file()
    assert not store.index_path.exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--recipe", "paper"], "--recipe auto"),
        (["--recipe", "IVF8,Nonsense"], "factory string"),
        (["--recipe", "IVF8,Flat", "--probe", "0"], "--probe"),
    ],
)
def test_build_index_refuses(
    store: Datastore, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refuse(capsys, "build-index", "--dstore", store.path, *flags)
    assert not store.index_path.exists()


def test_import_converts(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = ["--dstore", prefix, "--dstore-size", ROWS, "--dstore-fp16"]
    said = say(capsys, "import", *old, "--out", tmp_path / "new", "--vocabulary", 50)
    assert f"{ROWS} entries of width {WIDTH}" in said
    keys, values = random_entries(ROWS, WIDTH)
    new = open_datastore(tmp_path / "new", verify=True)
    assert np.array_equal(new.keys, keys.astype(np.float16))
    assert np.array_equal(new.values, values)
    assert "exists already" in refuse(capsys, "import", *old, "--out", tmp_path / "new")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "--dstore-size"),
        (["--dstore-size", ROWS], "--dstore-fp16"),
        (["--dstore-size", ROWS + 1, "--dstore-fp16"], "--dstore-size"),
        (["--dstore-size", ROWS, "--dstore-fp16", "--vocabulary", 40_000], "overflowed"),
        (["--dstore-size", ROWS, "--dstore-fp16", "--vocabulary", 30], "no token ids"),
    ],
)
def test_import_refuses(
    prefix: Path,
    tmp_path: Path,
    flags: list[object],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["import", "--dstore", prefix, "--out", tmp_path / "new", *flags]
    assert says in refuse(capsys, *command)
    assert not (tmp_path / "new").exists()


def test_import_needs_old_files(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refuse(capsys, "import", "--dstore", store.path, "--out", tmp_path / "new")
    assert "PREFIX_keys.npy" in said


def test_tune_stores_the_fit(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half the tokens are certain at temperature 2. With a = exp(-2) the loss is least where
    0.5 (1 - a) / (lambda + (1 - lambda) a) = 0.5 / (1 - lambda).
    """
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", table)
    fitted = read_calibration(store.calibration_path, [store.fingerprint])
    assert fitted is not None
    stack = fitted.find(["knn"], "fixed")
    assert stack is not None
    assert isinstance(stack.mixer, Fixed)
    a = np.exp(-2)
    assert stack.mixer.weights[1] == pytest.approx((1 - 2 * a) / (2 * (1 - a)), abs=1e-6)
    assert stack.mixer.components[1].setting["temperature"] == 2.0
    assert "valid, 960 tokens; figures are of the 96 that nothing was fitted on" in said
    assert f"language model alone {np.exp(2):>18.2f}\n" in said
    change = f"{stack.perplexity / np.exp(2) - 1:+.1%}"
    assert f"knn, fixed {stack.perplexity:>28.2f} {change:>8}" in said
    assert said.count("<- used") == 1
    assert str(store.calibration_path) in said
    assert "nothing helps" not in said


def test_tune_says_where_nothing_helps(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "valid.npz", store.fingerprint, helpful=False)
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", table)
    assert "language model alone" in next(x for x in said.splitlines() if "<- used" in x)
    assert "nothing helps this model on this text: evaluation will use it alone" in said
    assert "calibration  language model alone, fitted on valid" in say(
        capsys, "info", "--dstore", store.path
    )


def test_tune_draws_curves_where_it_can(
    store: Datastore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    tune = ["tune", "--dstore", store.path, "--score-table", table]
    drawn: list[Path] = []
    monkeypatch.setattr(cli, "draw_curves", lambda table, path: not drawn.append(path))
    assert f"curves: {store.path / 'calibration.png'}\n" in say(capsys, *tune)
    assert "x.png" in say(capsys, *tune, "--plot", tmp_path / "x.png")
    assert drawn == [store.path / "calibration.png", tmp_path / "x.png"]
    monkeypatch.setattr(cli, "draw_curves", lambda table, path: False)
    assert "no curves: they need matplotlib" in say(capsys, *tune)


@pytest.mark.parametrize(
    ("flags", "says"),
    [([], "--score-table FILE.npz"), (["--data", "data-bin"], "--data needs --path")],
)
def test_tune_needs_a_table_or_what_makes_one(
    store: Datastore, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refuse(capsys, "tune", "--dstore", store.path, *flags)


def test_report_judges_the_calibration_on_another_table(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "test.npz", store.fingerprint, split="test")
    report = ["report", "--dstore", store.path, "--score-table", table]
    assert "has no calibration" in refuse(capsys, *report)
    fitted = calibration(store.fingerprint)
    setting = {"suffix": 0, "k": 0, "temperature": 2.0}
    knn = replace(fitted.best, mixer=Fixed((LM, Component("knn", setting)), (0.875, 0.125)))
    write_calibration(store.calibration_path, replace(fitted, stacks=(fitted.stacks[0], knn)))
    lm = np.exp(-2)
    sharp = np.where(np.arange(960) % 2, 1.0, 0.0)
    perplexity = np.exp(-np.log(0.875 * lm + 0.125 * sharp).mean())
    assert say(capsys, *report).splitlines() == [
        "test, 960 tokens; fitted on valid, 1,000 tokens",
        "  mixture                      perplexity   change",
        f"  language model alone         {np.exp(2):>10.2f}",
        f"  knn, fixed                   {perplexity:>10.2f} {perplexity * lm - 1:>+8.1%}  <- used",
    ]


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({"model": "x" * 64}, "another language model"),
        ({"experts": {}}, "lacks knn"),
        ({"described": {"knn": {"k": 16}}}, "another number of neighbours"),
    ],
)
def test_report_refuses_a_table_of_another_run(
    store: Datastore,
    tmp_path: Path,
    card: dict[str, Any],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_calibration(store.calibration_path, calibration(store.fingerprint))
    table = write_table(tmp_path / "test.npz", store.fingerprint, **card)
    assert says in refuse(capsys, "report", "--dstore", store.path, "--score-table", table)


def test_tune_refuses_a_table_of_another_datastore(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "valid.npz", "e" * 64)
    said = refuse(capsys, "tune", "--dstore", store.path, "--score-table", table)
    assert "not of this datastore" in said
    assert f"expected: datastore {store.fingerprint[:12]}" in said
    assert "found:    datastore eeeeeeeeeeee" in said
    assert not store.calibration_path.exists()


def test_tune_refuses_what_is_no_table(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refuse(capsys, "tune", "--dstore", store.path, "--score-table", tmp_path / "x.npz")
    assert "no score table" in said


def test_info_refuses_a_calibration_of_another_datastore(
    store: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    write_calibration(store.calibration_path, calibration("e" * 64))
    cli.main(["info", "--dstore", str(store.path)])
    assert "fitted for another datastore" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["info"], ["info", "--dstore", "x", "--y"]])
def test_wrong_words_get_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert "usage: fairseq-knnlm" in capsys.readouterr().err


def test_an_interruption_is_told_without_a_traceback(
    store: Datastore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build", interrupt)
    assert cli.main(["build-index", "--dstore", str(store.path)]) == 130
    assert "nothing was published" in capsys.readouterr().err
    assert not store.index_path.exists()


def test_what_is_written_is_json(indexed: Datastore) -> None:
    content = json.loads((indexed.path / "manifest.json").read_text())
    assert content["format"].startswith("fairseq-knnlm")
    *_, card = (indexed.path / "knn.index").read_bytes()[:-16].partition(b'{"format"')
    assert json.loads(b'{"format"' + card)["format"] == "fairseq-knnlm index"


def test_info_tells_a_damaged_card_from_a_missing_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_store(tmp_path / "store", *random_entries(300, 8))
    words = ["--dstore", str(tmp_path / "store")]
    cli.main(["build-index", *words])
    truncate(tmp_path / "store/knn.index")
    capsys.readouterr()
    cli.main(["info", *words])
    captured = capsys.readouterr()
    assert "index        none" not in captured.out
    assert "damaged" in captured.out + captured.err


def test_verify_does_not_vouch_for_files_without_checksums(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of urvashik/knnlm carry none: nothing says they are as they were written."""
    keys, values = random_entries(300, 8)
    keys.tofile(tmp_path / "old_keys.npy")
    values.tofile(tmp_path / "old_vals.npy")
    cli.main(["verify", "--dstore", str(tmp_path / "old"), "--dstore-size", "300"])
    captured = capsys.readouterr()
    assert "every byte as it was written" not in captured.out


@pytest.mark.parametrize(
    "flags",
    [
        *(["--probe", str(value)] for value in (-3, 0, 9)),
        *(["--recall-queries", str(value)] for value in (-1, 10**9)),
        *(["--seed", str(value)] for value in (-1, 2**32)),
        *(["--train-rows", str(value)] for value in (-1, 0)),
        *(["--recall", value] for value in ("nan", "0", "1.5")),
        *(["--max-bytes-per-key", str(value)] for value in (-1, 0)),
    ],
)
def test_build_index_refuses_numbers_out_of_bounds(
    store: Datastore, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = refuse(capsys, "build-index", "--dstore", store.path, "--recipe", "IVF8,Flat", *flags)
    assert flags[0] in said
    assert not store.index_path.exists()


def test_a_second_build_of_an_index_is_refused(
    store: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = store.path / ".knn.index.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = refuse(capsys, "build-index", "--dstore", store.path)
    assert "another process is writing" in said


def test_compress_into_the_datastore_is_refused(
    store: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in (store.path, store.path / "smaller"):
        said = refuse(capsys, "compress", "--dstore", store.path, "--out", out, "--pca", 2)
        assert "--out lies in the datastore" in said
