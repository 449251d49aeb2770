"""One pair in, one verdict out: the same as the gate's in this process, recorded, counted, and no pixel kept."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from gateway_client import as_json, encoded, files, judge_with, lesion, problem
from starlette.testclient import TestClient

from factory import images
from factory.gateway.app import Gateway
from factory.gateway.model import ImageGate, policy_digest
from factory.models.families import load_denoiser
from factory.quality.edges import edge_contrast
from factory.quality.overlap import iou
from factory.recipe import GateSection
from factory.stages.score import ScoreSamples

LENIENT = {"min_iou": 0.0, "min_area": 0.0, "max_area": 1.0, "min_solidity": 0.0, "shift_tolerance": 0.0}


def post(client: TestClient, image: np.ndarray, mask: np.ndarray, **data: str) -> Any:
    return client.post("/v1/validate", files=files(image, mask), data=data)


def test_the_answer_is_what_the_gate_of_a_pipeline_says_of_the_same_latents(
    client: TestClient, tiny_weights: Any
) -> None:
    image, mask = lesion(32)
    denoiser = load_denoiser(tiny_weights.generator)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    latents = denoiser.image_latents(denoiser.encode(pixels, torch.from_numpy(mask)[None, None].float())).numpy()
    score = ScoreSamples(tiny_weights.gate, denoiser.vae_digest, GateSection())
    (wanted,) = score(latents, mask[None])
    found = score.segment(latents)[0] > 0.5

    answer = post(client, image, mask, prompt="a mole", diagnosis="nevus")
    assert answer.status_code == 200, answer.text
    given = answer.json()
    assert set(given) == {"verdict", "reason", "iou", "theta", "scores", "mask", "model"}
    assert (given["verdict"], given["reason"]) == (wanted["outcome"], wanted["reason"])
    assert given["iou"] == pytest.approx(wanted["scores"]["iou"], abs=1e-3)
    scores = {k: v for k, v in wanted["scores"].items() if k != "iou"}  # and what the pixels that were sent say
    assert given["scores"] == pytest.approx(scores | {"score_edge_contrast": edge_contrast(image, mask)}, abs=1e-3)
    seen = images.read_mask(base64.b64decode(given["mask"]))
    assert seen.shape == (32, 32) and (seen != found).mean() < 0.01
    assert given["iou"] == pytest.approx(float(iou(seen, mask)), abs=1e-6)
    assert given["model"]["vae"] == denoiser.vae_digest
    assert given["model"]["policy"] == policy_digest(GateSection())


def test_a_form_and_json_and_every_format_say_the_same(client: TestClient) -> None:
    image, mask = lesion(64, width=96)
    form = post(client, image, mask).json()
    assert client.post("/v1/validate", json=as_json(image, mask, prompt=None)).json() == form
    assert images.read_mask(base64.b64decode(form["mask"])).shape == (64, 96)
    for kind in ("JPEG", "WEBP"):
        answer = client.post("/v1/validate", files=files(image, mask, kind))
        assert answer.status_code == 200, answer.text
        assert answer.json()["iou"] == pytest.approx(form["iou"], abs=0.1)


def test_theta_is_that_of_the_lesions_size_and_decides(make_gateway: Callable[..., Gateway], make_gate: Any) -> None:
    image, mask = lesion(32, 0.3)
    small = lesion(32, 0.1)[1]
    with TestClient(make_gateway(of=make_gate(**{**LENIENT, "min_iou": 0.7, "shift_tolerance": 0.05})).app()) as client:
        large, little = post(client, image, mask).json(), post(client, image, small).json()
    assert large["theta"] == 0.7 and 0 < little["theta"] < 0.7
    assert (large["reason"] == "low_iou") == (large["iou"] < 0.7)
    with TestClient(make_gateway(of=make_gate(**LENIENT)).app()) as client:
        assert post(client, image, mask).json()["verdict"] == "accepted"
        assert post(client, image, mask).json()["iou"] == large["iou"]


def test_a_mask_whose_contour_lies_on_no_edge_is_rejected_where_a_bound_is_given(
    make_gateway: Callable[..., Gateway], make_gate: Any
) -> None:
    image, mask = lesion(32)
    with TestClient(make_gateway(of=make_gate(**LENIENT, min_edge_contrast=1.2)).app()) as client:
        on, off = post(client, image, mask).json(), post(client, image, np.roll(mask, 8, axis=1)).json()
    assert (on["verdict"], off["verdict"], off["reason"]) == ("accepted", "rejected", "faint_edge")
    assert on["scores"]["score_edge_contrast"] > 1.2 > off["scores"]["score_edge_contrast"]


def test_scores_that_are_no_numbers_reject_and_are_null(make_gateway: Callable[..., Gateway], make_gate: Any) -> None:
    broken = make_gate(**LENIENT)
    with torch.no_grad():
        for parameter in broken.score.segmenter.parameters():
            parameter.fill_(float("nan"))
    with TestClient(make_gateway(of=broken).app()) as client:
        answer = post(client, *lesion())
    given = json.loads(answer.content, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (given["verdict"], given["reason"]) == ("rejected", "non_finite")
    assert given["scores"]["score_confidence"] is None


def test_an_answer_keeps_what_the_page_promises(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    schema = {"$ref": "#/components/schemas/Answer", "components": described["components"]}
    jsonschema.validate(post(client, *lesion()).json(), schema)
    page = client.get("/")
    assert "/v1/validate" in page.text and "<script" not in page.text and "//" not in page.text.replace("://", "")


def test_every_decision_is_one_line_of_the_audit_log_and_no_input_is_in_it(
    make_gateway: Callable[..., Gateway], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "a-token-of-the-test-0123456789"
    monkeypatch.setenv("FACTORY_GATE_TOKEN", token)
    image, mask = lesion()
    folder = tmp_path / "audit"
    with TestClient(make_gateway(audit=str(folder)).app()) as client:
        client.headers["Authorization"] = f"Bearer {token}"
        answers = [post(client, image, mask, prompt="Jane Doe's mole"), post(client, image, mask)]
        problem(post(client, image, mask[:40]), 422, "mask_size")
    (path,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["request_id"] for line in lines] == [answer.headers["gate-request-id"] for answer in answers]
    first, given = lines[0], answers[0].json()
    for name in ("verdict", "reason", "iou", "theta", "scores", "model"):
        assert first[name] == given[name]
    assert first["image_sha256"] == hashlib.sha256(encoded(image)).hexdigest()
    assert first["prompt_sha256"] == hashlib.sha256(b"Jane Doe's mole").hexdigest()
    assert (first["width"], first["height"], lines[1]["prompt_sha256"]) == (48, 48, None)
    text = path.read_text()
    assert "Jane" not in text and token not in text and max(len(line) for line in text.splitlines()) < 1500


def test_a_full_audit_file_is_followed_by_another(tmp_path: Path) -> None:
    from factory.gateway.audit import AuditLog

    log = AuditLog(tmp_path / "audit", max_file_bytes=300)
    for number in range(6):
        log.write(number=number, filler="x" * 60)
    lines = [line for path in sorted(log.folder.iterdir()) for line in path.read_text().splitlines()]
    assert [json.loads(line)["number"] for line in lines] == list(range(6))
    assert len(list(log.folder.iterdir())) == 3  # two lines of 127 bytes each


def test_a_decision_that_cannot_be_recorded_is_not_given(
    make_gateway: Callable[..., Gateway], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = make_gateway(audit=str(tmp_path))
    os.close(gateway._audit._file)  # type: ignore[union-attr]  # the disk is gone
    with TestClient(gateway.app()) as client:
        assert problem(post(client, *lesion()), 503, "no_audit") and post(client, *lesion()).headers["retry-after"]
    gateway._audit._file = os.open(os.devnull, os.O_WRONLY)  # type: ignore[union-attr]


def test_metrics_count_requests_decisions_and_time(make_gateway: Callable[..., Gateway]) -> None:
    with TestClient(make_gateway().app()) as client:
        given = post(client, *lesion()).json()
        client.post("/v1/validate", content=b"x", headers={"Content-Type": "text/plain"})
        client.get("/anything")
        text = client.get("/metrics").text
    assert 'factory_gate_requests_total{path="/v1/validate",status="200"} 1.0' in text
    assert 'factory_gate_requests_total{path="/v1/validate",status="415"} 1.0' in text
    assert 'factory_gate_requests_total{path="other",status="404"} 1.0' in text
    reason = given["reason"] or ""
    assert f'factory_gate_decisions_total{{reason="{reason}",verdict="{given["verdict"]}"}} 1.0' in text
    assert 'factory_gate_request_seconds_count{path="/v1/validate"} 2.0' in text
    assert "factory_gate_queue_depth 0.0" in text and 'factory_gate_call_size_bucket{le="1.0"} 1.0' in text


def test_a_diagnosis_that_is_rejected_too_often_is_a_metric(make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway()
    for _ in range(20):
        gateway.metrics.alarms.add("melanoma", "rejected")
        gateway.metrics.alarms.add(None, "accepted")
    with TestClient(gateway.app()) as client:
        post(client, *lesion(), diagnosis="nevus")
        text = client.get("/metrics").text
    assert 'factory_gate_rejected_too_often{diagnosis="melanoma"} 1.0' in text
    assert 'factory_gate_rejected_too_often{diagnosis=""} 0.0' in text
    assert 'factory_gate_rejected_too_often{diagnosis="nevus"} 0.0' in text


def test_health_is_the_process_and_readiness_the_gate(make_gateway: Callable[..., Gateway], gate: ImageGate) -> None:
    gateway = make_gateway()
    with TestClient(gateway.app()) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {"status": "ready", "model": gate.model}

        async def never() -> dict[str, str]:
            raise ConnectionError("no replica")

        gateway._ready = never
        assert problem(client.get("/readyz"), 503, "not_ready") and client.get("/healthz").status_code == 200


def test_requests_at_once_share_calls_and_each_gets_its_own_answer(
    make_gateway: Callable[..., Gateway], gate: ImageGate
) -> None:
    sizes, real = [], judge_with(gate)

    async def judge(pairs: Any) -> Any:
        sizes.append(len(pairs))
        return await real(pairs)

    radii = [0.15 + 0.02 * n for n in range(12)]
    pairs = [lesion(48, radius, 48 + 8 * (n % 3)) for n, radius in enumerate(radii)]
    with TestClient(make_gateway().app()) as client:
        alone = [post(client, *pair).json() for pair in pairs]
    with (
        TestClient(make_gateway(judge=judge, gather_s=0.2, max_batch=4).app()) as client,
        ThreadPoolExecutor(12) as pool,
    ):
        together = list(pool.map(lambda pair: post(client, *pair).json(), pairs))
    assert together == alone, "an answer depends on its neighbours"
    assert sum(sizes) == 12 and max(sizes) <= 4 and len(sizes) < 12


def test_a_queue_that_is_full_answers_429_at_once_and_then_goes_on(
    make_gateway: Callable[..., Gateway], gate: ImageGate
) -> None:
    release, real = threading.Event(), judge_with(gate)

    async def judge(pairs: Any) -> Any:
        import asyncio

        await asyncio.to_thread(release.wait)
        return await real(pairs)

    gateway = make_gateway(judge=judge, max_waiting=3, retry_after_s=7)
    with TestClient(gateway.app()) as client, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(post, client, *lesion()) for _ in range(3)]
        while gateway._waiting < 3:
            pass
        refused = post(client, *lesion())
        assert problem(refused, 429, "busy") and refused.headers["retry-after"] == "7"
        assert client.get("/healthz").status_code == 200
        assert "factory_gate_queue_depth 3.0" in client.get("/metrics").text
        release.set()
        assert [done.result().status_code for done in waiting] == [200] * 3
        assert post(client, *lesion()).status_code == 200


def test_a_gate_that_is_slow_or_dies_is_a_503_to_try_again(make_gateway: Callable[..., Gateway]) -> None:
    import asyncio

    async def slow(pairs: Any) -> Any:
        await asyncio.sleep(30)

    async def dead(pairs: Any) -> Any:
        raise RuntimeError("secret detail of a replica")

    for judge, error in ((slow, "slow_gate"), (dead, "no_gate")):
        with TestClient(make_gateway(judge=judge, answer_s=0.1).app()) as client:
            answer = post(client, *lesion())
            assert problem(answer, 503, error) and answer.headers["retry-after"] == "1"
            assert "secret" not in answer.text
