"""Images per second of the phantom on two processes, beside the rate of PNG-encoding the same images.

Encoding is the ceiling: a corpus on disk cannot be written faster than that, whatever draws it.
"""

from __future__ import annotations

import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2

from factory import phantom

PROCESSES, SIZE, IMAGES = 2, 128, 1200
RESULT = Path(__file__).parent / "results" / "phantom_rate.json"


def work(first: int) -> tuple[float, float]:
    """Seconds to draw a share of the images, and seconds to encode them."""
    cv2.setNumThreads(1)  # one thread a process, so that two processes mean two cores
    phantom.draw(0, 0, SIZE)
    start = time.perf_counter()
    images = [p.image for p in phantom.draw_many(0, range(first, first + IMAGES // PROCESSES), SIZE)]
    drawn = time.perf_counter()
    for image in images:
        cv2.imencode(".png", image)
    return drawn - start, time.perf_counter() - drawn


def main() -> None:
    starts = [k * (IMAGES // PROCESSES) for k in range(PROCESSES)]
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:
        drawing, encoding = zip(*pool.map(work, starts), strict=True)
    rate, ceiling = IMAGES / max(drawing), IMAGES / max(encoding)
    result = {
        "images_per_s": round(rate, 1),
        "processes": PROCESSES,
        "size": SIZE,
        "ceiling": round(ceiling, 1),
        "ratio": round(rate / ceiling, 4),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{rate:.1f} images/s at {SIZE} px on {PROCESSES} processes; PNG-encoding alone: {ceiling:.1f} images/s")


if __name__ == "__main__":
    main()
