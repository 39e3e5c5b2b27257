"""Composition, powers and exponentials of displacement fields."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from monai_drdm.fields.grid import check_ddf, check_same_grid, field_dtype
from monai_drdm.fields.warp import PaddingMode, warp

# a first step of at most this many voxels keeps the first-order start of scaling and squaring far below grid error
_FIRST_STEP_VOX = 0.125


def compose(first: Tensor, second: Tensor, padding_mode: PaddingMode = "border") -> Tensor:
    """``first(x + second(x)) + second(x)``.

    Warping by the result equals warping by ``first`` and then by ``second``.

    Args:
        first: ``(B, D, *S)`` voxels.
        second: ``(B, D, *S)`` voxels.
        padding_mode: what ``first`` is outside the grid.

    Returns:
        ``(B, D, *S)`` voxels.

    Raises:
        TypeError: not floating tensors.
        ValueError: shapes do not fit.
    """
    check_ddf(first, "compose", "first")
    check_ddf(second, "compose", "second")
    check_same_grid(first, second, "compose", ("first", "second"))
    return warp(first, second, "bilinear", padding_mode) + second


def power(ddf: Tensor, n: int | Tensor) -> Tensor:
    """``ddf`` composed with itself ``n`` times, by binary powers: at most ``2 log2(n)`` compositions.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        n: how often, 0 or more (0 gives the identity): one number, or one per sample ``(B,)`` on the CPU.

    Returns:
        ``(B, D, *S)`` voxels.

    Raises:
        ValueError: negative or fractional ``n``, or a wrong number of them.
    """
    check_ddf(ddf, "power")
    counts = torch.as_tensor(n, device="cpu")
    if (
        counts.is_floating_point()
        or counts.ndim > 1
        or counts.numel() not in (1, ddf.shape[0])
        or bool((counts < 0).any())
    ):
        raise ValueError(f"power: n must be a non-negative integer or (B,) of them with B = {ddf.shape[0]}, got {n!r}.")
    remaining = counts.reshape(-1).expand(ddf.shape[0]).clone()
    result, factor = torch.zeros_like(ddf), ddf
    first = True
    while bool((remaining > 0).any()):
        odd = remaining % 2 == 1
        if bool(odd.any()):
            product = factor if first else compose(result, factor)
            chosen = odd.to(ddf.device).view(-1, *(1,) * (ddf.ndim - 1))
            result, first = torch.where(chosen, product, result), False
        remaining //= 2
        if bool((remaining > 0).any()):
            factor = compose(factor, factor)
    return result


def exp_svf(svf: Tensor, squarings: int | None = None) -> Tensor:
    """The flow of a stationary velocity field after unit time, by scaling and squaring.

    ``exp(v) = (id + v / 2^n)^(2^n)``, the powers taken by repeated squaring (Arsigny et al., MICCAI 2006).

    Args:
        svf: ``(B, D, *S)`` voxels per unit time.
        squarings: ``n``. None chooses it from the largest velocity of the batch, so that the first step is at most
            1/8 voxel; that reads one number back from the device.

    Returns:
        ``(B, D, *S)`` displacement in voxels, float32 or float64.

    Raises:
        ValueError: negative ``squarings``, or velocities that are not finite.
    """
    check_ddf(svf, "exp_svf", "svf")
    if squarings is None:
        largest = float(svf.detach().abs().max())
        if not math.isfinite(largest):
            raise ValueError("exp_svf: svf must be finite, got NaN or infinity. Check the network or the draw.")
        squarings = max(0, math.ceil(math.log2(largest / _FIRST_STEP_VOX))) if largest > 0 else 0
    if squarings < 0:
        raise ValueError(f"exp_svf: squarings must be 0 or more, got {squarings}.")
    ddf: Tensor = svf.to(field_dtype(svf)) / 2.0**squarings
    for _ in range(squarings):
        ddf = compose(ddf, ddf)
    return ddf
