"""Long tasks beside each other on a cluster, one to a GPU or a core: fits that know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from factory.recipe import Recipe
from factory.runtime import cluster
from factory.runtime.cluster import Resources

RETRIES = 3  # of a task whose machine is lost

Echo = Callable[[str], None]
Work = Callable[[], str]  # picklable; returns what is to be said when it is done


def workers_of(resources: Resources, recipe: Recipe) -> int:
    """Tasks at a time: one per GPU, else one per core."""
    return resources.gpus or cluster.pools(resources, recipe).tasks


def carry_out(work: Sequence[Work], resources: Resources, recipe: Recipe, kind: str, echo: Echo = print) -> None:
    """Carries out tasks on the connected cluster, in their order. A task whose machine is lost begins again; the first
    error ends them all, and a ValueError is raised as it was said there."""
    import ray
    from ray.exceptions import RayTaskError

    gpus = 1 if resources.gpus else 0
    task: Any = ray.remote(num_cpus=cluster.ACTOR_CPUS, num_gpus=gpus, max_retries=RETRIES)(_one)
    workers, waiting, running, done = workers_of(resources, recipe), iter(work), set[Any](), 0
    try:
        while True:
            running |= {task.remote(one) for one in _next(waiting, workers - len(running))}
            if not running:
                return
            ready, rest = ray.wait(list(running))
            running = set(rest)
            for said in ray.get(ready):
                done += 1
                echo(f"{kind} {done} of {len(work)}, {said}")
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, ValueError) else error from None
    finally:
        for left in running:
            ray.cancel(left, force=True)


def _next(waiting: Iterator[Work], count: int) -> Iterator[Work]:
    for _ in range(count):
        one = next(waiting, None)
        if one is not None:
            yield one


def _one(work: Work) -> str:
    """A task has a thread of its own on a core, since its neighbours have the others."""
    import torch

    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    return work()
