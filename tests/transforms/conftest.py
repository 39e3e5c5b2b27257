from __future__ import annotations

import dataclasses

import pytest
import torch

from monai_drdm.networks import RecResACNet


@pytest.fixture(scope="session")
def small_network():
    """Factory of an untrained network on a small working grid, its weights fixed by a seed."""

    def build(spatial_dims: int, working_size: int = 32, scale: float = 1.0) -> RecResACNet:
        generator = torch.Generator().manual_seed(spatial_dims)
        network = RecResACNet(spatial_dims).eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            if "time_embed" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                strength = 1e-4 * scale if name.startswith("conv_out") else 1.0
                parameter.copy_(noise * (strength / max(parameter[0].numel(), 1) ** 0.5))
        network.card = dataclasses.replace(
            network.card, name=f"untrained-{spatial_dims}d", working_size=working_size, steps=2
        )
        return network

    return build


@pytest.fixture
def scan():
    """Factory of a smooth image and a label of nested boxes, ``(1, *S)`` each."""

    def build(shape: tuple[int, ...], label_dtype: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
        axes = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in shape), indexing="ij")
        radius = torch.stack(axes).norm(dim=0)
        image = torch.exp(-3 * radius**2) + 0.1 * torch.sin(9 * axes[0])
        label = (radius < 0.8).to(torch.int64) + (radius < 0.4).to(torch.int64)
        return {"image": image[None], "label": label[None].to(label_dtype)}

    return build
