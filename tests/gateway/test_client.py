"""The example's client, which knows the page and not the code, against the gate on a socket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gateway_client import encoded, lesion, listening

from factory.gateway.app import Gateway

CLIENT = Path(__file__).resolve().parents[2] / "examples" / "gate_client.py"
TOKEN = "b1946ac92492d2347c6235b4d2611184"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Six images, five with masks named as ISIC names them."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for number in range(6):
        image, mask = lesion(64, 0.15 + 0.05 * number, 64 + 16 * (number % 2))
        (images / f"ISIC_{number:07}.jpg").write_bytes(encoded(image, "JPEG"))
        if number != 5:
            (masks / f"ISIC_{number:07}_segmentation.png").write_bytes(encoded(mask.astype("uint8") * 255))
    return images, masks


def run(port: int, folders: tuple[Path, Path], *more: str, token: str = TOKEN) -> Any:
    out = folders[0].parent / "ious.json"
    done = subprocess.run(
        [sys.executable, "-I", CLIENT, f"http://127.0.0.1:{port}", *map(str, folders), "--out", str(out), *more],
        env={**os.environ, "FACTORY_GATE_TOKEN": token}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done, json.loads(out.read_text()) if out.exists() else None


def test_a_folder_is_gated_with_its_masks_with_shifted_ones_and_with_others(
    make_gateway: Callable[..., Gateway], folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FACTORY_GATE_TOKEN", TOKEN)
    with listening(make_gateway()) as port:
        done, true = run(port, folders)
        assert done.returncode == 0, done.stderr
        assert list(true["iou"]) == [f"ISIC_{number:07}" for number in range(5)]
        assert len(done.stdout.splitlines()) == 7 and set(true["model"]) == {"vae", "gate", "policy"}
        _, shifted = run(port, folders, "--shift", "0.9")
        assert all(row["reason"] == "empty_mask" for row in shifted["rows"].values()), "a mask moved out of its image"
        _, swapped = run(port, folders, "--swap")
        assert swapped["iou"] != true["iou"] and swapped["swap"]
        refused, _ = run(port, folders, token="wrong")
        assert refused.returncode == 1 and "gate: 401 token: Authorization must be" in refused.stderr
