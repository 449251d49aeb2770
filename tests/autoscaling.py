"""A cluster that grows and shrinks by itself, on one machine: Ray's fake multi-node provider behind a head of our own.

Ray's `AutoscalingCluster` reads a file that its wheel lacks, and stops every Ray of the machine; this starts one head
in a process group of its own and ends that group.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
EMPTY: dict[str, Any] = {
    "docker": {}, "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
    "rsync_exclude": [], "rsync_filter": [], "initialization_commands": [], "setup_commands": [],
    "head_setup_commands": [], "worker_setup_commands": [], "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}  # fmt: skip
WORKER_PORTS = range(10002, 20000)  # Ray keeps these for its workers
PATIENCE_S = 120.0
STORE_BYTES = 100 * 2**20


@contextlib.contextmanager
def growing_head(most: int, idle_minutes: float) -> Iterator[tuple[str, Path]]:
    """A head with no GPU that may add up to `most` nodes of one GPU each, and takes them back once they were idle for
    `idle_minutes`. Gives its address and its configuration."""
    folder = Path(tempfile.mkdtemp(prefix="grow-"))
    port = free_port()
    address = f"127.0.0.1:{port}"
    config = folder / "cluster.json"
    config.write_text(json.dumps(config_of(address, most, idle_minutes)))
    head = subprocess.Popen(
        command_of(port, folder, config), env=environment_of(), start_new_session=True,
        stdout=(folder / "out").open("wb"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        until(lambda: answers(port), f"the head must answer at {address}")
        yield address, config
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def config_of(address: str, most: int, idle_minutes: float) -> dict[str, Any]:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

    worker = {"CPU": 1, "GPU": 1, "object_store_memory": STORE_BYTES}
    return EMPTY | {
        "cluster_name": "growing", "max_workers": most, "upscaling_speed": 1.0, "idle_timeout_minutes": idle_minutes,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "provider": {
            "type": "external", "module": PROVIDER, "use_node_id_as_ip": True, "disable_node_updaters": True,
            "disable_launch_config_check": True, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 8}, "node_config": {}, "max_workers": 0},
            "gpu": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": most},
        },
    }  # fmt: skip


def command_of(port: int, folder: Path, config: Path) -> list[str]:
    ray = Path(sys.executable).parent / "ray"
    return [
        str(ray), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=8",
        "--num-gpus=0", f"--object-store-memory={STORE_BYTES}", f"--temp-dir={folder}", "--include-dashboard=false",
        f"--autoscaling-config={config}", "--disable-usage-stats",
    ]  # fmt: skip


def environment_of() -> dict[str, str]:
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    return os.environ | {
        "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }  # fmt: skip


def free_port() -> int:
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in WORKER_PORTS:
            return port


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def until(holds: Any, what: str, patience_s: float = PATIENCE_S) -> float:
    """Waits; the seconds it took."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < patience_s, what
        time.sleep(0.2)
    return time.monotonic() - began
