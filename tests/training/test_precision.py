from __future__ import annotations

import pytest
import torch

from monai_drdm.training.precision import Bfloat16Inferer, has_native_bfloat16, SmallGridsInFloat32


@pytest.mark.skipif(not has_native_bfloat16(torch.device("cpu")), reason="this processor has no bfloat16")
@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (torch.nn.Conv3d(32, 48, 3, padding=1), (2, 3, 4)),
        (torch.nn.Conv3d(16, 32, 3, stride=2, padding=1), (1, 1, 1)),
        (torch.nn.ConvTranspose3d(16, 32, 3, padding=1), (2, 2, 8)),
        (torch.nn.Conv2d(16, 32, 3, stride=2, padding=1), (8, 1)),
        (torch.nn.Conv2d(16, 32, 3, padding=1), (8, 9)),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, torch.nn.Module) else str(one),
)
def test_gradients_of_small_grids_are_those_of_float32(network, shape):
    """Whatever was in memory before: here numbers that would be seen."""
    images = torch.randn(2, network.in_channels, *shape, generator=torch.Generator().manual_seed(0))
    found = []
    for enabled in (False, True, True, True):
        network.zero_grad()
        for size in range(1, 40):  # memory that the next call gets, most likely, in all sizes that it may ask for
            torch.full((size * 1000,), 1e30)
        predicted = Bfloat16Inferer(enabled)(images, network)
        predicted.sum().backward()
        found.append(network.weight.grad.clone())
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], atol=0.3, rtol=0.02)


def test_large_grids_are_computed_in_bfloat16():
    network = torch.nn.Conv2d(4, 4, 3, padding=1)
    images = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    exact, rounded = (Bfloat16Inferer(enabled)(images, network) for enabled in (False, True))
    assert exact.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, rounded.bfloat16().float(), atol=0, rtol=0)
    assert not torch.equal(exact, rounded)


def test_convolutions_may_be_called_in_any_way():
    """Names instead of places, no batch, and numbers that bfloat16 is not meant for."""
    image, weight = torch.randn(1, 3, 2, 8), torch.randn(4, 3, 3, 3)

    def call(images, by_name):
        if by_name:
            return torch.nn.functional.conv2d(input=images, weight=weight.to(images.dtype), padding=1)
        return torch.nn.functional.conv2d(images, weight.to(images.dtype), padding=1)

    exact = call(image, False)
    for by_name in (False, True):
        torch.testing.assert_close(Bfloat16Inferer(True)(image, call, by_name), exact)
        torch.testing.assert_close(Bfloat16Inferer(True)(image[0], call, by_name), exact[0])
    with SmallGridsInFloat32():
        assert call(image.double(), False).dtype == torch.float64
