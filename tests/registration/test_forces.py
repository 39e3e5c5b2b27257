from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp
from scipy.ndimage import gaussian_filter

from monai_drdm.registration.forces import demons_forces, WIDTHS
from monai_drdm.registration.networks import RegistrationNetwork, Structure


def blob(shape, centre, width):
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    apart = sum((axis - c) ** 2 for axis, c in zip(axes, centre))
    return torch.exp(-apart / (2 * width**2))[None, None]


@pytest.mark.parametrize("shape", [(30, 34), (22, 24, 26)])
def test_forces_are_those_of_thirion(shape):
    """Beside NumPy's gradient and SciPy's Gaussian."""
    moving = blob(shape, [n / 2 for n in shape], 4.0)
    fixed = blob(shape, [n / 2 + 1 for n in shape], 5.0)
    found = demons_forces(moving, fixed)
    assert found.shape == (1, len(WIDTHS) * len(shape), *shape)
    for number, width in enumerate(WIDTHS):
        a, b = (gaussian_filter(one[0, 0].double().numpy(), width, mode="nearest") for one in (moving, fixed))
        gradient, apart = np.stack(np.gradient((a + b) / 2)), b - a
        expected = apart * gradient / ((gradient**2).sum(0) + apart**2 + 1e-3)
        part = found[0, number * len(shape) : (number + 1) * len(shape)].double().numpy()
        np.testing.assert_allclose(part, expected, atol=0.02)
        assert np.sqrt((part**2).sum(0)).max() <= 0.5


@pytest.mark.parametrize("width", range(len(WIDTHS)))
def test_following_them_brings_images_together(width):
    shape = (40, 44)
    moving, fixed = blob(shape, (20, 22), 5.0), blob(shape, (21, 20.5), 5.0)
    before = (moving - fixed).square().mean()
    step = demons_forces(moving, fixed)[:, 2 * width : 2 * width + 2]
    after = (Warp("bilinear", "border")(moving, step) - fixed).square().mean()
    assert float(after) < 0.7 * float(before)


def test_a_network_sees_them_beside_the_images():
    network = RegistrationNetwork(Structure("regunet", 2, 4, depth=1))
    seen = []
    network.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.cat([blob((16, 20), (8, 10), 3.0), blob((16, 20), (9, 10), 3.0)], dim=1)
    network.eval()(images)
    coarse = torch.nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(seen[0][:, 8:], 4 * demons_forces(coarse[:, :1], coarse[:, 1:]))
    assert seen[0].shape == (1, 16, 8, 10)
