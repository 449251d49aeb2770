from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.release.licences import CONDITIONS, Parent, Verdict, classify, join, join_names, require

NAMES = st.sampled_from(list(CONDITIONS))


def _verdict(*licences: str) -> Verdict:
    return join(Parent("corpus", f"set{i}", licence) for i, licence in enumerate(licences))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ("CC0", "CC0"), ("cc0-1.0", "CC0"), ("CC-0", "CC0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0"),
        ("CC BY 4.0", "CC-BY"), ("cc-by-sa-4.0", "CC-BY-SA"), ("CC-BY-NC", "CC-BY-NC"),
        ("http://creativecommons.org/licenses/by-nc-sa/4.0/", "CC-BY-NC-SA"),
        ("Apache 2.0", "Apache-2.0"), ("apache-2.0", "Apache-2.0"), ("MIT", "Apache-2.0"),
        ("research only", "research-only"), ("Research-Only", "research-only"),
        ("LicenseRef-Stanford-DDI-research-use", "research-only"), ("LicenseRef-unstated", "unknown"),
        ("Apache-2.0 AND CC-BY-4.0", "CC-BY"), ("CC-BY-SA-4.0 AND CC-BY-NC-4.0 AND CC0-1.0", "CC-BY-NC-SA"),
        ("Apache-2.0 AND openrail++", "unknown"),
        ("CC-BY-ND-4.0", "unknown"), ("ask the authors", "unknown"), ("", "unknown"), (None, "unknown"),
    ],
)  # fmt: skip
def test_a_licence_is_known_by_its_usual_spellings_and_otherwise_unknown(found: str | None, expected: str) -> None:
    assert classify(found) == expected


@pytest.mark.parametrize(
    ("licences", "expected", "commercial"),
    [
        (("CC0",), "CC0", True),
        (("CC0", "Apache-2.0"), "Apache-2.0", True),
        (("Apache-2.0", "CC-BY"), "CC-BY", True),
        (("CC-BY", "CC-BY-SA"), "CC-BY-SA", True),
        (("CC0", "CC-BY-NC"), "CC-BY-NC", False),
        (("CC-BY-SA", "CC-BY-NC"), "CC-BY-NC-SA", False),
        (("CC-BY-NC", "research-only"), "research-only", False),
        (("CC0", "whatever"), "unknown", False),
        ((), "unknown", False),
    ],
)
def test_the_join_is_the_most_restrictive_of_all_parents(
    licences: tuple[str, ...], expected: str, commercial: bool
) -> None:
    verdict = _verdict(*licences)
    assert (verdict.licence, verdict.commercial) == (expected, commercial)


@given(NAMES, NAMES, NAMES)
def test_the_join_is_a_lattice_join(a: str, b: str, c: str) -> None:
    assert join_names([a, a]) == a
    assert join_names([a, b]) == join_names([b, a])
    assert join_names([join_names([a, b]), c]) == join_names([a, join_names([b, c])])


def test_only_the_parents_that_block_are_listed_as_blocking() -> None:
    verdict = join(
        [Parent("corpus", "ham", "CC-BY-NC-4.0"), Parent("corpus", "isic", "CC0"), Parent("weights", "w", "")]
    )
    assert {parent.name for parent in verdict.blocking} == {"ham", "w"}
    assert verdict.notes == ("The licence of w is not settled: none is stated.",)


def test_share_alike_beside_non_commercial_is_pointed_out() -> None:
    assert "no single licence satisfies both" in _verdict("CC-BY-SA", "CC-BY-NC").notes[0]


def test_commercial_use_is_refused_in_one_sentence_that_names_the_blocking_parents() -> None:
    verdict = join([Parent("corpus", "ham10000", "CC-BY-NC-4.0"), Parent("corpus", "isic", "CC0")])
    with pytest.raises(ValueError, match=r"^release\.allow must be 'any'.*: ham10000 \(CC-BY-NC-4\.0\)\.$"):
        require(verdict, "commercial")
    require(verdict, "any")
    require(_verdict("CC0"), "commercial")
