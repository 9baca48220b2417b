"""Makes the frozen files of this folder, by the code of the time (README.md).

    PYTHONPATH=WORKTREE python tests/data/make.py KIND

The text, keys and questions are the same in all of them. The listings (``*.txt``) are NumPy's, of
what was given to that code or of the bytes that it wrote.
"""

import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
ROWS, WIDTH, VOCABULARY, SEED = 96, 8, 20, 7
EOS = 2


def keys() -> np.ndarray:
    """(96, 8) float32, which float16 holds exactly."""
    drawn = np.random.default_rng(SEED).integers(-512, 512, (ROWS, WIDTH))
    return (drawn / 64).astype(np.float32)


def values() -> np.ndarray:
    """(96,) int64: lines of five tokens, an empty line after every third."""
    made = np.random.default_rng(SEED + 1).integers(4, VOCABULARY, ROWS)
    made[5::6] = EOS
    made[18::18] = EOS
    return made


def origin() -> Any:
    from fairseq_knnlm.datastore import Origin

    return Origin("a" * 64, "b" * 64, VOCABULARY, "last_ffn_input", split="train")


def write(folder: Path, key_dtype: str | None = "float16", finish: Any = None) -> Any:
    """A datastore by the code that is imported."""
    from fairseq_knnlm.datastore import DatastoreWriter, open_datastore

    writer = DatastoreWriter(folder, ROWS, WIDTH, origin(), key_dtype)
    writer.write(np.arange(ROWS), keys(), values())
    writer.publish(*([finish] if finish else []))
    return open_datastore(folder)


def options(builder: Any) -> Any:
    """What a builder of indexes takes as its options, whatever they were called at the time."""
    *_, kind, _ = typing.get_type_hints(builder.__init__).values()
    return kind(k=10)


def first() -> None:
    """d9add5b: datastore 1, card 1, and a calibration and a table that are refused today."""
    from fairseq_knnlm.calibration import Calibration, write_calibration
    from fairseq_knnlm.index import save
    from fairseq_knnlm.indexing import build
    from fairseq_knnlm.tables import ScoreTableWriter

    folder = HERE / "v1-first"
    store = write(folder)
    index, card = build(store.keys, "IVF4,Flat", recall_at=10, nprobe=4, progress=False)
    save(index, card, folder / "knn.index", store.fingerprint)
    about = ("a" * 64, "valid", 10, 5, "IVF4,Flat", "exact", 100.0, 90.0)
    calibration = Calibration(0.25, 1.0, store.fingerprint, *about)
    write_calibration(folder / "calibration.json", calibration)
    table = ScoreTableWriter(HERE / "table-v1.npz")
    table.write({"row": np.arange(3), "lm": -np.arange(1, 4, dtype=np.float32)})
    table.publish({"split": "valid"})


def streamed() -> None:
    """2962302: datastore 2, whose index has a card beside it."""
    from fairseq_knnlm.index import save
    from fairseq_knnlm.indexing import IndexBuilder
    from fairseq_knnlm.recipes import Recipe

    builder = IndexBuilder(Recipe("IVF4,SQfp16", 4, ROWS), WIDTH, ROWS, options(IndexBuilder))
    builder.train(keys(), np.arange(ROWS))
    for rows in np.arange(ROWS).reshape(-1, 24)[::-1]:  # in another order, as it may be
        builder.see(keys()[rows], rows)
        builder.add(keys()[rows], rows)
    index, card = builder.finish()
    write(HERE / "v2-card1", None, lambda to, seal: save(index, card, to / "knn.index", seal))


def compressed() -> None:
    """932e59e: datastore 3, with principal components, merged, and both."""
    from fairseq_knnlm.compress import compress
    from fairseq_knnlm.index import save
    from fairseq_knnlm.indexing import IndexBuilder, build
    from fairseq_knnlm.recipes import Recipe

    store = write(HERE / "temporary")
    index, card = build(store.keys, Recipe("Flat", 0, 0), options(IndexBuilder), progress=False)
    save(index, card, HERE / "temporary/knn.index", store.fingerprint)
    compress(store, HERE / "v3-pca", pca=4)
    compress(store, HERE / "v3-merge", merge=20)
    compress(store, HERE / "v3-both", pca=4, merge=20)
    _remove(HERE / "temporary")
    for name in ("v3-pca", "v3-merge", "v3-both"):
        _list(HERE / name)


