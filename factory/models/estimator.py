"""From how a mask agrees with what a segmenter found, and how sure that was, to the IoU that it has with the truth.

An overlap with what was found is not that: where the segmenter is unsure it is low for right masks too. The estimate is
fitted on pairs whose truth is known (`fits/iou_estimator.py`), and lies beside the segmenter that it was fitted for.

Letters: N pairs.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILE = "iou_estimator.safetensors"
FEATURES = 5  # of `quality.overlap.agreement`, shares from 0 to 1 each
WIDTH = 16
ENDS = 0.005  # shares nearer to 0 or 1 are taken for this


class IouEstimator(nn.Module):
    """A network of some hundred weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1)
        )

    def forward(self, agreement: Tensor) -> Tensor:
        """(N, FEATURES) -> the logit of the IoU with the true mask, (N,)."""
        return self.layers(agreement.clamp(ENDS, 1 - ENDS).logit())[:, 0]

    @torch.inference_mode()
    def expected(self, agreement: NDArray[np.floating]) -> NDArray[np.float64]:
        """(N, FEATURES) -> the IoU that is to be expected, (N,) from 0 to 1. A row's does not depend on the others."""
        rows = torch.from_numpy(np.asarray(agreement, np.float64))
        return np.array([float(self(row[None]).sigmoid()) for row in rows])


def save_estimator(model: IouEstimator, directory: str | Path) -> None:
    """Beside the segmenter in a directory."""
    save_file({k: v.detach().float().contiguous() for k, v in model.state_dict().items()}, Path(directory) / FILE)


def load_estimator(directory: str | Path) -> IouEstimator | None:
    """The estimator of a directory's segmenter, or None where none was fitted."""
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    model = IouEstimator()
    model.load_state_dict(load_file(path))
    return model.double().eval()
