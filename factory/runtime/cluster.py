"""What there is to run on, and how large each pool should be there.

`pools` is a pure function of (resources, recipe), so that the same answer is had from a live cluster (`resources`)
and from a cluster YAML without one (`resources_of_yaml`). On one machine `connect` starts Ray by itself, with at
least eight logical CPUs: Ray Data can wait for ever when an actor pool leaves no whole CPU for its tasks, and logical
CPUs cost nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from factory.recipe import Recipe

MIN_LOGICAL_CPUS = 8
STARTS = 3  # attempts to start Ray here
FOR_EVER = -1  # a machine may be waited for longer than any limit; what hangs is ended by `synthesize.unit_timeout_s`
CLUSTER = "DERMAFACTORY_CLUSTER"  # in the environment: the YAML that the cluster was made from
ACTOR_CPUS = 0.5  # logical; what an actor reserves, so that tasks always find a whole CPU


@dataclass(frozen=True)
class Resources:
    """What a cluster has, or may grow to: cores, GPUs, and bytes of memory (0: not known)."""

    cpus: int
    gpus: int = 0
    memory: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.cpus + other.cpus, self.gpus + other.gpus, self.memory + other.memory)

    def __mul__(self, count: int) -> Resources:
        return Resources(self.cpus * count, self.gpus * count, self.memory * count)


@dataclass(frozen=True)
class Pools:
    """Actors per stage, and threads each may use."""

    synthesize: int
    gate_replicas: int
    tasks: int
    num_threads: int
    gpus_per_actor: float


def pools(resources: Resources, recipe: Recipe) -> Pools:
    """One denoising actor per GPU; without GPUs one per `num_threads` cores. The gate needs a replica per 8 actors."""
    threads = recipe.synthesize.num_threads
    wanted = recipe.synthesize.num_actors or resources.gpus or max(1, resources.cpus // threads)
    return Pools(
        synthesize=wanted,
        gate_replicas=max(1, -(-wanted // 8)),
        tasks=max(1, resources.cpus),
        num_threads=threads,
        gpus_per_actor=1.0 if resources.gpus else 0.0,
    )


@contextlib.contextmanager
def connect() -> Iterator[Resources]:
    """Joins the cluster of `RAY_ADDRESS` (as under `ray job submit`), or starts one here and ends it afterwards."""
    quiet()
    import ray

    if ray.is_initialized():
        settle()
        yield resources()
        return
    address, ours = os.environ.get("RAY_ADDRESS"), {}
    if not address:  # "local": a cluster that happens to run here is not ours to join
        address, ours = "local", {"num_cpus": max(MIN_LOGICAL_CPUS, os.cpu_count() or 1), "include_dashboard": False}
    with _kept_for_errors():
        _start(partial(ray.init, address, log_to_driver=False, logging_level=logging.ERROR, **ours))
    try:
        settle()
        yield resources()
    finally:
        ray.shutdown()


def _start(init: Callable[[], object]) -> None:
    """Ray gives its own start 30 seconds, which no setting changes; a busy machine may need another attempt."""
    for attempt in range(1, STARTS + 1):
        try:
            init()
            return
        except Exception as error:  # Ray raises it as such
            if attempt == STARTS or "timed out during startup" not in str(error):
                raise


@contextlib.contextmanager
def _kept_for_errors() -> Iterator[None]:
    """What Ray's C++ side writes to standard error meanwhile is shown only if it fails: it says each time that it was
    told to be quiet."""
    with tempfile.TemporaryFile() as kept:
        real = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.seek(0)
            os.write(real, kept.read())
            raise
        finally:
            os.dup2(real, 2)
            os.close(real)


def quiet() -> None:
    """Ray and its libraries say only what is wrong; the factory's own progress lines say the rest."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("ray", "ray.data", "ray.serve", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def settle() -> None:
    """Ray Data's settings for every pipeline of the factory."""
    from ray.data import DataContext

    quiet()  # again: importing Ray Data has set its own level
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = FOR_EVER
    context.max_errored_blocks = 0  # a lost block is a lost row without a reason; stages give reasons instead


