"""Weights on disk: what a directory is, and a digest that is read again only when its file has changed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from factory.models import weights


def test_the_digest_of_a_large_file_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "LARGE", 8)
    monkeypatch.setattr(weights.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"some weights")
    first = weights._file_digest(file)
    assert first == hashlib.sha256(b"some weights").hexdigest()
    kept = list((tmp_path / "node").rglob("*/digests/*"))
    assert [path.read_text() for path in kept] == [first]
    kept[0].write_text("was read here")
    assert weights._file_digest(file) == "was read here"
    file.write_bytes(b"some weight!")  # as long, and later
    os.utime(file, ns=(1, 1))
    assert weights._file_digest(file) == hashlib.sha256(b"some weight!").hexdigest()


def test_a_directory_without_a_network_and_one_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a diffusers directory with unet/config.json or transformer/config"):
        weights.family_of(tmp_path)
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel", "in_channels": 5}')
    with pytest.raises(ValueError, match="a U-Net of 4, 8 or 9 channels, got UNet2DConditionModel with 5 in .*; name"):
        weights.family_of(tmp_path)
    for channels, family in ((4, "joint"), (8, "joint"), (9, "inpaint")):
        (tmp_path / "unet/config.json").write_text(
            f'{{"_class_name": "UNet2DConditionModel", "in_channels": {channels}}}'
        )
        assert weights.family_of(tmp_path) == family
