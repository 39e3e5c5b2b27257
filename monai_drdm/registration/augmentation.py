"""What keeps a registration network from learning its pairs by heart, or that both images are equally bright."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields import compose, identity_grid, warp
from monai_drdm.registration.data import RegistrationBatch

_BIAS_NODES = 4
_NOISE = 0.1
_ALL_INSIDE = 1 - 1e-4


def mirrored(pairs: RegistrationBatch, generator: torch.Generator) -> RegistrationBatch:
    """Mirror all pairs along every axis with a chance of one half: exact, and the field goes along.

    Args:
        pairs: on the generator's device.
        generator: decides.

    Returns:
        New pairs; ``fixed(x) = moving(x + ddf(x))`` holds as before.
    """
    dims = pairs.fixed.ndim - 2
    decided = torch.rand(dims, generator=generator, device=generator.device) < 0.5
    axes = [axis for axis, mirror in enumerate(decided.tolist()) if mirror]
    if not axes:
        return pairs
    flipped = [2 + axis for axis in axes]
    found = {name: None if value is None else value.flip(flipped) for name, value in vars(pairs).items()}
    if pairs.ddf is not None:
        sign = pairs.ddf.new_tensor([-1.0 if axis in axes else 1.0 for axis in range(dims)])
        found["ddf"] = pairs.ddf.flip(flipped) * sign.view(-1, *(1,) * dims)
    return RegistrationBatch(**found)  # type: ignore[arg-type]  # None stays None


def posed(pairs: RegistrationBatch, strength: float, generator: torch.Generator) -> RegistrationBatch:
    """Turn, stretch and shift every fixed image by a linear map of its own; the field goes along.

    Fields that deform anatomy hold nothing of where the head lay; two scans of different people do.

    Args:
        pairs: with known fields, on the generator's device.
        strength: standard deviation of the entries that the map adds to the identity, and of the shift in halves of
            the image's size; 0 leaves the pairs as they are.
        generator: decides.

    Returns:
        New pairs; ``fixed(x) = moving(x + ddf(x))`` holds to interpolation error where ``inside`` says so.
    """
    if strength == 0 or pairs.ddf is None:
        return pairs
    shape, count, device = pairs.fixed.shape[2:], pairs.fixed.shape[0], generator.device
    dims, middle = len(shape), torch.tensor([(n - 1) / 2 for n in shape], device=device)
    linear = strength * torch.randn((count, dims, dims), generator=generator, device=device)
    shift = strength * middle * torch.randn((count, dims), generator=generator, device=device)
    centred = identity_grid(shape, device=device, dtype=torch.float32) - middle.view(1, -1, *(1,) * dims)
    moved = torch.einsum("bij,nj...->bi...", linear, centred) + shift.view(count, -1, *(1,) * dims)
    label = pairs.fixed_label
    return replace(
        pairs,
        fixed=warp(pairs.fixed.float(), moved),
        inside=warp(pairs.inside.float(), moved, padding_mode="zeros") > _ALL_INSIDE,
        ddf=compose(pairs.ddf.float(), moved),
        fixed_label=None if label is None else warp(label, moved, "nearest", "zeros"),
    )


def repainted(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Other grey values for the same anatomy: a random gamma, a smooth bias over the image, and noise.

    Args:
        images: ``(B, 1, *S)`` in [0, 1]; every one gets its own.
        strength: standard deviation of the logarithms of gamma and of the bias; 0 leaves the images as they are.
        generator: on the device of the images.

    Returns:
        ``(B, 1, *S)`` in [0, 1].
    """
    if strength == 0:
        return images
    dims, count = images.ndim - 2, images.shape[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=images.device)

    gamma = (strength * normal(count, 1, *(1,) * dims)).exp()
    bias = F.interpolate(
        strength * normal(count, 1, *(_BIAS_NODES,) * dims),
        images.shape[2:],
        mode="bilinear" if dims == 2 else "trilinear",
        align_corners=True,
    )
    noise = _NOISE * strength * normal(*images.shape)
    return (images.clamp(0, 1) ** gamma * bias.exp() + noise).clamp(0, 1)
