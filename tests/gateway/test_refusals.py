"""What is not a pair of pictures is refused with a documented 4xx and one sentence, whatever it is."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gateway_client import as_json, encoded, files, lesion, problem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from factory.gateway.app import Gateway
from factory.gateway.refusal import STATUSES

URL = "/v1/validate"
TOKEN = "b1946ac92492d2347c6235b4d2611184"


def with_file(name: str, data: bytes) -> dict[str, Any]:
    return files(*lesion()) | {name: (name, data, "image/png")}


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that declares side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def animated(tmp_path: Path) -> bytes:
    frames = [Image.fromarray(np.full((48, 48, 3), value, np.uint8)) for value in (0, 90, 200)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    return (tmp_path / "a.webp").read_bytes()


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize(
    ("data", "status", "error"),
    [
        (b"", 422, "empty_file"),
        (b"GIF89a" + bytes(50), 415, "image_format"),
        (b"II*\0" + bytes(50), 415, "image_format"),
        (b"%PDF-1.7", 415, "image_format"),
        (b"\x80\x04\x95cos\nsystem\n", 415, "image_format"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), 422, "broken"),
        (b"\xff\xd8\xff\xe0" + bytes(50), 422, "broken"),
        (b"RIFF\x10\0\0\0WEBPVP8 " + bytes(30), 422, "broken"),
        (encoded(lesion()[0])[:-200], 422, "truncated"),
        (bomb(60_000), 413, "too_many_pixels"),
        (bomb(300), 413, "too_many_pixels"),
    ],
    ids=["empty", "gif", "tiff", "pdf", "pickle", "png_noise", "jpeg_noise", "webp_noise", "cut", "bomb", "above_cap"],
)
def test_a_file_that_is_no_picture(client: TestClient, name: str, data: bytes, status: int, error: str) -> None:
    said = problem(client.post(URL, files=with_file(name, data)), status, error)
    assert name in said["message"]


def test_an_animation(client: TestClient, tmp_path: Path) -> None:
    problem(client.post(URL, files=with_file("image", animated(tmp_path))), 422, "animated")


def test_a_mask_of_another_size_is_one_clear_sentence(client: TestClient) -> None:
    said = problem(client.post(URL, files=files(lesion(64)[0], lesion(48)[1])), 422, "mask_size")
    assert said["message"] == "The mask must have the image's 64 x 64 pixels, got 48 x 48; resize it."
    turned = files(lesion(48, width=64)[0], lesion(64, width=48)[1])
    assert "64 x 48 pixels, got 48 x 64" in problem(client.post(URL, files=turned), 422, "mask_size")["message"]


@pytest.mark.parametrize(
    ("side", "width", "error"), [(16, 16, "too_small"), (1, 400, "too_small"), (40, 200, "too_long")]
)
def test_pictures_in_which_nothing_can_be_seen(client: TestClient, side: int, width: int, error: str) -> None:
    problem(client.post(URL, files=files(*lesion(side, width=width))), 422, error)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"diagnosis": "freckle"}, "unknown_diagnosis"),
        ({"prompt": "x" * 2001}, "long_prompt"),
        ({"theta": "0.1"}, "unknown_field"),
    ],
)
def test_fields_that_are_wrong(client: TestClient, data: dict[str, str], error: str) -> None:
    problem(client.post(URL, files=files(*lesion()), data=data), 422, error)
    problem(client.post(URL, json=as_json(*lesion(), **data)), 422, error)


@pytest.mark.parametrize(
    ("change", "status", "error"),
    [
        ({"image": None}, 422, "wrong_type"),
        ({"image": 5}, 422, "wrong_type"),
        ({"mask": ["a"]}, 422, "wrong_type"),
        ({"mask": "not base64!"}, 422, "base64"),
        ({"mask": "é"}, 422, "base64"),
        ({"prompt": 1}, 422, "wrong_type"),
        ({"prompt": "\ud800"}, 422, "not_text"),
        ({"image": base64.b64encode(b"x").decode()}, 415, "image_format"),
        ({"": "x"}, 422, "unknown_field"),
    ],
)
def test_json_fields_of_a_wrong_kind(client: TestClient, change: dict[str, Any], status: int, error: str) -> None:
    body = json.dumps(as_json(*lesion()) | change)  # escaped, so half a surrogate pair can be sent
    problem(client.post(URL, content=body, headers={"Content-Type": "application/json"}), status, error)


@pytest.mark.parametrize("name", ["image", "mask"])
def test_a_field_that_is_missing_or_given_twice(client: TestClient, name: str) -> None:
    whole = files(*lesion())
    missing = {other: file for other, file in whole.items() if other != name}
    assert name in problem(client.post(URL, files=missing), 422, "missing_field")["message"]
    problem(client.post(URL, files=[*whole.items(), (name, whole[name])]), 422, "repeated_field")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"nul", b'"image"', b"[" * 100_000, b"1" * 5000, b"\xff\xfe", b'{"image":"","image":""}']
)
def test_a_body_that_is_no_json_object(client: TestClient, body: bytes) -> None:
    problem(client.post(URL, content=body, headers={"Content-Type": "application/json"}), 400, "json")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"--b", b"--b--", b"--b\r\n--b--", b"--b\r\n\r\nx\r\n--b--",
        b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nx',
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--",
        b'--b\r\nContent-Disposition: attachment; name="image"\r\n\r\nx\r\n--b--',
        b'--b\r\nContent-Disposition: form-data; name="image"\r\nContent-Transfer-Encoding: base64\r\n\r\nx\r\n--b--',
        b"--b\r\nX: " + b"y" * 9000 + b"\r\n\r\nx\r\n--b--",
        b"".join(b'--b\r\nContent-Disposition: form-data; name="p%d"\r\n\r\n\r\n' % n for n in range(30)) + b"--b--",
    ],
)  # fmt: skip
def test_a_body_that_is_no_form(client: TestClient, body: bytes) -> None:
    answer = client.post(URL, content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    problem(answer, 400, "multipart")


@pytest.mark.parametrize(
    ("headers", "status", "error"),
    [
        ({}, 415, "content_type"),
        ({"Content-Type": "text/plain"}, 415, "content_type"),
        ({"Content-Type": "image/png"}, 415, "content_type"),
        ({"Content-Type": "\xff\xfe"}, 415, "content_type"),
        ({"Content-Type": "multipart/form-data"}, 400, "boundary"),
        ({"Content-Type": "application/json", "Content-Encoding": "gzip"}, 415, "content_encoding"),
        ({"Content-Type": "application/json", "Content-Length": "-1"}, 400, "content_length"),
        ({"Content-Type": "application/json", "Content-Length": "7"}, 400, "content_length"),
        ({"Content-Type": "application/json", "Content-Length": "9" * 40}, 413, "body_too_large"),
    ],
)
def test_headers_that_promise_something_else(
    client: TestClient, headers: dict[str, str], status: int, error: str
) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    problem(client.post(URL, content=b"{}", headers=raw), status, error)


def test_a_body_above_the_cap_is_refused_by_its_length_and_while_it_comes(client: TestClient) -> None:
    drawn: list[int] = []

    def endless() -> Any:
        for number in range(10_000):
            drawn.append(number)
            yield bytes(10_000)

    headers = {"Content-Type": "application/json"}
    problem(client.post(URL, content=bytes(200_001), headers=headers), 413, "body_too_large")
    problem(client.post(URL, content=endless(), headers=headers), 413, "body_too_large")


def test_paths_and_methods_that_are_not_there(client: TestClient) -> None:
    problem(client.get("/v1/nothing"), 404, "no_path")
    problem(client.get("/docs/../../etc/passwd"), 404, "no_path")
    answer = client.get(URL)
    assert problem(answer, 405, "no_method") and answer.headers["allow"] == "POST"
    assert client.delete("/metrics").status_code == 405


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}é",
        TOKEN,
    ],
)
def test_a_wrong_token_is_401_before_anything_is_read(
    make_gateway: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch, header: str | None
) -> None:
    monkeypatch.setenv("FACTORY_GATE_TOKEN", TOKEN)
    gateway = make_gateway()
    headers = [] if header is None else [(b"authorization", header.encode())]
    with TestClient(gateway.app()) as client:
        answer = client.post(URL, content=b"nonsense", headers=headers)
        assert problem(answer, 401, "token") and answer.headers["www-authenticate"] == "Bearer"
        assert TOKEN not in answer.text
        right = {"Authorization": f"bearer {TOKEN}"}
        assert client.post(URL, files=files(*lesion()), headers=right).status_code == 200
        assert [client.get(path).status_code for path in ("/healthz", "/readyz", "/metrics", "/openapi.json")] == [
            200
        ] * 4
        assert client.get("/openapi.json").json()["paths"][URL]["post"]["security"] == [{"token": []}]


async def asked(app: Any, body: bytes, kind: str) -> int:
    """The status of one request, without a client's own work, of which ten thousand would take a minute."""
    statuses: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

    headers = [(b"content-type", kind.encode()), (b"content-length", b"%d" % len(body))]
    scope = {"type": "http", "method": "POST", "path": URL, "raw_path": URL.encode(), "query_string": b"",
             "headers": headers, "http_version": "1.1", "scheme": "http"}  # fmt: skip
    await app(scope, receive, send)
    (status,) = statuses
    return status


