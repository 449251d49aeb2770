from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import HOSTILE, TinyRun, build, write_lab

from factory import records
from factory.lab import caption_truth, planted
from factory.release import charts
from factory.release.collect import COMMANDS, ReportInputs
from factory.release.provenance import RunFacts
from factory.release.report import build_report, collect, write_report
from factory.storage import open_store
from factory.tables import Table

VOID = {"meta", "img", "input", "br", "hr", "link"}


class Page(HTMLParser):
    """The page's tags, addresses, table rows and text; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.rows: dict[str, str] = {}
        self.text: list[str] = []
        self._open: list[str] = []
        self._row: str | None = None
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        known = dict(attrs)
        self.addresses += [str(known[name]) for name in ("src", "href", "action", "srcset", "poster") if name in known]
        assert not [name for name in known if name.startswith("on")], "no inline handlers"
        if tag == "tr":
            self._row = known.get("data-count")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] == "style":
            return
        self.text.append(data)
        if self._row and self._open[-1] == "td" and self._row not in self.rows:
            self.rows[self._row] = data

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def page(run: TinyRun) -> Page:
    return Page(build_report(collect(run.path)))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    run = build(tmp_path_factory.mktemp("runs") / "full", photographs=True)
    write_lab(run.path)
    return run


def test_the_funnel_on_the_page_is_an_independent_recount_of_the_samples(run: TinyRun, page: Page) -> None:
    expected: Counter[str] = Counter(planned=run.planned)
    for row in run.samples:
        expected[row["outcome"]] += 1
        if row["reason"]:
            expected[f"{row['outcome']}:{row['reason']}"] += 1
    expected["waiting"] = run.planned - len(run.samples)
    assert {name: int(text) for name, text in page.rows.items()} == dict(expected)
    shown = {name: int(page.rows[name]) for name in ("accepted", "rejected", "failed", "waiting", "planned")}
    assert shown.pop("planned") == sum(shown.values())


def test_acceptance_per_group_is_an_independent_recount(run: TinyRun, page: Page) -> None:
    for word, column, value in (("melanocytic nevus", "diagnosis", "nevus"), ("IV", "skin_type", "IV")):
        rows = [row for row in run.samples if row[column] == value]
        accepted = sum(row["outcome"] == "accepted" for row in rows)
        assert re.search(rf"\b{word} {accepted} {len(rows)} {100 * accepted / len(rows):.1f}%", page.words)


def test_denoiser_calls_are_counted(run: TinyRun, page: Page) -> None:
    ran, planned = sum(row["calls_run"] for row in run.samples), 20 * len(run.samples)
    assert f"{ran} of {planned} planned denoiser calls" in page.words
    assert "Left after call" in page.words
    assert f"saved {100 * (1 - ran / planned):.1f}%" in page.words


def test_every_accepted_sample_of_a_small_run_is_shown_and_rejected_ones_with_pixels(run: TinyRun, page: Page) -> None:
    kept = [row for row in run.samples if row.get("image") and row["outcome"] in ("accepted", "rejected")]
    beside = 2 * 3 * 5  # five phantoms and five samples for each of three diagnoses
    assert page.tags["img"] == len(kept) + beside


def test_nothing_on_the_page_is_fetched_and_no_script_runs(full_run: TinyRun) -> None:
    html = build_report(collect(full_run.path))
    page = Page(html)
    assert all(address.startswith(("data:image/webp;base64,", "#")) for address in page.addresses)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert "default-src 'none'" in html
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_hostile_words_are_shown_and_never_obeyed(fresh_run: TinyRun) -> None:
    inputs = collect(fresh_run.path)
    html = build_report(replace(inputs, facts=replace(inputs.facts, name=HOSTILE, versions={HOSTILE: HOSTILE})))
    page = Page(html)
    assert HOSTILE in page.words and page.tags["script"] == 0
    assert "&lt;script&gt;" in html and "<script" not in html
    assert "https://example.com/a.png" not in page.addresses


def test_what_was_not_measured_is_said_with_the_command_that_measures_it(run: TinyRun, page: Page) -> None:
    for name in ("worth", "gate", "caption_accuracy", "near_copies"):
        assert f"factory {COMMANDS[name]} --run {run.path}" in page.words


def test_an_empty_run_has_a_page_that_says_what_to_do(tmp_path: Path) -> None:
    page = Page(build_report(collect(tmp_path)))
    assert "No samples have been made yet." in page.words
    for name in ("corpus", "samples", "fits", "worth"):
        assert f"factory {COMMANDS[name]} --run" in page.words


def test_what_was_measured_is_on_the_page(full_run: TinyRun) -> None:
    words = Page(build_report(collect(full_run.path))).words
    for expected in (
        "real + synthetic 0.760 (0.730 to 0.790)",
        "real + synthetic minus real, repeated AUC 0.050 (0.020 to 0.080) better",
        "Not measured: no real row has what it needs.", "These are closed-set numbers.",
        "precision 94 100 94.0%", "mask shifted 41 0.43 4 / 7 33 / 34", "none (exact mask) 80 1.00 78 / 80",
        "precision of 52.0%", "asymmetry 24 83.3%", "number of colours 24 62.5%", "0.91 0.021",
        "melanoma 8, nevus 12. Left out: failed 2.", "Asymmetry (0 to 1) 0.200 0.100 71.0% 60.0% to 82.0%",
        "black 50.0% 25.0%",
        "1 of 28 checked samples ( 3.6%", "s1 r1 0.981 yes", "By features it is 0.974.",
        "net-base base real + synthetic random taught 0.655 (0.591 to 0.719) 0.655 (0.591 to 0.719)",
        "net-small small real MAE alone not run: not a vit", "real + synthetic over real net-large large 0.100",
        "net-small small 1,000 2.500 224 px", "Tested on 20 real images", "3 samples with a parent among held-out",
        "A release of this run is bound by Apache-2.0", "isic2017 corpus CC0 no", "lora-joint", "1,234,567",
    ):  # fmt: skip
        assert " ".join(expected.split()).replace(" ", "") in words.replace(" ", ""), expected


def test_real_images_stand_beside_synthetic_ones_and_phantoms_are_called_phantoms(
    run: TinyRun, full_run: TinyRun
) -> None:
    assert "Real and synthetic, side by side" in Page(build_report(collect(full_run.path))).words
    inputs = collect(run.path)
    assert inputs.phantom and "Phantom and synthetic, side by side" in Page(build_report(inputs)).words


def test_rejected_samples_without_pixels_are_said_not_to_be_kept(tmp_path: Path) -> None:
    run = build(tmp_path / "run", count=9)
    inputs = collect(run.path)
    assert inputs.shown is not None
    blind = inputs.shown.filter(np.array([row == "accepted" for row in inputs.shown["outcome"].to_pylist()]))
    words = Page(build_report(replace(inputs, shown=blind))).words
    assert "pixels of the 2 rejected samples were not kept" in words and "synthesize.keep_rejected=image" in words
    none = build(tmp_path / "none", count=9, only="accepted")
    assert "No sample was rejected." in Page(build_report(collect(none.path))).words


def test_samples_outside_the_plan_are_pointed_out(run: TinyRun) -> None:
    inputs = collect(run.path)
    assert inputs.plan is not None
    words = Page(build_report(replace(inputs, plan=inputs.plan.slice(0, 35)))).words
    assert "5 samples belong to no row of the plan" in words


def test_the_report_is_written_into_the_run_and_the_same_run_gives_the_same_page(fresh_run: TinyRun) -> None:
    assert write_report(fresh_run.path) == "report/index.html"
    first = (fresh_run.path / "report" / "index.html").read_bytes()
    assert write_report(open_store(fresh_run.path)) and (fresh_run.path / "report" / "index.html").read_bytes() == first


def test_pictures_come_from_a_bounded_number_of_parts(run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory.release.collect._MAX_PARTS", 1)
    inputs = collect(run.path)
    assert inputs.shown is not None and inputs.samples is not None
    first_part = {row["sample_id"] for row in run.samples[:16]}
    assert set(inputs.shown["sample_id"].to_pylist()) <= first_part
    assert inputs.samples.num_rows == len(run.samples)


def test_a_damaged_lab_file_is_named(fresh_run: TinyRun) -> None:
    (fresh_run.path / "lab").mkdir()
    (fresh_run.path / "lab" / "worth.json").write_text("{")
    with pytest.raises(ValueError, match=r"lab/worth\.json must be JSON"):
        collect(fresh_run.path)


def test_plain_inputs_are_enough() -> None:
    page = Page(build_report(ReportInputs(facts=RunFacts("bare", "/runs/bare"))))
    assert "bare" in page.words and page.tags["section"] == 12


def test_a_browser_renders_the_page(full_run: TinyRun, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    write_report(full_run.path)
    shot = tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
             "--disable-background-networking", "--disable-component-update",
             f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    address = (full_run.path / "report" / "index.html").as_uri()
    command = [browser, *flags, "--window-size=1000,1600", f"--screenshot={shot}", address]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (1600, 1000, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # text alone has fewer: charts and pictures are there


def test_an_intelligible_title_is_set(run: TinyRun) -> None:
    assert "<title>tiny: dermafactory report</title>" in build_report(collect(run.path))
    assert json.loads((run.path / "run.json").read_text())["fingerprint"] in build_report(collect(run.path))


def test_what_the_labs_own_functions_return_is_understood(run: TinyRun) -> None:
    """The forms are the lab's: a gate that accepts all, and captions that repeat the truth."""
    gate = planted.gate_accuracy(lambda images, masks: [("accepted", None, 0.9)] * len(images), 5, 40, size=64)
    corpus = Table(open_store(run.path), "corpus").read()
    full = corpus.to_pylist()
    for row in full:
        row |= {"true_border_irregularity": 0.2, "true_color_count": 2, "true_colors": ["red", "white"]}
    captions = [
        {"record_id": row["record_id"], "asymmetry": row["true_asymmetry"], "border_irregularity": 0.2,
         "color_count": 2, "colors": ["red"], "outcome": "accepted"}
        for row in full
    ]  # fmt: skip
    said = caption_truth.captioner_accuracy(
        records.rows_to_table("corpus", full), records.rows_to_table("captions", captions)
    )
    words = Page(build_report(replace(collect(run.path), gate=gate, caption_accuracy=said))).words
    good = gate["recall"]["trials"]
    assert f"recall {good} {good} 100.0%" in words and f"precision {good} 40" in words
    assert "asymmetry 24 100.0%" in words


