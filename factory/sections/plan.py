"""What to make, how much of each, and where it is drawn into."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from factory import taxonomy
from factory.sections.base import Count, Natural, Positive, Section, Share, refuse

Bank = Literal["minimal", "standard", "extended"]


class PlanSection(Section):
    """What to make: quotas over diagnosis and skin type, and how each sample is drawn."""

    # Over the cells; each class up to the corpus's largest (DerMAE); by the corpus's training images, or their root; by
    # how often a classifier misses a diagnosis; or as `cells` says.
    balance: Literal["equal", "largest", "square_root", "prevalence", "false_negative", "explicit"] = "equal"
    count: Count = 256  # of `largest` and `explicit` there is no choice, so it is not read
    cells: dict[str, Natural] = {}  # explicit: samples by cell, such as melanoma/V, or melanoma/V/hand with sites
    false_negative_rates: str | None = None  # a JSON file of rates by diagnosis, here or in the run (lab/NAME.json)
    max_ratio: Positive | None = None  # of synthetic to real in a cell; unsaid it is 3 but for equal and largest
    # What synthesize.weights hold, by which samples are told apart.
    generator: Literal["joint", "flux", "inpaint", "class_conditional"] = "joint"
    diagnoses: list[str] = ["nevus", "melanoma", "seborrheic_keratosis"]
    skin_types: list[str] = list(taxonomy.SKIN_TYPES)
    sites: list[str] = []  # also a quota each; a prompt of the extended bank names them
    lesion_sizes: list[str] = []  # small, medium-sized, large; likewise
    bank: Bank = "standard"  # how much a prompt says (factory/prompt_banks)
    banks: list[Bank] = []  # a quota each, to compare them; empty: the one above
    size: Annotated[int, Field(ge=32, le=1024, multiple_of=32)] = 128
    guidance: Annotated[float, Field(ge=1.0, le=30.0)] = 2.0
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    seed: Natural = 0
    audit_share: Share = 0.02  # carried to the end ungated, to measure what the gate's rejection biases
    audit_min: Natural = 16
    unit_rows: Count | None = None  # None: see stages/plan.py
    overgenerate: bool = False  # quotas are of accepted samples, and more are planned by each cell's acceptance
    acceptance: Annotated[float, Field(gt=0.0, le=1.0)] = 0.65  # of a cell that nothing is known of; DiffAug's
    acceptance_from: str | None = None  # another run, whose samples say what the first round may expect
    min_acceptance: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02  # a cell that is surely below is planned no more
    max_rounds: Count | None = 1  # of plan and synthesize; null: until the quotas are met
    max_samples: Count | None = None  # of all rounds together
    images_per_s: Positive | None = None  # of an actor, for the estimate where this run has measured none
    price_per_gpu_hour: Annotated[float, Field(ge=0.0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _what_goes_without_saying(cls, given: Any) -> Any:
        """DiffAug guides by 7.5, where nothing else is said; its gain ends at three synthetic images to a real one."""
        if isinstance(given, dict) and given.get("generator") == "inpaint":
            given = {"guidance": 7.5, **given}
        if isinstance(given, dict) and given.get("balance", "equal") not in ("equal", "largest"):
            given = {"max_ratio": 3.0, **given}
        return given

    @model_validator(mode="after")
    def _words_are_known(self) -> PlanSection:
        problems = []
        for field, words, vocabulary in (
            ("diagnoses", self.diagnoses, taxonomy.DIAGNOSES),
            ("skin_types", self.skin_types, taxonomy.SKIN_TYPES),
            ("sites", self.sites, taxonomy.SITES),
            ("lesion_sizes", self.lesion_sizes, taxonomy.LESION_SIZES),
        ):
            needed = field in ("diagnoses", "skin_types")
            if (needed and not words) or len(set(words)) != len(words):
                least = " and at least one" if needed else ""
                problems.append(f"{field} must name each word once{least}, got {words}")
            problems += [problem for word in words for problem in _unknown(word, vocabulary, field)]
        cells = math.prod(map(len, self.axes().values()))
        if self.count < cells and self.balance == "equal":
            problems.append(f"count must give every cell at least one sample: {cells} cells, got count {self.count}")
        refuse(problems + self._unaskable() + self._wrong_targets())
        return self

    def axes(self) -> dict[str, list[str]]:
        """What a cell is made of: the plan's columns, and the words of each."""
        named = {"diagnosis": self.diagnoses, "skin_type": self.skin_types}
        return named | {
            axis: [*words]
            for axis, words in (("site", self.sites), ("lesion_size", self.lesion_sizes), ("bank", self.banks))
            if words
        }

    def _unaskable(self) -> list[str]:
        """Sites and sizes that the generator cannot be asked for."""
        problems = []
        for field, words in (("sites", self.sites), ("lesion_sizes", self.lesion_sizes)):
            banks = [*self.banks] or [self.bank]
            if words and ({*banks} != {"extended"} or self.generator == "class_conditional"):
                problems.append(
                    f"{field} needs bank extended and a generator by text, which alone can be asked for it, got bank "
                    f"{', '.join(banks)} and generator {self.generator}"
                )
        if self.lesion_sizes and self.generator == "inpaint":
            problems.append("lesion_sizes must be empty for generator inpaint, whose planned mask is the lesion's size")
        if len({*self.banks}) != len(self.banks):
            problems.append(f"banks must name each bank once, got {self.banks}")
        if self.banks and self.generator == "class_conditional":
            problems.append(
                f"banks must be empty for generator class_conditional, which reads no text, got {self.banks}"
            )
        if self.banks and self.balance in ("square_root", "prevalence"):
            problems.append(f"banks must be empty for balance {self.balance}: a corpus has no image of a bank")
        return problems

    def _wrong_targets(self) -> list[str]:
        problems = []
        if (self.balance == "explicit") != bool(self.cells):
            problems.append(
                f"cells must be given exactly for balance explicit, got {len(self.cells)} for {self.balance}"
            )
        if (self.balance == "false_negative") != (self.false_negative_rates is not None):
            problems.append(
                f"false_negative_rates must name a JSON file exactly for balance false_negative, got "
                f"{self.false_negative_rates} for {self.balance}"
            )
        if self.cells and not any(self.cells.values()):
            problems.append("cells must ask for at least one sample, got none")
        return problems + [problem for cell in self.cells for problem in self._wrong_cell(cell)]

    def _wrong_cell(self, cell: str) -> list[str]:
        words, axes = cell.split("/"), self.axes()
        if len(words) != len(axes):
            return [f"cells must be named {'/'.join(axes)}, got {cell!r}"]
        known = {
            "diagnosis": taxonomy.DIAGNOSES, "skin_type": taxonomy.SKIN_TYPES, "site": taxonomy.SITES,
            "lesion_size": taxonomy.LESION_SIZES, "bank": get_args(Bank),
        }  # fmt: skip
        lists = {
            "diagnosis": "diagnoses", "skin_type": "skin_types", "site": "sites", "lesion_size": "lesion_sizes",
            "bank": "banks",
        }  # fmt: skip
        problems = []
        for word, (axis, listed) in zip(words, axes.items(), strict=True):
            if wrong := _unknown(word, known[axis], f"the {axis} of cells {cell!r}"):
                problems += wrong
            elif word not in listed:
                problems.append(f"cells must be of those in {lists[axis]}, got {cell!r}; add {word} there")
        return problems


def _unknown(word: str, vocabulary: tuple[str, ...], field: str) -> list[str]:
    """The sentence on a word that a vocabulary lacks, or none."""
    try:
        taxonomy.check(word, vocabulary, field)
    except ValueError as error:
        return [str(error)]
    return []


class BackgroundsSection(Section):
    """The normal skin that lesions are drawn into, found in the corpus (plan.generator inpaint)."""

    min_side: Annotated[int, Field(ge=8)] = 32  # px in the corpus; a square is scaled to plan.size
    margin: Annotated[float, Field(ge=0.0, le=0.5)] = 0.05  # of the shorter side, kept from the outlined lesion