def fitted() -> None:
    """a0e4814: calibration 2, with its gate in a file beside it."""
    import torch

    from fairseq_knnlm.calibration import Calibration, Stack, write_calibration
    from fairseq_knnlm.mixers import LM, Component, Fixed, Gate

    store = write(HERE / "v1-calibration2")
    knn = Component("knn", {"suffix": 0, "k": 0, "temperature": 2.0})
    gate = Gate((LM, knn), ("knn_distances",), 1, hidden=())
    with torch.no_grad():  # weights are 1 / (1 + 2 ** x) and the rest, x a distance less 1
        gate.mean.fill_(1.0)
        gate.scale.fill_(1.0)
        for name, weight in gate.named_parameters():
            filled = [[0.0], [float(np.log(2))]] if name.endswith("weight") else [0.0, 0.0]
            weight.copy_(torch.tensor(filled))
    calibration = Calibration(
        datastores=(store.fingerprint,),
        model="a" * 64,
        fitted_on={"split": "valid", "tokens": 1000, "held_out": 100, "seed": 0},
        experts={"knn": {"k": 10, "index": "IVF4,Flat"}},
        base_perplexity=100.0,
        stacks=(
            Stack((), Fixed((LM,), (1.0,)), 100.0, 6.5),
            Stack(("knn",), Fixed((LM, knn), (0.75, 0.25)), 90.0, 6.25),
            Stack(("knn",), gate, 80.0, 6.0),
        ),
        default=2,
        versions={"python": "3"},
    )
    write_calibration(HERE / "v1-calibration2/calibration.json", calibration)


def landed() -> None:
    """4b4532b: datastores 1, 2 and 3 with cards 2, documents 1, n-grams, calibration 3, table 2."""
    import torch

    from fairseq_knnlm.calibration.stored import Calibration, FittedMixture, write_calibration
    from fairseq_knnlm.calibration.writer import ScoreTableWriter
    from fairseq_knnlm.datastore import open_datastore
    from fairseq_knnlm.datastore.boundaries import after_empty_lines
    from fairseq_knnlm.datastore.documents import write_documents
    from fairseq_knnlm.experts.kneser_ney import NGramModel
    from fairseq_knnlm.experts.ngram_file import save_counts
    from fairseq_knnlm.index.build import BuildOptions, IndexBuilder
    from fairseq_knnlm.index.recipes import Recipe
    from fairseq_knnlm.index.storage import save
    from fairseq_knnlm.mixture.components import LM, Component
    from fairseq_knnlm.mixture.mixers import Fixed, Gate
    from fairseq_knnlm.runs.build_index import build_index
    from fairseq_knnlm.runs.compress import compress

    folder = HERE / "v1-landed"
    store = write(folder)
    options = BuildOptions(k=10, nprobe=4)
    build_index(store, folder / "knn.index", options, recipe="IVF4,Flat")
    write_documents(store, after_empty_lines(store.values, EOS))
    save_counts(
        NGramModel.count(store.values, VOCABULARY, 3, progress=False),
        *(folder / "ngram.npz", store.fingerprint),
    )
    knn = Component("knn", {"suffix": 0, "k": 0, "temperature": 2.0})
    gate = Gate((LM, knn), ("knn_distances",), 1, hidden=())
    with torch.no_grad():
        for number, weight in enumerate((*gate.parameters(), *gate.buffers())):
            weight.fill_((number + 1) / 4)
    mixtures = (
        FittedMixture((), Fixed((LM,), (1.0,)), 100.0, 6.5, 101.0),
        FittedMixture(("knn",), Fixed((LM, knn), (0.75, 0.25)), 90.0, 6.25, 91.0),
        FittedMixture(("knn",), gate, 95.0, 6.3, 96.0),
    )
    calibration = Calibration(
        datastores=(store.fingerprint,),
        model="a" * 64,
        fitted_on={
            "split": "valid",
            "tokens": 1000,
            "chosen_on": 100,
            "held_out": 100,
            "seed": 0,
            "context": {"tokens_per_sample": 12},
        },
        experts={"knn": {"k": 10, "index": "IVF4,Flat"}},
        base_perplexity=100.0,
        mixtures=mixtures,
        default=1,
        versions={"python": "3"},
        names=("v1-landed",),
    )
    write_calibration(folder / "calibration.json", calibration)
    table = ScoreTableWriter(HERE / "table-v2.npz")
    table.write(
        {
            "row": np.arange(3),
            "token": np.array([4, 5, 2], np.int32),
            "context": np.array([-1, 4, 5], np.int32),
            "lm": -np.arange(1, 4, dtype=np.float32),
            "knn": -np.arange(2, 8, dtype=np.float32).reshape(3, 2),
        }
    )
    settings = [{"suffix": 0, "k": 0, "temperature": t} for t in (1.0, 2.0)]
    table.publish(
        {
            "split": "valid",
            "model": "a" * 64,
            "k": 10,
            "features": [],
            "experts": {"knn": settings},
            "described": {"knn": {"k": 10}},
            "datastores": [store.fingerprint],
        }
    )
    builder = IndexBuilder(Recipe("IVF4,SQfp16", 4, ROWS), WIDTH, ROWS, options)
    builder.train(keys(), np.arange(ROWS))
    builder.see(keys(), np.arange(ROWS))
    builder.add(keys(), np.arange(ROWS))
    index, card = builder.finish()
    write(HERE / "v2-landed", None, lambda to, seal: save(index, card, to / "knn.index", seal))
    compress(store, HERE / "v3-landed", pca=4, merge=20)
    build_index(open_datastore(HERE / "v3-landed"), HERE / "v3-landed/knn.index", options)
    _list(HERE / "v3-landed")


