"""``fairseq-knnlm encode`` against fairseq-preprocess, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import Capture, call, refuse, say
from conftest import ROOT, must
from tokenizers_at_hand import ENGLISH, EXACT, byte_level, sentencepiece_model

LINES = [*ENGLISH, "", "= the bird =", "", "caf\u00e9  na\u00efve \u6f22 \U0001f600", " here "]
FILES = ("dict.txt", "train.bin", "train.idx", "valid.bin", "valid.idx")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two splits, lines of several lengths and empty ones."""
    folder = tmp_path_factory.mktemp("texts")
    found = {}
    for split, times in (("train", 5), ("valid", 1)):
        found[split] = folder / f"{split}.txt"
        found[split].write_text("\n".join(LINES * times) + "\n", encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "sentencepiece.model"
    path.write_bytes(sentencepiece_model())
    return path


def cut_by_the_library(model: Path, text: Path, to: Path) -> Path:
    """Pieces with spaces between them, as spm_encode writes them."""
    import sentencepiece

    opened = sentencepiece.SentencePieceProcessor(model_file=str(model))
    lines = text.read_text(encoding="utf-8").splitlines()
    to.write_text("".join(" ".join(opened.encode(x, out_type=str)) + "\n" for x in lines))
    return to


def preprocessed(folder: Path, pieces: dict[str, Path], *flags: object) -> Path:
    words = [word for split, path in pieces.items() for word in (f"--{split}pref", path)]
    must("fairseq-preprocess", "--only-source", *words, "--destdir", folder, *flags)
    return folder


def same(ours: Path, theirs: Path, names: Sequence[str] = FILES) -> None:
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.mark.slow
def test_the_files_are_those_of_fairseq_preprocess(
    texts: dict[str, Path], model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Of the same pieces, byte by byte, by one process and by several."""
    given = [*texts.values(), "--tokenizer", model]
    say(capsys, "encode", *given, "--out", tmp_path / "ours")
    pieces = {
        split: cut_by_the_library(model, text, tmp_path / split) for split, text in texts.items()
    }
    theirs = preprocessed(tmp_path / "theirs", pieces, "--srcdict", tmp_path / "ours/dict.txt")
    same(tmp_path / "ours", theirs)
    say(capsys, "encode", *given, "--out", tmp_path / "two", "--workers", 2)
    same(tmp_path / "two", theirs)
    again = ["--srcdict", tmp_path / "ours", "--out", tmp_path / "again"]
    say(capsys, "encode", texts["valid"], "--tokenizer", model, *again)
    same(tmp_path / "again", theirs, [name for name in FILES if "train" not in name])


@pytest.mark.slow
def test_the_dictionary_is_that_of_fairseq_preprocess(tmp_path: Path, capsys: Capture) -> None:
    """Where every piece comes in the text; of the others it has none."""
    model = tmp_path / "model"
    model.write_bytes(sentencepiece_model(byte_fallback=False, vocab_size=60))
    import sentencepiece

    opened = sentencepiece.SentencePieceProcessor(model_file=str(model))
    every = [opened.id_to_piece(n).replace("\u2581", " ") for n in range(3, len(opened))]
    text = tmp_path / "train.txt"
    text.write_text("\n".join([*ENGLISH, *every]) + "\n")
    say(capsys, "encode", text, "--tokenizer", model, "--out", tmp_path / "ours")
    pieces = {"train": cut_by_the_library(model, text, tmp_path / "pieces")}
    theirs = preprocessed(tmp_path / "theirs", pieces)
    found, expected = (
        [line.split(" ") for line in (folder / "dict.txt").read_text().splitlines()]
        for folder in (tmp_path / "ours", theirs)
    )
    known = [row for row in found if row[1] != "0"]
    assert known == [row for row in expected if row[1] != "0"]
    assert len(found) % 8 == len(expected) % 8 == 4  # with fairseq's own four
    same(tmp_path / "ours", theirs, ("train.idx",))


def test_what_is_left_beside_the_data(
    texts: dict[str, Path], model: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "data"
    said = say(capsys, "encode", *texts.values(), "--tokenizer", model, "--out", out)
    told = json.loads((out / "encoding.json").read_text())
    raw = texts["train"].read_bytes()
    train = told["splits"]["train"]
    assert (train["words"], train["bytes"]) == (len(raw.decode().split()), len(raw))
    assert (train["items"], train["changed"], train["unknown"]) == (5 * len(LINES), 10, 0)
    ids = np.fromfile(out / "train.bin", np.uint16)
    assert train["tokens"] == len(ids)
    import hashlib

    assert train["fingerprint"] == hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()
    assert (out / "sentencepiece.model").read_bytes() == model.read_bytes()
    assert f"train: {len(ids):,} tokens of {train['words']:,} words, {len(raw):,} bytes" in said
    assert "10 lines come back as another text" in said
    assert out.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_files_of_a_split_are_documents(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """With an empty line between them, where there is none; ``LINE`` stands for one."""
    folder = tmp_path / "train"
    folder.mkdir()
    for name, text in {"a": "the cat\nhere", "b": "the dog\n\n", "c": "---\nthe bird\n"}.items():
        (folder / name).write_text(text)
    flags = ["--tokenizer", model, "--document-separator=---"]
    say(capsys, "encode", folder, *flags, "--out", tmp_path / "data")
    from fairseq.data import Dictionary

    types = Dictionary.load(str(tmp_path / "data/dict.txt"))
    lines = types.string(np.fromfile(tmp_path / "data/train.bin", np.uint16), include_eos=True)
    found = lines.replace(" </s>", "</s>").replace("</s> ", "</s>").replace(" ", "").split("</s>")
    words = [line.replace("\u2581", " ").strip() for line in found]
    assert words == ["the cat", "here", "", "the dog", "", "", "the bird", ""]
    told = json.loads((tmp_path / "data/encoding.json").read_text())
    assert told["splits"]["train"]["bytes"] == 12 + 9 + 13 - 3


def test_an_empty_folder_may_be_there(
    texts: dict[str, Path], model: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "data").mkdir()
    say(capsys, "encode", texts["train"], "--tokenizer", model, "--out", tmp_path / "data")
    assert (tmp_path / "data/train.bin").is_file()


def bad_input(folder: Path, texts: dict[str, Path], model: Path) -> dict[str, tuple[Any, ...]]:
    """What is typed, by what is said of it."""
    train, out = texts["train"], folder / "out"
    (folder / "latin.txt").write_bytes("the\n\u00e9t\u00e9\n".encode("latin-1"))
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "none").mkdir()
    (folder / "full").mkdir()
    (folder / "full/file").write_text("")
    (folder / "words.txt").write_text("the 3\ncat 1\n")
    (folder / "no-dictionary.txt").write_text("the\n")
    (folder / "newline.model").write_bytes(
        sentencepiece_model(**EXACT, user_defined_symbols=["\n"])
    )
    good = ("--tokenizer", model, "--out", out)
    return {
        "there is no text at": (folder / "gone.txt", *good),
        "is not in UTF-8": (f"train={folder / 'latin.txt'}", *good),
        "at byte 4, in line 2": (f"train={folder / 'latin.txt'}", *good, "--workers", 2),
        "the text of train is empty": (f"train={folder / 'empty.txt'}", *good),
        "at least a word": (f"train={folder / 'blank.txt'}", *good),
        "SPLIT=FILE": (f"{folder}/a b", *good),
        "no tokenizer at": (train, "--tokenizer", folder / "gone", "--out", out),
        "is no model of sentencepiece": (train, "--tokenizer", train, "--out", out),
        "has no tokenizer that can be used": (train, "--tokenizer", folder / "none", "--out", out),
        "is not empty": (train, "--tokenizer", model, "--out", folder / "full"),
        "is no folder": (train, "--tokenizer", model, "--out", train),
        "which lies below the file": (train, "--tokenizer", model, "--out", train / "a"),
        "of another tokenizer": (train, *good, "--srcdict", folder / "words.txt"),
        "no dictionary at": (train, *good, "--srcdict", folder / "none"),
        "cannot be read": (train, *good, "--srcdict", folder / "no-dictionary.txt"),
        "--workers": (train, *good, "--workers", 0),
        "nothing tells which pieces are frequent": (texts["valid"], *good),
        "without ends of lines": (train, "--tokenizer", folder / "newline.model", "--out", out),
    }


def test_what_is_refused(
    texts: dict[str, Path], model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """In one message each, and nothing is left of it."""
    for says, words in bad_input(tmp_path, texts, model).items():
        before = set(tmp_path.rglob("*"))
        said = refuse(capsys, "encode", *words)
        assert says in said and "expected:" in said and "found:" in said, (says, said)
        assert set(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_in_the_middle_leaves_nothing(
    texts: dict[str, Path], model: Path, tmp_path: Path, number: int, capsys: Capture
) -> None:
    """Nothing that has the folder's name; what a killed process left is removed by the next."""
    text, out, small = tmp_path / "valid.txt", tmp_path / "data", tmp_path / "small"
    text.write_text("the cat was singing here and there\n" * 100_000)
    say(capsys, "encode", texts["train"], "--tokenizer", model, "--out", small)
    words = ["encode", text, "--tokenizer", model, "--srcdict", small, "--out", out, "--workers", 2]
    begun = subprocess.Popen(
        [sys.executable, "-m", "fairseq_knnlm.cli", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".data.partial-*/valid.bin")):
        assert begun.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    begun.send_signal(number)
    said, _ = begun.communicate(timeout=60)
    assert begun.returncode == (143 if number == signal.SIGTERM else -number), said.decode()
    assert not out.exists()
    if number == signal.SIGTERM:
        assert {path.name for path in tmp_path.iterdir()} == {"valid.txt", "small"}
        assert "Traceback" not in said.decode()
    text.write_text("the cat\n")
    say(capsys, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "small", "valid.txt"}


# -- tokenizers of transformers -----------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny GPT-2 with a tokenizer of its kind, as transformers saves it, and wrapped."""
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    from fairseq_knnlm.runs.wrapping import wrap

    folder = tmp_path_factory.mktemp("gpt2")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), eos_token="<|endoftext|>"
    )
    config = transformers.GPT2Config(
        vocab_size=len(fast) + 3,
        bos_token_id=fast.eos_token_id,
        eos_token_id=fast.eos_token_id,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "hf")
    fast.save_pretrained(folder / "hf")
    wrap(folder / "hf", folder / "wrapped", None, None)
    return {"hf": folder / "hf", "wrapped": folder / "wrapped"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["hf", "wrapped"])
