"""A datastore that was made smaller, evaluated by the commands people type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Lab, must
from stores import assert_helps, brute_force

from fairseq_knnlm.calibration.table import read_table
from fairseq_knnlm.datastore import Datastore, open_datastore
from fairseq_knnlm.errors import DatastoreError
from fairseq_knnlm.experts.knn import KnnSetting
from fairseq_knnlm.mixture.components import Component
from fairseq_knnlm.runs.compress import compress


@pytest.fixture(scope="module")
def smaller(lab: Lab, datastore: Path) -> Path:
    """Compressed and indexed by the commands people type."""
    folder = lab.folder / "smaller"
    said = must(
        *("fairseq-knnlm", "compress", "--dstore", datastore, "--out", folder),
        *("--pca", 12, "--merge", 4, "--seed", 1),
    )
    before, after = (len(open_datastore(path)) for path in (datastore, folder))
    assert f"{folder}: {before:,} -> {after:,} entries, " in said
    assert after < before
    must("fairseq-knnlm", "build-index", "--dstore", folder)
    return folder


@pytest.fixture(scope="module")
def asked(lab: Lab) -> Datastore:
    """The keys and tokens of the test split."""
    folder = lab.folder / "asked"
    lab.evaluate("test", "--save-knnlm-dstore", "--dstore-mmap", folder, "--dstore-fp32")
    return open_datastore(folder)


@pytest.mark.parametrize("similarity", ["l2", "do_not_recomp_l2"])
def test_evaluation_is_a_few_plain_lines(
    lab: Lab, smaller: Path, asked: Datastore, tmp_path: Path, similarity: str
) -> None:
    lab.evaluate(
        "test", "--knnlm", "--dstore-filename", smaller, "--k", 64, "--lmbda", 0.3,
        "--knn-temp", 2.0, "--knn-sim-func", similarity, "--score-table", tmp_path / "table.npz",
    )  # fmt: skip
    store = open_datastore(smaller)
    assert store.weights is not None and store.projection is not None
    queries = asked.full_keys().astype(np.float64) @ store.projection
    near, nearest = brute_force(store.full_keys(), queries, 64, "l2")
    weights = np.exp(-near / 2) * store.weights[nearest]
    agreed = (weights * (store.values[nearest] == asked.values[:, None])).sum(axis=1)
    expected = agreed / weights.sum(axis=1)
    table = read_table(tmp_path / "table.npz")
    found = np.exp(table.column(Component("knn", vars(KnnSetting(temperature=2.0)))))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    # What stood before an entry was merged away, so no neighbour shares its words.
    sharing = [setting["suffix"] > 0 for setting in table.experts["knn"]]
    assert any(sharing)
    assert np.array_equal(np.isnan(table["knn"]).all(axis=0), sharing)


def test_another_models_width_is_refused(lab: Lab, datastore: Path, tmp_path: Path) -> None:
    """It is the width of the model's keys that counts, not of the projected ones."""
    store = open_datastore(compress(open_datastore(datastore), tmp_path / "out", pca=12))
    store.check_origin(width=16)
    with pytest.raises(DatastoreError, match="another key width") as caught:
        store.check_origin(width=12)
    assert_helps(caught, "key width 16")
