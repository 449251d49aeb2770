"""The gate over HTTP: its latency, the load that it sustains, what it answers at twice that, and what HTTP costs.

load      clients on loopback ask at a fixed rate, open loop (they do not wait for one another), in rising steps; the
          highest step is sustained at which every request is answered 200 and p99 stays under --p99-s
overload  twice that rate: only 200, 429 and 503, every 200 the verdict of this process, memory flat (by how much
          the web process and the replica grow over its second half)
handle    cost per item of one call of the handle with 32 latents against one HTTP image call, with a gate that costs
          nothing behind both, sequentially; the goal is at most a tenth

python benchmarks/gate_http.py --seconds 20 --overload-seconds 120        # the full run, about 8 minutes
python benchmarks/gate_http.py --seconds 3 --overload-seconds 6 --steps 4 --out /tmp/gate_http.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from factory import images, phantom
from factory.gateway.gather import Judged
from factory.gateway.model import ImageGate
from factory.gateway.server import bound, server
from factory.gateway.settings import Settings
from factory.models.weights import STARTER
from factory.recipe import GateSection
from factory.runtime import cluster, gate_http

RESULT = Path(__file__).parent / "results" / "gate_http.json"
SIZE, PAIRS, BATCH = 128, 16, 32


@dataclass
class Seen:
    """What one step of load came to."""

    rate: float
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    rss: list[int] = field(default_factory=list)  # bytes, once a second

    def summary(self) -> dict[str, Any]:
        done = sorted(self.seconds) or [float("nan")]
        return {
            "asked_per_s": self.rate, "answered_200": self.statuses["200"], "statuses": dict(self.statuses),
            "p50_s": round(done[len(done) // 2], 4), "p99_s": round(done[min(len(done) - 1, int(len(done) * 0.99))], 4),
            "wrong": self.wrong,
        }  # fmt: skip


def pair(number: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = phantom.draw(1234, number, 256)
    return drawn.image, drawn.mask


def form(number: int) -> aiohttp.FormData:
    image, mask = pair(number)
    data = aiohttp.FormData()
    data.add_field("image", images.encode_png(image), filename="i.png", content_type="image/png")
    data.add_field("mask", images.encode_mask(mask), filename="m.png", content_type="image/png")
    return data


def in_process() -> list[Judged]:
    """The verdicts on the same pairs, in this process."""
    gate = ImageGate(STARTER, None, None, STARTER / "gate", GateSection())
    pairs = [pair(n) for n in range(PAIRS)]
    return gate([images.resized(i, SIZE, SIZE) for i, _ in pairs], [images.resized(m, SIZE, SIZE) for _, m in pairs])


async def loaded(port: int, rate: float, seconds: float, wanted: list[Judged], watched: list[psutil.Process]) -> Seen:
    """`rate` requests a second for so long, whatever comes of those before."""
    seen, bodies = Seen(rate), [form(n)() for n in range(PAIRS)]
    raw = [(body.content_type, await encoded(body)) for body in bodies]
    timeout, tasks = aiohttp.ClientTimeout(total=90), set()
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(number: int) -> None:
            began = time.perf_counter()
            kind, data = raw[number]
            try:
                async with session.post(
                    f"http://127.0.0.1:{port}/v1/validate", data=data, headers={"Content-Type": kind}
                ) as answer:
                    given = await answer.json()
                    seen.statuses[str(answer.status)] += 1
                    if answer.status == 200:
                        seen.seconds.append(time.perf_counter() - began)
                        right = wanted[number]
                        seen.wrong += (given["verdict"], given["reason"]) != (right.verdict, right.reason)
                        seen.wrong += abs(given["iou"] - (right.iou or 0.0)) > 1e-6
            except (aiohttp.ClientError, TimeoutError) as error:
                seen.statuses[type(error).__name__] += 1

        began, sent, noted = time.perf_counter(), 0, 0.0
        while (now := time.perf_counter() - began) < seconds:
            while sent < now * rate:
                task = asyncio.create_task(one(sent % PAIRS))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            if now - noted >= 1:
                noted = now
                seen.rss.append(sum(process.memory_info().rss for process in watched))
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
    return seen


async def encoded(payload: Any) -> bytes:
    """A form's bytes, so that clients do not encode while they measure."""

    class Kept:
        data = bytearray()

        async def write(self, part: bytes) -> None:
            self.data += part

    kept = Kept()
    kept.data = bytearray()
    await payload.write(kept)
    return bytes(kept.data)


