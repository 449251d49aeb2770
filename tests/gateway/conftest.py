"""A gateway on the real tiny gate of `tiny_weights`, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from gateway_client import SIZE, judge_with
from starlette.testclient import TestClient

from factory.gateway.app import Gateway
from factory.gateway.model import ImageGate
from factory.gateway.settings import Settings
from factory.recipe import GateSection


@pytest.fixture(scope="session")
def make_gate(tiny_weights: Any) -> Callable[..., ImageGate]:
    def make(**policy: Any) -> ImageGate:
        return ImageGate(tiny_weights.generator, None, None, tiny_weights.gate, GateSection(**policy))

    return make


@pytest.fixture(scope="session")
def gate(make_gate: Callable[..., ImageGate]) -> ImageGate:
    return make_gate()


@pytest.fixture(scope="session")
def make_gateway(gate: ImageGate) -> Callable[..., Gateway]:
    """`make_gateway(judge=..., gate=..., **settings)`: by default the tiny gate, without a token."""

    def make(*, judge: Any = None, of: ImageGate | None = None, **settings: Any) -> Gateway:
        model = of or gate

        async def ready() -> dict[str, str]:
            return model.model

        return Gateway(judge or judge_with(model), ready, SIZE, model.multiple, Settings(**settings))

    return make


@pytest.fixture(scope="session")
def client(make_gateway: Callable[..., Gateway]) -> Iterator[TestClient]:
    with TestClient(make_gateway(max_body_bytes=200_000, max_pixels=40_000).app()) as found:
        yield found
