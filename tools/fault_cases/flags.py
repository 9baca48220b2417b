"""Flags that cannot be meant: alone, together, or with what they name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fault_cases.stage import Case, Stage
from fault_cases.typed import HUGE, Command, Table, flag_cases, typed
from fault_cases.world import BLOCKS, INDEX, K, knnlm

MUST = "refused with a message that names the flag"

#: With ``--knnlm`` and a datastore: flags, and what the message must hold.
KNN: Table = {
    "k 0": ("--k 0", "--k"),
    "k -5": ("--k=-5", "--k"),
    "k above the entries": ("--k 10000000", "--k"),
    "k of 30 digits": (f"--k {HUGE}", "--k"),
    "k a word": ("--k many", "--k"),
    "lambda 1.5": ("--lmbda 1.5", "--lmbda"),
    "lambda -0.1": ("--lmbda=-0.1", "--lmbda"),
    "lambda nan": ("--lmbda nan", "--lmbda"),
    "lambda inf": ("--lmbda inf", "--lmbda"),
    "temperature 0": ("--knn-temp 0", "--knn-temp"),
    "temperature -1": ("--knn-temp=-1", "--knn-temp"),
    "temperature nan": ("--knn-temp nan", "--knn-temp"),
    "temperature inf": ("--knn-temp inf", "--knn-temp"),
    "temperature 1e-300": ("--knn-temp 1e-300", "--knn-temp"),
    "temperature 1e300": ("--knn-temp 1e300", "--knn-temp"),
    "probe -3": ("--probe=-3", "--probe"),
    "probe 0": ("--probe 0", "--probe"),
    "probe 9 of 8 lists": ("--probe 9", "--probe"),
    "probe of 30 digits": (f"--probe {HUGE}", "--probe"),
    "device gpu": ("--knn-device gpu", "--knn-device"),
    "device cuda:7": ("--knn-device cuda:7", "--knn-device"),
    "device cuda:-1": ("--knn-device cuda:-1", "--knn-device"),
    "device cuda:x": ("--knn-device cuda:x", "--knn-device"),
    "device empty": ("--knn-device=", "--knn-device"),
    "another metric": ("--faiss-metric-type ip", "--faiss-metric-type"),
    "metric nobody knows": ("--faiss-metric-type cosine", "metric"),
    "another key type": ("--knn-keytype decoder_output", "--knn-keytype|key type"),
    "keys left out but needed": ("--no-load-keys --knn-sim-func dot", "--no-load-keys"),
    "keys left out, and pointers": ("--no-load-keys --pointers join", "--no-load-keys|--pointers"),
    "pointer-min without replace": ("--pointer-min 3", "--pointer-min"),
    "pointer-min 0": ("--pointers replace --pointer-min 0", "--pointer-min"),
    "pointer-min of 30 digits": (f"--pointers replace --pointer-min {HUGE}", "--pointer-min"),
    "size 0": ("--dstore-size 0", "--dstore-size"),
    "size -5": ("--dstore-size=-5", "--dstore-size"),
    "another size": ("--dstore-size 3", "--dstore-size"),
    "float32 while evaluating": ("--dstore-fp32", "--dstore-fp32"),
    "a folder to save while evaluating": ("--dstore-mmap x", "--dstore-mmap"),
    "saving and evaluating": ("--save-knnlm-dstore --dstore-mmap x", "save first|--save"),
    "no-save-keys while evaluating": ("--no-save-keys", "--no-save-keys"),
    "recipe while evaluating": ("--recipe Flat", "--recipe"),
    "bytes a key while evaluating": ("--max-bytes-per-key 9", "--max-bytes-per-key|--recipe"),
    "documents while evaluating": ("--document-boundary w", "--document-boundary"),
    "expert nobody knows": ("--experts knn,oracle", "--experts"),
    "expert twice": ("--experts knn,knn", "--experts"),
    "expert without a name": ("--experts knn,", "--experts"),
    "experts a comma": ("--experts ,", "--experts"),
    "lm2 without a model": ("--experts knn,lm2", "--expert-lm"),
    "weight of lm2 without lm2": ("--expert-lm-lmbda 0.1", "lm2"),
    "lm2 that is not there": ("--experts knn,lm2 --expert-lm x.pt", "x.pt"),
    "weights above 1 in all": (
        "--experts knn,cache --lmbda 0.6 --cache-lmbda 0.5",
        "weights|lmbda",
    ),
    "cache weight 2": ("--experts knn,cache --cache-lmbda 2", "--cache-lmbda"),
    "n-gram weight -1": ("--experts knn,ngram --ngram-lmbda=-1", "--ngram-lmbda"),
    "weight of an absent expert": ("--ngram-lmbda 0.1", "ngram"),
    "theta of an absent cache": ("--cache-theta 0.1", "cache"),
    "window of an absent cache": ("--cache-window 100", "cache"),
    "window 0": ("--experts knn,cache --cache-window 0", "--cache-window"),
    "window -5": ("--experts knn,cache --cache-window=-5", "--cache-window"),
    "window 10^12": ("--experts knn,cache --cache-window 1000000000000", "--cache-window"),
    "window of 30 digits": (f"--experts knn,cache --cache-window {HUGE}", "--cache-window"),
    "theta -1": ("--experts knn,cache --cache-theta=-1", "--cache-theta"),
    "theta nan": ("--experts knn,cache --cache-theta nan", "--cache-theta"),
    "theta inf": ("--experts knn,cache --cache-theta inf", "--cache-theta"),
    "theta 1e300": ("--experts knn,cache --cache-theta 1e300", "--cache-theta"),
    "mixer nobody knows": ("--mixer oracle", "mixer"),
    "mixer and weights": ("--mixer bins --lmbda 0.1", "--lmbda|--mixer"),
    "skip-searches 2": ("--skip-searches 2", "--skip-searches"),
    "skip-searches -1": ("--skip-searches=-1", "--skip-searches"),
    "skip-searches nan": ("--skip-searches nan", "--skip-searches"),
    "skip-searches and a table": ("--skip-searches 0.5 --score-table t.npz", "--skip-searches"),
    "features without a table": ("--lm-features", "--lm-features"),
    "index that is not there": ("--indexfile nowhere.index", "nowhere.index"),
    "index a folder": ("--indexfile .", "index"),
    "index empty": ("--indexfile=", "--indexfile|index"),
    "no block left": ("--tokens-per-sample 8", "--tokens-per-sample"),
    "blocks below 0": ("--tokens-per-sample 4", "--tokens-per-sample"),
    "blocks of 30 digits": (f"--tokens-per-sample {HUGE}", "--tokens-per-sample"),
    "context -8": ("--context-window=-8", "--context-window"),
    "more shares than batches": ("--num-shards 1000000", "--num-shards"),
    "shards 0": ("--num-shards 0 --context-window 0", "--num-shards"),
    "shard 5 of 2": ("--num-shards 2 --shard-id 5 --context-window 0", "--shard-id"),
    "shard -1": ("--num-shards 2 --shard-id=-1 --context-window 0", "--shard-id"),
    "shard 1 of 1": ("--shard-id 1 --context-window 0", "--shard-id"),
    "max-tokens 1": ("--max-tokens 1", "--max-tokens"),
    "max-tokens 0": ("--max-tokens 0", "--max-tokens"),
    "max-tokens -5": ("--max-tokens=-5", "--max-tokens"),
    "batch size 0": ("--batch-size 0", "--batch-size"),
    "batch size -1": ("--batch-size=-1", "--batch-size"),
}
#: Without a datastore.
BASE: Table = {
    "knnlm without a datastore": ("--knnlm", "--dstore-filename"),
    "save without a folder": ("--save-knnlm-dstore", "--dstore-mmap"),
    "folder without save": ("--dstore-mmap x", "--save-knnlm-dstore"),
    "datastore without knnlm": ("--dstore-filename x", "--knnlm"),
    "n-grams without a datastore": ("--experts ngram", "--dstore-filename"),
    "lambda without knnlm": ("--lmbda 0.3", "--lmbda"),
    "k without knnlm": ("--k 8", "--k"),
    "temperature without knnlm": ("--knn-temp 3", "--knn-temp"),
    "probe without knnlm": ("--probe 3", "--probe"),
    "index without knnlm": ("--indexfile x", "--indexfile"),
    "cache window without cache": ("--cache-window 3", "cache"),
    "skip-searches without knnlm": ("--skip-searches 0.5", "--skip-searches"),
    "pointers without knnlm": ("--pointers join", "--pointers"),
    "mixer without experts": ("--mixer gate", "--mixer"),
    "cache in more shares than batches": ("--experts cache --num-shards 1000000", "--num-shards"),
    "context -8": ("--context-window=-8", "--context-window"),
    "shard 5 of 2": ("--num-shards 2 --shard-id 5 --context-window 0", "--shard-id"),
    "max-tokens 1": ("--max-tokens 1", "--max-tokens"),
    "save and float16 and float32": (
        "--save-knnlm-dstore --dstore-mmap x --dstore-fp16 --dstore-fp32",
        "--dstore-fp16",
    ),
    "save in shards": (
        "--save-knnlm-dstore --dstore-mmap x --num-shards 2 --context-window 0",
        "shard",
    ),
    "save with k": ("--save-knnlm-dstore --dstore-mmap x --k 8", "--k"),
    "documents at no expression": (
        "--save-knnlm-dstore --dstore-mmap x --document-boundary (",
        "--document-boundary",
    ),
    "documents at an empty expression": (
        "--save-knnlm-dstore --dstore-mmap x --document-boundary=",
        "--document-boundary",
    ),
    "no-save-keys with Flat": (
        "--save-knnlm-dstore --dstore-mmap x --no-save-keys --recipe Flat",
        "recipe|streamed",
    ),
    "no-save-keys with nonsense": (
        "--save-knnlm-dstore --dstore-mmap x --no-save-keys --recipe Nonsense",
        "Nonsense",
    ),
    "no-save-keys, 0 bytes a key": (
        "--save-knnlm-dstore --dstore-mmap x --no-save-keys --max-bytes-per-key 0",
        "--max-bytes-per-key",
    ),
    "no-save-keys, probe -3": (
        "--save-knnlm-dstore --dstore-mmap x --no-save-keys --recipe IVF8,SQ8 --probe=-3",
        "--probe",
    ),
    "no-save-keys, probe of 30 digits": (
        f"--save-knnlm-dstore --dstore-mmap x --no-save-keys --recipe IVF8,SQ8 --probe {HUGE}",
        "--probe",
    ),
}
#: Flags that do nothing in a run, and what the line that says so must hold.
IDLE: dict[str, tuple[str, str, str]] = {
    "float16 for our datastore": ("knnlm", "--dstore-fp16", "--dstore-fp16 does nothing"),
    "size of our datastore": ("knnlm", "--dstore-size ROWS", "--dstore-size does nothing"),
    "a model without lm2": ("knnlm", "--expert-lm CKPT", "--expert-lm does nothing"),
    "bf16 on a CPU": ("knnlm", "--bf16", "--bf16 does nothing"),
    "fp16 on a CPU": ("knnlm", "--fp16", "--fp16 gains nothing on a CPU"),
    "reset of an absent cache": ("knnlm", "--cache-reset", "--cache-reset does nothing"),
    "save with a size": ("save", "--dstore-size 8", "--dstore-size does nothing"),
    "build-index, float16": ("build-index", "--dstore-fp16", "--dstore-fp16 does nothing"),
}
#: Recipes that FAISS does not know, or that crash it, or eat the memory.
RECIPES = {
    "nonsense": "Nonsense",
    "PCA0,IVF4,Flat": "PCA0,IVF4,Flat",
    "HNSW0": "HNSW0",
    "2,000 letters A": "A" * 2000,
    "100,000 letters A": "A" * 100_000,
    "PQ8x0": "PQ8x0",
    "IMI2x20": "IMI2x20,Flat",
    "IVF0,Flat": "IVF0,Flat",
    "IVF-1,Flat": "IVF-1,Flat",
    "IVF1000000,Flat": "IVF1000000,Flat",
    "IVF99999999999,Flat": "IVF99999999999,Flat",
    "PQ7": "PQ7",
    "PQ0": "PQ0",
    "PQ8x99": "PQ8x99",
    "PCA99999,Flat": "PCA99999,Flat",
    "OPQ0,IVF4,PQ4": "OPQ0,IVF4,PQ4",
    "HNSW99999999": "HNSW99999999",
    "brackets": "(" * 500,
    "IVF4,": "IVF4,",
    "a comma": ",",
    "an empty one": "",
    "a binary index": "BFlat",
    "IDMap": "IDMap,Flat",
    "a zero byte": "Flat\x01",
    "paper": "paper",
    "LSH": "LSH0",
    "Residual0": "RQ0x0",
    "ITQ": "ITQ9999,LSH",
    "Refine of nothing": "Refine(",
}
BUILD: Table = {
    "probe -3": ("--probe=-3", "--probe"),
    "probe 0": ("--probe 0", "--probe"),
    "probe of 30 digits": (f"--probe {HUGE}", "--probe"),
    "recall 0": ("--recall 0", "--recall"),
    "recall 1.5": ("--recall 1.5", "--recall"),
    "recall nan": ("--recall nan", "--recall"),
    "recall-queries -1": ("--recall-queries=-1", "--recall-queries"),
    "recall-queries a billion": ("--recall-queries 1000000000", "--recall-queries"),
    "recall-queries of 30 digits": (f"--recall-queries {HUGE}", "--recall-queries"),
    "seed -1": ("--seed=-1", "--seed"),
    "seed of 30 digits": (f"--seed {HUGE}", "--seed"),
    "train-rows 0": ("--train-rows 0", "--train-rows"),
    "train-rows -5": ("--train-rows=-5", "--train-rows"),
    "train-rows 1": ("--train-rows 1 --recall-queries 0", "train"),
    "train-rows of 30 digits": (f"--train-rows {HUGE}", "--train-rows"),
    "bytes a key 0": ("--recipe auto --max-bytes-per-key 0", "--max-bytes-per-key"),
    "bytes a key -5": ("--recipe auto --max-bytes-per-key=-5", "--max-bytes-per-key"),
    "bytes a key of 30 digits": (
        f"--recipe auto --max-bytes-per-key {HUGE}",
        "--max-bytes-per-key",
    ),
    "device gpu": ("--knn-device gpu", "--knn-device"),
    "metric cosine": ("--metric cosine", "--metric"),
    "size 0": ("--dstore-size 0", "--dstore-size"),
    "size 3": ("--dstore-size 3", "--dstore-size"),
    "flag nobody knows": ("--colour red", "--colour"),
}
COMPRESS: Table = {
    "nothing to do": ("", "--pca"),
    "pca 0": ("--pca 0", "--pca"),
    "pca -1": ("--pca=-1", "--pca"),
    "pca 17 of 16": ("--pca 17", "--pca"),
    "pca of 30 digits": (f"--pca {HUGE}", "--pca"),
    "merge 0": ("--merge 0", "--merge"),
    "merge -1": ("--merge=-1", "--merge"),
    "merge beyond the entries": ("--merge 10000000", "--merge"),
    "merge of 30 digits": (f"--merge {HUGE}", "--merge"),
    "seed -1": ("--pca 8 --seed=-1", "--seed"),
    "seed of 30 digits": (f"--pca 8 --seed {HUGE}", "--seed"),
    "index without merge": ("--pca 8 --indexfile x.index", "--indexfile"),
    "index that is not there": ("--merge 4 --indexfile x.index", "x.index"),
    "size 0": ("--pca 8 --dstore-size 0", "--dstore-size"),
}
TUNE: Table = {
    "no table": ("", "--score-table"),
    "table that is not there": ("--score-table x.npz", "x.npz"),
    "table a folder": ("--score-table .", "score-table|table"),
    "seed -1": ("--score-table KNN --seed=-1", "--seed"),
    "seed of 30 digits": (f"--score-table KNN --seed {HUGE}", "--seed"),
    "data without path": ("--data DATA", "--path"),
    "path without data": ("--score-table KNN --path x.pt", "--path|--data"),
    "data that is not there": ("--data nowhere --path CKPT BLOCKS", "nowhere"),
    "split that is not there": ("--data DATA --path CKPT --gen-subset x BLOCKS", "x|--gen-subset"),
    "experts nobody knows": ("--data DATA --path CKPT --experts oracle BLOCKS", "--experts"),
    "flag nobody knows": ("--score-table KNN --colour red", "--colour"),
}


def cases() -> Iterator[Case]:
    """Evaluation, building, compressing, tuning; then datastores' names."""
    commands: tuple[Command, ...] = (
        ("knnlm", KNN, lambda stage: stage.world.knn(stage.store())),
        ("base", BASE, lambda stage: stage.world.evaluate()),
        ("build-index", BUILD, lambda s: knnlm("build-index", "--dstore", s.bare(), *INDEX)),
        ("compress", COMPRESS, lambda s: knnlm("compress", "--dstore", s.store(), "--out", "new")),
        ("tune", TUNE, lambda s: knnlm("tune", "--dstore", s.store())),
    )
    yield from flag_cases("flags", MUST, commands, _known)
    for name, (command, flags, says) in IDLE.items():
        play = partial(_idle, command=command, flags=flags, says=says)
        must = "works, and one line says that the flag does nothing"
        yield Case("flags", f"idle: {name}", f"{command} with {flags}", must, play)
    for name, recipe in RECIPES.items():
        play = partial(_recipe, recipe=recipe)
        done = f"build-index --recipe {recipe[:20]!r}"
        must = "refused with a message on the recipe; FAISS does not take us with it"
        yield Case("flags", f"recipe: {name}", done, must, play)
        play = partial(_recipe_streamed, recipe=recipe)
        done = f"--no-save-keys --recipe {recipe[:20]!r}"
        yield Case("flags", f"streamed recipe: {name}", done, must, play)
    for name, (paths, says) in NAMES.items():
        play = partial(_named, paths=paths, says=says)
        yield Case("flags", f"datastores: {name}", f"--dstore-filename {paths}", MUST, play)
    for name in ("info", "verify", "build-index", "tune", "report"):
        yield Case(
            "flags",
            f"{name}: datastore that is not there",
            f"{name} --dstore nowhere",
            MUST,
            partial(_nowhere, command=name),
        )
    yield Case("flags", "help", "--help of each command", "an example each", _help)


