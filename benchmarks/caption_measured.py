"""How true measured captions are, how fast they are made, and what they say of real lesions by class.

On phantoms the truth is known: rank correlation of asymmetry, border irregularity and number of colours with it, and
the share of images whose words are the right ones; with the true masks, with masks by colour and with the segmenter's.
Speed is images per second at 256 px on two processes, PNG decoding of image and mask included, beside the decoding
alone in the same processes: nothing that reads PNGs is faster. With the masks that ISIC 2017 publishes, each
attribute's quartiles by class, and of melanoma against nevus Mann-Whitney's test with the AUC as its effect size.

    python benchmarks/caption_measured.py [--phantoms 400] [--isic2017 PATH --images 200]

`--aspect` is the width over height that the pictures were taken at: the challenge publishes mostly 4:3, and a local
copy that was squeezed to squares has another shape until that is undone. It is applied to square files only.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from scipy.stats import mannwhitneyu, spearmanr

from factory import phantom
from factory.images import decode_mask, decode_rgb, encode_mask, encode_png, read_mask, read_png, resized
from factory.quality.attributes import Measurements, measure
from factory.quality.overlap import iou
from factory.quality.statistics import bootstrap, wilson
from factory.stages.masks import SegmenterMasks, measured_mask

PROCESSES, SEED, SIDE = 2, 902, 256
GOALS = {"spearman": 0.9, "words": 0.9, "images_per_s": 150}
LEVELS = {"asymmetry": phantom.ASYMMETRY_LEVELS, "border_irregularity": phantom.BORDER_LEVELS}
NUMBERS: dict[str, Callable[[Measurements], float]] = {
    "asymmetry": lambda m: m.asymmetry,
    "border_irregularity": lambda m: m.border_irregularity,
    "color_count": lambda m: m.color_count,
    "color_asymmetry": lambda m: m.color_asymmetry,
    "radial_variance": lambda m: m.radial_variance,
    "fractal_dimension": lambda m: m.fractal_dimension,
    "abrupt_octants": lambda m: m.abrupt_octants,
    "relative_diameter": lambda m: m.relative_diameter,
}


def accuracy(count: int, size: int) -> dict[str, Any]:
    """Of `count` phantoms that nothing was fitted on, by where the mask came from."""
    segmenter = SegmenterMasks()
    finders: dict[str, Callable[[Any], Any]] = {"measured": measured_mask, "segmenter": segmenter}
    pairs: dict[str, list[tuple[Any, Measurements]]] = {"true": [], **{name: [] for name in finders}}
    overlaps: dict[str, list[tuple[float, float]]] = {name: [] for name in finders}
    for drawn in phantom.draw_many(SEED, range(count), size):
        truth = (drawn.asymmetry, drawn.border_irregularity, frozenset(drawn.colors))
        pairs["true"].append((truth, measure(drawn.image, drawn.mask)))
        for name, find in finders.items():
            found = find(drawn.image)
            overlaps[name].append((float(iou(drawn.mask, found.mask)), found.confidence))
            try:
                pairs[name].append((truth, measure(drawn.image, found.mask)))
            except ValueError:  # nothing was found: the caption of such a record fails, and says so
                continue
    result = {name: _agreement(rows) | {"captioned": len(rows), "of": count} for name, rows in pairs.items()}
    for name, found in overlaps.items():
        both = np.asarray(found)
        result[name] |= {
            "median_iou": round(float(np.median(both[:, 0])), 4),
            "confidence_to_iou_spearman": _ranked(both[:, 1], both[:, 0]),
        }
    return result


def _agreement(rows: list[tuple[Any, Measurements]]) -> dict[str, Any]:
    true = {"asymmetry": [t[0] for t, _ in rows], "border_irregularity": [t[1] for t, _ in rows]}
    said = {name: [getattr(m, name) for _, m in rows] for name in LEVELS}
    spearman = {name: _ranked(said[name], true[name]) for name in LEVELS}
    spearman["color_count"] = _ranked([m.color_count for _, m in rows], [len(t[2]) for t, _ in rows])
    words = {
        name: _share(
            [phantom.level(a, cuts) == phantom.level(b, cuts) for a, b in zip(said[name], true[name], strict=True)]
        )
        for name, cuts in LEVELS.items()
    }
    words["colors_exact"] = _share([frozenset(m.colors) == t[2] for t, m in rows])
    words["colors_each"] = _share([(c in m.colors) == (c in t[2]) for t, m in rows for c in phantom.COLORS])
    return {"spearman": spearman, "words": words}


def _ranked(a: Any, b: Any) -> dict[str, float]:
    one, two = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    found = bootstrap(lambda x, y: float(spearmanr(x, y).statistic), np.arange(len(one)), one, two, num_resamples=200)
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def _share(hits: list[bool]) -> dict[str, float]:
    found = wilson(sum(hits), len(hits))
    return {"value": round(found.value, 4), "low": round(found.low, 4), "high": round(found.high, 4)}


def timed(pairs: list[tuple[bytes, bytes]]) -> tuple[float, float, float]:
    """Seconds to decode pairs of PNGs and measure them, seconds to decode them alone, and CPU seconds of the first."""
    cv2.setNumThreads(1)  # one thread a process, so that two processes mean two cores
    measure(read_png(pairs[0][0]), read_mask(pairs[0][1]))
    start, spent = time.perf_counter(), time.process_time()
    for image, mask in pairs:
        measure(read_png(image), read_mask(mask))
    middle, spent = time.perf_counter(), time.process_time() - spent
    for image, mask in pairs:
        read_png(image), read_mask(mask)
    return middle - start, time.perf_counter() - middle, spent


def speed(count: int) -> dict[str, Any]:
    """Images per second of two processes, and of decoding alone."""
    drawn = [(encode_png(p.image), encode_mask(p.mask)) for p in phantom.draw_many(SEED, range(count), SIDE)]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        measuring, decoding, spent = zip(*pool.map(timed, [drawn[k::PROCESSES] for k in range(PROCESSES)]), strict=True)
    rate, ceiling = count / max(measuring), count / max(decoding)
    return {
        "size": SIDE, "images": count, "processes": PROCESSES, "images_per_s": round(rate, 1),
        "ceiling": round(ceiling, 1), "ratio": round(rate / ceiling, 4),
        # What a busy machine leaves as it is: the time on a core that an image takes, decoding included.
        "cpu_ms_per_image": round(1000 * sum(spent) / count, 2),
    }  # fmt: skip


def real_records(root: Path, count: int | None) -> Iterator[tuple[str, Path, Path]]:
    """(class, image, mask) of ISIC 2017's training and validation phases; with `count`, evenly spread over them."""
    listed = []
    for phase in ("Training", "Validation"):
        table = root / f"ISIC-2017_{phase}_Part3_GroundTruth.csv"
        for row in csv.DictReader(table.open()) if table.exists() else ():
            image = root / f"ISIC-2017_{phase}_Data" / f"{row['image_id']}.jpg"
            mask = root / f"ISIC-2017_{phase}_Part1_GroundTruth" / f"{row['image_id']}_segmentation.png"
            flags = (float(row["melanoma"]), float(row["seborrheic_keratosis"]))
            name = "melanoma" if flags[0] else "seborrheic_keratosis" if flags[1] else "nevus"
            if image.exists() and mask.exists():
                listed.append((name, image, mask))
    step = max(1, len(listed) // count) if count else 1
    yield from listed[::step][:count]


def by_class(root: Path, count: int | None, aspect: float) -> dict[str, Any]:
    """Quartiles of every attribute by class, and melanoma against nevus."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in NUMBERS}
    colors: dict[str, dict[str, int]] = {}
    squeezed, lost, counts = 0, 0, dict[str, int]()
    for name, image, mask in real_records(root, count):
        rgb = decode_rgb(image.read_bytes(), image.name)
        seen = resized(decode_mask(mask.read_bytes(), mask.name), rgb.shape[1], rgb.shape[0])
        square = rgb.shape[0] == rgb.shape[1]
        squeezed += square
        if min(rgb.shape[:2]) > SIDE:
            scale = SIDE / min(rgb.shape[:2])
            size = (round(rgb.shape[1] * scale), round(rgb.shape[0] * scale))
            rgb, seen = resized(rgb, *size), resized(seen, *size)
        try:
            found = measure(rgb, seen, unstretch=aspect if square else None)
        except ValueError:
            lost += 1
            continue
        counts[name] = counts.get(name, 0) + 1
        for attribute, read in NUMBERS.items():
            values[attribute].setdefault(name, []).append(float(read(found)))
        for color in found.colors:
            colors.setdefault(name, {})[color] = colors.get(name, {}).get(color, 0) + 1
    return {
        "images": sum(counts.values()), "by_class": counts, "without_a_lesion": lost,
        "square_files_unstretched": squeezed, "aspect": round(aspect, 4),
        "attributes": {attribute: _compared(classes) for attribute, classes in values.items()},
        "share_with_color": {
            name: {color: round(had / counts[name], 3) for color, had in sorted(of.items())}
            for name, of in colors.items()
        },
    }  # fmt: skip


def _compared(classes: dict[str, list[float]]) -> dict[str, Any]:
    result: dict[str, Any] = {
        name: {
            "num": len(found),
            **{
                word: round(float(np.quantile(found, at)), 4)
                for word, at in (("q1", 0.25), ("median", 0.5), ("q3", 0.75))
            },
        }
        for name, found in sorted(classes.items())
    }
    ill, well = classes.get("melanoma", []), classes.get("nevus", [])
    if ill and well:
        test = mannwhitneyu(ill, well)
        interval = bootstrap(
            lambda values, label: _auc(values[label > 0], values[label == 0]),
            np.arange(len(ill) + len(well)), np.asarray(ill + well), np.asarray([1] * len(ill) + [0] * len(well)),
            num_resamples=200,
        )  # fmt: skip
        result["melanoma_over_nevus"] = {
            "auc": round(interval.value, 4), "low": round(interval.low, 4), "high": round(interval.high, 4),
            "p_value": float(f"{test.pvalue:.2e}"),
        }  # fmt: skip
    return result


def _auc(ill: Any, well: Any) -> float:
    """The chance that a melanoma's value is above a nevus's, ties counting half."""
    if not len(ill) or not len(well):
        return float("nan")
    return float(mannwhitneyu(ill, well).statistic / (len(ill) * len(well)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phantoms", type=int, default=400)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--timed", type=int, default=600, help="images of the speed part; 0 leaves it out")
    parser.add_argument("--isic2017", type=Path)
    parser.add_argument("--images", type=int, help="so many of ISIC 2017 instead of all")
    parser.add_argument("--aspect", type=float, default=4 / 3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "caption_measured.json")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    result: dict[str, Any] = {"goals": GOALS, "seed": SEED}
    if args.timed:
        result["speed"] = speed(args.timed)
        print(json.dumps(result["speed"]))
    if args.phantoms:
        result["phantoms"] = {str(size): accuracy(args.phantoms, size) for size in args.sizes}
        print(json.dumps(result["phantoms"], indent=1))
    if args.isic2017:
        result["isic2017"] = by_class(args.isic2017, args.images, args.aspect)
        print(json.dumps(result["isic2017"], indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
