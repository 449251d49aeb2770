"""What a client is refused with: a status, a word for programs and one sentence for people."""

from __future__ import annotations

# Every status that the service answers, and when; the OpenAPI page lists them.
STATUSES: dict[int, str] = {
    400: "The body is not the multipart form or the JSON object that its content type promises.",
    401: "The bearer token is missing or wrong.",
    404: "There is no such path.",
    405: "The path has no such method.",
    408: "The body did not arrive within the time limit.",
    413: "The body, or the pixels that an image declares, are more than the limit.",
    415: "The content type, or the format of an image, is none of those that are taken.",
    422: "A field is missing or wrong; the message says which and what to do.",
    429: "Too many requests are waiting; try again after Retry-After seconds.",
    503: "The gate does not answer at the moment; try again after Retry-After seconds.",
}


class Refusal(Exception):
    """An answer other than a verdict. `error` is the word for programs, the text one sentence."""

    def __init__(self, status: int, error: str, sentence: str) -> None:
        super().__init__(sentence)
        assert status in STATUSES
        self.status, self.error = status, error


class ClientGone(Exception):
    """The client hung up before its body was complete: there is nobody to answer."""
