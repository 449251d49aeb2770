"""The gate over HTTP on a real Ray Serve: the verdict of this process, through deaths of replicas and new policies."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gateway_client import SIZE, as_json, lesion, listening, sent_slowly

from factory.gateway.body import content_kind, fields_of
from factory.gateway.model import ImageGate, policy_digest
from factory.gateway.pair import pair_of
from factory.gateway.settings import Settings
from factory.recipe import GateSection, load
from factory.run import Run
from factory.runtime import gate_http

pytestmark = pytest.mark.usefixtures("ray_cluster")
LENIENT = {"min_iou": 0.0, "min_area": 0.0, "max_area": 1.0, "min_solidity": 0.0, "shift_tolerance": 0.0}
BODIES = [json.dumps(as_json(*lesion(48, 0.12 + 0.03 * n))).encode() for n in range(8)]


def ask(port: int, body: bytes, token: str | None = None) -> tuple[int, Any]:
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": f"Bearer {token}"})
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/validate", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def arguments(tiny_weights: Any, tmp_path_factory: pytest.TempPathFactory) -> gate_http.GateArguments:
    """Of a run whose recipe names the tiny weights."""
    run = Run(str(tmp_path_factory.mktemp("gate") / "run"))
    recipe = load(
        "smoke", [*tiny_weights.overrides, f"plan.size={SIZE}", *(f"gate.{k}={v}" for k, v in LENIENT.items())]
    )
    with run.lock():
        run.write_header(recipe)
    return gate_http.GateArguments(run=run.uri, max_replicas=2, num_cpus=0.1, settings=Settings(answer_s=20.0))


@pytest.fixture(scope="module")
def wanted(local_gate: ImageGate) -> list[Any]:
    """What the gate says of BODIES in this process."""
    kind = content_kind("application/json", None)
    pairs = [pair_of(fields_of(body, kind), Settings(), SIZE, local_gate.multiple) for body in BODIES]
    return local_gate([pair.image for pair in pairs], [pair.mask for pair in pairs])


@pytest.fixture(scope="module")
def local_gate(tiny_weights: Any) -> ImageGate:
    return ImageGate(tiny_weights.generator, None, None, tiny_weights.gate, GateSection(**LENIENT))


@pytest.fixture(scope="module")
def port(arguments: gate_http.GateArguments) -> Iterator[int]:
    """The web application of `factory gate serve`, on the gate's handle."""
    from ray import serve as ray_serve

    ray_serve.shutdown()  # what other files left has no HTTP
    handle = gate_http.start(arguments, GateSection(**LENIENT))
    about = handle.about.remote().result()
    web = gate_http.gateway(handle, SIZE, about["multiple"], arguments.settings)
    with listening(web) as found:
        yield found
    gate_http.stop()
    ray_serve.shutdown()


class Load:
    """Four clients that ask for the bodies again and again, until they are told to stop."""

    def __init__(self, port: int) -> None:
        self.port, self.seen, self._over = port, list[tuple[int, int, Any]](), threading.Event()

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(4)
        self._clients = [self._pool.submit(self._run, n) for n in range(4)]
        return self

    def _run(self, number: int) -> None:
        while not self._over.is_set():
            number = (number + 1) % len(BODIES)
            self.seen.append((number, *ask(self.port, BODIES[number])))

    def further(self, count: int, timeout_s: float = 600) -> None:
        goal, deadline = len(self.seen) + count, time.monotonic() + timeout_s
        while len(self.seen) < goal:
            assert time.monotonic() < deadline, "the gate answers no more"
            assert not any(client.done() for client in self._clients), "a request was dropped"
            time.sleep(0.02)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for client in self._clients:
            client.result()
        self._pool.shutdown()


def replica() -> int:
    """The process id of a replica."""
    from ray import serve as ray_serve

    return int(ray_serve.get_deployment_handle(gate_http.GATE, gate_http.APP).about.remote().result()["pid"])