def test_what_scaling_measured_is_told_and_a_run_without_it_has_no_such_section(run: TinyRun) -> None:
    point = {"nodes": 1, "samples": 96, "all_busy_s": 4.0, "seconds": 30.0, "rate": 3.2, "steady_rate": 4.0,
             "efficiency": 1.0, "steady_efficiency": 1.0}  # fmt: skip
    four = point | {"nodes": 4, "steady_rate": 15.5, "steady_efficiency": 0.96875}
    loss = {
        "nodes": 4, "killed_s": 7.5, "units": 12, "units_redone": 2, "samples_redone": 16, "planned": 96,
        "accepted": 80, "rejected": 16, "failed": 0, "counts_add_up": True, "once_each": True, "same_bytes": True,
    }  # fmt: skip
    setting = {"count": 96, "call_s": 0.1, "calls": 10}
    inputs = collect(run.path)
    assert "Scaling" not in Page(build_report(inputs)).text
    found = {"setting": setting, "points": [point, four], "loss": loss}
    page = Page(build_report(replace(inputs, scaling=found)))
    assert "Scaling" in page.text and "96.9%" in page.text
    assert "2 of 12 units (16 samples) were made twice" in page.words
    assert "every byte is that of the undisturbed run" in page.words
    broken = Page(build_report(replace(inputs, scaling=found | {"loss": loss | {"once_each": False}})))
    assert "Some samples are missing or there twice." in broken.words


