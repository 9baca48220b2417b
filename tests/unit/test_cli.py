"""The command ``fairseq-knnlm`` in this process, on small datastores."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import run
from stores import alter, random_entries, truncate, write_compressed, write_store

from fairseq_knnlm import cli, files
from fairseq_knnlm.calibration.stored import (
    Calibration,
    Stack,
    read_calibration,
    write_calibration,
)
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.experts.kneser_ney import NGramModel
from fairseq_knnlm.mixture.components import LM, Component
from fairseq_knnlm.mixture.mixers import Fixed

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
    alone = Stack((), Fixed((LM,), (1.0,)), 150.0, 7.2, 151.0)
    knn = Component("knn", {"suffix": 0, "k": 0, "temperature": 12.0})
    mixed = Stack(("knn",), Fixed((LM, knn), (0.875, 0.125)), 120.25, 6.9, 121.0)
    fitted_on = {"split": "valid", "tokens": 1000, "chosen_on": 100, "held_out": 100, "seed": 0}
    fitted_on["context"] = {}
    stacks = (alone, mixed)
    return Calibration((datastore,), MODEL, fitted_on, {"knn": {"k": 8}}, 150.0, stacks, 1)


def write_table(
    path: Path,
    seal: str,
    *,
    helpful: bool = True,
    split: str = "valid",
    own: bool = False,
    **card: Any,
) -> Path:
    """960 tokens; the neighbours know half of them for certain at temperature 2, or nothing."""
    rows = np.arange(960)
    lm = np.full(960, -2.0, np.float32)
    sharp = np.where(rows % 2, 0.0, -np.inf).astype(np.float32)
    other = lm - 1
    writer = ScoreTableWriter(path)
    columns = np.stack([other, sharp if helpful else other], axis=1)
    distances = 1 + np.random.default_rng(1).random((960, 2), np.float32)
    if own:
        distances[::2, 0] = 0
    experts = {} if card.get("experts") == {} else {"knn": columns}
    ids = np.zeros((2, 960), np.int32)
    named = {"row": rows, "token": ids[0], "context": ids[1], "lm": lm}
    writer.write({**named, **experts, "knn_distances": distances})
    settings = [{"suffix": 0, "k": 0, "temperature": t} for t in (1.0, 2.0)]
    writer.publish(
        {
            "datastores": [seal],
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
    size = sum(file.bytes for file in store.manifest.files.values())
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
    assert cli.main(["verify", "--dstore", str(store.path)]) == 1
    assert "weights.npy is damaged" in capsys.readouterr().err


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
    assert "valid, 960 tokens; figures are of the 96 that nothing was fitted or chosen on" in said
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


def test_curves_that_fail_cost_nothing_else(
    store: Datastore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are drawn last, whatever matplotlib and the disk have to say."""

    def fail(*_: object) -> bool:
        assert store.calibration_path.is_file()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cli, "draw_curves", fail)
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", table)
    assert "no curves: error: the disk is full" in said
    assert read_calibration(store.calibration_path, [store.fingerprint]) is not None


def reads(folder: Path) -> list[object]:
    """``--data`` and ``--path``, of files that are there, for who does not read them."""
    data, model = folder / "data-bin", folder / "model.pt"
    data.mkdir()
    for file in (data / "dict.txt", data / "valid.idx", data / "valid.bin", model):
        file.write_text("text")
    return ["--data", data, "--path", model]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--plot", "FOLDER"], "--plot cannot be written"),
        (["--plot", "FOLDER/calibration.json"], "the calibration and --plot name the same file"),
        (["--plot", "/dev/null"], "--plot cannot be written"),
        (["--score-table", "FOLDER"], "--score-table cannot be written"),
        (["--score-table", "T.npz", "--plot", "T.npz"], "--score-table and --plot name the same"),
    ],
)
def test_what_tune_writes_is_tried_before_the_table_is_made(
    store: Datastore,
    tmp_path: Path,
    flags: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "_evaluate", lambda *_: pytest.fail("hours of work"))
    typed = [flag.replace("FOLDER", str(store.path)) for flag in flags]
    typed = [str(store.path / flag) if flag == "T.npz" else flag for flag in typed]
    flags = [*reads(tmp_path), *typed]
    assert says in refuse(capsys, "tune", "--dstore", store.path, *flags)


