"""Random changes of registration pairs: flips, affine maps and intensities."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.diffusion.diffuse import diffuse
from monai_drdm.fields import compose, identity_grid, warp
from monai_drdm.registration.data import RegistrationBatch

_BIAS_NODES = 4
_NOISE = 0.1
_ALL_INSIDE = 1 - 1e-4
_LOWEST = 0.3


def drawn_pairs(pairs: RegistrationBatch, level: float, generator: torch.Generator) -> RegistrationBatch:
    """Pairs of each fixed image with itself, deformed by random fields: new ones with every call, and known.

    One field makes the moving image, and another one the fixed image from it. Both are resampled once.

    Args:
        pairs: on the generator's device; their moving images are not used.
        level: largest level of the fields in (0, 1]; the levels are drawn from 0.3 times it upwards.
        generator: makes all random choices.

    Returns:
        New pairs; ``fixed(x) = moving(x + ddf(x))`` up to interpolation errors.
    """
    count, shape, device = len(pairs.fixed), pairs.fixed.shape[2:], pairs.fixed.device
    seeds = torch.randint(2**62, (2 * count,), generator=generator, device=device).tolist()
    share = torch.rand(2 * count, generator=generator, device=device).tolist()
    levels = [level * (_LOWEST + (1 - _LOWEST) * one) for one in share]
    fields = diffuse([torch.Generator().manual_seed(seed) for seed in seeds], shape, levels, device=device)
    first, ddf = fields.chunk(2)
    both = compose(first, ddf)
    label = pairs.fixed_label
    return RegistrationBatch(
        warp(pairs.fixed, first),
        warp(pairs.fixed, both),
        warp(pairs.inside.float(), both, padding_mode="zeros") > _ALL_INSIDE,
        ddf,
        None if label is None else warp(label, first, "nearest"),
        None if label is None else warp(label, both, "nearest"),
    )


def random_flip(pairs: RegistrationBatch, generator: torch.Generator) -> RegistrationBatch:
    """Flip all pairs along each axis with a probability of one half. The flip is exact, and the field is flipped too.

    Args:
        pairs: on the generator's device.
        generator: makes all random choices.

    Returns:
        New pairs; ``fixed(x) = moving(x + ddf(x))`` holds as before.
    """
    dims = pairs.fixed.ndim - 2
    chosen = torch.rand(dims, generator=generator, device=generator.device) < 0.5
    axes = [axis for axis, flip in enumerate(chosen.tolist()) if flip]
    if not axes:
        return pairs
    flipped = [2 + axis for axis in axes]
    found = {name: None if value is None else value.flip(flipped) for name, value in vars(pairs).items()}
    if pairs.ddf is not None:
        sign = pairs.ddf.new_tensor([-1.0 if axis in axes else 1.0 for axis in range(dims)])
        found["ddf"] = pairs.ddf.flip(flipped) * sign.view(-1, *(1,) * dims)
    return RegistrationBatch(**found)  # type: ignore[arg-type]  # None stays None


def random_affine(pairs: RegistrationBatch, strength: float, generator: torch.Generator) -> RegistrationBatch:
    """Rotate, stretch and shift every fixed image by an affine map of its own, and adapt its field.

    Fields that deform anatomy do not change the patient's position, in which two scans of different people differ.

    Args:
        pairs: with known fields, on the generator's device.
        strength: standard deviation of the entries that the map adds to the identity, and of the shift in halves of
            the image's size; 0 leaves the pairs as they are.
        generator: makes all random choices.

    Returns:
        New pairs; ``fixed(x) = moving(x + ddf(x))`` holds up to interpolation errors where ``inside`` is true.
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


def intensity_jitter(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Change the intensities of images: a random gamma, a smooth bias field, and noise.

    It keeps the network from relying on both images being equally bright.

    Args:
        images: ``(B, 1, *S)`` in [0, 1]; each is changed differently.
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
