"""Several Ray nodes on this machine: how scaling and the loss of a node are tried without a cluster.

A node is a raylet of its own, with workers and an object store of its own; to Ray it is another machine. Each has one
GPU by name alone, so that pools are sized as on GPU machines, and one actor runs on each. The head has none, as in
`cluster/rayjob.yaml`: it runs the driver, the gate and commits.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import psutil

from factory.runtime.cluster import STARTS, _kept_for_errors, quiet, settle

HEAD_CPUS = 8  # logical; see `cluster.MIN_LOGICAL_CPUS`
STORE_BYTES = 100 * 2**20  # of the object store of each node
DRAINED_S = 60  # how far off the loss is that `announce` announces


class LocalNodes:
    """A head and `count` nodes, to which this process is connected: `with LocalNodes(2) as nodes: ...`.

    Nodes are added and lost in this process's main thread or in another, one at a time.
    """

    def __init__(self, count: int = 0) -> None:
        self._count, self._nodes = count, []  # type: ignore[var-annotated]
        self._cluster: Any = None
        self._folder = ""

    def __enter__(self) -> Self:
        quiet()
        import ray

        if ray.is_initialized():
            raise ValueError("nodes must be started where no Ray is connected, got one; leave it first.")
        for attempt in range(1, STARTS + 1):
            try:
                self._start()
                return self
            except BaseException as error:
                self.__exit__(None, None, None)
                if attempt == STARTS or "timed out during startup" not in str(error):
                    raise
        raise AssertionError("unreachable")

    def _start(self) -> None:
        """All of it; Ray gives each node 30 seconds to start, and half a cluster is no use."""
        import ray
        from ray._common.utils import get_default_ray_temp_dir
        from ray.cluster_utils import Cluster

        os.makedirs(get_default_ray_temp_dir(), exist_ok=True)  # where Ray notes the address, and no Ray has been yet
        self._folder = tempfile.mkdtemp(prefix="nodes-")  # sockets live in it, so its path must be short
        self._nodes, self._cluster = [], Cluster(shutdown_at_exit=True)
        with _kept_for_errors():
            self._cluster.add_node(
                num_cpus=HEAD_CPUS, object_store_memory=STORE_BYTES, include_dashboard=False, temp_dir=self._folder,
                _system_config={"health_check_period_ms": 1000},  # a lost node is known in five seconds
            )  # fmt: skip
            ray.init(self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        settle()
        self.grow_to(self._count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()
        if self._cluster.head_node is not None:
            with _kept_for_errors():
                self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def address(self) -> str:
        """The head's address, as `RAY_ADDRESS` takes it."""
        return str(self._cluster.address)

    def grow_to(self, count: int) -> None:
        """Add nodes until there are `count`; returns when all are up."""
        with _kept_for_errors():
            while len(self._nodes) < count:
                self._nodes.append(
                    self._cluster.add_node(wait=False, num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES)
                )
            self._cluster.wait_for_nodes()

    def announce(self, index: int = -1) -> str:
        """Tell Ray that a node is about to be taken away, as a cloud does with spot machines. Returns its id."""
        import ray

        node_id = self.node_id(index)
        client = ray._raylet.GcsClient(address=self.address)
        deadline_ms = int(1000 * (time.time() + DRAINED_S))
        taken, why = client.drain_node(node_id, 2, "spot", deadline_ms)  # 2: preemption
        if not taken:
            raise RuntimeError(f"node {node_id} must be there to be drained, got {why!r}")
        return node_id

    def node_id(self, index: int = -1) -> str:
        """Ray's id of a node, in hex."""
        return str(self._nodes[index].node_id)

    def lose(self, index: int = -1) -> str:
        """Kill a node and all its processes without a word. Returns its id."""
        node = self._nodes.pop(index)
        workers = _children_of(node)  # Ray ends the node alone, and they would work on until they notice
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self._cluster.remove_node(node, allow_graceful=False)
        return str(node.node_id)


def _children_of(node: Any) -> list[psutil.Process]:
    """All processes that a node has started."""
    (raylet,) = node.all_processes["raylet"]
    return psutil.Process(raylet.process.pid).children(recursive=True)
