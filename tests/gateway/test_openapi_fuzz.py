"""The OpenAPI document is what a client may rely on: schemathesis sends what it allows and what it forbids.

schemathesis is not among the pins; install it beside the environment (`uv pip install --target DIR schemathesis`) and
name DIR in DERMAFACTORY_SCHEMATHESIS.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gateway_client import listening

from factory.gateway.app import Gateway

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,unsupported_method"
)


def test_schemathesis_finds_nothing(make_gateway: Callable[..., Gateway], tmp_path: Path) -> None:
    folder = Path(os.environ.get("DERMAFACTORY_SCHEMATHESIS", ""))
    if not (folder / "schemathesis").is_dir():
        pytest.skip("schemathesis is not here; set DERMAFACTORY_SCHEMATHESIS to the folder it was installed to")
    with listening(make_gateway(max_body_bytes=200_000)) as port:
        done = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json",
                "--max-examples", os.environ.get("DERMAFACTORY_SCHEMATHESIS_EXAMPLES", "40"), "--seed", "1",
                "--workers", "1", "--generation-database", "none", "--checks", CHECKS,
            ],
            env={**os.environ, "PYTHONPATH": str(folder)}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "POST /v1/validate" in done.stdout or "passed" in done.stdout, json.dumps(done.stdout[-1000:])
