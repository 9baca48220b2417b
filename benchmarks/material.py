"""What the benchmark works on: text, language model, datastore, index, queries.

Everything lies under one folder and is made once. A file or folder gets its name when it is
complete, and the name carries what it depends on.
"""

import hashlib
import itertools
import json
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import Demo, make_room
from shell import Shell
from torch import Tensor

from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.files import publish
from fairseq_knnlm.index.build import RECALL, BuildOptions, build, plan
from fairseq_knnlm.index.card import IndexCard
from fairseq_knnlm.index.recipes import choose
from fairseq_knnlm.index.search import SearchIndex
from fairseq_knnlm.index.storage import load as load_index
from fairseq_knnlm.index.storage import save as save_index

WIKITEXT2 = "WikiText-2"
ROOT = Path(__file__).resolve().parent.parent
PLUGIN: list[object] = ["--user-dir", ROOT / "fairseq_knnlm", "--task", "knn_lm"]
#: Blocks of 64 tokens, each after 192 of context.
READING = """
    --max-tokens 2048 --tokens-per-sample 256 --context-window 192 --sample-break-mode none --cpu
""".split()
#: Keys that an index is examined with, where the build does not say otherwise.
EXAMINED = BuildOptions().queries
#: The index's own distances.
FROM_INDEX = "do_not_recomp_l2"
#: Of the speed of the LM alone, what a lean mixture keeps at least.
SPEED = 0.45
#: Entries of a datastore's block: of all there are, since the published search maps one file.
ONE_BLOCK = 2**31 - 1
#: Sampled tokens that follow one another, as those of a batch do.
STRETCH = 256


@dataclass(frozen=True)
class Source:
    """Text and a language model of it.

    Attributes:
        name: in words.
        text: folder of the splits.
        suffix: of their files, ``train`` + suffix and so on.
        checkpoint: the language model.
        dictionary: fairseq's, where it is not that of the train split.
        calibrated: a datastore of it with a calibration, where there is one.
    """

    name: str
    text: Path
    suffix: str
    checkpoint: Path
    dictionary: Path | None = None
    calibrated: Path | None = None

    def file(self, split: str) -> Path:
        return self.text / f"{split}{self.suffix}"


def find_source(shared: Path, demo: Path) -> Source:
    """WikiText-2 where it is at hand, else the demo's docstrings; makes what these lack."""
    source = Source(WIKITEXT2, shared / "data/wikitext-2", ".tokens", shared / "ckpt/wt2-small.pt")
    if source.checkpoint.is_file() and source.file("train").is_file():
        return source
    checkpoint, pieces = demo / "lm/checkpoint_best.pt", demo / "pieces"
    if not checkpoint.is_file():
        make_room(demo)
        steps = Demo(demo, updates=1600)
        steps.prepare()
        steps.train()
    store = demo / "datastores/docstrings"
    return Source(
        "docstrings (demo)",
        pieces / "docstrings",
        ".txt",
        checkpoint,
        pieces / "dict.txt",
        store if (store / "calibration.json").is_file() else None,
    )


@dataclass(frozen=True)
class Choice:
    """What decides which material is made.

    Attributes:
        k: neighbours a token.
        queries: sampled tokens of valid, and as many of test.
        seed: of the samples.
        lines: of the test split whose evaluation is timed; 0 for all.
        first: lines of every split that are used at all; 0 for all.
    """

    k: int
    queries: int
    seed: int
    lines: int
    first: int


@dataclass(frozen=True)
class Asked:
    """Sampled tokens of a split.

    Attributes:
        keys: (Q, D) float32, the queries.
        tokens: (Q,) int64, what is asked for.
        lm: (Q,) float32, log p_LM of it.
    """

    keys: Tensor
    tokens: Tensor
    lm: np.ndarray


