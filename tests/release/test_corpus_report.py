"""The corpus part of the report against a corpus written by hand, and against recounts row by row."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny_corpus
from PIL import Image
from tiny_corpus import HOSTILE

from factory import records, taxonomy
from factory.recipe import Recipe
from factory.release.collect import collect
from factory.release.corpus import composition, copies, facts, skin, table1
from factory.release.corpus.crosstab import CrossTable
from factory.release.report import build_report, write_report
from factory.run import Run
from factory.storage import open_store
from factory.tables import Table

SETTINGS = facts.Settings(min_side=128, scales=(128, 256, 512), near_duplicates="reject", min_likeness=0.75)


@pytest.fixture(scope="module")
def counted() -> facts.CorpusFacts:
    corpus = tiny_corpus.table()
    return facts.counted(
        corpus, copies_table=tiny_corpus.copies_table(), listed=corpus.select(["source"]), hints=tiny_corpus.hints(),
        settings=SETTINGS,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus.build(tmp_path_factory.mktemp("runs") / "tiny-corpus")


def cells(table: CrossTable) -> dict[str, dict[str, int]]:
    """The counts of a cross table that are not zero, by its words."""
    rows = zip(table.rows, table.counts, strict=True)
    return {r: {c: n for c, n in zip(table.columns, counts, strict=True) if n} for r, counts in rows}


def of(counted: facts.CorpusFacts, source: str) -> table1.Dataset:
    return next(d for d in counted.datasets if d.source == source)


# ------------------------------------------------------------------------------------------------------ table 1


def test_table_1_counts_labels_before_and_after_every_filter(counted: facts.CorpusFacts) -> None:
    isic = of(counted, "isic2019")
    assert (isic.title, isic.modality) == ("ISIC 2019", "dermoscopic")
    assert (isic.listed, isic.accepted) == (table1.Labels(4, 2, 1), table1.Labels(1, 1, 0))
    steps = {f.name: (f.lost, f.left.total) for f in isic.filters}
    assert steps["excluded_label"] == (table1.Labels(0, 0, 1), 6)
    assert steps["failed"] == (table1.Labels(0, 1, 0), 5)
    assert steps["too_small"] == (table1.Labels(2, 0, 0), 3)
    assert steps["exact_duplicate"] == (table1.Labels(1, 0, 0), 2)
    assert steps["near_duplicate"] == steps["published_duplicate"] == steps["other"] == (table1.Labels(0, 0, 0), 2)
    kaggle = of(counted, "kaggle1")
    assert {name: kaggle.lost(name) for name in table1.FILTERS if kaggle.lost(name)} == {
        "published_duplicate": 1, "near_duplicate": 2,
    }  # fmt: skip
    assert of(counted, "ddi").splits == {"train": 1, "val": 1, "test": 1}
    assert cells(counted.failures)["isic2019"] == {"missing_image": 1}


def test_resolutions_are_those_of_real_images_and_only_of_those_that_were_read(counted: facts.CorpusFacts) -> None:
    sizes = of(counted, "isic2019").sizes
    assert sizes == table1.Sizes(5, 4, (120, 100), (600, 450), (1024, 768), (100, 450, 768))
    unread = [dict(row, source_width=None, source_height=None) for row in tiny_corpus.corpus_rows()]
    assert facts.counted(tiny_corpus.table(unread)).total.sizes is None


def test_totals_are_the_sums_of_the_datasets(counted: facts.CorpusFacts) -> None:
    for part in ("listed", "accepted"):
        assert getattr(counted.total, part).total == sum(getattr(d, part).total for d in counted.datasets)
    for i, step in enumerate(counted.total.filters):
        assert step.lost.total == sum(d.filters[i].lost.total for d in counted.datasets)
    assert (counted.total.listed.total, counted.total.accepted.total) == (17, 9)
    assert counted.total.sizes is not None and counted.total.sizes.known == 15


def test_a_reason_that_is_not_a_known_filter_is_not_lost() -> None:
    rows = tiny_corpus.corpus_rows()
    rows[5]["reason"] = "blurred"
    found = facts.counted(tiny_corpus.table(rows))
    assert of(found, "isic2019").lost("other") == 1 and of(found, "isic2019").lost("too_small") == 1
    assert cells(found.other_reasons)["isic2019"] == {"blurred": 1}
    assert found.checks[0].holds


def test_thresholds_count_the_real_short_sides_of_dropped_and_of_kept_rows(counted: facts.CorpusFacts) -> None:
    sizes = counted.size_filter
    by_side = {t.side: (t.dropped.total, dict(zip(sizes.sources, t.by_source, strict=True))) for t in sizes.thresholds}
    assert list(by_side) == [64, 96, 112, 128, 256]
    assert by_side[96][0] == 0
    assert by_side[112] == (1, {"isic2019": 1, "ddi": 0, "kaggle1": 0, "pad-ufes-20": 0})  # 100 px
    assert by_side[128] == (2, {"isic2019": 2, "ddi": 0, "kaggle1": 0, "pad-ufes-20": 0})  # and 120 px
    assert by_side[256] == (5, {"isic2019": 2, "ddi": 0, "kaggle1": 1, "pad-ufes-20": 2})
    assert dict(zip(sizes.sources, sizes.unknown, strict=True))["isic2019"] == 2
    assert sizes.at(128).dropped.total == counted.total.lost("too_small")


def test_another_least_side_has_a_column_of_its_own() -> None:
    found = table1.size_filter(tiny_corpus.table(), 120)
    assert [t.side for t in found.thresholds] == [64, 96, 112, 120, 128, 256] and found.at(120).dropped.total == 1


def test_scales_have_a_column_for_every_rung_and_larger_ones_serve_smaller(counted: facts.CorpusFacts) -> None:
    assert counted.scales.columns == ("128", "256", "512") and counted.scales.column_totals == (3, 5, 1)
    assert counted.at_least == (9, 6, 1)
    assert cells(counted.scales)["kaggle1"] == {"128": 1, "256": 1}


# ------------------------------------------------------------------------------------------------------- copies


def test_every_pair_counts_once_and_the_table_of_copies_is_accounted_for(counted: facts.CorpusFacts) -> None:
    found = counted.copies
    assert found.kinds == {"exact": 2, "published": 1, "near": 2} and found.total == 5
    assert cells(found.matrix) == {
        "isic2019": {"isic2019": 1, "kaggle1": 2}, "kaggle1": {"isic2019": 2, "kaggle1": 2}, "ddi": {},
        "pad-ufes-20": {},
    }  # fmt: skip
    assert [(p.source_a, p.source_b, p.total) for p in found.pairs] == [
        ("isic2019", "isic2019", 1), ("isic2019", "kaggle1", 2), ("kaggle1", "kaggle1", 2),
    ]  # fmt: skip
    assert found.reconciled == copies.Reconciled(rows=6, counted=3, equal_pixels=2, repeats=1, unknown=0)
    assert found.reconciled.holds
    assert cells(found.removed) == {
        "isic2019": {"isic2019": 1}, "kaggle1": {"isic2019": 2, "kaggle1": 1}, "ddi": {}, "pad-ufes-20": {}
    }  # fmt: skip


def test_groups_are_counted_over_all_rows_and_over_accepted_ones(counted: facts.CorpusFacts) -> None:
    assert counted.copies.groups == copies.Groups(
        listed=11, listed_largest=5, listed_many_sources=1, accepted=7, accepted_largest=2, accepted_many_sources=0,
        crossing=0,
    )  # fmt: skip


def test_the_matrix_is_a_recount_pair_by_pair_on_random_copies() -> None:
    rng = np.random.default_rng(5)
    rows = []
    for i in range(120):
        pixels = f"pixels {rng.integers(60)}"
        row = {"row_id": f"r{i}", "record_id": pixels, "source": f"s{rng.integers(4)}", "group_id": "g"}
        rows.append(row | {"outcome": "accepted", "split": "train"})
    pairs = [(f"r{a}", f"r{b}", str(rng.choice(["near", "published"]))) for a, b in rng.integers(120, size=(200, 2))]
    pairs = [p for p in pairs if p[0] != p[1]]
    found = copies.count_copies(tiny_corpus.table(rows), tiny_corpus.copies_table(pairs))
    by_id = {row["row_id"]: row for row in rows}
    kinds: dict[frozenset[str], str] = {}
    for a, b, kind in pairs:
        if kinds.get(frozenset((a, b))) != "published":
            kinds[frozenset((a, b))] = kind
    for one, two in combinations(rows, 2):
        if one["record_id"] == two["record_id"]:
            kinds[frozenset((one["row_id"], two["row_id"]))] = "exact"
    expected = Counter((frozenset(by_id[name]["source"] for name in pair), kind) for pair, kind in kinds.items())
    got = {(frozenset((p.source_a, p.source_b)), kind): n for p in found.pairs for kind, n in p.kinds.items() if n}
    assert got == dict(expected)
    matrix = np.array(found.matrix.counts)
    assert (matrix == matrix.T).all() and np.triu(matrix).sum() == len(kinds) == found.total
    assert found.reconciled is not None and found.reconciled.holds


def test_a_kind_of_copies_that_is_new_has_a_count_of_its_own() -> None:
    found = copies.count_copies(tiny_corpus.table(), tiny_corpus.copies_table([("a0", "k0", "crop")]))
    assert found.kinds == {"exact": 2, "published": 0, "near": 0, "crop": 1}


def test_a_group_in_two_splits_fails_its_check() -> None:
    rows = tiny_corpus.corpus_rows()
    rows[1]["split"] = "val"  # the lesion of a0, which is in train
    found = facts.counted(tiny_corpus.table(rows))
    check = next(c for c in found.checks if c.name == "one_split")
    assert (check.holds, found.holds, found.copies.groups.crossing) == (False, False, 1)


def test_a_held_out_image_in_the_group_of_a_training_image_fails_its_check() -> None:
    names = [row["row_id"] for row in tiny_corpus.corpus_rows()]
    held = pa.table({"row_id": names, "split": pa.array(["test" if n == "k0" else None for n in names], pa.string())})
    found = facts.counted(tiny_corpus.table(), hints=held)
    check = next(c for c in found.checks if c.name == "held_out")
    assert check.holds is False and "2 rows share a group" in check.found  # a0 and a1


def test_pairs_apart_orphans_and_a_lost_row_each_fail_a_check() -> None:
    rows = tiny_corpus.corpus_rows()
    rows[10] |= {"group_id": "elsewhere", "duplicate_of": "a2"}  # k0: a2 was rejected itself
    listed = pa.table({"source": ["isic2019"] * 7 + ["ddi"] * 4 + ["kaggle1"] * 5 + ["pad-ufes-20"] * 2})
    found = facts.counted(tiny_corpus.table(rows), copies_table=tiny_corpus.copies_table(), listed=listed)
    failed = {c.name: c.found for c in found.checks if c.holds is False}
    assert failed == {
        "listing": "18 listed; not so: ddi", "copies_stay": "1 of 4 rows break it",
        "copies_grouped": "2 of 6 pairs break it",
    }  # fmt: skip


def test_an_image_that_is_stored_enlarged_fails_its_check_unless_it_was_padded() -> None:
    rows = tiny_corpus.corpus_rows()
    rows[15]["scale"] = 180  # p0, published with 200 x 130 px
    for frame, holds in (("keep", False), ("pad", True)):
        found = facts.counted(tiny_corpus.table(rows), settings=facts.Settings(min_side=128, frame=frame))
        assert next(c for c in found.checks if c.name == "sizes").holds is holds
    small = facts.counted(tiny_corpus.table(), settings=facts.Settings(min_side=256))
    assert "3 below" in next(c for c in small.checks if c.name == "sizes").found  # k4, p0 and p1


def test_all_checks_hold_on_the_corpus_as_it_is_and_without_tables_they_are_left_open(
    counted: facts.CorpusFacts,
) -> None:
    assert [c.holds for c in counted.checks] == [True] * len(counted.checks)
    alone = facts.counted(tiny_corpus.table())
    assert alone.holds and sum(c.holds is None for c in alone.checks) == 5


# -------------------------------------------------------------------------------------------------- composition


def test_what_is_missing_is_counted_on_accepted_rows(counted: facts.CorpusFacts) -> None:
    lacking = cells(counted.missing.lacking)
    assert dict(zip(counted.missing.lacking.rows, counted.missing.of, strict=True))["isic2019"] == 2
    assert lacking["isic2019"] == {
        "patient_id": 2, "age": 1, "sex": 2, "site": 2, "skin_type": 2, "diameter_mm": 2, "mask": 1,
    }  # fmt: skip
    assert lacking["kaggle1"]["skin_type"] == 2, "a measured band is not a published skin type"
    assert "patient_id" not in lacking["pad-ufes-20"] and "diameter_mm" not in lacking["pad-ufes-20"]


def test_an_empty_mask_an_empty_word_and_a_number_that_is_none_are_missing() -> None:
    rows = tiny_corpus.corpus_rows()
    rows[1] |= {"mask_source": "empty", "patient_id": "", "age": float("nan")}
    lacking = cells(composition.missing(tiny_corpus.table(rows)).lacking)["isic2019"]
    assert (lacking["mask"], lacking["patient_id"], lacking["age"]) == (2, 2, 1)


def test_no_skin_scale_is_merged_with_another(counted: facts.CorpusFacts) -> None:
    found = {(s.scale, s.origin): s for s in counted.skin.scales}
    assert list(found) == [("fst", "expert"), ("ddi", "expert")]
    assert cells(found["fst", "expert"].by_source) == {"pad-ufes-20": {"III": 2}}  # not kaggle1's measured III
    assert cells(found["ddi", "expert"].by_source) == {"ddi": {"12": 2, "56": 1}}
    for (scale, _), part in found.items():
        assert part.by_source.columns == taxonomy.SKIN_TYPE_WORDS[scale]
    assert cells(counted.skin.coverage) == {
        "isic2019": {"measured ITA alone": 2}, "kaggle1": {"measured ITA alone": 1, "nothing": 1},
        "ddi": {"DDI group (12: I and II, 34: III and IV, 56: V and VI), expert": 3},
        "pad-ufes-20": {"Fitzpatrick type, expert": 2},
    }  # fmt: skip
    assert counted.skin.coverage.total == counted.total.accepted.total


def test_two_origins_of_one_scale_stay_apart() -> None:
    rows = tiny_corpus.corpus_rows()
    rows[-1]["skin_type_source"] = "annotators"
    found = skin.skin_tone(tiny_corpus.table(rows))
    assert [(s.scale, s.origin, s.by_source.total) for s in found.scales] == [
        ("fst", "annotators", 1), ("fst", "expert", 1), ("ddi", "expert", 3),
    ]  # fmt: skip


def test_the_angles_bands_are_the_published_ones_and_stand_beside_what_is_stated(counted: facts.CorpusFacts) -> None:
    assert cells(counted.skin.ita) == {
        "isic2019": {"I": 1, "IV": 1}, "kaggle1": {"III": 1, "no angle": 1}, "ddi": {"II": 1, "VI": 1, "no angle": 1},
        "pad-ufes-20": {"I": 1, "III": 1},
    }  # fmt: skip
    fst = counted.skin.scales[0]
    assert cells(fst.angles)["III"] == {"I": 1, "III": 1} and fst.quartiles[2] == (40.8, 46.5, 52.2)
    assert [s.scale for s in counted.skin.scales if s.angles.total != s.by_source.total] == []


def test_bands_agree_with_the_taxonomy_at_and_around_every_bound() -> None:
    angles = [b + d for b in taxonomy.ITA_BOUNDS for d in (-0.5, 0.0, 0.5)]
    found = skin.bands(pa.table({"ita": pa.array([*angles, None, float("nan")], pa.float32())}))
    assert [found.words[c] for c in found.codes[:-2]] == [taxonomy.skin_type_of_ita(a) for a in angles]
    assert [found.words[c] for c in found.codes[-2:]] == ["no angle"] * 2
    assert skin.band_bounds() == ("> 55", "41 to 55", "28 to 41", "10 to 28", "-30 to 10", "≤ -30")


def test_modality_and_confirmation_by_source(counted: facts.CorpusFacts) -> None:
    assert cells(counted.modality)["ddi"] == {"clinical": 3} and counted.domain.column_totals == (9,)
    assert cells(counted.confirmation) == {
        "isic2019": {"histology": 1, "follow_up": 1}, "ddi": {"histology": 3}, "kaggle1": {"not stated": 2},
        "pad-ufes-20": {"not stated": 2},
    }  # fmt: skip


def test_where_publisher_and_policy_differ_is_listed_by_label(counted: facts.CorpusFacts) -> None:
    found = counted.label_policy
    assert cells(found.agreement)["ddi"] == {"they agree": 2, "they differ": 1}
    assert cells(found.agreement)["isic2019"] == {"policy only": 6, "neither says": 1}
    assert found.disagreements == (composition.Disagreement("ddi", HOSTILE, "other_benign", True, False, 1, 1),)


def test_licences_are_joined_to_one_verdict(counted: facts.CorpusFacts) -> None:
    rows = {row.source: (row.understood, row.rows, row.blocks_commercial) for row in counted.licence.rows}
    assert rows == {
        "isic2019": ("CC-BY-NC", 2, True), "ddi": ("research-only", 3, True), "kaggle1": ("unknown", 2, True),
        "pad-ufes-20": ("CC-BY", 2, False),
    }  # fmt: skip
    assert counted.licence.verdict is not None
    assert (counted.licence.verdict.licence, counted.licence.verdict.commercial) == ("unknown", False)


def test_balance_is_of_the_training_split_and_states_what_weights_cost(counted: facts.CorpusFacts) -> None:
    found = counted.balance
    assert found is not None and found.images == 7
    roots = 5 + 2**0.5  # five cells of one image, and pad-ufes-20's two nevi
    shares = {s.name: (s.images, s.before, s.after) for s in found.by_source}
    assert shares["isic2019"] == (2, pytest.approx(2 / 7), pytest.approx(2 / roots))
    assert shares["pad-ufes-20"] == (2, pytest.approx(2 / 7), pytest.approx(2**0.5 / roots))
    cell = next(c for c in found.cells if c.source == "pad-ufes-20")
    assert (cell.diagnosis, cell.images, cell.weight) == ("nevus", 2, pytest.approx(2**0.5 / roots / 2))
    assert sum(c.images * c.weight for c in found.cells) == pytest.approx(1.0)
    natural = found.options[0]
    assert (natural.alpha, natural.effective_size, natural.most_repeats) == (1.0, pytest.approx(7), pytest.approx(1))
    assert natural.sources == pytest.approx(1 / (3 * (2 / 7) ** 2 + (1 / 7) ** 2))
    assert natural.malignant_share == pytest.approx(2 / 7)


def test_a_corpus_without_any_accepted_row_has_facts_too() -> None:
    rows = [row for row in tiny_corpus.corpus_rows() if row["outcome"] != "accepted"]
    found = facts.counted(tiny_corpus.table(rows), copies_table=tiny_corpus.copies_table([]))
    assert found.balance is None and found.licence.verdict is None and found.total.accepted.total == 0
    assert json.loads(facts.to_json(found))["total"]["listed"]["benign"] == 5  # a2, a5, a6, k0 and k3
    html = build_report(replace(collect("/nowhere/at/all"), corpus_facts=found))
    assert "No image was accepted, so no licence binds." in html and "No image is in the training split." in html


# ------------------------------------------------------------------------------------------------- page and JSON


class Tables(HTMLParser):
    """The body rows of every table by its id: the text of each cell, with the parts of a cell apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[list[str]]]] = {}
        self._rows: list[list[list[str]]] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self._rows = self.rows.setdefault(str(dict(attrs).get("id")), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append([])
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._cell and data.strip():
            self._rows[-1][-1].append(data.strip())

    def named(self, table: str, name: str) -> list[str]:
        """The first text of each cell of a row, but for its name."""
        row = next(r for r in self.rows[table] if r and r[0] and r[0][0] == name)
        return [cell[0] if cell else "" for cell in row[1:]]


def numbers(texts: list[str]) -> list[int]:
    return [0 if text == "·" else int(text.replace(",", "")) for text in texts if re.fullmatch(r"[\d,]+|·", text)]


def test_the_page_and_the_json_have_the_same_numbers(run: Path) -> None:
    write_report(run)
    said = json.loads((run / "report" / "corpus.json").read_text())
    page = Tables((run / "report" / "index.html").read_text())
    assert said["sealed"] and said["holds"]
    for d in [*said["datasets"], said["total"]]:
        labels = [[d[part][key] for key in ("benign", "malignant", "not_stated")] for part in ("listed", "accepted")]
        shown = numbers(page.named("corpus-table1", d["title"]))
        assert shown == [*labels[0], *labels[1][:2], *d["splits"].values()]  # no accepted row lacks its label
        left = [sum(f["left"].values()) for f in d["filters"] if f["name"] != "other"]
        listed, accepted = (sum(d[part].values()) for part in ("listed", "accepted"))
        assert numbers(page.named("corpus-filters", d["title"])) == [listed, *left, accepted]
    matrix = said["copies"]["matrix"]
    for name, counts in zip(matrix["rows"], matrix["counts"], strict=True):
        assert numbers(page.named("corpus-matrix", name)) == counts
    titles = {d["source"]: d["title"] for d in said["datasets"]}
    missing = said["missing"]
    for name, count, row in zip(missing["lacking"]["rows"], missing["of"], missing["lacking"]["counts"], strict=True):
        assert numbers(page.named("corpus-missing", titles[name])) == [count, *row]
    for i, name in enumerate(said["size_filter"]["sources"]):
        shown = numbers(page.named("corpus-thresholds", titles[name]))
        assert shown == [
            said["size_filter"]["known"][i],
            *(t["by_source"][i] for t in said["size_filter"]["thresholds"]),
        ]
    for row in said["balance"]["by_source"]:
        assert numbers(page.named("corpus-balance-sources", titles[row["name"]]))[0] == row["images"]
    assert said["tables"].keys() == {"corpus", "listing", "intake", "copies"}


def test_settings_come_from_the_tables_and_not_from_a_later_recipe(run: Path) -> None:
    found = facts.of_run(open_store(run))
    assert found is not None
    assert found.settings == facts.Settings(
        min_side=128, scales=(128, 256, 512), near_duplicates="reject", min_likeness=0.75
    )


def test_hostile_words_are_shown_and_never_obeyed() -> None:
    rows = [dict(row, licence=HOSTILE, modality=HOSTILE) for row in tiny_corpus.corpus_rows()]
    for row in rows[:7]:
        row |= {"source": HOSTILE, "confirmation": HOSTILE}
    rows[4]["reason"] = rows[5]["reason"] = HOSTILE
    rows[-1] |= {"skin_type_scale": HOSTILE, "skin_type": HOSTILE, "skin_type_source": HOSTILE, "diagnosis": HOSTILE}
    found = facts.counted(tiny_corpus.table(rows), copies_table=tiny_corpus.copies_table(), settings=SETTINGS)
    html = build_report(replace(collect("/nowhere/at/all"), corpus_facts=found))
    assert html.count("&lt;script&gt;") > 20 and "<script" not in html and "<img src=https" not in html
    assert json.loads(facts.to_json(found))["datasets"][0]["source"] == HOSTILE


def test_a_run_without_copies_says_so(tmp_path: Path) -> None:
    path = tiny_corpus.build(tmp_path / "run", copies=False)
    write_report(path)
    html = (path / "report" / "index.html").read_text()
    assert "Copies were not looked for" in html and f"factory ingest --run {path}" in html
    said = json.loads((path / "report" / "corpus.json").read_text())
    assert said["copies"]["looked_for"] is False and said["copies"]["kinds"] == {"exact": 2, "published": 0, "near": 0}
    assert [c["holds"] for c in said["checks"]].count(None) == 2


def test_a_published_table_without_its_images_has_a_page(tmp_path: Path) -> None:
    path = tiny_corpus.build(tmp_path / "run", missing=True)
    write_report(path)
    said = json.loads((path / "report" / "corpus.json").read_text())
    assert said["holds"] and said["failures"]["counts"] == [[3], [7], [5], [2]] and said["balance"] is None
    html = (path / "report" / "index.html").read_text()
    assert "no image was read" in html and "No image was read, so no size is known." in html
    assert "No image was accepted" in html and "Checked against the truth" not in html  # a corpus of none is no phantom


def test_an_unsealed_corpus_says_so_on_the_page_and_in_the_json(tmp_path: Path) -> None:
    path = tiny_corpus.build(tmp_path / "run", seal=False)
    write_report(path)
    assert "The corpus is not sealed" in (path / "report" / "index.html").read_text()
    assert json.loads((path / "report" / "corpus.json").read_text())["sealed"] is False


def test_a_failed_check_is_seen_on_the_page() -> None:
    rows = tiny_corpus.corpus_rows()
    rows[1]["split"] = "val"
    html = build_report(replace(collect("/nowhere/at/all"), corpus_facts=facts.counted(tiny_corpus.table(rows))))
    assert "<b>does not hold</b> No group of patient" in html
    assert "1 groups have accepted images in more than one split" in html


def test_a_browser_shows_no_table_wider_than_the_page(run: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    write_report(run)
    shot = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
             f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    command = [browser, *flags, "--window-size=1200,6000", f"--screenshot={shot}", (run / "report/index.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    paper = pixels[0, 0]
    assert (pixels[:, 1180:] == paper).all() and not (pixels[:, 100:1100] == paper).all()


# -------------------------------------------------------------------------------------------------- real runs


def test_the_command_makes_the_page_at_any_time_and_refuses_a_run_that_is_none(
    run: Path, tmp_path: Path, factory_command: Callable[..., Any]
) -> None:
    said = factory_command("report", "--run", run)
    assert said.status == 0 and f"report      {run}/report/index.html" in said.out
    refused = factory_command("report", "--run", tmp_path / "none")
    assert refused.status == 2 and "must name a run that holds something" in refused.err
    assert not (tmp_path / "none").exists()


def recount(path: Path) -> tuple[Counter[tuple[str, str]], dict[str, Any]]:
    """Rows by source and outcome from the sealed corpus, row by row, and what the JSON says."""
    rows = Table(open_store(path), "corpus").read().to_pylist()
    said = json.loads((path / "report" / "corpus.json").read_text())
    assert said["sealed"] and said["holds"], [c for c in said["checks"] if c["holds"] is False]
    for d in said["datasets"]:
        ours = [row for row in rows if row["source"] == d["source"]]
        accepted = [row for row in ours if row["outcome"] == records.ACCEPTED]
        assert sum(d["listed"].values()) == len(ours) and sum(d["accepted"].values()) == len(accepted)
        assert d["accepted"]["malignant"] == sum(row["malignant"] is True for row in accepted)
        assert d["splits"] == {s: sum(row["split"] == s for row in accepted) for s in taxonomy.SPLITS}
        short = sorted(min(r["source_width"], r["source_height"]) for r in ours if r["source_width"])
        assert d["sizes"]["short"] == [short[0], short[(len(short) - 1) // 2], short[-1]]
    return Counter((row["source"], row["outcome"]) for row in rows), said


@pytest.mark.usefixtures("ray_cluster")
def test_an_ingest_ends_with_the_report(tmp_path: Path, factory_command: Callable[..., Any]) -> None:
    path = tmp_path / "run"
    done = factory_command("ingest", "--recipe", "smoke", "--run", path, "--corpus", "phantom=60")
    assert done.status == 0, done.err
    assert f"report      {path}/report/index.html" in done.out
    counts, said = recount(path)
    assert counts["phantom", "accepted"] == 60 and said["copies"]["looked_for"]
    assert said["settings"]["min_side"] == Recipe.model_validate(Run(str(path)).header()["recipe"]).corpus.min_side  # type: ignore[index]
    assert [(s["scale"], s["origin"]) for s in said["skin"]["scales"]] == [("ita", "phantom")]


@pytest.mark.usefixtures("ray_cluster")
def test_the_report_on_real_photographs_is_a_recount(
    isic2017: Path, tmp_path: Path, factory_command: Callable[..., Any]
) -> None:
    """The published validation set of ISIC 2017, with one image there again under another name."""
    root = tmp_path / "isic2017"
    root.mkdir()
    data = "ISIC-2017_Validation_Data"
    for item in isic2017.glob("ISIC-2017_Validation_*"):
        if item.name != data:
            (root / item.name).symlink_to(item)
    (root / data).mkdir()
    for file in (isic2017 / data).iterdir():
        (root / data / file.name).symlink_to(file)
    table = root / "ISIC-2017_Validation_Part3_GroundTruth.csv"
    text = table.read_text()
    table.unlink()
    first = sorted((root / data).glob("*.jpg"))[0]
    (root / data / "ISIC_9999999.jpg").symlink_to(first)
    same = next(line for line in text.splitlines() if line.startswith(first.stem))
    table.write_text(text.rstrip("\n") + "\n" + same.replace(first.stem, "ISIC_9999999") + "\n")
    path = tmp_path / "run"
    done = factory_command("ingest", "--run", path, "--corpus", f"isic2017={root}", "--corpus", "phantom=12")
    assert done.status == 0, done.err
    counts, said = recount(path)
    assert counts["isic2017", "accepted"] + counts["isic2017", "rejected"] == 151
    isic = said["datasets"][0]
    assert isic["splits"] == {"train": 0, "val": 0, "test": counts["isic2017", "accepted"]}
    assert said["copies"]["kinds"]["exact"] == 1 and said["copies"]["removed"]["counts"][0][0] >= 1
    assert said["licence"]["verdict"]["licence"] == "Apache-2.0"  # CC0 and the phantoms'