def test_a_verdict_over_http_is_that_of_this_process(port: int, wanted: list[Any]) -> None:
    for body, judged in zip(BODIES, wanted, strict=True):
        status, given = ask(port, body)
        assert status == 200
        assert (given["verdict"], given["reason"], given["iou"], given["theta"], given["scores"], given["model"]) == (
            judged.verdict, judged.reason, judged.iou, judged.theta, judged.scores, judged.model
        )  # fmt: skip
        assert base64.b64decode(given["mask"])[:4] == b"\x89PNG"


def test_a_replica_killed_under_load_costs_at_most_a_retry_and_no_verdict_is_wrong(
    port: int, wanted: list[Any]
) -> None:
    with Load(port) as load:
        load.further(20)
        os.kill(replica(), signal.SIGKILL)
        load.further(20)
        while load.seen[-1][1] != 200:  # until there is another
            load.further(1)
        load.further(20)
    statuses = {status for _, status, _ in load.seen}
    assert statuses <= {200, 429, 503}, statuses
    for number, status, given in load.seen:
        assert status != 200 or given["iou"] == wanted[number].iou


def test_a_new_policy_under_load_drops_nothing_restarts_nothing_and_is_named(
    port: int, arguments: gate_http.GateArguments, wanted: list[Any]
) -> None:
    pid = replica()
    strict = GateSection(**{**LENIENT, "min_iou": 1.0})
    with Load(port) as load:
        load.further(10)
        gate_http.deploy(gate_http.config_of(arguments, strict))
        load.further(40)
        gate_http.deploy(gate_http.config_of(arguments, GateSection(**LENIENT)))
        load.further(40)
    assert {status for _, status, _ in load.seen} == {200}
    versions = {policy_digest(strict): strict, policy_digest(GateSection(**LENIENT)): GateSection(**LENIENT)}
    seen = {given["model"]["policy"] for _, _, given in load.seen}
    assert seen == set(versions)
    for number, _, given in load.seen:
        policy = versions[given["model"]["policy"]]
        assert given["theta"] == policy.min_iou and given["iou"] == wanted[number].iou
        assert (given["verdict"] == "accepted") == (given["iou"] >= policy.min_iou)
    assert replica() == pid


def test_the_clusters_application_serves_the_same_behind_a_token(
    port: int, arguments: gate_http.GateArguments, wanted: list[Any], tmp_path: Path
) -> None:
    from ray import serve as ray_serve

    (tmp_path / "token").write_text("the-token-of-a-cluster-0001")
    (tmp_path / "token").chmod(0o600)
    limits = {"token_file": str(tmp_path / "token"), "require_token": True, "audit": str(tmp_path / "audit")}
    ours = gate_http.GateArguments(**{**arguments.model_dump(), "settings": limits})
    ray_serve.shutdown()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        free = sock.getsockname()[1]
    ray_serve.start(http_options={"host": "127.0.0.1", "port": free, "location": "HeadOnly"})
    gate_http.deploy(gate_http.config_of(ours, GateSection(**LENIENT), "application"))
    assert ask(free, BODIES[0])[0] == 401
    refused, _, said = sent_slowly(free, [b"Content-Type: application/json", b"Content-Length: 3000000"], 3_000_000)
    assert (refused, said["error"]) == (401, "token")  # Serve's proxy in between loses it no more than uvicorn does
    status, given = ask(free, BODIES[0], "the-token-of-a-cluster-0001")
    assert (status, given["iou"], given["verdict"]) == (200, wanted[0].iou, wanted[0].verdict)
    assert ask(free, b"{}", "the-token-of-a-cluster-0001")[0] == 422
    with urllib.request.urlopen(f"http://127.0.0.1:{free}/readyz", timeout=30) as answer:
        assert json.load(answer)["model"] == given["model"]
    (log,) = (tmp_path / "audit").iterdir()
    assert len(log.read_text().splitlines()) == 1
