"""``fairseq-knnlm report --join``: files of shares, made by hand, to the figures of their whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_calls import Capture, refuse, say
from stores import assert_helps

from fairseq_knnlm.calibration.table import read_part, read_table
from fairseq_knnlm.calibration.writer import ScoreTableWriter
from fairseq_knnlm.errors import TableError
from fairseq_knnlm.runs.joining import join_tables

MODEL = "d" * 64
#: Figures that a share cannot have alone, or that come of the sums of all.
NOT_KNOWN = {
    "base_loss_error": None,
    "loss_error": None,
    "gain": 9.0,
    "gain_error": None,
    "errors_by": "batch means over sections of the text",
}
OF_TEXT = ("word_perplexity", "byte_perplexity", "bits_per_byte")
#: log2 p of 4 tokens a share: a loss of 3 bits, and of 2.5.
BASE, MIXED = -3.0, -2.5


def sections(number: int, of: int) -> dict[str, Any]:
    """A section a share; each has tokens in its own alone."""

    def own(some: Any, none: Any) -> list[Any]:
        return [some if section == number else none for section in range(of)]

    # The first share is dearer than the second: 4 and 2 bits a token, 3 and 2 with the mixture.
    base, mixed = (-4.0, -3.0) if number == 0 else (-2.0, -2.0)
    return {
        "tokens": own(4, 0),
        "base_log_prob": own([4 * base * math.log(2)], []),
        "log_prob": own([4 * mixed * math.log(2)], []),
    }


def share(number: int, of: int = 2, **fields: Any) -> dict[str, Any]:
    """4 tokens in 2 batches."""
    return {
        "number": number,
        "of": of,
        "first_batch": 2 * number,
        "batches": 2,
        "of_batches": 2 * of,
        "of_tokens": 4 * of,
        "model": MODEL,
        "precision": "float32",
        "datastores": ["e" * 64],
        "calibration": None,
        "described": {"knn": {"k": 8, "index": "Flat"}},
        "flags": {"k": 8, "lmbda": 0.25},
        "base_log_prob": [4 * BASE * math.log(2)],
        "log_prob": [4 * MIXED * math.log(2)],
        "counts": {"knn": {"recalled_knn": 1, "search_seconds": 0.5}},
        "sections": sections(number, of),
        **fields,
    }


def results(number: int, **fields: Any) -> dict[str, Any]:
    """Of a share whose own losses are of no use to the whole."""
    return {
        "tokens": 4,
        "tokens_left_out": 7 if number == 0 else 0,
        "tokens_impossible": 0,
        "base_loss": 9.0,
        "base_perplexity": 512.0,
        "loss": 8.0,
        "perplexity": 256.0,
        **NOT_KNOWN,
        "seconds": 2.0,
        "tokens_per_second": 2.0,
        "experts": ["knn"],
        "mixed": ["knn"],
        "mixer": "fixed",
        "mixture": "knn: lambda 0.25",
        "mixture_from": "given",
        "k": 8,
        "index": "Flat",
        "distances": "exact squared L2",
        "search_seconds": 0.5,
        "tokens_recalled": 1,
        "datastore": f"/scratch/{number}/dstore",
        "split": "test",
        "context": None,
        "versions": {"torch": "2"},
        "share": share(number),
        **fields,
    }


def write(folder: Path, name: str, content: object) -> Path:
    path = folder / name
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path, f"{number}.json", results(number)) for number in range(2)]


def test_the_report_of_the_whole(files: list[Path], tmp_path: Path, capsys: Capture) -> None:
    """In any order; where the datastore lay may differ."""
    to = tmp_path / "whole.json"
    said = say(capsys, "report", "--join", *reversed(files), "--results-json", to)
    assert said.splitlines() == [
        "test, joined of 2 shares",
        "base LM  perplexity 8.00, loss 3.0000 bits, 8 tokens",
        "kNN-LM   perplexity 5.66, loss 2.5000 bits, 8 tokens",
        "knn: lambda 0.25 (given)",
        "gain 0.5000 bits, standard error 0.5000; standard error of the loss 0.5000 bits, by batch "
        "means over sections of the text",
        "k 8, index Flat; distances exact squared L2",
        "2 tokens/s over 4.0 s, of which search 1.0 s",
    ]
    found = json.loads(to.read_text())
    assert "share" not in found
    assert (found["tokens"], found["tokens_left_out"], found["tokens_recalled"]) == (8, 7, 2)
    assert found["loss"] == pytest.approx(2.5, abs=1e-15)
    assert say(capsys, "report", "--join", to).splitlines()[1:] == said.splitlines()[1:]


def test_several_datastores_are_counted_each(tmp_path: Path, capsys: Capture) -> None:
    """Most recalled of one datastore are told: 5 + 0 of the first, 2 + 4 of the second."""
    files = []
    for number, recalled in enumerate([(5, 2), (0, 4)]):
        first, second = recalled
        counts = {"recalled_knn": first, "recalled_knn2": second, "search_seconds": 1}
        pointed = {"queries": 4, "searches": 1 + number}
        skipped = {"tokens": 4, "searched": 1 + number}
        mine = share(number, counts={"knn": counts | pointed, "skipping": skipped})
        extra = {"pointers": "join", "searches_saved": 0.0, "searches_skipped": 0.0}
        files.append(write(tmp_path, f"{number}.json", results(number, share=mine, **extra)))
    to = tmp_path / "whole.json"
    say(capsys, "report", "--join", *files, "--results-json", to)
    found = json.loads(to.read_text())
    assert found["tokens_recalled"] == 6
    assert found["searches_saved"] == found["searches_skipped"] == 1 - 3 / 8


def test_figures_over_the_text_are_of_the_whole(tmp_path: Path, capsys: Capture) -> None:
    """8 tokens of 24 and 20 bits are 5 words of 40 bytes."""
    text = {"source": "raw text", "words": 5, "bytes": 40, "unknown": 2, "agreement": 1.0}
    names = [f"{of}{name}" for of in ("", "base_") for name in OF_TEXT]
    files = [
        write(tmp_path, f"{number}.json", results(number, text=text, **dict.fromkeys(names)))
        for number in range(2)
    ]
    to = tmp_path / "whole.json"
    said = say(capsys, "report", "--join", *files, "--results-json", to)
    found = json.loads(to.read_text())
    assert found["bits_per_byte"] == pytest.approx(20 / 40)
    assert found["base_bits_per_byte"] == pytest.approx(24 / 40)
    assert found["word_perplexity"] == pytest.approx(2 ** (20 / 5))
    assert found["byte_perplexity"] == pytest.approx(2 ** (20 / 40))
    assert (
        "a word: perplexity 16.00 (base LM 27.86); a byte: 1.4142, 0.5000 bits (base LM 0.6000); "
        "of 5 words and 40 bytes (raw text, 2 of the tokens unknown)"
    ) in said


def test_tokens_without_probability(tmp_path: Path, capsys: Capture) -> None:
    impossible = results(1, tokens_impossible=1, share=share(1, log_prob=None))
    files = [
        write(tmp_path, f"{one['share']['number']}.json", one) for one in (results(0), impossible)
    ]
    assert "kNN-LM   perplexity infinite" in say(capsys, "report", "--join", *files)


def changed(number: int, **fields: Any) -> dict[str, Any]:
    return results(number, share=share(number, **fields))


#: The second file, and what is said of it.
WRONG: dict[str, tuple[Any, str]] = {
    "twice": (results(0), "share 0 of 2 is there twice"),
    "another number of shares": (changed(1, of=3), "of 2, as in"),
    "another model": (changed(1, model="f" * 64), "model ffff"),
    "another datastore": (changed(1, datastores=[]), "datastores"),
    "another calibration": (changed(1, calibration="a" * 64), "calibration none"),
    "another expert": (changed(1, described={"knn": {"k": 9}}), "described"),
    "another weight": (changed(1, flags={"k": 8, "lmbda": 0.5}), "--lmbda 0.5"),
    "another flag": (changed(1, flags={"k": 8}), "--lmbda none"),
    "half precision": (changed(1, precision="float16"), "precision float16"),
    "another split": (results(1, split="valid"), "split valid"),
    "another mixture": (results(1, mixture="knn: lambda 0.5"), "mixture knn: lambda 0.5"),
    "another version": (results(1, versions={"torch": "3"}), "versions"),
    "other batches": (changed(1, of_batches=5), "of_batches 5"),
    "a gap": (changed(1, first_batch=3, batches=1), "first batch 3"),
    "too few batches": (changed(1, batches=1), "8 tokens in 3 batches"),
    "too few tokens": (results(1, tokens=3), "7 tokens in 4 batches"),
    "a whole run": ({**results(1), "share": None}, "is of a whole run"),
    "no such share": (changed(2), "share 2 of 2"),
    "no batches": (changed(1, batches=0), "batches"),
    "no count": (results(1, tokens=-1), "tokens"),
    "other sections": (changed(1, sections=sections(1, 3)), "sections [3, None]"),
    "half a section": (changed(1, sections={**sections(1, 2), "tokens": [4]}), "sections of"),
    "an unknown field": (changed(1, name="x"), "name"),
    "no sum": (changed(1, log_prob="x"), "log_prob"),
    "JSON of another kind": ([], "JSON of another kind"),
}


@pytest.mark.parametrize("case", list(WRONG))
def test_files_that_do_not_belong_together(tmp_path: Path, case: str, capsys: Capture) -> None:
    second, says = WRONG[case]
    files = [write(tmp_path, "0.json", results(0)), write(tmp_path, "1.json", second)]
    to = tmp_path / "whole.json"
    said = refuse(capsys, "report", "--join", *files, "--results-json", to)
    assert says in said
    assert "expected:" in said and "found:" in said and "to do:" in said
    assert not to.exists()


def test_shares_that_are_missing_are_named(tmp_path: Path, capsys: Capture) -> None:
    mine = [share(number, of=20) for number in (0, 5)]
    files = [
        write(tmp_path, f"{one['number']}.json", results(one["number"], share=one)) for one in mine
    ]
    said = refuse(capsys, "report", "--join", *files)
    assert "18 of 20 shares are missing" in said
    assert "no share 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, ..." in said
    assert "1 of 2 shares are missing" in refuse(
        capsys, "report", "--join", write(tmp_path, "x.json", results(0))
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--join", "0.json", "--score-table", "t.npz"], "--score-table does nothing"),
        (["--join", "0.npz", "--results-json", "t.json"], "--results-json does nothing"),
        (["--join", "0.json", "--dstore", "x"], "--dstore does nothing"),
        (["--join", "0.json", "--results-json", "0.json"], "would write over what is read"),
        (["--join", "nowhere.json"], "nowhere.json cannot be read"),
        (["--join", "nowhere.npz"], "no score table at nowhere.npz"),
        (["--results-json", "x"], "not both of --dstore and --score-table"),
        (["--join", "0.json", "--raw-text", "x"], "--raw-text does nothing with these files"),
        (["--dstore", "x", "--score-table", "y", "--raw-text", "z"], "--raw-text needs --data"),
        (["--dstore", "x", "--score-table", "y", "--data", "nowhere"], "no dictionary at nowhere"),
        (["--dstore", "x"], "not both of --dstore and --score-table"),
        ([], "not both of --dstore and --score-table"),
    ],
)
def test_words_that_make_no_report(words: list[str], says: str, capsys: Capture) -> None:
    assert says in refuse(capsys, "report", *words)


def table(folder: Path, number: int, **fields: Any) -> Path:
    """Of a share: every second row of 8, as batches that go by length have them."""
    path = folder / f"{number}.npz"
    rows = np.arange(number, 8, 2)
    writer = ScoreTableWriter(path)
    columns = {"row": rows, "token": rows.astype(np.int32), "context": rows.astype(np.int32)}
    lm = np.full(4, BASE * math.log(2), np.float32)
    writer.write(columns | {"lm": lm, "knn": (lm - rows).astype(np.float32)[:, None]})
    settings = {"knn": [{"suffix": 0, "k": 0, "temperature": 1.0}]}
    left_out = {"experts", *NOT_KNOWN}
    known = {name: x for name, x in results(number).items() if name not in left_out}
    about = {"model": MODEL, "experts": settings, "features": [], "described": {"knn": {"k": 8}}}
    writer.publish(known | about | fields)
    return path


def test_tables_join_row_by_row(tmp_path: Path, capsys: Capture) -> None:
    to = tmp_path / "whole.npz"
    files = [table(tmp_path, number) for number in (0, 1)]
    said = say(capsys, "report", "--join", *files, "--score-table", to)
    assert "kNN-LM   perplexity 5.66, loss 2.5000 bits, 8 tokens" in said
    whole = read_table(to)
    assert whole["row"].tolist() == whole["token"].tolist() == list(range(8))
    assert np.array_equal(whole["knn"][:, 0], (whole["lm"] - np.arange(8)).astype(np.float32))
    assert whole.card["version"] == 2
    assert whole.card["tokens"] == 8
    assert "share" not in whole.card


def test_what_columns_cost_was_measured_by_each_share(tmp_path: Path) -> None:
    """No two take the same time; the first one's is told of the whole."""
    to, files = tmp_path / "whole.npz", []
    for number in (0, 1):
        group = {"columns": [0], "shared": number + 0.5, "first": 0.25, "further": 0.0}
        nothing = {"columns": [], "shared": 0.0, "first": 0.0, "further": 0.0}
        experts = {"knn": {"groups": [group], "features": nothing}}
        costs = {"lm": 1.0 + number, "lm_features": 0.0, "mixing": 0.0, "experts": experts}
        files.append(table(tmp_path, number, costs=costs))
    join_tables(list(reversed(files)), to)
    costs = read_table(to).card["costs"]
    assert costs["lm"] == 1.0
    assert costs["experts"]["knn"]["groups"][0]["shared"] == 0.5


def test_the_table_of_a_share_is_fitted_on_by_nobody(tmp_path: Path) -> None:
    path = table(tmp_path, 1)
    assert read_part(path).card["version"] == 3
    with pytest.raises(TableError, match="is the score table of a share") as caught:
        read_table(path)
    assert_helps(caught, "share 1 of 2")


def test_tables_of_other_columns(tmp_path: Path, capsys: Capture) -> None:
    """They were written with other flags, as the cards say."""
    files = [table(tmp_path, 0), table(tmp_path, 1, features=["knn_top"])]
    assert "features ['knn_top']" in refuse(capsys, "report", "--join", *files)
