"""Bad input ends before any work, with a message that says expected, found, and what to do.

Most cases run fairseq's command in this process and look at the exception; that such an
exception reaches the user as a message, exit code 1 and no traceback is shown by processes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Lab, eval_lm, must, run

from fairseq_knnlm.datastore import open_datastore
from fairseq_knnlm.errors import ConfigError, DatastoreError, IndexFileError, KnnlmError, ModelError
from fairseq_knnlm.runs.compress import compress
from fairseq_knnlm.runs.options import MixingOptions, Options, WritingOptions
from fairseq_knnlm.tasks.loading import check_stock_is_enough


@pytest.fixture
def store(datastore: Path, tmp_path: Path) -> Path:
    """A copy of the datastore, to be spoilt."""
    return Path(shutil.copytree(datastore, tmp_path / "store"))


def refused(
    lab: Lab, kind: type[KnnlmError], *flags: object, split: str = "test", model: str = "adaptive"
) -> str:
    """The message of an evaluation that must be refused before a batch is scored."""
    with pytest.raises(kind) as caught:
        lab.evaluate(split, *flags, model=model)
    message = str(caught.value)
    assert "expected:" in message
    assert "found:" in message
    return message


def memory(store: Path, *flags: object) -> list[object]:
    return ["--knnlm", "--dstore-filename", store, "--k", 8, *flags]


FLAGS = {
    "k below 1": (["--k", 0], "1 or more"),
    "k above the datastore": (["--k", 10_000_000], "exceeds the datastore"),
    "lambda above 1": (["--lmbda", 1.5], "0 to 1"),
    "lambda below 0": (["--lmbda=-0.1"], "0 to 1"),
    "temperature 0": (["--knn-temp", 0], "above 0"),
    "temperature below 0": (["--knn-temp=-1"], "above 0"),
    "temperature is no number": (["--knn-temp", "nan"], "above 0"),
    "both runs at once": (["--save-knnlm-dstore", "--dstore-mmap", "x"], "save first"),
    "another metric": (["--faiss-metric-type", "ip"], "--faiss-metric-type"),
    "contradicting size": (["--dstore-size", 3], "manifest"),
    "keys left out but needed": (["--no-load-keys", "--knn-sim-func", "dot"], "--no-load-keys"),
    "no such device": (["--knn-device", "cuda:7"], "--knn-device"),
    "nonsense device": (["--knn-device", "gpu"], "auto, cpu"),
    "no block left": (["--tokens-per-sample", 8], "--tokens-per-sample 3072"),
    "negative block": (["--tokens-per-sample", 4], "-4 tokens"),
    "more shares than batches": (["--num-shards", 1000], "the batches of the split"),
    "a share and a process a GPU": (
        ["--num-shards", 2, "--distributed-world-size", 2],
        "--distributed-world-size 1",
    ),
    "unknown expert": (["--experts", "knn,oracle"], "of knn, cache, ngram, suffix, lm2"),
    "expert named twice": (["--experts", "knn,knn"], "each once"),
    "expert without a name": (["--experts", "knn,"], "each once"),
    "second model not named": (["--experts", "knn,lm2"], "--expert-lm CHECKPOINT"),
    "second model not there": (["--experts", "lm2", "--expert-lm", "x.pt"], "no checkpoint x.pt"),
    "weight above 1": (["--experts", "knn,cache", "--cache-lmbda", 2], "--cache-lmbda"),
    "weight of lm2 above 1": (["--expert-lm-lmbda", 2], "--expert-lm-lmbda"),
    "weights above 1 in all": (
        ["--experts", "knn,cache", "--lmbda", 0.6, "--cache-lmbda", 0.5],
        "a sum of at most 1",
    ),
    "weight of an expert not asked": (["--ngram-lmbda", 0.1], "add ngram to --experts"),
    "setting of an expert not asked": (["--cache-theta", 0.1], "add cache to --experts"),
    "window of nothing": (["--experts", "knn,cache", "--cache-window", 0], "1 or more"),
    "theta below 0": (["--experts", "knn,cache", "--cache-theta=-1"], "0 or more"),
    "mixer that was not fitted": (["--mixer", "gate"], "knn, gate in the calibration"),
    "mixer and weights": (["--mixer", "bins", "--lmbda", 0.1], "--lmbda"),
}


@pytest.mark.parametrize("case", list(FLAGS))
def test_flags(lab: Lab, datastore: Path, case: str) -> None:
    flags, says = FLAGS[case]
    words = lab.command("test", *memory(datastore), *flags)
    with pytest.raises(ConfigError) as caught:
        eval_lm(words)
    message = str(caught.value)
    assert says in message
    assert "expected:" in message
    assert "found:" in message


@pytest.mark.parametrize(
    "flags",
    [
        *(["--knnlm"], ["--save-knnlm-dstore"], ["--dstore-filename", "x"], ["--dstore-mmap", "x"]),
        *(["--experts", "knn"], ["--experts", "cache,ngram"], ["--knnlm", "--experts", "cache"]),
    ],
)
def test_half_a_request(lab: Lab, flags: list[str]) -> None:
    refused(lab, ConfigError, *flags)


def test_no_datastore(lab: Lab, tmp_path: Path) -> None:
    says = refused(lab, DatastoreError, *memory(tmp_path / "nowhere"))
    assert "no datastore at" in says
    assert "--save-knnlm-dstore" in says


def test_no_index(lab: Lab, store: Path) -> None:
    (store / "knn.index").unlink()
    assert "build_index.py" in refused(lab, IndexFileError, *memory(store))


def test_datastore_of_another_checkpoint(lab: Lab, datastore: Path) -> None:
    says = refused(lab, DatastoreError, *memory(datastore), model="plain")
    assert "another checkpoint" in says


def test_datastore_of_another_dictionary(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(lab.data, tmp_path / "bin"))
    lines = (data / "dict.txt").read_text().splitlines()
    (data / "dict.txt").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    words = lab.command("test", *memory(datastore))
    words[0] = str(data)
    with pytest.raises(DatastoreError, match="another dictionary"):
        eval_lm(words)


def test_datastore_of_another_key_type(lab: Lab, datastore: Path) -> None:
    says = refused(lab, DatastoreError, *memory(datastore, "--knn-keytype", "decoder_output"))
    assert "--knn-keytype last_ffn_input" in says


def test_datastore_of_another_width(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """A store that knows nothing of its model, as those of urvashik/knnlm, still has a width."""
    rows = np.zeros((300, 24), np.float32) + 1
    rows.tofile(tmp_path / "old_keys.npy")
    np.ones((300, 1), np.int64).tofile(tmp_path / "old_vals.npy")
    prefix = tmp_path / "old"
    must("fairseq-knnlm", "build-index", "--dstore", prefix, "--dstore-size", 300)
    says = refused(lab, DatastoreError, *memory(prefix, "--dstore-size", 300))
    assert "another key width" in says


def test_urvashik_datastores_open(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """The same entries in the files of the original give the same perplexity."""
    keys, values = np.load(datastore / "keys.npy"), np.load(datastore / "values.npy")
    keys.tofile(tmp_path / "old_keys.npy")
    values.astype(np.int16).reshape(-1, 1).tofile(tmp_path / "old_vals.npy")
    old = ["--dstore-size", len(keys), "--dstore-fp16"]
    must("fairseq-knnlm", "build-index", "--dstore", tmp_path / "old", *old)
    mixture = ["--lmbda", 0.3, "--knn-temp", 2]
    ours = lab.evaluate("test", *memory(datastore, *mixture))
    theirs = lab.evaluate("test", *memory(tmp_path / "old", *old, *mixture))
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-6)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _alter(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def _remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("spoil", [_truncate, _alter, _remove])
@pytest.mark.parametrize("name", ["keys.npy", "values.npy", "manifest.json", "knn.index"])
def test_damaged_files(lab: Lab, store: Path, name: str, spoil: Callable[[Path], None]) -> None:
    spoil(store / name)
    says = refused(lab, KnnlmError, *memory(store))
    assert str(store) in says


@pytest.mark.parametrize("spoil", [_truncate, _alter])
def test_damaged_card(lab: Lab, store: Path, spoil: Callable[[Path], None]) -> None:
    content = (store / "knn.index").read_bytes()
    with (store / "card").open("wb") as file:
        file.write(content[-300:])
    spoil(store / "card")
    (store / "knn.index").write_bytes(content[:-300] + (store / "card").read_bytes())
    refused(lab, IndexFileError, *memory(store))


def test_manifest_changed_by_hand(lab: Lab, store: Path) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["rows"] -= 1
    (store / "manifest.json").write_text(json.dumps(manifest))
    assert "altered" in refused(lab, DatastoreError, *memory(store))


def test_index_of_another_datastore(lab: Lab, store: Path, tmp_path: Path) -> None:
    """Also where rows and width are the same."""
    other = tmp_path / "other"
    lab.evaluate("train", "--save-knnlm-dstore", "--dstore-mmap", other, "--dstore-fp32")
    must("fairseq-knnlm", "build-index", "--dstore", other)
    flags = memory(store, "--indexfile", other / "knn.index")
    assert "index of another datastore" in refused(lab, IndexFileError, *flags)


def test_several_datastores(lab: Lab, store: Path) -> None:
    """Each has its own index and its own share of the weight."""
    other = shutil.copytree(store, store.with_name("other"))
    both = ["--knnlm", "--dstore-filename", f"{store}:{other}", "--k", 8]
    says = refused(lab, ConfigError, *both, "--indexfile", store / "knn.index")
    assert "knn.index in each datastore" in says
    assert "found:    1.2" in refused(lab, ConfigError, *both, "--lmbda", 0.6)
    missing = store.with_name("nowhere")
    both[2] = f"{store}:{missing}"
    assert f"no datastore at {missing}" in refused(lab, DatastoreError, *both)


def test_n_grams_of_a_datastore_that_lost_its_text(lab: Lab, store: Path, tmp_path: Path) -> None:
    merged = compress(open_datastore(store), tmp_path / "merged", merge=8)
    flags = ["--experts", "ngram", "--dstore-filename", merged]
    says = refused(lab, ConfigError, *flags)
    assert "no longer holds its text" in says
    assert "leave ngram out of --experts" in says


def test_probe_beyond_the_lists(lab: Lab, store: Path) -> None:
    build = ["--dstore", store, "--recipe", "IVF8,Flat", "--recall-queries", 5]
    must("fairseq-knnlm", "build-index", *build)
    assert "1 to 8" in refused(lab, ConfigError, *memory(store, "--probe", 9))
    lab.evaluate("test", *memory(store, "--probe", 8))


def test_saving_onto_something(lab: Lab, store: Path) -> None:
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    says = refused(lab, DatastoreError, "--save-knnlm-dstore", "--dstore-mmap", store)
    assert "exists already" in says
    assert before == {file.name: file.read_bytes() for file in store.iterdir()}


def test_saving_on_a_full_disk(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    says = refused(lab, DatastoreError, "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "new")
    tokens = len(lab.text("test"))
    assert f"{tokens * (16 * 2 + 2) / 1024:.1f} KiB free" in says
    assert not list(tmp_path.iterdir())


def test_model_without_the_layer(lab: Lab, tmp_path: Path) -> None:
    flags = ["--save-knnlm-dstore", "--dstore-mmap", tmp_path / "new"]
    key_type = ["--knn-keytype", "decoder_output"]
    says = refused(lab, ModelError, *flags, *key_type, model="prenorm-nofinal")
    assert "no layer for --knn-keytype" in says
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--results-json", "--score-table"])
@pytest.mark.parametrize("shards", ["--num-shards", "--distributed-world-size"])
def test_figures_of_saving_in_shards(lab: Lab, tmp_path: Path, flag: str, shards: str) -> None:
    saving = ["--save-knnlm-dstore", "--dstore-mmap", tmp_path / "new", shards, 2]
    says = refused(lab, ConfigError, *saving, flag, tmp_path / "file")
    assert f"leave {flag} out" in says
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--results-json", "--score-table"])
def test_one_file_of_several_processes(lab: Lab, tmp_path: Path, flag: str) -> None:
    """That fairseq starts by itself, a GPU each, all with the same flags."""
    several = ["--distributed-world-size", 2]
    says = refused(lab, ConfigError, flag, tmp_path / "new", *several)
    assert "--num-shards 2, --shard-id and files with other names" in says
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flag", ["knnlm", "experts", "score_table", "results_json", "progress_file"]
)
def test_flags_that_the_stock_scorer_would_ignore(flag: str) -> None:
    check_stock_is_enough(Options(), "this decoder")
    mixing = flag in ("knnlm", "experts")
    given = Options(
        mixing=MixingOptions(**({flag: "x"} if mixing else {})),  # type: ignore[arg-type]
        writing=WritingOptions(**({} if mixing else {flag: "x"})),  # type: ignore[arg-type]
    )
    says = f"--{flag.replace('_', '-')} does not work with this decoder"
    with pytest.raises(ConfigError, match=says):
        check_stock_is_enough(given, "this decoder")


def test_recipes_that_faiss_refuses(datastore: Path, tmp_path: Path) -> None:
    for recipe in ("IVF8,Nonsense", "PQ7", "paper"):
        ran = run(
            *("fairseq-knnlm", "build-index", "--dstore", datastore, "--recipe", recipe),
            *("--indexfile", tmp_path / "x.index"),
        )
        assert ran.code == 1
        assert "expected:" in ran.out
        assert "Traceback" not in ran.out
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags",
    [
        ["--knnlm", "--dstore-filename", "nowhere"],
        ["--tokens-per-sample", "8"],
        ["--knnlm", "--dstore-filename", "DSTORE", "--lmbda", "2"],
    ],
)
def test_the_user_sees_a_message_and_no_traceback(
    lab: Lab, datastore: Path, flags: list[str]
) -> None:
    words = [str(datastore) if word == "DSTORE" else word for word in flags]
    ran = run("fairseq-eval-lm", *lab.command("test", *words))
    assert ran.code == 1
    assert "Traceback" not in ran.out
    assert "\nerror: " in ran.out
    assert "  expected: " in ran.out
    assert "  found:    " in ran.out


def test_a_killed_save_leaves_nothing_that_opens(lab: Lab, tmp_path: Path) -> None:
    """Ended by an exception in the middle: no folder of that name, and no partial one either."""
    from fairseq_knnlm.runs.save import Saving

    def fail(self: Saving, batch: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saving, "take", fail)
        with pytest.raises(KeyboardInterrupt):
            lab.evaluate("test", "--save-knnlm-dstore", "--dstore-mmap", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    # Nor does the next run in this process meet the scorer of the one that ended.
    words = lab.command("test", "--num-workers", 0)
    words[words.index("knn_lm")] = "language_modeling"
    assert eval_lm(words)["loss"] == pytest.approx(lab.evaluate("test")["loss"], abs=2e-5)
