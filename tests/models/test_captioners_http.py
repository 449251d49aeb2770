"""The http captioner against an endpoint that is slow, busy, broken, talks garbage or costs money."""

from __future__ import annotations

import json
import random
import re
import time
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
from stub_endpoint import good, serving

from factory.models.captioners.http import Budget, HttpCaptioner, read_completion, retry_after_s
from factory.models.captioners.protocol import Request
from factory.progress import Stopped
from factory.recipe import CaptionSection, HttpSection


def section(address: str, **http: Any) -> CaptionSection:
    settings = {"name": "tiny", "timeout_s": 5.0, "tries": 3, "concurrency": 4, **http}
    return CaptionSection(captioner="http", model=address, http=HttpSection(**settings))


def requests(count: int) -> list[Request]:
    return [Request(np.full((8, 8, 3), k, np.uint8), f"describe {k}") for k in range(count)]


def captioner(address: str, waits: list[float] | None = None, **http: Any) -> HttpCaptioner:
    sleep = (lambda s: None) if waits is None else waits.append
    return HttpCaptioner(section(address, **http), sleep=sleep, rng=random.Random(0))


def test_answers_come_in_order_with_their_tokens_and_the_schema_constrains() -> None:
    with serving(lambda image, nth: good(image[-40:])) as endpoint:
        found = captioner(endpoint.address).ask(requests(9))
        assert [answer.text is not None and answer.tokens_in == 100 for answer in found] == [True] * 9
        assert len({answer.text for answer in found}) == 9 and len(endpoint.asked) == 9
        assert [a.text for a in found] == [a.text for a in captioner(endpoint.address).ask(requests(9))]
    body = endpoint.bodies[0]
    assert body["temperature"] == 0 and body["model"] == "tiny" and body["max_tokens"] == 256
    wanted = body["response_format"]["json_schema"]["schema"]
    assert wanted["required"] == ["asymmetry", "border_irregularity", "colors", "description"]
    assert wanted["additionalProperties"] is False and endpoint.tokens[0] is None


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_busy_or_broken_endpoint_is_asked_again(status: int) -> None:
    with serving(lambda image, nth: good() if nth > 2 else (status, {}, b"busy")) as endpoint:
        found = captioner(endpoint.address).ask(requests(3))
    assert all(answer.problem is None for answer in found)
    assert set(endpoint.asked.values()) == {3}


def test_what_stays_broken_is_a_named_problem_of_its_own_row() -> None:
    replies = {0: (500, {}, b""), 1: (429, {}, b""), 2: (200, {}, b"<html>"), 3: (400, {}, b"{}"), 4: 2.0}

    def answer(image: str, nth: int) -> Any:
        return replies.get(order.index(image), good())

    with serving(answer) as endpoint:
        asker = captioner(endpoint.address, timeout_s=0.4)
        shown = requests(7)
        order = [asker.body(one)["messages"][0]["content"][0]["image_url"]["url"] for one in shown]
        found = asker.ask(shown)
    assert [one.problem for one in found] == ["http_500", "http_429", "garbage", "http_400", "timeout", None, None]
    assert [endpoint.asked[image] for image in order] == [3, 3, 3, 1, 3, 1, 1]


def test_pauses_double_with_jitter_and_are_never_shorter_than_asked_for() -> None:
    waits: list[float] = []
    with serving(lambda image, nth: (429, {"Retry-After": "7"}, b"") if nth == 1 else (500, {}, b"")) as endpoint:
        captioner(endpoint.address, waits, tries=5, backoff_s=2.0, max_wait_s=10.0, concurrency=1).ask(requests(1))
    assert waits[0] == 7.0 and len(waits) == 4
    assert all(0 <= wait <= ceiling for wait, ceiling in zip(waits[1:], (4.0, 8.0, 10.0), strict=True))


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    assert retry_after_s("12") == 12.0 and retry_after_s("0.5") == 0.5
    assert retry_after_s(None) == retry_after_s("soon") == retry_after_s("-3") == 0.0
    assert 50 < retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_an_endpoint_that_refuses_everybody_stops_the_run(status: int) -> None:
    with serving(lambda image, nth: (status, {"Location": "http://127.0.0.1:9/"}, b"")) as endpoint:
        asker = captioner(endpoint.address, concurrency=1)
        with pytest.raises(Stopped, match=f"answered {status} to every request; check caption.model and the token"):
            asker.ask(requests(20))
        with pytest.raises(Stopped):
            asker.begin(1)
    assert sum(endpoint.asked.values()) == 1


