"""The gate over HTTP on Ray Serve: replicas that judge pixels, and the web application in front of them.

    world --HTTP--> Gateway (factory/gateway) --by handle, batches of a few milliseconds--> Gate replicas (autoscaled)

On one machine (`factory gate serve`) the application is served by this process, because Serve's own proxy bounds
neither the size of headers nor the time that they take. On a cluster (`cluster/gate.yaml`) it is Serve's ingress
deployment, and what stands before the cluster bounds those.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp

from factory.gateway.app import Gateway
from factory.gateway.gather import Judged
from factory.gateway.pair import Pair
from factory.gateway.settings import Settings
from factory.models.families import check_base
from factory.models.weights import family_of
from factory.recipe import GateSection, Recipe
from factory.run import Run
from factory.runtime.cluster import quiet
from factory.runtime.serve import GateDeployment
from factory.runtime.weights import weights_of
from factory.sections.base import Count, Positive, Section

APP, GATE, INGRESS = "gate-http", "Gate", "Ingress"
RETRIES_S = (0.1, 0.5, 2.0)  # a replica that dies is replaced in about two seconds
DEPLOY_S = 300.0  # for weights to be loaded
_LOGGING = {"enable_access_log": False, "log_level": "ERROR"}  # an access log would repeat what the audit log says


class GateArguments(Section):
    """What a gate is of. In a Serve config these are the application's `args`."""

    run: str | None = None  # whose weights and recipe; None: the starter's
    min_replicas: Count = 1
    max_replicas: Count = 4
    ongoing: Positive = 2.0  # calls in flight per replica, above which there will be more replicas
    num_threads: Count = 1
    num_cpus: Positive = 1.0  # that a replica reserves
    settings: Settings = Settings()


PATHS = ("generator", "adapter", "weights")


class GateReplica(GateDeployment):
    """A replica that encodes pixels too; latents are judged as by `GateDeployment`."""

    def __init__(self, paths: dict[str, str | None], section: GateSection, num_threads: int) -> None:
        from factory.gateway.model import ImageGate

        generator, adapter, weights = _here(paths)
        self._gate = ImageGate(generator, adapter, paths["family"], weights, section, num_threads)
        self._score = self._gate.score

    def judge(self, images: Sequence[Any], masks: Sequence[Any]) -> list[Judged]:
        """images (h, w, 3) uint8 and masks (h, w) bool -> their answers, in order."""
        return self._gate(images, masks)

    def about(self) -> dict[str, Any]:
        """`model`: the digests; `multiple`: what sides must be multiples of; `pid`: this process."""
        return {"model": self._gate.model, "multiple": self._gate.multiple, "pid": os.getpid()}


def _here(paths: dict[str, str | None]) -> tuple[Path, Path | None, Path]:
    """Generator, adapter and gate on the replica's machine: where the builder found them, or, where that was its own
    copy of a run in a bucket, this machine's copies."""
    generator, adapter, weights = (None if name is None else Path(name) for name in map(paths.get, PATHS))
    assert generator is not None and weights is not None
    if paths["run"] is None or all(path is None or path.exists() for path in (generator, adapter, weights)):
        return generator, adapter, weights
    return weights_of(Run(paths["run"]), recipe_of(paths["run"]))


class Ingress:
    """The web application in a replica of Serve's, for clusters."""

    def __init__(self, gate: Any, size: int, settings: Settings) -> None:
        self._gate, self._size, self._settings = gate, size, settings

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        about = await self._gate.about.remote()
        return gateway(self._gate, self._size, about["multiple"], self._settings).app()


def gateway(handle: Any, size: int, multiple: int, settings: Settings) -> Gateway:
    """The web application on a handle of the gate's deployment."""

    async def ready() -> dict[str, str]:
        about = await handle.about.remote()
        return dict(about["model"])

    return Gateway(HandleJudge(handle), ready, size, multiple, settings)


class HandleJudge:
    """Pairs to answers by one call of a replica. A call whose replica died is sent again: a verdict depends on nothing
    but its pair and the policy, so a second answer is as good as the first."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def __call__(self, pairs: Sequence[Pair]) -> list[Judged]:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError

        images, masks = [pair.image for pair in pairs], [pair.mask for pair in pairs]
        for wait_s in RETRIES_S:
            try:
                return list(await self._handle.judge.remote(images, masks))
            except (RayActorError, BackPressureError):
                await asyncio.sleep(wait_s)
        return list(await self._handle.judge.remote(images, masks))


# ------------------------------------------------------------------------------------------------- deployments


def recipe_of(run: str | None) -> Recipe:
    """What the run was last worked on with; the defaults without one."""
    if run is None:
        return Recipe()
    if (recipe := Run(run).recipe()) is None:
        raise ValueError(f"--run must name a run that holds something, got {run}; begin with `factory ingest`.")
    return recipe


def gate_alone(args: dict[str, Any]) -> Any:
    """Serve's builder of the replicas without a web application: `args` are `GateArguments`."""
    return _gate(GateArguments.model_validate(args))


