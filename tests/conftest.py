"""A tiny corpus and tiny language models, made once with the stock commands, for all tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_world
from tiny_world import PLUGIN, ROOT, TINY, preprocessing, training, write_corpus

# What is computed here is so little that threads are slower than one, many times so where others
# use the machine too. Said before torch and FAISS are loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

#: As they are evaluated in the tests.
BLOCKS = [*tiny_world.BLOCKS, "--max-tokens", "64"]
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
        words: list[object] = [self.data, *PLUGIN]
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

    # Where a test has imported the package before, fairseq leaves its tasks alone.
    import fairseq_knnlm.tasks  # noqa: F401

    parser = options.get_eval_lm_parser()
    args = options.parse_args_and_arch(parser, words)
    return {name: float(x) for name, x in host.main(convert_namespace_to_omegaconf(args)).items()}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Corpus, binarised with the stock command; one trained model and a few barely trained."""
    folder = tmp_path_factory.mktemp("lab")
    world = Lab(folder)
    must(*preprocessing(write_corpus(folder), world.data))
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(lambda name: train(world, name), MODELS))
    return world


def train(world: Lab, name: str) -> None:
    """Trains one of ``MODELS`` with the stock command; only "adaptive" for long enough to learn."""
    architecture = ["--arch", "transformer_lm", *TINY, *MODELS[name]]
    updates = 60 if name == "adaptive" else 5
    flags = [*PLUGIN, *architecture, "--ddp-backend", "legacy_ddp", "--max-update", updates]
    must(*training(world.data, world.folder / name, *flags))


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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Of two processes each runs whole files, whose fixtures are made once. What starts a Ray
        # stays in one: it kills workers wherever it finds them.
        group = item.path.stem
        if item.path.is_relative_to(Path(__file__).parent / "cluster"):
            item.add_marker("cluster")
            group = "cluster"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """A Ray of two nodes on the loopback device alone, in which this process takes part."""
    from fairseq_knnlm.cluster.connect import ray_library

    ray = ray_library(loopback=True)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def address(nodes: Any) -> str:
    """Where that Ray is."""
    return str(nodes.address)