def test_an_endpoint_that_is_gone_stops_the_run_and_fails_no_row() -> None:
    with serving(lambda image, nth: good()) as endpoint:
        pass
    with pytest.raises(Stopped, match="came to nothing 4 times in a row, the last time unreachable; check it"):
        captioner(endpoint.address, give_up_after=4, tries=2).ask(requests(30))


def test_the_cap_stops_before_a_unit_that_would_pass_it_and_inside_one_that_costs_more() -> None:
    prices = {"price_in": 1000.0, "price_out": 5000.0, "max_spend": 1.0, "concurrency": 1}
    with serving(lambda image, nth: good()) as endpoint:  # an answer costs 0.1 + 0.1
        asker = captioner(endpoint.address, **prices)
        asker.begin(100)  # nothing is known of the price yet
        assert len(asker.ask(requests(3))) == 3
        asker.begin(2)
        with pytest.raises(Stopped, match=r"caption.http.max_spend 1: 0\.6 is spent and what is next would pass it"):
            asker.begin(3)
        with pytest.raises(Stopped, match="raise it and run the same command"):
            asker.ask(requests(9))
    assert sum(endpoint.asked.values()) == 5
    again = Budget(HttpSection(name="tiny", **prices), paid=[(100, 20)] * 4)
    assert again.spent == pytest.approx(0.8)
    again.check()
    with pytest.raises(Stopped):  # the price is known from what was paid before
        again.begin(2)


def test_garbage_that_was_paid_for_is_counted() -> None:
    paid = json.dumps({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}).encode()
    with serving(lambda image, nth: (200, {}, paid)) as endpoint:
        (found,) = captioner(endpoint.address).ask(requests(1))
    assert (found.problem, found.tokens_in, found.tokens_out) == ("garbage", 30, 3)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{" * 9999, b'{"usage": 3}', b"\xff", b'{"choices": {}}'])
def test_no_body_is_too_odd_to_be_read(body: bytes) -> None:
    assert read_completion(body)[0] is None


def test_the_token_comes_from_the_environment_and_is_stored_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DERMA_TEST_TOKEN", "sesame")
    with serving(lambda image, nth: good()) as endpoint:
        wanted = section(endpoint.address, token_env="DERMA_TEST_TOKEN")
        HttpCaptioner(wanted).ask(requests(1))
    assert endpoint.tokens == ["Bearer sesame"] and "sesame" not in wanted.model_dump_json()
    monkeypatch.delenv("DERMA_TEST_TOKEN")
    with pytest.raises(ValueError, match="token_env must name a variable that is set, got DERMA_TEST_TOKEN; export it"):
        HttpCaptioner(wanted)


@pytest.mark.parametrize(
    ("model", "http", "said"),
    [
        ("ftp://x/v1", {"name": "a"}, "model must be an http:// or https:// address"),
        ("file:///etc/passwd", {"name": "a"}, "model must be an http:// or https:// address"),
        ("https://me:secret@x/v1", {"name": "a"}, "without a user, a password or a query"),
        ("https://x/v1", {}, "http.name must be the model's name at the endpoint"),
        ("https://x/v1", {"name": "a", "max_spend": 1.0}, "max_spend needs price_in and price_out"),
        (None, {"name": "a"}, "model must be given for captioner http"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_sent(model: Any, http: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        CaptionSection(captioner="http", model=model, http=HttpSection(**http))
