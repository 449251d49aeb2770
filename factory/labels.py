"""The label policy: what a dataset's own label means here, from one versioned file (`labels.yaml`).

Policy.read().judge("ham10000", "akiec") -> Judgement(diagnosis="ak_iec_mixed", malignant=True, ham7="akiec")

A label is mapped to a diagnosis, or excluded with a reason; one that the policy does not have is refused by name, so
that a dataset's new version cannot enter half understood.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("labels.yaml")
DOMAINS: tuple[str, ...] = ("dermatology", "colonoscopy", "fundus")


@dataclass(frozen=True)
class Judgement:
    """What a label means. `excluded` says why such rows are left out; `diagnosis` is None then."""

    diagnosis: str | None = None
    domain: str | None = None
    malignant: bool | None = None
    ham7: str | None = None
    excluded: str | None = None


class Policy:
    """Diagnoses by domain, and each dataset's labels. See the head of `labels.yaml` for the shape."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.version = content["version"]
        self._judgements = {
            name: Judgement(name, domain, about["malignant"], about.get("ham7"))
            for domain, diagnoses in content["diagnoses"].items()
            for name, about in diagnoses.items()
        }

    @staticmethod
    def read(overlay: str | Path | None = None) -> Policy:
        """Our policy, with the file of a recipe's `corpus.labels` laid over it. Raises ValueError naming a mistake."""
        if overlay is None:
            return default()
        ours: dict[str, Any] = _content(FILE)
        try:
            theirs = _content(Path(overlay))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"corpus.labels must be a readable YAML file, got {overlay} ({error}).") from error
        _check(overlay, theirs, ours)
        return Policy(_over(ours, theirs))

    def judge(self, dataset: str, label: str) -> Judgement:
        """The meaning of one published label. Raises ValueError where the policy does not know it."""
        known = self.content["datasets"].get(dataset, {})
        meaning = known.get(label)
        if meaning is None:
            near = difflib.get_close_matches(label, [str(name) for name in known], n=1)
            hint = f" (near {near[0]!r})" if near else ""
            raise ValueError(
                f"the label {label!r} of {dataset} must be in the label policy, got one it does not know{hint}; "
                f"map or exclude it under datasets.{dataset} in a file and name that file in corpus.labels."
            )
        if isinstance(meaning, dict):
            return Judgement(excluded=meaning["excluded"])
        return self._judgements[meaning]

    def malignant(self, diagnosis: str) -> bool | None:
        """Whether a diagnosis is malignant."""
        return self._judgements[diagnosis].malignant

    def diagnoses(self, domain: str) -> tuple[str, ...]:
        """The vocabulary of a domain."""
        return tuple(self.content["diagnoses"][domain])

    def digest(self) -> str:
        """32 hex digits that change with any meaning."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:32]


@cache
def default() -> Policy:
    """The policy that ships with the package."""
    return Policy(_content(FILE))


def _content(file: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    content = yaml.load(file.read_text(encoding="utf-8"), loader)
    if not isinstance(content, dict):
        raise yaml.YAMLError("it must hold a mapping")
    return content


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings are merged, except that an exclusion is a value as a whole."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        nested = isinstance(value, dict) and isinstance(under, dict) and "excluded" not in {*value, *under}
        merged[key] = _over(under, value) if nested else value  # type: ignore[arg-type]
    return merged


def _check(file: str | Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """A mistake in an overlay is said before anything is read with it."""
    unknown = sorted(set(theirs) - set(ours))
    if unknown:
        raise ValueError(f"{file} must have the keys {', '.join(ours)}, got {unknown[0]!r}; see factory/labels.yaml.")
    diagnoses = {name for d in (ours, theirs) for names in d.get("diagnoses", {}).values() for name in names}
    for dataset, labels in theirs.get("datasets", {}).items():
        for label, meaning in labels.items():
            excluded = isinstance(meaning, dict) and set(meaning) == {"excluded"}
            if not excluded and meaning not in diagnoses:
                raise ValueError(
                    f"datasets.{dataset}.{label} in {file} must be a diagnosis or {{excluded: why}}, got {meaning!r}; "
                    f"choose one of {', '.join(sorted(diagnoses))}."
                )