def _known(stage: Stage) -> dict[str, object]:
    return {
        "KNN": stage.world.tables / "knn.npz",
        "DATA": stage.world.data,
        "CKPT": stage.world.checkpoint(),
        "ROWS": stage.world.rows,
        "BLOCKS": [*BLOCKS, *K],
    }


def _idle(stage: Stage, *, command: str, flags: str, says: str) -> str:
    store = stage.store()
    words = {
        "knnlm": lambda: stage.world.knn(store),
        "save": lambda: stage.world.save("new"),
        "build-index": lambda: knnlm("build-index", "--dstore", store, *INDEX),
    }[command]()
    loss = stage.world.losses["knn"] if command == "knnlm" and "fp16 " not in f"{flags} " else None
    changes = ["new/*", "store/knn.index"]
    stage.works([*words, *typed(flags, _known(stage))], loss=loss, says=says, changes=changes)
    return f"works, and says: {says}"


def _recipe(stage: Stage, *, recipe: str) -> str:
    words = knnlm("build-index", "--dstore", stage.bare(), f"--recipe={recipe}")
    return stage.refused(words, "recipe|factory|index", patience=20)


def _recipe_streamed(stage: Stage, *, recipe: str) -> str:
    words = stage.world.save("new", "--no-save-keys", f"--recipe={recipe}")
    return stage.refused(words, "recipe|factory|index|streamed", patience=20)