def this_machine() -> str:
    """The node that this process runs on, as Ray names it."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def is_alive(node: str) -> bool:
    """Whether a node that was named so is still of the cluster."""
    import ray

    return any(known["NodeID"] == node and known["Alive"] for known in ray.nodes())


def gpu_memory() -> int | None:
    """Bytes of this machine's smallest GPU, where a fit will run on this machine; None on a cluster of others, or
    without a GPU."""
    import torch

    if os.environ.get("RAY_ADDRESS") or not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(n).total_memory for n in range(torch.cuda.device_count()))


def resources() -> Resources:
    """What the connected cluster has, or may grow to.

    Ray's own autoscaler does not tell a driver how far it may go, so the cluster's YAML says it where `CLUSTER` names
    one; a Ray that does tell is believed. On one machine that cannot grow, cores are counted from the machine: Ray's
    are logical there.
    """
    import ray
    from ray._private.state import state  # what Ray Train itself asks; there is no public name for it

    nodes, total = [node for node in ray.nodes() if node["Alive"]], ray.cluster_resources()
    most = may_grow_to() or state.get_max_resources_from_cluster_config() or {}
    grown = {name: max(total.get(name, 0), limit) for name, limit in most.items() if limit < sys.maxsize}
    if grown.get("CPU", 0) > total.get("CPU", 0) or len(nodes) > 1:
        cpus = int(grown.get("CPU") or total.get("CPU", 1))
    else:
        cpus = os.cpu_count() or 1
    known = {**total, **grown}
    return Resources(cpus=cpus, gpus=int(known.get("GPU", 0)), memory=int(known.get("memory", 0)))


def may_grow_to() -> dict[str, float]:
    """What the YAML that the environment's `DERMAFACTORY_CLUSTER` names lets the cluster have, as Ray names it."""
    path = os.environ.get(CLUSTER)
    if not path:
        return {}
    limit = resources_of_yaml(path)
    return {"CPU": limit.cpus, "GPU": limit.gpus, "memory": limit.memory}


# ------------------------------------------------------------------------------------------------------ from a YAML

_QUANTITY = re.compile(r"^(\d+(?:\.\d+)?)(m|[kMGTP]i?|Ki)?$")
_POWERS = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_START_FLAG = re.compile(r"--num-(cpus|gpus)[= ](\d+)|--(memory)[= ](\d+)")
_KUBERAY = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig", "RayCluster": None}


def resources_of_yaml(path: str | Path) -> Resources:
    """What a cluster has at its largest, read from a `ray up` YAML or from a KubeRay RayJob, RayService or RayCluster.

    Raises ValueError where the file leaves it open, as when a group's CPUs are not stated.
    """
    try:
        config = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cluster must be a readable YAML file, got {path} ({error}); check the path.") from error
    if not isinstance(config, dict):
        raise ValueError(f"cluster must be a YAML mapping, got {path}; name a `ray up` YAML or a RayJob.")
    if config.get("kind") in _KUBERAY:
        key = _KUBERAY[config["kind"]]
        return _of_kuberay(config["spec"] if key is None else config["spec"][key])
    if (config.get("provider") or {}).get("type") == "local":
        return _of_machines(config)
    if "available_node_types" in config:
        return _of_node_types(config)
    raise ValueError(
        f"cluster must have available_node_types, a local provider or a KubeRay kind, got none in {path}; "
        "see cluster/ for an example of each."
    )


def _of_node_types(config: Mapping[str, Any]) -> Resources:
    """`ray up` on a cloud: the head, and every type as often as it may be started."""
    types, head = config["available_node_types"], config["head_node_type"]
    limit = config.get("max_workers", 2)  # the launcher's own default
    counts = {name: min(limit, kind.get("max_workers", 0 if name == head else limit)) for name, kind in types.items()}
    if sum(counts.values()) > limit and sum(count > 0 for count in counts.values()) > 1:
        raise ValueError(
            f"max_workers must be the sum of its types' ({sum(counts.values())}), got {limit}; with less, what is "
            "started depends on demand. Raise it, or lower the types' own."
        )
    counts[head] += 1
    return sum((_of_type(name, types[name]) * count for name, count in counts.items() if count), Resources(0))


