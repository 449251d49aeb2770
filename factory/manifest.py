"""The seal of a table: which parts it consists of, what it was made from, and the rounds before it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from factory import parts
from factory.parts import PartInfo, canonical_json


@dataclass(frozen=True)
class Manifest:
    """What a sealed table consists of and was made from.

    `parents` are the manifest digests of the tables it was made from. Each further round adds its predecessor's
    digest to `predecessors`, oldest first.
    """

    table: str
    parts: tuple[PartInfo, ...]
    schema: str
    fingerprint: dict[str, str]
    parents: dict[str, str]
    predecessors: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest's canonical content."""
        return parts.sha256(canonical_json(self._content()))

    @property
    def origin(self) -> str:
        """The digest of the first round: it stays when a round is added, and changes when the table is remade."""
        return self.predecessors[0] if self.predecessors else self.digest

    @property
    def rows(self) -> int:
        return sum(info.rows for info in self.parts)

    @property
    def counts(self) -> dict[str, int]:
        """Rows per outcome; empty for a table that has none."""
        total: Counter[str] = Counter()
        for info in self.parts:
            total.update(info.outcomes)
        return dict(sorted(total.items()))

    def to_json(self) -> bytes:
        summary = {"rows": self.rows, "outcomes": self.counts, "digest": self.digest}
        return json.dumps({**self._content(), **summary}, sort_keys=True, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The manifest in a file; a KeyError, TypeError or ValueError if it is none or was edited."""
        content = json.loads(data)
        manifest = cls(
            table=str(content["table"]),
            parts=tuple(PartInfo.from_json(info) for info in content["parts"]),
            schema=str(content["schema"]),
            fingerprint=_strings(content["fingerprint"]),
            parents=_strings(content["parents"]),
            predecessors=tuple(str(digest) for digest in content["predecessors"]),
        )
        if content["digest"] != manifest.digest:
            raise ValueError("its content does not match its own digest")
        return manifest

    def _content(self) -> dict[str, Any]:
        return {
            "table": self.table, "parts": [parts.info_json(info) for info in self.parts], "schema": self.schema,
            "fingerprint": self.fingerprint, "parents": self.parents, "predecessors": list(self.predecessors),
        }  # fmt: skip


def _strings(content: Mapping[str, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in content.items()}