def test_a_document_a_line_is_what_fairseq_preprocess_makes(
    gpt2: dict[str, Path], folder: str, tmp_path: Path, capsys: Capture
) -> None:
    """With the dictionary of `wrap` and ids by the library itself."""
    lines = [line for line in LINES if line]
    text = tmp_path / "train.txt"
    text.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--tokenizer", gpt2[folder], "--document-separator", "blank"]
    said = say(capsys, "encode", text, *flags, "--out", tmp_path / "ours")
    assert f"in {len(lines)} documents" in said and "another text" not in said
    raw = byte_level()
    ids = (tmp_path / "ids").open("w")
    with ids:
        for line in lines:
            ids.write(" ".join(map(str, raw.encode(line).ids)) + "\n")
    dictionary = ["--srcdict", gpt2["wrapped"] / "dict.txt"]
    theirs = preprocessed(tmp_path / "theirs", {"train": tmp_path / "ids"}, *dictionary)
    same(tmp_path / "ours", theirs, ("dict.txt", "train.bin", "train.idx"))
    say(capsys, "encode", text, *flags, *dictionary, "--out", tmp_path / "named")
    same(tmp_path / "named", theirs, ("dict.txt", "train.bin", "train.idx"))


def test_a_file_is_a_document_as_it_is(
    gpt2: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    raw = byte_level()
    text = "the cat\r\n\n\n  here\t\u6f22\u5b57 <|endoftext|>\n"
    for split in ("train", "valid"):
        (tmp_path / f"{split}.txt").write_bytes(text.encode())
    texts = [tmp_path / "train.txt", tmp_path / "valid.txt"]
    say(capsys, "encode", *texts, "--tokenizer", gpt2["wrapped"], "--out", tmp_path / "data")
    from fairseq.data import Dictionary

    types = Dictionary.load(str(tmp_path / "data/dict.txt"))
    ids = np.fromfile(tmp_path / "data/valid.bin", np.uint16)
    symbols = [types[one] for one in ids.tolist()]
    assert symbols[-1] == "</s>" and "</s>" not in symbols[:-1]
    assert raw.decode([int(one) for one in symbols[:-1]], skip_special_tokens=False) == text
    told = json.loads((tmp_path / "data/encoding.json").read_text())
    assert told["splits"]["valid"]["bytes"] == len(text.encode())
    assert told["special"] == {"</s>": 0}


def test_what_is_no_tokenizer_of_transformers(
    gpt2: dict[str, Path], texts: dict[str, Path], tmp_path: Path, capsys: Capture
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(gpt2["wrapped"], broken)
    (broken / "tokenizer.json").write_text("{}")
    other = tmp_path / "words.txt"
    other.write_text("".join(f"{n} 1\n" for n in range(1, 90)))
    for says, tokenizer, more in (
        ("is no tokenizer", broken, ()),
        ("a dictionary of another tokenizer", gpt2["wrapped"], ("--srcdict", other)),
    ):
        words = [texts["train"], "--tokenizer", tokenizer, *more, "--out", tmp_path / "out"]
        assert says in refuse(capsys, "encode", *words)
    (broken / "checkpoint.pt").write_bytes(b"nothing")
    smaller, code = tmp_path / "smaller", tmp_path / "code"
    shutil.copytree(gpt2["hf"], smaller)
    shutil.copytree(gpt2["hf"], code)
    for path, more in (
        (smaller / "config.json", {"vocab_size": 10}),  # than its tokenizer, which is another's
        (
            code / "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}},
        ),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    for says, folder in (
        ("has no tokenizer that can be used", broken),
        ("for a model of 10", smaller),
        ("brings code of its own, which is not run", code),
    ):
        words = [texts["train"], "--tokenizer", folder, "--out", tmp_path / "out"]
        said = refuse(capsys, "encode", *words)
        assert says in said and said.count("error: ") == 1
    assert not (tmp_path / "out").exists()


def test_help_has_an_example(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        call("encode", "--help")
    assert "example: fairseq-knnlm encode text/train.txt" in capsys.readouterr().out
