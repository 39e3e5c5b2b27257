"""Whether a network can do its work: one field, drawn on a small image."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monai_drdm.diffusion.model import DRDM
from monai_drdm.networks import RecoveryNetwork

_WORKING_SIZES = {2: (16, 1025), 3: (16, 513)}
_TRIAL_SIZE = {2: 33, 3: 17}
_TRIAL_STEPS = 2
_LEVEL = 0.5


def check_draws(network: RecoveryNetwork) -> None:
    """Draw one field with a network, on a small image and in few steps: that takes seconds whatever its card says.

    Raises:
        ValueError: the card names a sampler that the network does not have, or a working size out of range; or what is
            drawn is no deformation: the network predicts nothing, not a number, or steps out of the image.
    """
    card, dims = network.card, network.card.spatial_dims
    DRDM(network)  # the settings of the card
    low, high = _WORKING_SIZES[dims]
    if not low <= card.working_size <= high:
        raise ValueError(
            f"network {card.name!r}: working_size must be from {low} to {high} in {dims}D, got {card.working_size}."
        )
    size = min(card.working_size, _TRIAL_SIZE[dims])
    small = copy.copy(network)
    small.card = replace(card, working_size=size)
    largest: list[float] = []
    watch = small.register_forward_hook(lambda *call: largest.append(_largest(call[-1])))
    try:
        quick = "fast" if card.sampler == "reference" else card.sampler  # the same network in fewer steps
        model = DRDM(small, quick, _TRIAL_STEPS)
        image = _blob(size, dims).expand(1, card.in_channels, *(size,) * dims)
        farthest = float(model.sample(image.to(model.device), _LEVEL, [0]).abs().max())
    finally:
        watch.remove()
    if not any(largest):  # not a number is not 0
        raise ValueError(f"network {card.name!r} recovers nothing: all that it predicts is 0. Train it first.")
    if not farthest <= size:
        raise ValueError(
            f"network {card.name!r} draws a field that moves {farthest:.3g} voxels on an image of {size}. Its weights "
            "are damaged, or those of another kind of network."
        )


def _largest(output: Any) -> float:
    tensors = [output] if isinstance(output, Tensor) else [one for one in output if isinstance(one, Tensor)]
    return max(float(one.abs().max()) for one in tensors)


def _blob(size: int, dims: int) -> Tensor:
    """A bright spot with waves, ``(1, 1, *S)``."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for _ in range(dims)), indexing="ij")
    image = torch.exp(-3 * torch.stack(axes).square().sum(dim=0)) + 0.1 * torch.sin(9 * axes[0])
    return image[None, None]
