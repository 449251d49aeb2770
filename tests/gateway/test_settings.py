"""Who may reach the gate: tokens, their files, addresses; and a policy file that is followed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory.gateway.policy_file import PolicyFile
from factory.gateway.server import bound
from factory.gateway.settings import Settings, check_exposure, is_loopback, token_of
from factory.recipe import GateSection

LONG = "b1946ac92492d2347c6235b4d2611184"


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FACTORY_GATE_TOKEN", raising=False)


def private(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_loopback_needs_no_token_and_any_other_address_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert is_loopback(host) and not check_exposure(host, Settings(), None, None).require_token
    for host in ("0.0.0.0", "::", "192.168.1.5", "gate.example.org"):
        with pytest.raises(ValueError, match="a token must be set, got none; set FACTORY_GATE_TOKEN"):
            check_exposure(host, Settings(), None, None)
    monkeypatch.setenv("FACTORY_GATE_TOKEN", "short")
    assert token_of(Settings()) == "short"
    with pytest.raises(ValueError, match="must have at least 16 characters where others can reach the port, got 5"):
        check_exposure("0.0.0.0", Settings(), None, None)
    monkeypatch.setenv("FACTORY_GATE_TOKEN", LONG)
    assert check_exposure("0.0.0.0", Settings(), None, None).require_token


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604, 0o700])
def test_a_token_file_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = private(tmp_path / "token", LONG, mode)
    with pytest.raises(ValueError, match=f"must have mode 0600, got {mode:04o}; run `chmod 600 {path}`"):
        token_of(Settings(token_file=path))


def test_a_token_file_of_its_owner_alone_goes_before_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_GATE_TOKEN", "another")
    assert token_of(Settings(token_file=private(tmp_path / "token", LONG + "\n"))) == LONG
    with pytest.raises(ValueError, match="a token must be set"):
        token_of(Settings(token_file=private(tmp_path / "empty", "\n"), require_token=True))
    with pytest.raises(ValueError, match="--token-file must be a readable text file"):
        token_of(Settings(token_file=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="must be printable ASCII without spaces"):
        token_of(Settings(token_file=private(tmp_path / "spaces", "two words")))


def test_certificate_and_key_come_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--tls-cert and --tls-key must be given together"):
        check_exposure("127.0.0.1", Settings(), "cert.pem", None)
    with pytest.raises(ValueError, match="--tls-cert must be a readable PEM file, got"):
        check_exposure("127.0.0.1", Settings(), str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with bound("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(ValueError, match=r"--port must be free on 127.0.0.1, got \d+ .*; choose another"):
            bound("127.0.0.1", sock.getsockname()[1])


def test_a_policy_file_is_followed_and_a_wrong_version_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("gate: {min_iou: 0.8}\n")
    followed, applied, said = PolicyFile(path), list[GateSection](), list[str]()
    assert followed.read().min_iou == 0.8

    async def story() -> None:
        task = asyncio.create_task(followed.follow(applied.append, said.append, poll_s=0.01))

        async def written(text: str) -> None:
            heard = len(said)
            (tmp_path / "new").write_text(text)
            os.replace(tmp_path / "new", path)
            while len(said) == heard:
                await asyncio.sleep(0.01)

        await written("gate: {min_iou: 0.9}\n")
        await written("gate: {min_iou: 7}\n")
        await written("gate: [")
        await written("gate: {min_iou: 0.6}\n")
        task.cancel()

    asyncio.run(asyncio.wait_for(story(), 20))
    assert [section.min_iou for section in applied] == [0.9, 0.6]
    assert "from now on" in said[0] and "unchanged" in said[1] and "min_iou" in said[1] and "unchanged" in said[2]


def test_the_command_prints_a_policy_and_refuses_a_wrong_request(
    factory_command: Callable[..., Any], tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("gate: {min_iou: 0.8}\n")
    bad.write_text("gate: {min_iuo: 0.8}\n")
    said = factory_command("gate", "policy", good)
    assert said.status == 0 and '"min_iou": 0.8' in said.out and "\npolicy      " in said.out
    said = factory_command("gate", "policy", bad)
    assert said.status == 2 and "min_iou" in said.err
    said = factory_command("gate", "serve", "--host", "0.0.0.0", "--port", "0")
    assert said.status == 2 and "a token must be set" in said.err
    said = factory_command("gate", "serve", "--policy", tmp_path / "none.yaml")
    assert said.status == 2 and "--policy must be a YAML file" in said.err
