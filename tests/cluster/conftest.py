"""One Ray for all tests of this folder, on the loopback device alone, with two nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fairseq_knnlm.cluster.connect import ray_library


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("cluster")


@pytest.fixture(scope="session")
def nodes() -> Iterator[Any]:
    """A Ray of two nodes, in which this process takes part."""
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
