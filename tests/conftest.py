"""A tiny corpus and tiny language models, made once with the stock commands, for all tests."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Blocks of 8 tokens after 8 of context, the same everywhere.
BLOCKS = ["--tokens-per-sample", "16", "--context-window", "8", "--max-tokens", "64"]
TINY = [
    *("--decoder-embed-dim", "16", "--decoder-input-dim", "16", "--decoder-output-dim", "16"),
    *("--decoder-ffn-embed-dim", "32", "--decoder-layers", "2", "--decoder-attention-heads", "2"),
]
ADAPTIVE = [
    *("--adaptive-input", "--adaptive-input-factor", "2", "--adaptive-input-cutoff", "20,60"),
    *("--adaptive-softmax-factor", "2", "--adaptive-softmax-cutoff", "20,60"),
    *("--tie-adaptive-weights", "--tie-adaptive-proj", "--criterion", "adaptive_loss"),
]
#: The decoders under test: plain or adaptive softmax, tied or not, norm before or after.
MODELS = {
    "adaptive": ADAPTIVE,
    "plain": [],
    "prenorm": ["--decoder-normalize-before", "--share-decoder-input-output-embed"],
    "prenorm-nofinal": ["--decoder-normalize-before", "--no-decoder-final-norm"],
    "untied": [
        *("--adaptive-softmax-cutoff", "20,60", "--criterion", "adaptive_loss"),
        *("--decoder-layers", "1"),
    ],
}


@dataclass(frozen=True)
class Ran:
    """A finished process."""

    code: int
    out: str


def run(*command: object, cwd: Path | None = None) -> Ran:
    """Runs a command as a user would, and keeps what it printed."""
    words = [str(word) for word in command]
    local = Path(sys.executable).parent / words[0]
    if local.exists():  # the environment's own, whatever PATH says
        words[0] = str(local)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return Ran(done.returncode, done.stdout)


def must(*command: object, cwd: Path | None = None) -> str:
    """Runs a command that has to succeed."""
    ran = run(*command, cwd=cwd)
    assert ran.code == 0, ran.out[-3000:]
    return ran.out


@dataclass(frozen=True)
class Lab:
    """The tiny world: where its data and checkpoints lie."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "bin"

    def checkpoint(self, model: str = "adaptive") -> Path:
        return self.folder / model / "checkpoint_last.pt"

    def text(self, split: str) -> list[str]:
        """The split's tokens, sentence ends included."""
        return (self.folder / f"{split}.txt").read_text().replace("\n", " </s> ").split()

    def command(self, split: str, *flags: object, model: str = "adaptive") -> list[str]:
        """``fairseq-eval-lm`` with the plugin; what ``flags`` say wins."""
        words = [self.data, "--user-dir", ROOT / "fairseq_knnlm", "--task", "knn_lm"]
        words += ["--path", self.checkpoint(model), "--gen-subset", split, *BLOCKS]
        words += ["--sample-break-mode", "none", "--cpu", *flags]
        return [str(word) for word in words]

    def evaluate(self, split: str, *flags: object, model: str = "adaptive") -> dict[str, float]:
        """Runs ``fairseq-eval-lm`` in this process and returns fairseq's own loss."""
        # A loader's worker outlives its run in one process, and stalls the next while it ends.
        return eval_lm(self.command(split, *flags, "--num-workers", 0, model=model))


def eval_lm(words: list[str]) -> dict[str, float]:
    """``fairseq-eval-lm`` in this process, up to and with fairseq's own report."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli import eval_lm as host

    parser = options.get_eval_lm_parser()
    args = options.parse_args_and_arch(parser, words)
    return {name: float(x) for name, x in host.main(convert_namespace_to_omegaconf(args)).items()}


def write_corpus(folder: Path, held_out: int = 40) -> dict[str, Path]:
    """Text in which the next word often follows from the last two: something to remember."""
    rng = random.Random(7)
    words = [f"w{number}" for number in range(120)]
    follow = {(a, b): rng.choice(words) for a in words for b in words}
    files = {}
    for split, lines in (("train", 300), ("valid", held_out), ("test", held_out)):
        files[split] = folder / f"{split}.txt"
        with files[split].open("w") as file:
            for _ in range(lines):
                line = rng.choices(words, weights=range(120, 0, -1), k=2)
                while len(line) < rng.randint(5, 15):
                    likely = follow[line[-2], line[-1]]
                    line.append(likely if rng.random() < 0.7 else rng.choice(words[:40]))
                file.write(" ".join(line) + "\n")
    return files


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Corpus, binarised with the stock command; one trained model and a few barely trained."""
    folder = tmp_path_factory.mktemp("lab")
    files = write_corpus(folder)
    text = [word for split, file in files.items() for word in (f"--{split}pref", file)]
    must("fairseq-preprocess", "--only-source", *text, "--destdir", folder / "bin")
    world = Lab(folder)
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda name: train(world, name), MODELS))
    return world


def train(world: Lab, name: str) -> None:
    """Trains one of ``MODELS`` with the stock command; only "adaptive" for long enough to learn."""
    must(
        *("fairseq-train", world.data, "--user-dir", ROOT / "fairseq_knnlm"),
        *("--task", "knn_lm", "--arch", "transformer_lm", *TINY, *MODELS[name], "--cpu"),
        *("--ddp-backend", "legacy_ddp", "--optimizer", "adam", "--lr", "0.01"),
        *("--tokens-per-sample", 16, "--sample-break-mode", "none", "--max-tokens", 512),
        *("--max-update", 60 if name == "adaptive" else 5, "--seed", 1),
        *("--save-dir", world.folder / name, "--no-epoch-checkpoints", "--disable-validation"),
        *("--num-workers", 0),
    )


@pytest.fixture(scope="session")
def datastore(lab: Lab) -> Path:
    """The datastore of the train split, with an exact index, made by the commands people type."""
    folder = lab.folder / "dstore"
    must(
        "fairseq-eval-lm",
        *lab.command("train", "--save-knnlm-dstore", "--dstore-mmap", folder),
    )
    must(sys.executable, ROOT / "examples/build_index.py", "--dstore", folder)
    return folder
