"""On a socket: clients that lie about lengths, that are slow, that never finish; and TLS."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from gateway_client import encoded, lesion, listening

from factory.gateway.app import Gateway


def form() -> bytes:
    image, mask = lesion()
    head = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n'
    return (
        head % b"image"
        + encoded(image)
        + b"\r\n"
        + head % b"mask"
        + encoded(mask.astype("uint8") * 255)
        + b"\r\n--b--\r\n"
    )


def request(length: object, *headers: str) -> bytes:
    lines = [
        "POST /v1/validate HTTP/1.1", "Host: gate", "Content-Type: multipart/form-data; boundary=b",
        *([] if length is None else [f"Content-Length: {length}"]), *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def said(port: int, *pieces: bytes, pause_s: float = 0.0, timeout_s: float = 10.0, half_close: bool = False) -> bytes:
    """All that the server answers to the pieces until it closes, or for `timeout_s`."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for piece in pieces:
                sock.sendall(piece)
                time.sleep(pause_s)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while part := sock.recv(65536):
                found += part
    return found


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.fixture(scope="module")
def port(make_gateway: Callable[..., Gateway]) -> int:  # type: ignore[misc]
    gateway = make_gateway(max_body_bytes=100_000, body_s=0.5, drain_s=2.0)
    with listening(gateway, headers_s=0.5, max_connections=40) as found:
        yield found  # type: ignore[misc]


def answers(port: int) -> bool:
    body = form()
    return status_of(said(port, request(len(body), "Connection: close"), body)) == 200


def test_a_declared_length_above_the_cap_is_refused_before_a_byte_of_it_is_sent(port: int) -> None:
    for length in (100_001, 10**9, 10**15):
        began = time.monotonic()
        assert status_of(said(port, request(length))) == 413
        assert time.monotonic() - began < 5


def test_a_body_without_a_length_is_cut_off_at_the_cap(port: int) -> None:
    chunk = b"%x\r\n" % 20_000 + bytes(20_000) + b"\r\n"
    assert status_of(said(port, request(None, "Transfer-Encoding: chunked"), *[chunk] * 8, pause_s=0.02)) == 413


def test_fewer_bytes_than_declared_are_waited_for_and_then_refused(port: int) -> None:
    body = form()
    began = time.monotonic()
    assert status_of(said(port, request(len(body) + 500), body)) == 408
    assert 0.4 < time.monotonic() - began < 8


def test_a_client_that_hangs_up_in_the_middle_gets_no_verdict(port: int) -> None:
    body = form()
    assert b"verdict" not in said(port, request(len(body)), body[:300], half_close=True)
    assert answers(port)


def test_more_bytes_than_declared_are_no_part_of_the_request(port: int) -> None:
    body = form()
    answer = said(port, request(len(body)), body + b"GARBAGE \x00\x01\r\n\r\n", timeout_s=3)
    assert status_of(answer) == 200 and answer.count(b"HTTP/1.1 ") <= 2
    assert b"HTTP/1.1 5" not in answer


@pytest.mark.parametrize("length", ["-5", "abc", "1e3", "12, 13"])
def test_a_length_that_is_no_number(port: int, length: str) -> None:
    assert status_of(said(port, request(length), b"{}")) == 400


def test_bytes_that_are_no_http(port: int) -> None:
    for noise in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"HELLO\r\n\r\n",
        b"\x00" * 500 + b"\r\n\r\n",
    ):
        assert status_of(said(port, noise)) == 400
    assert status_of(said(port, b"GET / HTTP/1.1\r\nHost: gate\r\nX: " + b"y" * 70_000)) in (0, 400)


def test_a_slow_body_is_408_and_slow_headers_are_hung_up_on(port: int) -> None:
    body = form()
    began = time.monotonic()
    slow = said(port, request(len(body)), *[body[n : n + 10] for n in range(0, 300, 10)], pause_s=0.05)
    assert status_of(slow) == 408
    dripping = said(port, *[b"GET / HTTP/1.1\r\nX", *[b"x"] * 40], pause_s=0.05)
    assert dripping == b"" and time.monotonic() - began < 20


def test_idle_and_dripping_connections_have_an_end_and_keep_nobody_out_for_longer(port: int) -> None:
    crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    try:
        for sock in crowd:
            sock.sendall(b"POST /v1/validate HTTP/1.1\r\nHost: ga")
        full = said(port, b"GET /healthz HTTP/1.1\r\nHost: gate\r\nConnection: close\r\n\r\n")
        assert status_of(full) == 503 and b"Retry-After" in full
        deadline = time.monotonic() + 10
        while not answers(port):
            assert time.monotonic() < deadline, "slow connections keep others out"
            time.sleep(0.2)
    finally:
        for sock in crowd:
            sock.close()


def test_a_page_over_tls_by_its_certificate(make_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    with listening(make_gateway(), tls=(str(cert), str(key))) as secure:
        trusted = ssl.create_default_context(cafile=str(cert))
        with urllib.request.urlopen(f"https://127.0.0.1:{secure}/healthz", context=trusted) as answer:
            assert json.load(answer) == {"status": "ok"}
        assert status_of(said(secure, b"GET / HTTP/1.1\r\nHost: gate\r\n\r\n", timeout_s=3)) != 200
