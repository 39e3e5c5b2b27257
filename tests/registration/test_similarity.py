"""Local correlation, beside MONAI's loss and SciPy."""

import numpy as np
import pytest
import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from scipy.ndimage import uniform_filter

from monai_drdm.registration.similarity import box_sum, LocalCorrelation


def images(shape, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(batch, 1, *shape, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("shape", [(12, 9), (7, 10, 8), (2, 3, 1), (1, 30)])
def test_sums_over_windows_are_those_of_scipy(shape, window):
    values = images(shape, batch=2)[0].double()
    expected = [uniform_filter(one[0].numpy(), window, mode="constant") for one in values]
    np.testing.assert_allclose(
        box_sum(values, window)[:, 0].numpy(), np.stack(expected) * window ** len(shape), atol=1e-9
    )


def test_the_gradient_of_a_sum_is_right():
    values = images((5, 6, 4))[0].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda one: box_sum(one, 3), (values,))


@pytest.mark.parametrize(("shape", "window"), [((20, 17), 5), ((9, 12, 10), 7)])
def test_values_and_gradients_are_those_of_monai(shape, window):
    found, theirs = [], LocalNormalizedCrossCorrelationLoss(len(shape), window, reduction="none")
    for ours in (True, False):
        moved, fixed = images(shape, batch=2)
        moved.requires_grad_()
        alike = LocalCorrelation(fixed, window)(moved) if ours else -theirs(moved, fixed)
        alike.square().sum().backward()
        found.append((alike.detach(), moved.grad))
    torch.testing.assert_close(*found, atol=2e-4, rtol=1e-3)


def test_only_windows_that_are_seen_whole_count():
    moved, fixed = images((9, 8))
    seen = torch.ones(1, 1, 9, 8, dtype=torch.bool)
    seen[0, 0, 6, 2] = False
    likeness = LocalCorrelation(fixed, 3)
    every = likeness(moved)[0, 0].tolist()
    beside = {(row, column) for row in (5, 6, 7) for column in (1, 2, 3)}
    expected = np.mean([every[i][j] for i in range(9) for j in range(8) if (i, j) not in beside])
    assert float(likeness.mean(moved, seen)) == pytest.approx(expected, rel=1e-6)
    assert float(likeness.mean(moved, torch.zeros_like(seen))) == 0