def _of_type(name: str, kind: Mapping[str, Any]) -> Resources:
    has = kind.get("resources") or {}
    return Resources(_stated(has.get("CPU"), f"available_node_types.{name}.resources.CPU"),
                     int(has.get("GPU", 0)), int(has.get("memory", 0)))  # fmt: skip


def _of_machines(config: Mapping[str, Any]) -> Resources:
    """`ray up` on machines of one's own: what the start commands state, since nothing else does."""
    machines = config["provider"].get("worker_ips") or []
    found = _of_commands(config, "head_start_ray_commands")
    workers = min(len(machines), config.get("max_workers", len(machines)))
    return found + _of_commands(config, "worker_start_ray_commands") * workers if workers else found


def _of_commands(config: Mapping[str, Any], field: str) -> Resources:
    text = " ".join(config.get(field) or [])
    has = {match[1] or match[3]: int(match[2] or match[4]) for match in _START_FLAG.finditer(text)}
    return Resources(_stated(has.get("cpus"), f"--num-cpus in {field}"), has.get("gpus", 0), has.get("memory", 0))


def _of_kuberay(spec: Mapping[str, Any]) -> Resources:
    """A RayClusterSpec: the head, and every worker group at its largest."""
    found = _of_group("headGroupSpec", spec["headGroupSpec"])
    for group in spec.get("workerGroupSpecs") or []:
        most = _stated(group.get("maxReplicas"), f"{group['groupName']}.maxReplicas")
        found += _of_group(group["groupName"], group) * (most * group.get("numOfHosts", 1))
    return found


def _of_group(name: str, group: Mapping[str, Any]) -> Resources:
    """As KubeRay reads it: the group's `resources`, then `rayStartParams`, then the first container's limits."""
    asked = group["template"]["spec"]["containers"][0].get("resources") or {}
    pod = {**(asked.get("requests") or {}), **(asked.get("limits") or {})}
    gpus = next((value for key, value in pod.items() if key.endswith("gpu")), 0)
    start, has = group.get("rayStartParams") or {}, group.get("resources") or {}
    cpus = has.get("CPU", start.get("num-cpus", pod.get("cpu")))
    return Resources(
        _stated(None if cpus is None else _quantity(cpus), f"{name}.rayStartParams.num-cpus or its cpu limit"),
        _quantity(has.get("GPU", start.get("num-gpus", gpus))),
        _quantity(has.get("memory", start.get("memory", pod.get("memory", 0)))),
    )


def _stated(value: int | None, field: str) -> int:
    if value is None:
        raise ValueError(f"{field} must be stated for a cluster to be sized without it, got nothing; add it.")
    return int(value)


def _quantity(value: object) -> int:
    """A Kubernetes quantity (`4`, `500m`, `16Gi`) as a whole number, rounded up."""
    match = _QUANTITY.match(str(value))
    if match is None:
        raise ValueError(f"resources must be Kubernetes quantities such as 4, 500m or 16Gi, got {value!r}; correct it.")
    number, unit = float(match[1]), match[2] or ""
    if unit == "m":
        return math.ceil(number / 1000)
    return math.ceil(number * (1024 if unit.endswith("i") else 1000) ** _POWERS.get(unit[:1], 0))


def described(resources: Resources, pools: Pools) -> list[str]:
    """What `factory size` prints: the cluster at its largest and each pool on it."""
    memory = f", {resources.memory / 2**30:.0f} GiB of memory" if resources.memory else ""
    each = "a GPU each" if pools.gpus_per_actor else f"{pools.num_threads} thread(s) each, no GPU"
    return [
        f"cluster     {resources.cpus} CPUs, {resources.gpus} GPUs{memory}, at its largest",
        f"synthesize  {pools.synthesize} actor(s), {each}",
        f"gate        {pools.gate_replicas} replica(s)",
        f"curate      {pools.tasks} actor(s), the same for captions",
    ]
