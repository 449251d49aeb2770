"""How captions are written, and by whom."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from factory.sections.base import Count, Positive, Section, refuse


class HttpSection(Section):
    """How an OpenAI-compatible endpoint is asked. Nothing here changes what it answers but `name`."""

    name: str = ""  # the model's name there
    token_env: str | None = None  # the environment variable that holds the bearer token; the token is never stored
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8  # requests at once
    timeout_s: Positive = 120.0  # of one request, from its first byte sent to its last received
    tries: Count = 6  # of one request that is answered with 408, 429, 5xx, garbage or not at all
    backoff_s: Positive = 1.0  # before the second try; doubled each time, with jitter; Retry-After is honoured
    max_wait_s: Positive = 60.0  # the longest pause
    give_up_after: Count = 32  # requests in a row that came to nothing; then the run stops and can go on later
    max_spend: Annotated[float, Field(ge=0.0)] | None = None  # in the currency of the prices
    price_in: Annotated[float, Field(ge=0.0)] = 0.0  # of a million tokens
    price_out: Annotated[float, Field(ge=0.0)] = 0.0

    @model_validator(mode="after")
    def _a_cap_has_prices(self) -> HttpSection:
        if self.max_spend is not None and not (self.price_in or self.price_out):
            refuse(["max_spend needs price_in and price_out, the prices of a million tokens, got none"])
        return self


class CaptionSection(Section):
    """How captions are written: by measuring, or by a vision-language model."""

    captioner: Literal["measured", "transformers", "vllm", "http"] = "measured"
    masks: Literal["measured", "segmenter"] = "measured"  # where a record has none: by colour, or the starter's network
    aspect: Annotated[float, Field(ge=0.1, le=10.0)] | None = None  # width over height that square files had once
    bank: Literal["minimal", "standard", "extended"] = "standard"  # how much a measured caption says
    label_in_prompt: bool = True  # DermaFlux gives the label to the captioner; False is the blind arm
    model: str | None = None  # transformers, vllm: a directory with safetensors; http: the address up to /v1
    prompt: str = "abc"  # an instruction of factory/prompt_files
    prefix: str = "depicts"  # a prefix of factory/prompt_files, put before the model's description
    answer: Literal["json", "text"] = "json"  # json: the schema also constrains decoding where the backend can
    max_new_tokens: Count = 256
    batch_size: Count = 8  # images at once in transformers and vllm
    reject: list[str] = []  # findings that reject a caption (see quality/captions.py); the others are only stored
    http: HttpSection = HttpSection()

    @model_validator(mode="after")
    def _a_model_is_named(self) -> CaptionSection:
        from factory.instructions import prompt_file
        from factory.taxonomy import CAPTION_FINDINGS

        problems = []
        for kind, name in (("instruction", self.prompt), ("prefix", self.prefix)):
            try:
                prompt_file(name, kind)  # type: ignore[arg-type]
            except ValueError as error:
                problems.append(str(error))
        if unknown := sorted(set(self.reject) - set(CAPTION_FINDINGS)):
            problems.append(f"reject must hold findings ({', '.join(CAPTION_FINDINGS)}), got {', '.join(unknown)}")
        if self.captioner != "measured" and not self.model:
            problems.append(f"model must be given for captioner {self.captioner}: a directory, or an address for http")
        if self.captioner == "http" and self.model:
            problems += _address_problems(self.model)
            if not self.http.name:
                problems.append("http.name must be the model's name at the endpoint, got nothing")
        refuse(problems)
        return self


def _address_problems(address: str) -> list[str]:
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return [f"model must be an http:// or https:// address for captioner http, got {address!r}"]
    if parts.username or parts.password or parts.query:
        return ["model must be an address without a user, a password or a query; name the token in http.token_env"]
    return []