NAMES: Table = {
    "twice the same": ("STORE:STORE", "twice|same"),
    "twice, written otherwise": ("STORE:STORE/../store", "twice|same"),
    "an empty name at the end": ("STORE:", "--dstore-filename|empty|colon"),
    "an empty name at the start": (":STORE", "--dstore-filename|empty|colon"),
    "a colon": (":", "--dstore-filename|empty|colon"),
    "an empty name": ("", "--dstore-filename"),
    "a path with a colon": ("with:colon", "separate|colon|between|:"),
    "one that is not there": ("STORE:nowhere", "nowhere"),
    "a file": ("STORE/keys.npy", "no datastore|folder"),
    "a folder without one": (".", "no datastore"),
    "below a file": ("STORE/keys.npy/x", "no datastore|file"),
    "300 letters": ("x" * 300, "no datastore|name"),
    "/dev/null": ("/dev/null", "no datastore"),
}


def _named(stage: Stage, *, paths: str, says: str) -> str:
    store = stage.store()
    if paths == "with:colon":
        store.rename(stage.folder / paths)
    words = stage.world.knn(paths.replace("STORE", str(store)))
    return stage.refused(words, says)


def _nowhere(stage: Stage, *, command: str) -> str:
    words = knnlm(command, "--dstore", Path("nowhere"))
    if command in ("tune", "report"):
        words += ["--score-table", stage.world.tables / "knn.npz"]
    return stage.refused(words, "nowhere")


def _help(stage: Stage) -> str:
    names = ("save", "build-index", "tune", "report", "info", "verify", "compress", "import")
    for name in names:
        stage.works(knnlm(name, "--help"), says="example: ")
    return f"{len(names)} commands show one"