def test_sweeps_are_tables_and_a_run_without_them_has_no_such_section(run: TinyRun) -> None:
    inputs = collect(run.path)
    assert "Sweeps" not in Page(build_report(inputs)).text
    share = {"value": 0.625, "low": 0.3, "high": 0.86, "successes": 5, "trials": 8}
    mean = {"mean": 0.731, "low": 0.7, "high": 0.76}
    arms = {arm: {"dice": mean, "false_negative_rate": mean, "false_negative_rate_small": mean}
            for arm in ("real_synthetic", "real_repeated")}  # fmt: skip
    row = {"name": "0.7", "accepted": share, "by_diagnosis": {"seborrheic_keratosis": share},
           "by_size": {"small": share}}  # fmt: skip
    taught = row | {"tasks": {"classify": {"not_run": "one class alone"}, "segment": {"arms": arms}}}
    theta = {"varied": "theta", "rows": [taught, row | {"name": "0.9"}], "how": "As DiffAug did."}
    page = Page(build_report(replace(inputs, sweeps=[theta, theta | {"varied": "bank"}])))
    assert "filtered at each" in page.words and "samples of each, under the same gate" in page.words
    assert "62.5%" in page.text and "5 of 8" in page.words and "seborrheic keratosis" in page.words
    rate = {"precision": share, "recall": share, "auc": [0.912, 0.9, 0.93]}
    row = {"log_snr": 1.117, "timestep": 200.0, "latents": rate, "pixels": rate, "same_verdict": share}
    noise = Page(build_report(replace(inputs, validation_noise={"rows": [row], "pairs": 400})))
    assert "By the noise that the gate judges from" in noise.words and "0.912" in noise.words
    assert "0.731" in page.words and "one class alone" in page.words and "As DiffAug did." in page.words


