"""The tiny world that faults are planted in: text, language models, a datastore and all that
belongs to one, made by the commands that people type."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiny_world
from tiny_world import PLUGIN, TINY, preprocessing, training, write_corpus

from fault_cases.stage import Ran, Stage

#: As they are evaluated here.
BLOCKS = (
    *(*tiny_world.BLOCKS, "--max-tokens", "512"),
    *("--sample-break-mode", "none", "--cpu", "--num-workers", "0"),
)
K = ("--k", "64")
#: A mixture that flags say in full.
MIX = (*K, "--lmbda", "0.3", "--knn-temp", "2")
#: Lists, of which a search visits few: an index that is opened unchecked gives another loss.
INDEX = ("--recipe", "IVF8,Flat", "--probe", "2")
MODELS = {
    "model": ("--arch", "transformer_lm", *TINY, "--max-update", "60"),
    "other": ("--arch", "transformer_lm", *TINY, "--max-update", "3"),
    "light": (
        *("--arch", "lightconv_lm", *TINY, "--max-update", "3"),
        *("--decoder-kernel-size-list", "[3,3]", "--criterion", "cross_entropy"),
    ),
}
#: So that there are many, in a text without empty lines.
DOCUMENTS = ("--document-boundary", "w1")
#: Four blocks, about.
CUT = ("--block-rows", "900")
#: Of the evaluation that is shared out.
SHARES = 2
STOCK_TASK = ("--task", "language_modeling")
#: The hub interface takes the task from the checkpoint.
TASKS = {"model": PLUGIN}
#: Lines of the test split.
TESTED = 12


@dataclass
class World:
    """Where things lie, and what undamaged runs give.

    Attributes:
        folder: all of it.
        losses: in bits a token on the test split: ``base``, ``knn`` (with ``MIX``), ``cut`` (the
            same in blocks), ``cache``, ``calibrated``.
        seconds: what undamaged commands take.
    """

    folder: Path
    losses: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        return self.folder / "bin"

    @property
    def store(self) -> Path:
        """The datastore of train, with index, n-grams and calibration."""
        return self.folder / "store"

    @property
    def cut(self) -> Path:
        """The same text as a datastore in blocks, with documents and an index in pieces."""
        return self.folder / "cut"

    @property
    def shares(self) -> Path:
        """What ``knn`` over the datastore in blocks wrote in shares: ``0.json``, ``0.npz``, ..."""
        return self.folder / "shares"

    @property
    def tables(self) -> Path:
        """Score tables: ``valid.npz``, ``test.npz`` and ``knn.npz``, of valid with knn alone."""
        return self.folder / "tables"

    @property
    def receipts(self) -> Path:
        """``fixed.json`` and ``fitted.json``, of ``MIX`` and of what was fitted, and what they are
        of, by relative paths: ``data``, ``lm.pt``, ``dstore``, ``raw.txt``."""
        return self.folder / "receipts"

    @property
    def old(self) -> Path:
        """The prefix of the same entries in the files of urvashik/knnlm, float16."""
        return self.folder / "old" / "old"

    @property
    def rows(self) -> int:
        return len(np.load(self.store / "values.npy", mmap_mode="r"))

    def checkpoint(self, model: str = "model") -> Path:
        return self.folder / model / "checkpoint_last.pt"

    def evaluate(
        self, *flags: object, split: str = "test", model: str | Path = "model"
    ) -> list[object]:
        """``fairseq-eval-lm`` with the plugin; what ``flags`` say wins."""
        path = model if isinstance(model, Path) else self.checkpoint(model)
        return [
            *("fairseq-eval-lm", self.data, *PLUGIN, "--path", path),
            *("--gen-subset", split, *BLOCKS, *flags),
        ]

    def knn(self, store: Path | str, *flags: object, split: str = "test") -> list[object]:
        """The same with the neighbours of a datastore, in the mixture ``MIX``."""
        return self.evaluate("--knnlm", "--dstore-filename", store, *MIX, *flags, split=split)

    def calibrated(self, store: Path | str, *flags: object, split: str = "test") -> list[object]:
        """The same in the mixture that was fitted."""
        return self.evaluate("--knnlm", "--dstore-filename", store, *K, *flags, split=split)

    def save(self, folder: Path | str, *flags: object, split: str = "train") -> list[object]:
        """Saves a datastore."""
        return self.evaluate("--save-knnlm-dstore", "--dstore-mmap", folder, *flags, split=split)

    def share(self, number: int, *flags: object, folder: Path | None = None) -> list[object]:
        """A share of ``knn`` over the datastore in blocks, which writes results and a table."""
        to = (folder or self.shares) / str(number)
        files = ("--results-json", f"{to}.json", "--score-table", f"{to}.npz")
        of = ("--num-shards", SHARES, "--shard-id", number, "--max-tokens", 64)
        return self.knn(self.cut, *of, *files, *flags)


def knnlm(*words: object) -> list[object]:
    """The command ``fairseq-knnlm``."""
    return ["fairseq-knnlm", *words]


def make_world(folder: Path) -> World:
    """Makes all of it; half a minute.

    Raises:
        RuntimeError: where a command fails, though nothing was planted.
    """
    world = World(folder)
    (folder / "stage").mkdir()
    stage = Stage(folder / "stage", world)
    _made(stage, preprocessing(write_corpus(folder, test=TESTED), world.data))
    running = [stage.start(_training(world, name)) for name in MODELS]
    for each in running:
        _succeeded(each.wait(600))
    _remember(world, stage)
    shutil.rmtree(stage.folder)
    return world


def _remember(world: World, stage: Stage) -> None:
    """Datastore, index, tables, calibration; and the losses of undamaged runs."""
    store = world.store
    world.tables.mkdir()
    world.seconds["save"] = _made(stage, world.save(store, *DOCUMENTS)).seconds
    world.seconds["build-index"] = _made(
        stage, knnlm("build-index", "--dstore", store, *INDEX)
    ).seconds
    _made(stage, world.save(world.cut, *DOCUMENTS, *CUT))
    _made(stage, knnlm("build-index", "--dstore", world.cut, *INDEX))
    small = world.tables / "knn.npz"
    none = ("--mixer", "none")
    _made(stage, world.calibrated(store, *none, "--score-table", small, split="valid"))
    tables = {split: world.tables / f"{split}.npz" for split in ("valid", "test")}
    experts = ("--experts", "knn,cache,ngram", *none)
    for split, table in tables.items():
        flags = (*experts, "--score-table", table)
        _made(stage, world.calibrated(store, *flags, split=split))
    world.seconds["tune"] = _made(
        stage, knnlm("tune", "--dstore", store, "--score-table", tables["valid"])
    ).seconds
    for name, words in {
        "base": world.evaluate(),
        "knn": world.knn(store),
        "cut": world.knn(world.cut),
        "cache": world.evaluate("--experts", "cache", "--cache-lmbda", "0.2"),
        "calibrated": world.calibrated(store),
    }.items():
        loss = _made(stage, words).loss
        assert loss is not None
        world.losses[name] = loss
    world.shares.mkdir()
    for number in range(SHARES):
        _made(stage, world.share(number))
    _make_receipts(world, stage)
    world.old.parent.mkdir()
    write_old(world.old, np.load(store / "keys.npy"), np.load(store / "values.npy"))


def _make_receipts(world: World, stage: Stage) -> None:
    """Evaluates from a folder in which all that figures come of lies."""
    shutil.copytree(world.data, stage.folder / "data")
    shutil.copytree(world.store, stage.folder / "dstore")
    shutil.copy(world.checkpoint(), stage.folder / "lm.pt")
    shutil.copy(world.folder / "test.txt", stage.folder / "raw.txt")
    lm = ("fairseq-eval-lm", "data", *PLUGIN, "--path", "lm.pt", "--gen-subset", "test", *BLOCKS)
    for name, flags in (
        ("fixed", (*MIX, "--raw-text", "raw.txt")),
        ("fitted", (*K, "--experts", "knn,cache,ngram")),
    ):
        memory = ("--knnlm", "--dstore-filename", "dstore", *flags)
        _made(stage, [*lm, *memory, "--results-json", f"{name}.json"])
    shutil.copytree(stage.folder, world.receipts)


def write_old(prefix: Path, keys: np.ndarray, values: np.ndarray) -> None:
    """Entries in the files of urvashik/knnlm, float16 and int16."""
    keys.astype(np.float16).tofile(f"{prefix}_keys.npy")
    values.astype(np.int16).tofile(f"{prefix}_vals.npy")


def _training(world: World, name: str) -> list[object]:
    flags = (*TASKS.get(name, STOCK_TASK), *MODELS[name])
    return training(world.data, world.folder / name, *flags)


def _made(stage: Stage, words: Sequence[object]) -> Ran:
    return _succeeded(stage.start(words).wait(600))


def _succeeded(ran: Ran) -> Ran:
    if ran.code:
        raise RuntimeError(f"the undamaged world cannot be made: {ran.out[-3000:]}")
    return ran
