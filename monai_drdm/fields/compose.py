"""Composition, powers and exponentials of displacement fields."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_drdm.fields.grid import check_ddf, check_same_grid, field_dtype
from monai_drdm.fields.sampling import PaddingMode
from monai_drdm.fields.warp import warp

# Scaling and squaring starts with a first-order step. If it is at most this long, the error is a few hundredths of a
# voxel, even for fields that move by tens of voxels.
_FIRST_STEP_VOX = 0.125


def compose(first: Tensor, second: Tensor, padding_mode: PaddingMode = "border") -> Tensor:
    """``first(x + second(x)) + second(x)``.

    Warping by the result equals warping by ``first`` and then by ``second``.

    Args:
        first: ``(B, D, *S)`` voxels.
        second: ``(B, D, *S)`` voxels.
        padding_mode: how ``first`` continues beyond the grid.

    Returns:
        ``(B, D, *S)`` voxels, float32 or float64.

    Raises:
        TypeError: not floating tensors.
        ValueError: shapes do not fit.
    """
    check_ddf(first, "compose", "first")
    check_ddf(second, "compose", "second")
    check_same_grid(first, second, "compose", ("first", "second"))
    dtype = field_dtype(first, second)
    return warp(first.to(dtype), second.to(dtype), "bilinear", padding_mode) + second


def power(ddf: Tensor, n: int | Tensor) -> Tensor:
    """``ddf`` composed with itself ``n`` times, by binary powers: at most ``2 log2(n)`` compositions.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        n: 0 or more; 0 gives the identity. One number, or one per sample ``(B,)`` on the CPU.

    Returns:
        ``(B, D, *S)`` voxels.

    Raises:
        ValueError: negative or fractional ``n``, or a wrong number of them.
    """
    check_ddf(ddf, "power")
    counts = torch.as_tensor(n, device="cpu")
    if (
        counts.dtype not in (torch.int64, torch.int32)
        or counts.ndim > 1
        or counts.numel() not in (1, ddf.shape[0])
        or bool((counts < 0).any())
    ):
        raise ValueError(f"power: n must be a non-negative integer or (B,) of them with B = {ddf.shape[0]}, got {n!r}.")
    remaining = counts.reshape(-1).expand(ddf.shape[0]).clone()
    factor = ddf.to(field_dtype(ddf))
    result = torch.zeros_like(factor)
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


def exp_svf(svf: Tensor, squarings: int | None = None, *, at_most: int | None = None) -> Tensor:
    """The flow of a stationary velocity field after unit time, by scaling and squaring.

    ``exp(v) = (id + v / 2^n)^(2^n)``, the powers taken by repeated squaring (Arsigny et al., MICCAI 2006).

    Args:
        svf: ``(B, D, *S)`` voxels per unit time.
        squarings: ``n``. None chooses it for each sample from its largest velocity, so that the first step is at most
            1/8 voxel. For that, one number per sample is read back from the device.
        at_most: largest ``n`` that may be chosen. With this limit nothing is read back from an accelerator, so the host
            does not wait for it, and velocities are not checked.

    Returns:
        ``(B, D, *S)`` displacement in voxels, float32 or float64.

    Raises:
        ValueError: negative ``squarings`` or ``at_most``, or velocities that are not finite.
    """
    check_ddf(svf, "exp_svf", "svf")
    for name, number in (("squarings", squarings), ("at_most", at_most)):
        if number is not None and number < 0:
            raise ValueError(f"exp_svf: {name} must be 0 or more, got {number}.")
    ddf = svf.to(field_dtype(svf))
    if squarings is not None:
        ddf = ddf / 2.0**squarings
        for _ in range(squarings):
            ddf = compose(ddf, ddf)
        return ddf
    largest = ddf.detach().abs().flatten(1).amax(dim=1)
    if at_most is None and not bool(torch.isfinite(largest).all()):
        raise ValueError("exp_svf: svf must be finite, got NaN or infinity. Check the network or the draw.")
    # the smallest n with largest / 2^n <= _FIRST_STEP_VOX, for each sample on its own
    mantissa, exponent = torch.frexp(largest / _FIRST_STEP_VOX)
    each = (exponent - (mantissa == 0.5).to(exponent.dtype)).clamp(min=0, max=at_most)
    each = each.view(-1, *(1,) * (svf.ndim - 1))
    ddf = ddf / 2.0**each
    for done in range(int(each.max()) if at_most is None or svf.device.type == "cpu" else at_most):
        ddf = torch.where(each > done, compose(ddf, ddf), ddf)
    return ddf