def test_a_plot_does_not_replace_the_table(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    before = table.read_bytes()
    tune = ["tune", "--dstore", store.path, "--score-table", table, "--plot", table]
    assert "--plot names the score table" in refuse(capsys, *tune)
    assert table.read_bytes() == before


def test_a_second_tune_of_one_datastore_is_refused(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a living process fits one; a lock that is left behind stops nobody."""
    table = write_table(tmp_path / "valid.npz", store.fingerprint)
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom fairseq_knnlm.files import Claim\n"
        "claim = Claim(Path(sys.argv[1]))\nprint('claimed', flush=True)\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(store.calibration_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        tune = ["tune", "--dstore", store.path, "--score-table", table]
        assert "another process is writing" in refuse(capsys, *tune)
        other.kill()
    say(capsys, *tune)


def test_tune_of_several_leaves_the_calibration_of_one(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_table(tmp_path / "one.npz", store.fingerprint)
    say(capsys, "tune", "--dstore", store.path, "--score-table", one)
    before = store.calibration_path.read_bytes()
    seals = [store.fingerprint, "e" * 64]
    two = write_table(tmp_path / "two.npz", seals[0], datastores=seals, datastore="news:books")
    said = say(capsys, "tune", "--dstore", store.path, "--score-table", two)
    assert "written to " in said
    assert store.calibration_path.read_bytes() == before
    both = read_calibration(store.calibration_path, seals)
    assert both is not None
    assert both.names == ("news", "books")
    said = say(capsys, "info", "--dstore", store.path)
    assert "calibration  knn" in said
    assert "calibration  also of datastore" in said
    assert "news:books" in said


def test_a_merged_datastore_is_tuned_without_ngrams(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it no longer has the text for; whoever asks for them is still told so by evaluation."""
    store = write_compressed(tmp_path / "merged")
    asked: list[str] = []

    def evaluate(_: str, flags: list[str]) -> None:
        asked.append(flags[flags.index("--experts") + 1])
        write_table(store.path / "valid.npz", store.fingerprint)

    monkeypatch.setattr(cli, "_evaluate", evaluate)
    tune = ["tune", "--dstore", store.path, *reads(tmp_path)]
    assert "n-grams are left out" in say(capsys, *tune)
    assert "n-grams" not in say(capsys, *tune, "--experts", "knn,ngram")
    assert asked == ["knn,cache", "knn,ngram"]


@pytest.mark.parametrize("own", ["split", "distances", "neither"])
def test_text_that_the_datastore_holds_comes_with_a_warning(
    store: Datastore, tmp_path: Path, own: str, capsys: pytest.CaptureFixture[str]
) -> None:
    split = "train" if own == "split" else "valid"
    table = write_table(tmp_path / "x.npz", store.fingerprint, split=split, own=own == "distances")
    for command in ("tune", "report"):
        assert cli.main([command, "--dstore", str(store.path), "--score-table", str(table)]) == 0
        said = capsys.readouterr().err
        assert ("warning: the datastore seems to hold the text" in said) == (own != "neither")
        assert ("'train'" in said) == (own == "split")
        assert ("at distance 0" in said) == (own == "distances")


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


def verdicts(path: Path, capsys: pytest.CaptureFixture[str], code: int) -> tuple[str, str]:
    """What verify prints, and what it ends with."""
    assert cli.main(["verify", "--dstore", str(path)]) == code
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.fixture
def whole(indexed: Datastore, capsys: pytest.CaptureFixture[str]) -> Datastore:
    """Index, calibration, n-grams and a score table."""
    write_calibration(indexed.calibration_path, calibration(indexed.fingerprint))
    NGramModel.count(indexed.values, 50, 3).save(indexed.ngram_path, indexed.fingerprint)
    write_table(indexed.path / "valid.npz", indexed.fingerprint)
    return indexed


def test_verify_looks_at_everything(whole: Datastore, capsys: pytest.CaptureFixture[str]) -> None:
    said, wrong = verdicts(whole.path, capsys, 0)
    assert wrong == ""
    for name, verdict in {
        "store": "400 entries, every byte as it was written (keys.npy, values.npy)",
        "knn.index": "IVF8,Flat, nprobe 4",
        "ngram.npz": "n-grams up to 3 tokens",
        "calibration.json": "knn, fixed, fitted for this datastore",
        "valid.npz": "score table of valid, 960 tokens",
    }.items():
        assert f"{name}: {verdict}" in said
    (whole.path / "notes.txt").touch()
    (whole.path / ".knn.index.partial-abc").touch()
    said, wrong = verdicts(whole.path, capsys, 0)
    assert "notes.txt: a file that fairseq-knnlm does not know" in said
    assert ".knn.index.partial-abc: of a run that has not ended" in said


SPOILT = ("keys.npy", "values.npy", "knn.index", "ngram.npz", "calibration.json", "valid.npz")


def test_verify_lists_all_that_is_wrong(
    whole: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SPOILT:
        alter(whole.path / name)
    said, wrong = verdicts(whole.path, capsys, 1)
    assert wrong.count("expected:") >= len(SPOILT)
    for name in SPOILT:
        assert f"{whole.path / name} " in wrong
    assert said.count("not as it should be") == len(SPOILT) - 1  # keys and values are one thing


def test_info_says_of_each_part_what_is_wrong(
    whole: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = say(capsys, "info", "--dstore", whole.path)
    assert "n-grams      up to 3 tokens" in sound
    for name in SPOILT:
        truncate(whole.path / name)
    said = say(capsys, "info", "--dstore", whole.path)
    assert "400 entries of width 8" in said
    for part in ("arrays", "index", "n-grams", "calibration"):
        line = next(line for line in said.splitlines() if line.startswith(f"  {part} "))
        assert "found:" in line


@pytest.mark.parametrize("name", ["knn.index", "ngram.npz", "calibration.json", "more"])
def test_verify_waits_for_no_pipe(
    whole: Datastore, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole.path / name).unlink(missing_ok=True)
    os.mkfifo(whole.path / name)
    said, wrong = verdicts(whole.path, capsys, 0 if name == "more" else 1)
    assert "a device or pipe" in said + wrong


def test_verify_reads_the_numbers(
    store: Datastore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN among the keys and tokens beyond the vocabulary, under checksums that are right."""
    keys, values = np.load(store.path / "keys.npy"), np.load(store.path / "values.npy")
    keys[[50, 51], 3] = np.nan
    values[77] = 50
    manifest = json.loads((store.path / "manifest.json").read_text())
    for name, array in {"keys.npy": keys, "values.npy": values}.items():
        np.save(store.path / name, array)
        manifest["files"][name]["chunks"] = files.checksums(store.path / name)
    del manifest["fingerprint"], manifest["format"], manifest["version"]
    files.write_sealed(store.path / "manifest.json", "fairseq-knnlm datastore", 1, manifest)
    _, wrong = verdicts(store.path, capsys, 1)
    assert "NaN or infinity in 2 of 400 rows, first in row 50" in wrong
    assert "no token id below 50 in 1 of 400 rows, first in row 77" in wrong


def test_verify_tells_the_n_grams_of_another_text(
    store: Datastore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the fingerprint of this datastore."""
    NGramModel.count(store.values[:9], 50, 3).save(store.ngram_path, store.fingerprint)
    _, wrong = verdicts(store.path, capsys, 1)
    assert "not counted from this datastore" in wrong


def test_info_into_a_pipe_that_closes(store: Datastore) -> None:
    """``info | head``, as a process."""
    command = f"fairseq-knnlm info --dstore {store.path} | head -n 1; echo ${{PIPESTATUS[@]}}"
    ran = run("bash", "-c", f"export PATH={Path(sys.executable).parent}:$PATH; {command}")
    assert ran.out.splitlines() == [f"{store.path}: 400 entries of width 8", "0 0"]


@pytest.mark.parametrize("row", [0, 200, 399])
@pytest.mark.parametrize(("value", "says"), [(0, "never filled"), (np.nan, "NaN")])
def test_import_finds_holes_and_what_is_no_number(
    tmp_path: Path, row: int, value: float, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, values = random_entries(ROWS, WIDTH)
    keys[row] = value
    keys.tofile(tmp_path / "old_keys.npy")
    values.tofile(tmp_path / "old_vals.npy")
    command = ["import", "--dstore", tmp_path / "old", "--dstore-size", ROWS]
    assert says in refuse(capsys, *command, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


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
    for out, says in {".": "exists already", "smaller": "lies in the datastore"}.items():
        place = store.path / out
        said = refuse(capsys, "compress", "--dstore", store.path, "--out", place, "--pca", 2)
        assert says in said