class Material:
    """Makes what is not there yet.

    Args:
        source: text and language model.
        choice: what decides what is made.
        work: folder of everything.
        shell: runs the commands.
    """

    def __init__(self, source: Source, choice: Choice, work: Path, shell: Shell) -> None:
        self.source = source
        self.choice = choice
        self.shell = shell
        digest = hashlib.sha256(source.checkpoint.read_bytes())
        for split in ("train", "valid", "test"):
            digest.update(source.file(split).read_bytes())
        digest.update(str(choice.first).encode())
        self.folder = work / digest.hexdigest()[:12]
        self.folder.mkdir(parents=True, exist_ok=True)

    def describe(self) -> dict[str, Any]:
        """The setting, for ``results.json``."""
        return {
            "data": self.source.name,
            "model": self.source.checkpoint.name,
            "split": "test, fitted on valid",
            "reading": " ".join(map(str, READING)),
            "datastore_entries": len(self.store),
            # Entries say for themselves what part of test they are of.
            **{name: part for name, part in asdict(self.choice).items() if name != "lines"},
        }

    # -- text ---------------------------------------------------------------------------

    def data(self, split: str, lines: int = 0) -> Path:
        """A folder for fairseq with a split, or its first lines alone."""
        lines = min(filter(None, (lines, self.choice.first)), default=0)
        if not lines:
            return self._whole
        text = self.folder / f"{split}-{lines}.txt"
        with self.source.file(split).open(encoding="utf-8") as file, publish(text) as temporary:
            temporary.write_text("".join(itertools.islice(file, lines)), encoding="utf-8")
        dictionary = ["--srcdict", self._whole / "dict.txt"]
        return self._binarised(f"{split}-{lines}", [*dictionary, f"--{split}pref", text])

    @cached_property
    def _whole(self) -> Path:
        splits = ("train", "valid", "test")
        prefixes = [part for s in splits for part in (f"--{s}pref", self.source.file(s))]
        dictionary = ["--srcdict", self.source.dictionary] if self.source.dictionary else []
        return self._binarised("data", [*dictionary, *prefixes])

    def _binarised(self, name: str, options: list[Any]) -> Path:
        folder, partial = self.folder / name, self.folder / f".{name}.partial"
        if not folder.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            command = ["fairseq-preprocess", "--only-source", *options]
            self.shell.prepare(f"binarise-{name}", [*command, "--destdir", partial])
            partial.rename(folder)
        return folder

    # -- what the language model makes of it --------------------------------------------

    def evaluation(self, split: str, *options: object, lines: int = 0) -> list[object]:
        """The command that evaluates a split, or its first lines, with the plugin."""
        return [*self.stock(split, lines), *PLUGIN, *options]

    def stock(self, split: str, lines: int = 0) -> list[object]:
        """The same without the plugin."""
        path = ["--path", self.source.checkpoint, "--gen-subset", split]
        return ["fairseq-eval-lm", self.data(split, lines), *path, *READING]

    def saved(self, name: str, split: str, *options: object) -> Path:
        """A datastore of a split."""
        path = self.folder / name
        if not path.is_dir():
            save = ["--save-knnlm-dstore", "--dstore-mmap", path, "--block-rows", ONE_BLOCK]
            save += options
            self.shell.prepare(f"save-{name}", self.evaluation(split, *save))
        return path

    @cached_property
    def store(self) -> Datastore:
        """The datastore of the train split."""
        return open_datastore(self.saved("store", "train"))

    def streamed(self) -> Path:
        """The same without keys: they went into an index at once."""
        return self.saved(f"streamed-{self._recipe('auto').factory}", "train", "--no-save-keys")

    def asked(self, split: str) -> Asked:
        """Sampled tokens of a split, in stretches."""
        table = self.folder / f"{split}.npz"
        # The keys in full: an evaluation asks with what the language model has just computed.
        path = self.saved(split, split, "--dstore-fp32", "--score-table", table)
        queries = open_datastore(path)
        assert queries.keys is not None
        rows = sampled(len(queries), self.choice.queries, self.choice.seed)
        return Asked(
            keys=torch.from_numpy(queries.keys[rows]),
            tokens=torch.from_numpy(queries.values[rows].astype(np.int64)),
            lm=read_table(table)["lm"][rows],
        )

    # -- the mixture of all experts -----------------------------------------------------

    def neighbours(self, path: Path | None = None) -> list[object]:
        """Flags: neighbours in the automatic index, by its own distances; or in such a folder."""
        store = ["--knnlm", "--dstore-filename", path or self.store.path, "--k", self.choice.k]
        index = ["--indexfile", self.index_file("auto", EXAMINED)]
        return [*store, *index, "--knn-sim-func", FROM_INDEX]

    def every_expert(self) -> list[object]:
        """Flags: those that ``tune`` asks unless told otherwise."""
        return [*self.neighbours(), "--experts", "knn,cache,ngram,suffix"]

    def table_flags(self, table: Path) -> list[object]:
        """Flags: every column that a mixture can be fitted over."""
        return [*self.every_expert(), "--mixer", "none", "--score-table", table]

    @property
    def _table(self) -> Path:
        return self.folder / "mixed-valid.npz"

    def calibrated(self) -> None:
        """Fits the mixture on valid, and leaves it in the datastore."""
        if not self._table.is_file():
            flags = [*self.table_flags(self._table), "--table-costs"]
            self.shell.prepare("table-valid", self.evaluation("valid", *flags))
        if not (self.store.path / "calibration.json").is_file():
            self.tune()

    def tune(self) -> float:
        """Seconds that fitting takes, once the table is there."""
        command = ["fairseq-knnlm", "tune", "--dstore", self.store.path]
        return self.shell.seconds("tune", [*command, "--score-table", self._table])

    def lean(self) -> Path:
        """The same datastore, with the best mixture of those that have a part of the LM's speed."""
        folder, partial = self.folder / f"lean-{SPEED:g}", self.folder / ".lean.partial"
        if not folder.is_dir():
            self.calibrated()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for file in self.store.path.iterdir():
                if not file.name.startswith("calibration"):
                    (partial / file.name).symlink_to(file)
            command = ["fairseq-knnlm", "tune", "--dstore", partial, "--speed", SPEED]
            self.shell.prepare("tune-lean", [*command, "--score-table", self._table])
            partial.rename(folder)
        return folder

    # -- indexes ------------------------------------------------------------------------

    def _recipe(self, name: str) -> Any:
        return choose(name, len(self.store), self.store.manifest.width)

    def _options(self, queries: int, recall: float) -> BuildOptions:
        return BuildOptions(queries=queries, k=self.choice.k, recall=recall)

    def build(self, name: str, queries: int, recall: float = RECALL) -> tuple[Any, IndexCard]:
        """Builds an index of the datastore.

        Args:
            name: ``auto``, ``paper`` or a factory string.
            queries: keys to examine it with; nprobe is then as many lists as it needs.
            recall: share of the true neighbours that these lists should hold.
        """
        keys = self.store.full_keys()
        return build(keys, self._recipe(name), self._options(queries, recall))

    def index_file(self, name: str, queries: int, recall: float = RECALL) -> Path:
        """The file of such an index. Its name changes with anything that the index depends on."""
        decided = plan(self._recipe(name), self._options(queries, recall), self.store.fingerprint)
        digest = hashlib.sha256(json.dumps(decided).encode()).hexdigest()[:8]
        path = self.folder / f"{name}-{digest}.index"
        if not path.is_file():
            save_index(*self.build(name, queries, recall), path, self.store.fingerprint)
        return path

    def index(self, name: str, queries: int, recall: float = RECALL) -> SearchIndex:
        """Such an index, ready to search."""
        return load(self.index_file(name, queries, recall), self.store, self.choice.k)


def load(path: Path, store: Datastore, k: int) -> SearchIndex:
    """An index of a datastore."""
    rows, width = len(store), store.manifest.width
    return load_index(path, datastore=store.fingerprint, rows=rows, width=width, k=k)


def sampled(rows: int, wanted: int, seed: int) -> np.ndarray:
    """Rows in stretches that follow one another, in order, (wanted,) or fewer, int64."""
    length = min(STRETCH, wanted, rows)
    places = np.arange(rows // length)
    drawn = np.random.default_rng(seed).choice(
        places, min(len(places), wanted // length), replace=False
    )
    return (np.sort(drawn)[:, None] * length + np.arange(length)).ravel()
