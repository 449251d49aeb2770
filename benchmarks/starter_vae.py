"""How much of real skin the starter's VAE carries, against bicubic upsampling from the same number of values.

Both see ISIC 2017 validation images, which no fit has seen, at 128 px. The peer keeps block means in three channels
on the largest grid that holds no fewer values than the latents do, and is upsampled bicubically.

    python benchmarks/starter_vae.py --isic2017 PATH [--vae DIR] [--out benchmarks/results/starter_vae.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch

from factory.models.starter import load_vae

SIZE = 128


def images(root: Path) -> np.ndarray:
    files = sorted((root / "ISIC-2017_Validation_Data").glob("*.jpg"))
    read = [cv2.resize(cv2.imread(str(f))[:, :, ::-1], (SIZE, SIZE), interpolation=cv2.INTER_AREA) for f in files]
    return np.stack(read)


def psnr(real: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(N,) decibels over 8-bit pixels."""
    error = (real.astype(np.float64) - other.astype(np.float64)) ** 2
    return 10 * np.log10(255**2 / error.mean(axis=(1, 2, 3)).clip(1e-9))


def through_vae(vae: torch.nn.Module, real: np.ndarray) -> tuple[np.ndarray, int]:
    pixels = torch.from_numpy(real.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        latents = torch.cat([vae.encode(batch).latent for batch in pixels.split(16)])
        decoded = torch.cat([vae.decode(batch).sample for batch in latents.split(16)])
    out = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return out, latents[0].numel()


def through_grid(real: np.ndarray, num_values: int) -> tuple[np.ndarray, int]:
    side = int(np.ceil((num_values / 3) ** 0.5))
    small = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in real]
    return np.stack([cv2.resize(s, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for s in small]), side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isic2017", type=Path, required=True)
    parser.add_argument("--vae", type=Path, default=Path("factory/starter/vae"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/starter_vae.json"))
    parser.add_argument("--sheet", type=Path, help="write a PNG: real, VAE, grid, in columns")
    args = parser.parse_args()
    real = images(args.isic2017)
    ours, num_values = through_vae(load_vae(args.vae), real)
    peer, side = through_grid(real, num_values)
    result = {
        "images": len(real), "size": SIZE, "values_per_image": num_values, "peer_grid": [side, side, 3],
        "vae_psnr_db": round(float(psnr(real, ours).mean()), 2),
        "peer_psnr_db": round(float(psnr(real, peer).mean()), 2),
        "gain_db": round(float((psnr(real, ours) - psnr(real, peer)).mean()), 2),
        "worst_gain_db": round(float((psnr(real, ours) - psnr(real, peer)).min()), 2),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    if args.sheet:
        picked = np.linspace(0, len(real) - 1, 16).astype(int)
        rows = [np.hstack([real[i], ours[i], peer[i]]) for i in picked]
        sheet = np.hstack([np.vstack(rows[k::2]) for k in range(2)])
        cv2.imwrite(str(args.sheet), sheet[:, :, ::-1])


if __name__ == "__main__":
    main()
