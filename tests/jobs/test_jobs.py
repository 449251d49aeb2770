"""A job and a command are one thing; and one job, submitted to a real head behind a token."""

from __future__ import annotations

import contextlib
import os
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import typer

from factory.cli import app
from factory.run import Run

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SCRIPTS = sorted(path for path in JOBS.glob("*.py") if path.stem not in {"fit_starter", "scaling"})
RAY = Path(sys.executable).parent / "ray"
PATIENCE_S = 300.0  # seconds on a quiet machine; a loaded one may take minutes
ATTEMPTS = 3  # to start a head
WORKER_PORTS = range(10002, 20000)  # Ray keeps these for its workers, and refuses a head in them


# ------------------------------------------------------------------------------------------------------ scripts


def run_script(script: Path, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The script as `python script arguments` runs it, in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    return int(stop.value.code or 0)


def test_every_job_is_named_after_a_command() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    steps = {"ingest", "caption", "fit", "plan", "synthesize", "evaluate", "release", "demo"}
    assert {script.stem for script in SCRIPTS} == steps <= commands


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_takes_what_its_command_takes(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(script, "--help", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert f"Usage: factory {script.stem} " in said
    assert "--recipe" in said
    assert run_script(script, "--no-such-option", monkeypatch=monkeypatch) == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_job_says_how_it_is_submitted(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 25
    assert f"ray job submit --address http://127.0.0.1:8265 -- python $PWD/jobs/{script.name} " in text


# ------------------------------------------------------------------------------------------------------ a real head


@dataclass(frozen=True)
class Head:
    """A running head: its dashboard and the environment that holds its token."""

    address: str
    environment: dict[str, str]

    def submit(self, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """As a user does: a head whose agent is not up yet says so after ten seconds, and is asked again."""
        command = [str(RAY), "job", "submit", "--address", self.address, "--", "python", *map(str, arguments)]
        until = time.monotonic() + PATIENCE_S
        while True:
            done = subprocess.run(
                command,
                env=environment or self.environment,
                capture_output=True,
                text=True,
                timeout=PATIENCE_S,
                check=False,
            )
            if "No available agent" not in done.stderr or time.monotonic() > until:
                return done
            time.sleep(1)


def free_ports(count: int) -> list[int]:
    """Ports that are free now and that Ray's workers do not claim."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            bound = stack.enter_context(socket.socket())
            bound.bind(("127.0.0.1", 0))
            if (port := bound.getsockname()[1]) not in WORKER_PORTS:
                found.append(port)
        return found


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started, and nothing else: `ray stop` would end every Ray of this machine."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its own group, see start_new_session
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # an id used again is another process, and psutil knows
            member.kill()
    process.wait(20)
    psutil.wait_procs(family, timeout=20)


def opens(port: int, process: subprocess.Popen[bytes], log: Path) -> bool:
    """Waits until Ray says it runs and its dashboard is served; False when it gave up, or time is up."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            if "Ray runtime started" in log.read_text():
                return True
        time.sleep(0.5)
    return False


def start_head(temporary: Path, environment: dict[str, str], log: Path) -> tuple[subprocess.Popen[bytes], int]:
    """`ray start --head` with ports, folder and process group of its own; the process and its dashboard's port."""
    port, dashboard, client, agent, metrics = free_ports(5)
    command = [
        str(RAY), "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        f"--metrics-export-port={metrics}", f"--temp-dir={temporary}", "--num-cpus=8", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    return process, dashboard


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head behind a token. It ends with the test.

    Ray gives its own start 30 seconds, which no setting changes; a loaded machine may need another attempt.
    """
    temporary = Path(tempfile.mkdtemp(prefix="df", dir="/tmp"))  # socket paths must stay below 108 bytes
    token, log = tmp_path / "token", tmp_path / "head.log"
    token.write_text(secrets.token_hex(16))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    process, dashboard = start_head(temporary, environment, log)
    try:
        for _ in range(ATTEMPTS - 1):
            if opens(dashboard, process, log):
                break
            end(process)
            process, dashboard = start_head(temporary, environment, log)
        assert opens(dashboard, process, log), log.read_text()
        yield Head(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        end(process)
        shutil.rmtree(temporary, ignore_errors=True)


def test_a_submitted_ingest_seals_the_corpus_and_without_the_token_nothing_is_taken(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (JOBS / "ingest.py", "--run", run, "--recipe", "smoke", "--set", "corpus.phantoms.count=20")

    stranger = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH_")}
    refused = head.submit(*arguments, environment=stranger | {"HOME": str(tmp_path / "nobody")})
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
    assert not run.exists()

    done = head.submit(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"done        {run}" in done.stdout

    corpus = Run(run).table("corpus")
    assert corpus.sealed().rows == 20
    assert corpus.counts() == {"accepted": 20}
    assert corpus.verify() == []