@contextlib.contextmanager
def web(handle: Any, settings: Settings) -> Iterator[tuple[int, int]]:
    """The web application in a thread of this process: its port and its process id."""
    sock = bound("127.0.0.1", 0)
    about = handle.about.remote().result()
    serving = server(gate_http.gateway(handle, SIZE, about["multiple"], settings).app(), "127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(serving.serve([sock])))
    thread.start()
    while not serving.started:
        time.sleep(0.01)
    try:
        yield sock.getsockname()[1], os.getpid()
    finally:
        serving.should_exit = True
        thread.join(60)
        sock.close()


def growth(rss: list[int]) -> float:
    """Share by which memory grew over the second half of a step, by the medians of its two quarters."""
    later = rss[len(rss) // 2 :]
    if len(later) < 4:
        return float("nan")
    middle = len(later) // 2
    return float(np.median(later[middle:]) / np.median(later[:middle]) - 1)


def climb(port: int, given: argparse.Namespace, wanted: list[Judged], watched: list[psutil.Process]) -> dict[str, Any]:
    steps, sustained, rate = [], None, given.first
    for _ in range(given.steps):
        step = asyncio.run(loaded(port, rate, given.seconds, wanted, watched)).summary()
        steps.append(step)
        print(json.dumps(step), flush=True)
        if set(step["statuses"]) != {"200"} or step["p99_s"] > given.p99_s:
            break
        sustained, rate = step, rate * given.factor
    over = asyncio.run(
        loaded(port, 2 * (sustained or steps[0])["asked_per_s"], given.overload_seconds, wanted, watched)
    )
    overload = over.summary() | {
        "only_200_429_503": set(over.statuses) <= {"200", "429", "503"},
        "rss_mib": [round(rss / 2**20) for rss in (over.rss[0], over.rss[-1])] if over.rss else [],
        "rss_growth_second_half": round(growth(over.rss), 4),
    }
    print(json.dumps(overload), flush=True)
    return {"steps": steps, "sustained": sustained, "overload": overload}


# ------------------------------------------------------------------------------------------------- handle and HTTP


class FreeGate:
    """A deployment with the gate's methods and none of its work."""

    def validate(self, image_latents: np.ndarray, masks: np.ndarray, stage: str = "final") -> list[dict[str, Any]]:
        return [{"outcome": "accepted", "reason": None, "scores": {"iou": 1.0}} for _ in image_latents]

    def judge(self, pixels: list[np.ndarray], masks: list[np.ndarray]) -> list[Judged]:
        return [Judged("accepted", None, 1.0, 0.7, {}, mask, {"vae": "", "gate": "", "policy": ""}) for mask in masks]

    def about(self) -> dict[str, Any]:
        return {"model": {}, "multiple": 8, "pid": os.getpid()}


def costs(calls: int) -> dict[str, float]:
    """Milliseconds an item: one handle call with 32 latents, and one HTTP call with an image, in turn."""
    from ray import serve

    deployment = serve.deployment(FreeGate).options(
        ray_actor_options={"num_cpus": 0.1}, logging_config={"enable_access_log": False, "log_level": "ERROR"}
    )
    handle = serve.run(deployment.bind(), name="free", route_prefix=None)
    latents = np.random.default_rng(0).normal(size=(BATCH, 4, SIZE // 4, SIZE // 4)).astype(np.float32)
    masks = np.zeros((BATCH, SIZE, SIZE), bool)
    by_handle, by_http = [], []

    async def asked(port: int, count: int) -> list[float]:
        data, found = form(0)(), []
        kind, raw = data.content_type, await encoded(data)
        async with aiohttp.ClientSession() as session:
            for _ in range(count):
                began = time.perf_counter()
                async with session.post(
                    f"http://127.0.0.1:{port}/v1/validate", data=raw, headers={"Content-Type": kind}
                ) as answer:
                    assert answer.status == 200, await answer.text()
                    await answer.read()
                found.append(time.perf_counter() - began)
        return found

    with web(handle, Settings(gather_s=0.0)) as (port, _):
        for turn in range(4):  # the first of each warms up
            for _ in range(calls):
                began = time.perf_counter()
                handle.validate.remote(latents, masks).result()
                by_handle += [(time.perf_counter() - began) / BATCH] if turn else []
            by_http += asyncio.run(asked(port, calls)) if turn else asyncio.run(asked(port, calls))[:0]
    serve.delete("free")
    each, whole = float(np.median(by_handle)) * 1e3, float(np.median(by_http)) * 1e3
    return {"handle_ms": round(each, 3), "http_ms": round(whole, 3), "ratio": round(each / whole, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="of a step")
    parser.add_argument("--overload-seconds", type=float, default=120)
    parser.add_argument("--first", type=float, default=2.0, help="requests a second of the first step")
    parser.add_argument("--factor", type=float, default=1.4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--p99-s", type=float, default=1.0)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--waiting", type=int, default=16, help="requests that may wait")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()

    wanted = in_process()
    with cluster.connect():
        arguments = gate_http.GateArguments(max_replicas=1, settings=Settings(max_waiting=given.waiting))
        handle = gate_http.start(arguments, None)
        watched = [psutil.Process(os.getpid()), psutil.Process(handle.about.remote().result()["pid"])]
        with web(handle, arguments.settings) as (port, _):
            found = climb(port, given, wanted, watched)
        gate_http.stop()
        found["cost_per_item"] = costs(given.calls)
    print(json.dumps(found["cost_per_item"]))
    given.out.write_text(
        json.dumps({"cpus": os.cpu_count(), "load_average": os.getloadavg(), **found}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
