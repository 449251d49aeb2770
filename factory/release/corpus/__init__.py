"""The corpus part of the report: what was listed, what each filter took, and what is left, counted from the tables.

Counting is pure functions on the light columns of `corpus` and `copies`; `facts.py` puts the counts into one tree,
which is both what the page shows and, as JSON, `RUN/report/corpus.json`.
"""
