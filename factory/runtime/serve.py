"""The gate as a Ray Serve deployment: one call per batch, by handle, from the pipelines.

A call with a whole batch costs a tenth per sample of one call per row, and a thirtieth of HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from factory import records
from factory.models.sampler import Stage, Verdict
from factory.recipe import GateSection
from factory.runtime.cluster import Pools, quiet
from factory.stages.score import as_arrays, verdicts

RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0)  # a replica that dies mid-call is replaced in about two seconds


class GateDeployment:
    """A replica: loads the segmenter once, judges batches."""

    def __init__(
        self, weights: str | Callable[[], Path], vae_digest: str, section: GateSection, num_threads: int
    ) -> None:
        from factory.stages.score import ScoreSamples

        directory = weights() if callable(weights) else weights  # asked for on the replica's own machine
        self._score = ScoreSamples(directory, vae_digest, section, num_threads)

    def validate(
        self, image_latents: np.ndarray, masks: np.ndarray | None, stage: Stage = "final"
    ) -> list[dict[str, Any]]:
        """(N, C, h, w) float32 and (N, H, W) bool or None -> N of {outcome, reason, scores}."""
        return self._score(image_latents, masks, stage)

    def reconfigure(self, policy: dict[str, Any]) -> None:
        """A policy change without a restart (Serve's `user_config`)."""
        self._score.section = GateSection(**policy)


def app_name(run_uri: str) -> str:
    """A gate is its run's own: runs that share a cluster have other weights and other policies."""
    return f"gate-{records.digest('gate', run_uri)[:12]}"


def start_gate(
    run_uri: str, weights: str | Callable[[], Path], vae_digest: str, section: GateSection, pools: Pools
) -> None:
    """Deploys a run's gate on the connected cluster, and returns when it answers. Nothing is bound beyond loopback.
    weights: a directory that all machines have, or what finds one on each."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # Serve sets its own level when it is imported
    serve.start(http_options={"host": "127.0.0.1", "port": 0, "location": "NoServer"})
    deployment = serve.deployment(GateDeployment).options(
        num_replicas=pools.gate_replicas,
        max_ongoing_requests=32,
        ray_actor_options={"num_cpus": 0.1},
        user_config=section.model_dump(),
        logging_config={"enable_access_log": False, "log_level": "ERROR"},
    )
    gate = deployment.bind(weights, vae_digest, section, pools.num_threads)
    serve.run(gate, name=app_name(run_uri), route_prefix=None)


def stop_gate(run_uri: str) -> None:
    """Takes a run's gate down. Serve itself stays: it may hold other runs' gates, and ends with its cluster."""
    from ray import serve

    quiet()  # Serve has set its own level since
    serve.delete(app_name(run_uri))


class GateHandle:
    """A run's gate as the sampler sees it: submit a batch, collect its verdicts later (see `models/sampler.py`).

    A call whose replica died is sent again; verdicts depend on nothing but the batch, so a second answer is the same.
    """

    def __init__(self, run_uri: str) -> None:
        self._name = app_name(run_uri)
        self._handle: Any = None

    def submit(self, ids: list[str], image_latents: Tensor, masks: Tensor | None, stage: Stage) -> Any:
        """Starts a judgement and returns at once."""
        from ray import serve

        if self._handle is None:
            self._handle = serve.get_app_handle(self._name)
        arguments = (*as_arrays(image_latents, masks), stage)
        return arguments, self._handle.validate.remote(*arguments)

    def result(self, ticket: Any) -> list[Verdict]:
        """The verdicts of a submitted batch; waits for them."""
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        arguments, response = ticket
        for wait_s in (*RETRY_AFTER_S, None):
            try:
                return verdicts(response.result())
            except (RayActorError, BackPressureError):
                if wait_s is None:
                    raise
                time.sleep(wait_s)
                response = self._handle.validate.remote(*arguments)
        raise AssertionError("unreachable")
