"""Solvers as tables. A step of DDIM, DPM-Solver++(2M) or flow Euler is three numbers, so slots of one batch can be
at different steps of different schedules:

    z_next = keep * z + new * d + old * d_previous        d: the clean estimate (Eq. 11) of the guided prediction

DDIM (Song et al., arXiv 2010.02502, eta 0), DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, midpoint, first order at
the first and the last step), Euler on rectified flow. Timesteps are spaced "trailing" and the last step ends at the
clean estimate itself (Lin et al., arXiv 2305.08891), so a schedule may begin at zero SNR.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

SolverName = Literal["ddim", "dpm++2m"]
SOLVERS: tuple[str, ...] = ("ddim", "dpm++2m")


class Schedule(NamedTuple):
    """The N steps of one trajectory, each array (N,) float64. `timesteps` are on the network's scale."""

    timesteps: np.ndarray
    keep: np.ndarray
    new: np.ndarray
    old: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)


def schedule(
    prediction_type: str, alphas_cumprod: np.ndarray, num_inference_steps: int, solver: str, shift: float = 1.0
) -> Schedule:
    """The table of a solver. `alphas_cumprod` (T,) is the training schedule; of `flow` only its length counts, and
    `shift` moves its levels towards noise (s' = shift s / (1 + (shift - 1) s))."""
    num_train = len(alphas_cumprod)
    if not 1 <= num_inference_steps <= num_train:
        raise ValueError(f"num_inference_steps must be from 1 to {num_train}, got {num_inference_steps}; lower it.")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}; choose one of them.")
    if prediction_type == "flow":
        share = 1 - np.arange(num_inference_steps) / num_inference_steps
        noise = shift * share / (1 + (shift - 1) * share)
        timesteps, signal = noise * num_train, 1 - noise
    else:
        spaced = np.arange(num_inference_steps) * (num_train / num_inference_steps)
        timesteps = np.round(num_train - spaced) - 1
        alpha_bar = np.asarray(alphas_cumprod, np.float64)[timesteps.astype(np.int64)]
        signal, noise = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    steps = _ddim if solver == "ddim" else _dpm
    return Schedule(timesteps, *steps(np.append(signal, 1.0), np.append(noise, 0.0)))


def _ddim(signal: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the noise's direction, take the clean estimate at the next level. On a flow this is Euler's step."""
    keep = noise[1:] / noise[:-1]
    return keep, signal[1:] - keep * signal[:-1], np.zeros(len(keep))


def _dpm(signal: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Second order in the half log-SNR, from the last two clean estimates."""
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(signal) - np.log(noise)  # -inf at zero SNR, +inf at the end
    width = np.diff(half_log_snr)
    first = -signal[1:] * np.expm1(-width)  # the first-order weight of the clean estimate
    old = np.zeros(len(width))
    for step in range(1, len(width) - 1):
        old[step] = -0.5 * first[step] * width[step] / width[step - 1]  # 0 after an infinite first step
    return noise[1:] / noise[:-1], first - old, old