def test_ten_thousand_random_bodies_are_refused_and_the_gate_goes_on(make_gateway: Callable[..., Gateway]) -> None:
    rng, app = np.random.default_rng(5), make_gateway(max_body_bytes=200_000, max_pixels=40_000).app()
    form, picture = "multipart/form-data; boundary=b", encoded(lesion()[0])
    head = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'

    async def all_of_them() -> Counter[int]:
        seen: Counter[int] = Counter()
        for number in range(10_000):
            noise = rng.bytes(int(rng.integers(0, 400)))
            if number % 4 == 1:  # noise behind the first bytes of a picture
                noise = picture[: int(rng.integers(4, 60))] + noise
            elif number % 40 == 2:  # a picture with a few bytes changed
                changed = bytearray(picture)
                for at in rng.integers(8, len(picture), 5):
                    changed[at] = int(rng.integers(256))
                noise = bytes(changed)
            if number % 4:
                noise = head % b"image" + noise + b"\r\n" + head % b"mask" + noise + b"\r\n--b--"
            seen[await asked(app, noise, form if number % 3 else "application/json")] += 1
        good = json.dumps(as_json(*lesion())).encode()
        assert await asked(app, good, "application/json") == 200
        return seen

    seen = asyncio.run(all_of_them())
    assert set(seen) <= {200, 400, 413, 415, 422} and seen.total() == 10_000, seen
    assert all(seen[status] > 100 for status in (400, 415, 422)), seen


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PICTURE = st.sampled_from([base64.b64encode(encoded(lesion(side)[0])).decode() for side in (32, 48)])


@settings(max_examples=100)
@given(
    body=JSON | st.fixed_dictionaries(
        {"image": PICTURE | JSON, "mask": PICTURE | JSON}, optional={"prompt": JSON, "diagnosis": JSON, "other": JSON}
    )
)  # fmt: skip
def test_json_of_any_shape_gets_a_documented_answer(client: TestClient, body: Any) -> None:
    sent = json.dumps(body)  # with the Infinity and the half surrogate pairs that no careful client sends
    answer = client.post(URL, content=sent, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 or (answer.status_code in STATUSES and answer.status_code < 500), answer.text