def test_what_clients_of_the_gate_were_answered_is_drawn_and_a_run_without_it_has_no_such_section(
    run: TinyRun, tmp_path: Path
) -> None:
    assert "Gated over HTTP" not in Page(build_report(collect(run.path))).words
    shutil.copytree(run.path, tmp_path / "run")
    folder = tmp_path / "run/lab/gated"
    folder.mkdir(parents=True)
    answer = {"theta": 0.7, "reason": None, "verdict": "accepted"}
    rows = {str(k): answer | {"iou": 0.71 + k / 100} for k in range(9)}
    (folder / "true_masks.json").write_text(json.dumps({"rows": rows}))
    bad = {"theta": 0.7, "reason": "low_iou", "verdict": "rejected"}
    mixed = {str(k): (answer if k == 2 else bad) | {"iou": [0.05, 0.3, 1.0][k]} for k in range(3)}
    mixed["3"] = bad | {"reason": "non_finite", "iou": None}
    (folder / "others_masks.json").write_text(json.dumps({"rows": mixed}))
    page = Page(build_report(collect(tmp_path / "run")))
    assert "others masks 4 25.0% 0.30 low iou 2, non finite 1" in page.words
    assert "true masks 9 100.0% 0.75" in page.words


def test_a_histogram_counts_each_value_once_the_ends_included() -> None:
    drawn = str(charts.histogram([0.0, 0.01, 0.5, 1.0], 0.7, "overlaps", bins=4))
    titles = re.findall(r"<title>(.*?)</title>", drawn)
    assert titles == ["0.00 to 0.25: 2", "0.25 to 0.50: 0", "0.50 to 0.75: 1", "0.75 to 1.00: 1"]
    assert 'x1="163.4"' in drawn and charts.histogram([], 0.7, "none") == ""


def test_a_scaling_curve_draws_the_ideal_through_its_first_point() -> None:
    drawn = str(charts.scaling_curve([1, 2, 4], [4.0, 8.0, 12.0], "rates"))
    # 36 + 182 of the width at 4 nodes; 16 per second is the ideal there and the top, so 12 is three quarters up.
    assert 'x2="218.0" y2="8.0"' in drawn
    assert 'points="81.5,71.0 127.0,50.0 218.0,29.0"' in drawn
    assert charts.scaling_curve([], [], "none") == ""
