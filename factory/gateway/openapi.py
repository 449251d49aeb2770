"""The service described: an OpenAPI 3.1 document, and a page of it that loads nothing from anywhere."""

from __future__ import annotations

import html
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from factory import __version__, taxonomy
from factory.gateway.refusal import STATUSES
from factory.gateway.settings import Settings
from factory.quality.policy import REASONS
from factory.records import ACCEPTED, REJECTED

DESCRIPTION = """\
Does an image show its lesion where its mask says? The gate encodes the image, finds the lesion in latent space with a
segmenter that never sees the mask, and compares the two. A research tool, not a medical device; it keeps no image.

Send the mask at the image's own size, white where the lesion is. Both are PNG, JPEG or WebP, and both are shrunk to the
gate's working size before they are compared. Prompt and diagnosis are recorded (the prompt as its hash) and change no
verdict. A request that is answered 408, 429 or 503, or whose connection breaks, may be sent again as it was: a verdict
depends on nothing but what is sent and on the digests in `model`."""


class Model(BaseModel):
    """Digests: an answer is comparable with another that has the same three."""

    vae: str = Field(description="Of the VAE that encodes.")
    gate: str = Field(description="Of all that the gate was fitted to: segmenter, estimator and shapes.")
    policy: str = Field(description="Of the policy's version.")


class Answer(BaseModel):
    """The gate's verdict on one pair."""

    model_config = ConfigDict(extra="forbid")
    verdict: str = Field(json_schema_extra={"enum": [ACCEPTED, REJECTED]})
    reason: str | None = Field(description=f"Of a rejection: the first rule that failed, one of {', '.join(REASONS)}.")
    iou: float | None = Field(description="That the mask is expected to have with the lesion, 0 to 1.")
    theta: float = Field(description="The least IoU that a lesion of this mask's size must have.")
    scores: dict[str, float | None] = Field(description="Further facts, whatever the verdict. null: not a number.")
    mask: str = Field(description="What the segmenter finds: base64 of a one-bit PNG of the image's size.")
    model: Model


class Problem(BaseModel):
    """Why there is no verdict."""

    model_config = ConfigDict(extra="forbid")
    error: str = Field(description="A word for programs.")
    message: str = Field(description="One sentence: what must be, what was got, what to do.")
    request_id: str


def document(settings: Settings, secured: bool) -> dict[str, Any]:
    """The OpenAPI document of a service with these limits; secured: whether it asks for a token."""
    schemas: dict[str, Any] = {}
    for model in (Answer, Problem):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    components: dict[str, Any] = {"schemas": schemas}
    if secured:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dermafactory gate", "version": __version__, "description": DESCRIPTION},
        "paths": {
            "/v1/validate": {"post": _validate(settings, secured)},
            "/healthz": {"get": _plain("The process answers.", "application/json")},
            "/readyz": {"get": _plain("The gate answers; `model` names its digests.", "application/json", 503)},
            "/metrics": {"get": _plain("Counts, in Prometheus' text format.", "text/plain")},
            "/openapi.json": {"get": _plain("This document.", "application/json")},
        },
        "components": components,
    }


def _validate(settings: Settings, secured: bool) -> dict[str, Any]:
    statuses = [status for status in STATUSES if status not in (404, 405) and (secured or status != 401)]
    return {
        "operationId": "validate",
        "summary": "Judge an image and its mask.",
        "description": f"Bodies to {settings.max_body_bytes} bytes, images to {settings.max_pixels} pixels, sides from "
        f"{settings.min_side} px and at most 1:{settings.max_aspect:g}; a body within {settings.body_s:g} s.",
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _fields(settings, {"type": "string", "format": "binary"})},
                "application/json": {"schema": _fields(settings, {"type": "string", "contentEncoding": "base64"})},
            },
        },
        "responses": {"200": _response("The verdict.", "Answer"), **{str(s): _refusal(s) for s in statuses}},
    } | ({"security": [{"token": []}]} if secured else {})


def _fields(settings: Settings, file: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["image", "mask"],
        "additionalProperties": False,
        "properties": {
            "image": {**file, "description": "PNG, JPEG or WebP."},
            "mask": {**file, "description": "PNG, JPEG or WebP of the image's size, white where the lesion is."},
            "prompt": {"type": "string", "maxLength": settings.max_prompt},
            "diagnosis": {"type": "string", "enum": list(taxonomy.ALL_DIAGNOSES)},
        },
    }


def _response(text: str, schema: str) -> dict[str, Any]:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }


def _refusal(status: int) -> dict[str, Any]:
    headers = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
    found = _response(STATUSES[status], "Problem")
    if status in headers:
        found["headers"] = {headers[status]: {"schema": {"type": "string"}}}
    return found


def _plain(text: str, kind: str, refused: int | None = None) -> dict[str, Any]:
    responses = {"200": {"description": text, "content": {kind: {}}}}
    return {"summary": text, "responses": responses | ({} if refused is None else {str(refused): _refusal(refused)})}


def page(described: dict[str, Any]) -> str:
    """The document as HTML: no script, nothing fetched."""
    said = html.escape
    rows = []
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            answers = "".join(
                f"<tr><td>{said(status)}<td>{said(response['description'])}"
                for status, response in operation["responses"].items()
            )
            rows.append(
                f"<h2><code>{said(method.upper())} {said(path)}</code></h2><p>{said(operation['summary'])} "
                f"{said(operation.get('description', ''))}</p>{_body(operation)}<table>{answers}</table>"
            )
    schemas = "".join(
        f"<h3>{said(name)}</h3><pre>{said(json.dumps(schema, indent=2))}</pre>"
        for name, schema in described["components"]["schemas"].items()
    )
    title = said(described["info"]["title"])
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>body{{font:16px/1.5 sans-serif;"
        "max-width:50rem;margin:2rem auto;padding:0 1rem}td{padding:.1rem .8rem .1rem 0;vertical-align:top}"
        f"pre{{background:#f4f4f4;padding:1rem;overflow:auto}}</style><h1>{title} {said(described['info']['version'])}"
        f"</h1><p>{said(described['info']['description'])}</p><p><a href=openapi.json>openapi.json</a></p>"
        f"{''.join(rows)}<h2>Schemas</h2>{schemas}</html>"
    )


def _body(operation: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    return "".join(
        f"<p><code>{html.escape(kind)}</code></p><pre>{html.escape(json.dumps(part['schema'], indent=2))}</pre>"
        for kind, part in content.items()
    )