def application(args: dict[str, Any]) -> Any:
    """Serve's builder of the whole service for a Serve config: `args` are `GateArguments`."""
    from ray import serve

    arguments = GateArguments.model_validate(args)
    most = 4 * arguments.settings.max_waiting + arguments.settings.max_draining
    ingress = serve.deployment(serve.ingress()(Ingress), name=INGRESS).options(
        max_ongoing_requests=most, max_queued_requests=most,  # probes too; the application itself answers 429
        backpressure_config={"status_code": 503, "retry_after_s": arguments.settings.retry_after_s},
        ray_actor_options={"num_cpus": 0.5},
        health_check_period_s=5, health_check_timeout_s=30, logging_config=_LOGGING,
    )  # fmt: skip
    return ingress.bind(_gate(arguments), recipe_of(arguments.run).plan.size, arguments.settings)


def _gate(arguments: GateArguments) -> Any:
    from ray import serve

    recipe = recipe_of(arguments.run)
    generator, adapter, weights = weights_of(None if arguments.run is None else Run(arguments.run), recipe)
    family = recipe.plan.generator if arguments.run is not None else family_of(generator)
    check_base(generator, family)
    paths = {"generator": str(generator), "adapter": None if adapter is None else str(adapter), "family": family,
             "weights": str(weights), "run": arguments.run}  # fmt: skip
    deployment = serve.deployment(GateReplica, name=GATE).options(
        autoscaling_config={
            "min_replicas": arguments.min_replicas, "max_replicas": arguments.max_replicas,
            "target_ongoing_requests": arguments.ongoing, "upscale_delay_s": 5, "downscale_delay_s": 120,
        },
        max_ongoing_requests=8, ray_actor_options={"num_cpus": arguments.num_cpus},
        user_config=recipe.gate.model_dump(), health_check_period_s=5, health_check_timeout_s=30,
        logging_config=_LOGGING,
    )  # fmt: skip
    return deployment.bind(paths, recipe.gate, arguments.num_threads)


def config_of(arguments: GateArguments, policy: GateSection | None, builder: str = "gate_alone") -> dict[str, Any]:
    """The Serve config of a gate with a policy, or with its run's for None. Two that differ in the policy alone are the
    same replicas to Serve: it tells them, and restarts nothing."""
    app: dict[str, Any] = {
        "name": APP, "import_path": f"factory.runtime.gate_http:{builder}", "args": arguments.model_dump(),
        "route_prefix": None if builder == "gate_alone" else "/",
    }  # fmt: skip
    if policy is not None:
        app["deployments"] = [{"name": GATE, "user_config": policy.model_dump()}]
    return {"applications": [app]}


def deploy(config: dict[str, Any], timeout_s: float = DEPLOY_S) -> None:
    """Brings Serve to a config, and returns when it runs. Raises ConnectionError with Serve's words if it will not."""
    from ray import serve
    from ray.serve.context import _get_global_client  # what `serve deploy` reaches over the dashboard, which is off
    from ray.serve.schema import ServeDeploySchema

    quiet()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    schema = ServeDeploySchema.model_validate(config)
    _get_global_client().deploy_apps(schema)
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        apps = [serve.status().applications.get(app.name) for app in schema.applications]
        states = [None if app is None else app.status.value for app in apps]
        if all(state == "RUNNING" for state in states):
            return
        for app in apps:
            if app is not None and app.status.value == "DEPLOY_FAILED":
                raise ConnectionError(f"the gate must start, but Serve says: {app.message.strip()[-1500:]}")
        time.sleep(0.1)
    raise ConnectionError(f"the gate must start within {timeout_s:g} s, but did not; look at its replicas' logs.")


def start(arguments: GateArguments, policy: GateSection | None) -> Any:
    """Deploys the replicas on the connected cluster, nothing bound; the handle of the gate."""
    from ray import serve

    serve.start(http_options={"location": "NoServer"})
    deploy(config_of(arguments, policy))
    return serve.get_deployment_handle(GATE, APP)


def stop() -> None:
    """Takes the gate down; other applications stay."""
    from ray import serve

    quiet()
    serve.delete(APP)


# ------------------------------------------------------------------------------------------------- one machine


def serve_here(
    arguments: GateArguments,
    policy_file: str | None,
    host: str,
    port: int,
    tls: tuple[str | None, str | None],
    echo: Callable[[str], None],
) -> None:
    """Serves until SIGINT or SIGTERM, on a Ray of its own or the one of RAY_ADDRESS; a policy file is followed."""
    import signal

    from factory.gateway.policy_file import PolicyFile
    from factory.gateway.server import bound, server
    from factory.runtime import cluster

    followed = None if policy_file is None else PolicyFile(policy_file)
    sock = bound(host, port)  # a port that is taken is said before a cluster is started
    try:
        with cluster.connect():
            handle = start(arguments, None if followed is None else followed.read())
            about = handle.about.remote().result()
            web = gateway(handle, recipe_of(arguments.run).plan.size, about["multiple"], arguments.settings)
            scheme = "http" if tls[0] is None else "https"
            echo(f"gate        {scheme}://{host}:{sock.getsockname()[1]}/, policy {about['model']['policy']}")
            if arguments.settings.audit is not None:
                echo(f"audit       {arguments.settings.audit}")
            for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it is done
                signal.signal(number, lambda *_: None)

            def apply(section: GateSection) -> None:
                deploy(config_of(arguments, section))

            async def run() -> None:
                watching = None if followed is None else asyncio.create_task(followed.follow(apply, echo))
                await server(web.app(), host, port, *tls).serve([sock])
                if watching is not None:
                    watching.cancel()

            try:
                asyncio.run(run())
            finally:
                stop()
    finally:
        sock.close()
