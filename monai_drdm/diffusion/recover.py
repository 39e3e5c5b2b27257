"""Deformation recovery (paper, Algorithm 2) with the published networks: make a deformed image realistic step by step.

Every sampler takes images and fields on the working grid of the network and returns the recovered field. Before each
step the original image is warped by the composed field, so that blur does not accumulate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.fields import compose, fractions_to_voxels, gaussian_smooth, mend_folds, power, warp
from monai_drdm.fields.sampling import Mode
from monai_drdm.networks import RecResACNet
from monai_drdm.networks.recresacnet import TIME_STEPS


@dataclass(frozen=True)
class RecoveryStep:
    """What a callback is called with after each step."""

    index: int
    """0 to ``steps - 1``."""
    time: int
    """The time step given to the network."""
    ddf: Tensor
    """``(B, D, *S)`` voxels: the field after this step."""


Callback = Callable[[RecoveryStep], None]

_FAST_START = 48
_FAST_RELEASED_STEPS = 60
_FAST_SIGMA_VOX = 1.5


@torch.no_grad()
def recover_reference(
    network: RecResACNet, image: Tensor, ddf: Tensor, *, callback: Callback | None = None, progress: bool = False
) -> Tensor:
    """Recovery exactly as released: t = 79 … 0, with bicubic warping in 2D and zero padding.

    Args:
        network: a ``RecResACNet``.
        image: ``(B, C, *S)`` original images in the network's input range.
        ddf: ``(B, D, *S)`` voxels, the diffused field.
        callback: called after each step.
        progress: show a progress bar.

    Returns:
        ``(B, D, *S)`` voxels.
    """
    for index, time in enumerate(_bar(range(TIME_STEPS - 1, -1, -1), progress)):
        warped = warp(image, ddf, image_mode(image), "zeros")
        step = predict_step(network, warped, time)
        ddf = compose(ddf, step, "zeros")
        if callback is not None:
            callback(RecoveryStep(index, time, ddf))
    return ddf


@torch.no_grad()
def recover_fast(
    network: RecResACNet,
    image: Tensor,
    ddf: Tensor,
    *,
    steps: int = 12,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Recovery in few steps, each of which is smoothed and composed with itself.

    Time runs from 48 to 0, because predictions at times above 48 are stronger and less regular. One step replaces
    ``60 / steps`` released ones: its prediction is smoothed by a Gaussian, which removes pixel noise, and composed with
    itself that many times. One large step could fold where this composition does not. Folds that are left are mended
    locally.

    Args:
        network: a ``RecResACNet``.
        image: ``(B, C, *S)`` original images in the network's input range.
        ddf: ``(B, D, *S)`` voxels, the diffused field.
        steps: number of steps, 1 to 48; each costs one prediction.
        callback: called after each step.
        progress: show a progress bar.

    Returns:
        ``(B, D, *S)`` voxels.

    Raises:
        ValueError: ``steps`` outside 1 to 48.
    """
    times = strided_times(steps)
    repeats = max(1, round(_FAST_RELEASED_STEPS / steps))
    ddf = mend_folds(ddf)
    for index, time in enumerate(_bar(times, progress)):
        step = predict_step(network, warp(image, ddf, image_mode(image), "zeros"), time)
        ddf = compose(ddf, power(gaussian_smooth(step, _FAST_SIGMA_VOX), repeats))
        if callback is not None:
            callback(RecoveryStep(index, time, ddf))
    return mend_folds(ddf)


def predict_step(network: RecResACNet, image: Tensor, time: int) -> Tensor:
    """The network's displacement for a warped image at one time step: ``(B, D, *S)`` voxels."""
    t = torch.full((1,), time, device=image.device)
    return fractions_to_voxels(network(image, t))


def image_mode(image: Tensor) -> Mode:
    """The interpolation with which images were warped when the published networks were trained."""
    return "bicubic" if image.ndim == 4 else "bilinear"


def strided_times(steps: int) -> list[int]:
    """The time steps of the fast sampler: ``steps`` of them, evenly spaced from 48 to 0.

    Raises:
        ValueError: outside 1 to 48.
    """
    if not 1 <= steps <= _FAST_START:
        raise ValueError(f"sampler 'fast': steps must be in [1, {_FAST_START}], got {steps}.")
    return [round(_FAST_START * (1 - k / max(steps - 1, 1))) for k in range(steps)]


def _bar(times: Iterable[int], progress: bool) -> Iterable[int]:
    return tqdm(times, desc="recover", unit="step") if progress else times
