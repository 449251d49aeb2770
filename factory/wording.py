"""Reading the ABC of a lesion from free text: which levels and colours a description states, by rules.

    "The mole is slightly asymmetrical, with ragged borders; it is tan and dark brown."
    -> asymmetry low, border irregularity high, colors light-brown and dark-brown

A degree word beside the noun decides the level; without one, "asymmetric" and "irregular" count as medium. Rules are
fixed, so the same text is always read alike; what they miss is not guessed.
"""

from __future__ import annotations

import re

from factory import taxonomy

_DEGREES: dict[str, str] = {
    "low": r"low|slight(?:ly)?|mild(?:ly)?|minimal(?:ly)?|minor|little|subtle|subtly|faint(?:ly)?",
    "medium": r"medium|moderate(?:ly)?|somewhat|some|fairly|partial(?:ly)?|intermediate",
    "high": r"high(?:ly)?|marked(?:ly)?|significant(?:ly)?|severe(?:ly)?|pronounced|very|strong(?:ly)?|notabl[ey]"
    r"|considerabl[ey]|striking(?:ly)?|extreme(?:ly)?|substantial(?:ly)?",
}
_DEGREE = re.compile("|".join(rf"\b(?P<{level}>{words})\b" for level, words in _DEGREES.items()), re.IGNORECASE)
_NOT = r"\b(?:no|not|without|lacks?|lacking|absence of|free of|isn't|aren't)\b(?:\s+\w+){0,3}\s+"
_CLAUSE = re.compile(r"[.;!?,\n]|\b(?:but|while|whereas|although|and (?:the|its|it|with))\b", re.IGNORECASE)
# Per attribute: adjectives that state it by themselves, its noun, which needs a degree or a verb, and its opposite.
_SAYS = {
    "asymmetry": (r"\basymmetric(?:al|ally)?\b", r"\basymmetry\b", r"\bsymmetr(?:y|ic|ical|ically)\b"),
    "border_irregularity": (
        r"\b(?:irregular|irregularly|uneven|notched|scalloped|ragged|jagged|ill-defined|poorly[- ]defined)\b",
        r"\birregularit(?:y|ies)\b",
        r"\b(?:regular|smooth|even|well[- ]defined|well[- ]circumscribed|sharp|clear|distinct)\b",
    ),
}
_VERBS = "exhibits?|shows?|displays?|has|have|having|with|presents?|demonstrates?|there (?:is|are)"
_HAS = rf"\b(?:{_VERBS})\b\s+(?:\w+\s+){{0,2}}"
_BORDER = re.compile(r"\b(?:borders?|edges?|margins?|outlines?|contours?)\b", re.IGNORECASE)
_RAGGED = re.compile(r"\b(?:ragged|jagged|notched|scalloped)\b", re.IGNORECASE)
_COLOR_WORDS: dict[str, str] = {
    "light-brown": r"light(?:er)?[- ](?:brown|tan)|tan|beige",
    "dark-brown": r"dark(?:er)?[- ]brown|(?<!light )(?<!light-)(?<!lighter )brown",
    "black": r"black(?:ish)?",
    "blue-gray": r"blue[- ]?gr[ae]y|blu(?:e|ish)|gr[ae]y(?:ish)?",
    "red": r"red(?:dish|ness)?|pink(?:ish)?",
    "white": r"white|whitish",
}
_SKIN = re.compile(r"\b(?:skin|background|surrounding)\b", re.IGNORECASE)


def stated_levels(text: str, attribute: str) -> list[str]:
    """The levels that a text states for `asymmetry` or `border_irregularity`, in order, each once."""
    found: list[str] = []
    for clause in _CLAUSE.split(_quiet(text)):
        level = _level(clause, attribute)
        if level is not None and level not in found:
            found.append(level)
    return found


def stated_colors(text: str) -> tuple[str, ...]:
    """The dermoscopic colours that a text gives the lesion, in the vocabulary's order; skin's colours do not count."""
    of_lesion = " ; ".join(clause for clause in _CLAUSE.split(_quiet(text)) if not _SKIN.search(clause))
    return tuple(
        color for color in taxonomy.COLORS if re.search(rf"\b(?:{_COLOR_WORDS[color]})\b", of_lesion, re.IGNORECASE)
    )


def _quiet(text: str) -> str:
    """Without the marks of lists and of emphasis."""
    return re.sub(r"[*_#`\"]+", " ", text)


def _level(clause: str, attribute: str) -> str | None:
    adjective, noun, opposite = _SAYS[attribute]
    if attribute == "border_irregularity" and not _BORDER.search(clause):
        return None
    if _has(_NOT + f"(?:{adjective}|{noun})", clause):
        return "low"
    degree = _DEGREE.search(clause)
    if _has(f"{adjective}|{noun}", clause) and degree is not None:
        return degree.lastgroup
    if _has(f"{adjective}|{_HAS}{noun}", clause):
        return "high" if attribute == "border_irregularity" and _RAGGED.search(clause) else "medium"
    if _has(_NOT + f"(?:{opposite})", clause):
        return "medium"
    return "low" if _has(opposite, clause) else None


def _has(pattern: str, clause: str) -> bool:
    return re.search(pattern, clause, re.IGNORECASE) is not None
