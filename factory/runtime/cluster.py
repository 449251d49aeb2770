"""What there is to run on, and how large each pool should be there.

`pools` is a pure function of (resources, recipe), so that the same answer is had from a live cluster and from a
cluster YAML. On one machine `connect` starts Ray by itself, with at least eight logical CPUs: Ray Data can wait for
ever when an actor pool leaves no whole CPU for its tasks, and logical CPUs cost nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

from factory.recipe import Recipe

MIN_LOGICAL_CPUS = 8
NO_PROGRESS_S = 300  # Ray Data's own limit is half an hour; nothing here is silent that long
ACTOR_CPUS = 0.5  # logical; what an actor reserves, so that tasks always find a whole CPU


@dataclass(frozen=True)
class Resources:
    """What a cluster has: physical cores, GPUs, and bytes of memory."""

    cpus: int
    gpus: int = 0
    memory: int = 0


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
        yield resources()
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        logical = max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)
        # "local": a cluster that happens to run here is not ours to join, and would refuse num_cpus.
        ray.init("local", num_cpus=logical, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        settle()
        yield resources()
    finally:
        ray.shutdown()


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

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    context.max_errored_blocks = 0  # a lost block is a lost row without a reason; stages give reasons instead


def resources() -> Resources:
    """What the connected cluster has. Here, on one machine, cores are counted from the machine: Ray's are logical."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    cpus = os.cpu_count() or 1 if len(nodes) == 1 else int(total.get("CPU", 1))
    return Resources(cpus=cpus, gpus=int(total.get("GPU", 0)), memory=int(total.get("memory", 0)))
