from __future__ import annotations

import pytest
import torch


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