def blocked() -> None:
    """c391db1: datastore 4: two blocks and one added later, rows of all three forgotten."""
    from fairseq_knnlm.datastore import open_datastore
    from fairseq_knnlm.index.build import BuildOptions
    from fairseq_knnlm.runs.append import plan_onto
    from fairseq_knnlm.runs.build_index import build_index
    from fairseq_knnlm.runs.changing import forget_parts
    from fairseq_knnlm.runs.options import SavingOptions

    folder = HERE / "v4-blocks"
    _save_blocks(folder, range(64), [0, 40, 64])
    store = open_datastore(folder)
    build_index(store, folder / "knn.index", BuildOptions(k=10, nprobe=4), recipe="IVF4,Flat")
    _save_blocks(folder, range(64, ROWS), [0, 32], lambda plan: plan_onto(*plan, SavingOptions()))
    forget_parts(folder, [], [(10, 20), (38, 42), (60, 70)])


def _save_blocks(folder: Path, text: range, starts: Any, onto: Any = lambda plan: plan[1]) -> None:
    """These rows as a text, in blocks that begin at ``starts``, with its documents."""
    from functools import partial

    from fairseq_knnlm.datastore.boundaries import after_empty_lines
    from fairseq_knnlm.datastore.making import Making, Plan
    from fairseq_knnlm.runs.save_blocks import join

    plan = Plan(width=WIDTH, key_dtype="float16", origin=origin(), starts=starts)
    making = Making(folder, onto((folder, plan)))
    for block in making.plan.blocks:
        rows = making.plan.rows(block)
        chosen = np.array(text)[rows.start : rows.stop]
        writer = making.writer(block)
        writer.write(np.arange(len(rows)), keys()[chosen], values()[chosen])
        writer.publish()
    join(making, partial(after_empty_lines, eos=EOS))


def listings() -> None:
    """Files of urvashik/knnlm, as its code writes them, and what all datastores were made of."""
    keys().tofile(HERE / "published_keys.npy")
    values().tofile(HERE / "published_vals.npy")
    np.savetxt(HERE / "entries.txt", np.c_[values(), keys()], "%.9g", header="value, key")


def _list(folder: Path) -> None:
    """What the arrays of a datastore hold, by NumPy alone."""
    arrays = {file.stem: np.load(file) for file in sorted(folder.glob("*.npy"))}
    with folder.with_suffix(".txt").open("w") as file:
        for name, array in arrays.items():
            file.write(f"# {name} {array.dtype} {array.shape}\n")
            np.savetxt(file, np.atleast_2d(array), "%.9g")


def _remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


if __name__ == "__main__":
    globals()[sys.argv[1]]()
