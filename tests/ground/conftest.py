"""A real S3 endpoint on the loopback, for what the ground floor promises of object stores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from factory.storage import S3Store

Environ = dict[str, Any]
Wsgi = Callable[[Environ, Callable[..., Any]], Any]


class LoopbackS3:
    """moto's S3 behind a real socket. One request at a time, so that its check and its put are one step, as in S3;
    `answer` may be set to answer puts itself, `forget_condition` drops If-None-Match as some look-alikes do."""

    def __init__(self) -> None:
        self.moto: Wsgi = DomainDispatcherApplication(create_backend_app)
        self.answer: Callable[[Environ], tuple[str, bytes] | None] = lambda environ: None
        self.forget_condition = False
        self.puts: list[Environ] = []
        self.server = make_server("127.0.0.1", 0, self, threaded=False, request_handler=MotoRequestHandler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] in ("PUT", "POST"):
            self.puts.append(dict(environ))
            if self.forget_condition:
                environ.pop("HTTP_IF_NONE_MATCH", None)
            answer = self.answer(environ)
            if answer is not None:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response(answer[0], [("Content-Type", "application/xml")])
                return [answer[1]]
        return self.moto(environ, start_response)


@pytest.fixture(scope="module")
def server() -> Iterator[LoopbackS3]:
    patch = pytest.MonkeyPatch()
    server = LoopbackS3()
    server.thread.start()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        patch.delenv(name, raising=False)
    patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server.server_port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with suppress(FileExistsError):  # moto's buckets outlive a server within one process
        S3Store("s3://factory-test/x")._filesystem().mkdir("factory-test")
    yield server
    server.server.shutdown()
    patch.undo()


@pytest.fixture
def s3(server: LoopbackS3, request: pytest.FixtureRequest) -> Iterator[S3Store]:
    server.puts.clear()
    yield S3Store(f"s3://factory-test/{abs(hash(request.node.nodeid))}/run")
    server.answer, server.forget_condition = lambda environ: None, False
