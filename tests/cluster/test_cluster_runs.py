"""Runs with ``--knn-ray`` come to the figures of runs without it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from conftest import Lab, must

from fairseq_knnlm.datastore import open_datastore

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def sharded(lab: Lab) -> Path:
    """A datastore in blocks, with an index of which not all lists are visited."""
    path = lab.folder / "to-shard"
    saving = ["--save-knnlm-dstore", "--dstore-mmap", path, "--block-rows", 200]
    lab.evaluate("train", *saving)
    assert len(open_datastore(path).blocks) > 3
    build = ["build-index", "--dstore", path, "--recipe", "IVF8,Flat", "--probe", 3]
    must(sys.executable, "-m", "fairseq_knnlm.cli", *build)
    return path


def flags(store: Path) -> list[object]:
    return ["--knnlm", "--dstore-filename", store, "--k", 50, "--lmbda", 0.4, "--knn-temp", 10]


@pytest.mark.parametrize("similarity", ["l2", "do_not_recomp_l2"])
def test_an_evaluation_comes_to_the_same_figure(
    lab: Lab, sharded: Path, address: str, similarity: str
) -> None:
    asked = [*flags(sharded), "--knn-sim-func", similarity]
    on_ray = ["--knn-ray", address, "--knn-shards", 3, "--knn-replicas", 2]
    alone = lab.evaluate("valid", *asked)
    assert lab.evaluate("valid", *asked, *on_ray) == alone
    assert lab.evaluate("valid", "--pointers", "replace", *flags(sharded), *on_ray) == (
        lab.evaluate("valid", "--pointers", "replace", *flags(sharded))
    )


def test_nothing_of_ray_is_on_the_screen(lab: Lab, sharded: Path) -> None:
    """A command with a Ray of its own says what the same command says without it."""

    def said(*more: object) -> list[str]:
        out = must("fairseq-eval-lm", *lab.command("valid", *flags(sharded), *more))
        lines = [re.sub(r"^[-\d: ]+\| ", "", line) for line in out.splitlines()]  # without the time
        return [line for line in lines if "fairseq_cli" not in line and "tokens/s" not in line]

    alone = said()
    (added,) = [line for line in said("--knn-ray", "local", "--knn-shards", 2) if line not in alone]
    assert "is searched in 2 shards of a Ray of this process, 1 of each" in added
