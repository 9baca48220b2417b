"""The tiny world that commands are struck in, and what lies there before each of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny_world
from fault_cases.stage import Ran, Stage
from tiny_world import PLUGIN, TINY, preprocessing, training, write_corpus

from chaos_steps.striking import Strike, Striking

#: As text is read here.
READ = (
    *(*tiny_world.BLOCKS, "--max-tokens", "512"),
    *("--sample-break-mode", "none", "--cpu", "--num-workers", "0"),
)
#: Three blocks of the valid split, two of test.
IN_BLOCKS = ("--block-rows", 64)
#: An index that can be cut into pieces, and another one.
INDEX = ("--recipe", "IVF2,Flat", "--probe", 1)
OTHER_INDEX = ("--recipe", "IVF2,SQ8", "--probe", 2)
#: Documents begin with this word.
DOCUMENTS = ("--document-boundary", "w1")
MIX = ("--k", 8, "--lmbda", 0.3, "--knn-temp", 2)
#: Rows that are forgotten: of two blocks, and within one.
SOME_ROWS, OTHER_ROWS = "50:70", "10:20"
Words = Sequence[object]


@dataclass(frozen=True)
class World:
    """Where things lie."""

    folder: Path

    @property
    def data(self) -> Path:
        """The text."""
        return self.folder / "bin"

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.folder / "model" / "checkpoint_last.pt"

    def start(self, name: str) -> Path:
        """What lies there before a command: of ``STARTS``."""
        return self.folder / "starts" / name

    def evaluate(self, split: str, *flags: object) -> list[object]:
        """``fairseq-eval-lm``."""
        path = ("--path", self.model, "--gen-subset", split)
        return ["fairseq-eval-lm", self.data, *PLUGIN, *path, *READ, *flags]

    def save(self, *flags: object, split: str = "valid") -> list[object]:
        """Saves the datastore ``store``."""
        return self.evaluate(split, "--save-knnlm-dstore", "--dstore-mmap", "store", *flags)

    def append(self, *flags: object) -> list[object]:
        """Adds the test split to it."""
        return self.save("--append-dstore", *flags, split="test")

    def share(self, number: int, *flags: object) -> list[object]:
        """One of two processes that save it."""
        return self.save(*IN_BLOCKS, "--num-shards", 2, "--shard-id", number, *flags)


def knnlm(*words: object) -> list[object]:
    """The command ``fairseq-knnlm``."""
    return ["fairseq-knnlm", *words]


def make_world(folder: Path) -> World:
    """Makes all of it; some ten seconds.

    Raises:
        RuntimeError: where a command fails, though nothing was struck.
    """
    world = World(folder)
    (folder / "starts").mkdir(parents=True)
    files = write_corpus(folder, held_out=20, test=8)
    cut = "".join(files["train"].read_text().splitlines(keepends=True)[:60])
    files["train"].write_text(cut)
    flags = ("--task", "language_modeling", "--arch", "transformer_lm", *TINY)
    train = training(world.data, world.model.parent, *flags, "--max-update", 20)
    run_all(folder, [preprocessing(files, world.data), train])
    index = knnlm("build-index", "--dstore", "store", *INDEX)
    forget = knnlm("forget", "store", "--rows", SOME_ROWS)
    blocks = world.save(*IN_BLOCKS, *DOCUMENTS)
    results = ("--results-json", "{}.json", "--score-table", "{}.npz")
    shares = [
        world.evaluate(
            "valid",
            *("--knnlm", "--dstore-filename", "store", *MIX, "--num-shards", 2),
            *("--shard-id", n, "--max-tokens", 64),
            *(str(word).format(f"share-{n}") for word in results),
        )
        for n in (0, 1)
    ]
    table = world.evaluate(
        "test", "--knnlm", "--dstore-filename", "store", *MIX[:2], "--score-table", "table.npz"
    )
    streamed = ("--no-save-keys", *INDEX)
    for name, base, commands in (
        ("empty", None, []),
        ("flat", None, [world.save(*DOCUMENTS)]),
        ("flat, indexed", "flat", [index]),
        ("blocks", None, [blocks]),
        ("blocks, indexed", "blocks", [index]),
        ("streamed", None, [world.save(*IN_BLOCKS, *streamed)]),
        ("forgotten", "blocks, indexed", [forget]),
        ("share 0", None, [world.share(0)]),
        ("shares of results", "flat, indexed", shares),
        ("table", "blocks, indexed", [table]),
    ):
        place = world.start(name)
        if base is None:
            place.mkdir()
        else:
            shutil.copytree(world.start(base), place)
        run_all(place, commands)
    for name in ("flat", "blocks"):
        copy = shutil.copytree(world.start(name), world.start(f"{name}, no documents"))
        for file in copy.rglob("documents.npz"):
            file.unlink()
    _leave_unjoined(world)
    return world


def _leave_unjoined(world: World) -> None:
    """The blocks of a datastore whose last process was killed before it joined them."""
    place = Path(shutil.copytree(world.start("share 0"), world.start("unjoined")))
    steps = steps_of(world, "share 0", world.share(1))
    (join,) = (n for n, step in enumerate(steps, 1) if step.endswith("-> store/manifest.json"))
    stage = Stage(place, world)  # type: ignore[arg-type]
    log = world.folder / "unjoined.steps"
    striking = Striking(place, Strike("before", join), log)
    stage.start(world.share(1), before=striking.install).wait()


def steps_of(world: World, start: str, words: Words) -> list[str]:
    """The write steps of a command that nothing happens to, each as ``kind name``."""
    log = world.folder / "look.steps"
    log.unlink(missing_ok=True)
    place = world.folder / "look"
    shutil.copytree(world.start(start), place)
    try:
        striking = Striking(place, Strike(), log)
        run_all(place, [words], striking)
    finally:
        shutil.rmtree(place)
    return log.read_text().splitlines()[:-1]  # the last one is its end


def run_all(place: Path, commands: Sequence[Words], striking: Striking | None = None) -> list[Ran]:
    """Runs commands, which must work."""
    done = []
    for words in commands:
        before = None if striking is None else striking.install
        stage = Stage(place, None)  # type: ignore[arg-type]
        done.append(stage.start(words, before=before).wait(300))
        if done[-1].code:
            raise RuntimeError(f"{' '.join(map(str, words))}: {done[-1].out[-2000:]}")
    return done
