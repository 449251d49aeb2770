"""Actors whose machine is gone for good: their units go to the others.

Ray restarts an actor wherever there is room, and until then what it was given waits for it. On a cluster that gets no
machine in place of the lost one there is never room, and the run would wait for ever on the last few units. So when
nothing is left but what such actors may hold, and they have found no place for `PATIENCE_S`, they are given up. What
they held is not committed, hence simply missing, and is made by those that are left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PATIENCE_S = 10.0  # a machine that is replaced in this time, or an actor that is restarted on its own, keeps its units
LOOK_S = 1.0


class Watch:
    """Says afterwards whether actors were given up."""

    def __init__(self) -> None:
        self.given_up = 0


@contextmanager
def lost_actors_given_up(left: Callable[[], int], in_flight: int) -> Iterator[Watch]:
    """Within it, this driver's Ray Data actors that find no place are killed once nothing else is to be waited for.

    left: how many units are not committed yet; in_flight: how many one actor may hold. The units' pipeline then ends
    with a RayActorError.
    """
    watch, ended = Watch(), threading.Event()
    thread = threading.Thread(target=_keep_looking, args=(left, in_flight, watch, ended), name="losses", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        ended.set()
        thread.join()


def _keep_looking(left: Callable[[], int], in_flight: int, watch: Watch, ended: threading.Event) -> None:
    since, before = time.monotonic(), left()
    while not ended.wait(LOOK_S):
        now = left()
        lost = _without_a_place() if now else []
        if now != before or not lost or now > in_flight * len(lost):
            since, before = time.monotonic(), now
        elif time.monotonic() - since >= PATIENCE_S:
            _give_up(lost)
            watch.given_up += len(lost)
            return


def _without_a_place() -> list[str]:
    """Ids of this driver's Ray Data actors that wait for a restart on a machine that is there no more."""
    import ray
    from ray._private.state import actors  # the state API proper needs the dashboard, which a laptop's Ray is without

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    mine: dict[str, dict[str, Any]] = actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))
    return [
        name
        for name, actor in mine.items()
        if actor["State"] == "RESTARTING"
        and actor["ActorClassName"].startswith("MapWorker")
        and actor["Address"]["NodeID"] not in alive
    ]


def _give_up(names: list[str]) -> None:
    import ray
    from ray._private.worker import global_worker  # `ray.kill` wants a handle, which Ray Data keeps to itself

    for name in names:
        global_worker.core_worker.kill_actor(ray.ActorID.from_hex(name), True)
