from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monai_drdm.bank.entry import fingerprint_of, same_fingerprint
from monai_drdm.fields.intensity import robust_range, spread_voxels, to_unit_range
from monai_drdm.registration import unit_range

SIDES = st.one_of(st.integers(1, 150), st.sampled_from([16, 32, 64, 96, 128]))


def sampled_at(shape, count):
    """Where voxels are taken, ``(N, D)``, by images that hold their own indices."""
    index = torch.arange(math.prod(shape), dtype=torch.int32).view(1, *shape)
    return np.stack(np.unravel_index(spread_voxels(index[:, None], count)[0].numpy(), shape), axis=-1)


@given(shape=st.lists(SIDES, min_size=2, max_size=3).map(tuple), count=st.sampled_from([500, 4096]))
def test_no_plane_of_any_axis_is_left_out(shape, count):
    at = sampled_at(shape, count)
    assert min(count / 4, math.prod(shape)) <= len(at) <= 2 * count
    for axis, n in enumerate(shape):
        if 4 * n <= len(at):
            assert len(np.unique(at[:, axis])) == n


@pytest.mark.parametrize(
    ("shape", "step"),
    [((1, 256, 256), 17), ((2, 512, 512), 129), ((1, 100, 130), 3), ((1, 64, 64, 64), 65), ((1, 9, 8), 1)],
)
def test_images_that_were_sampled_well_before_keep_their_fingerprint(shape, step):
    image = torch.rand(shape)
    assert torch.equal(fingerprint_of(image), image.flatten()[::step])


@pytest.mark.parametrize("shape", [(192, 192), (128, 512, 64)])
def test_a_fingerprint_sees_every_column_and_plane(shape):
    """Of two thirds of the columns, or of every second plane, nothing was seen once."""
    image = torch.rand(1, *shape)
    for axis, n in enumerate(shape):
        for place in range(n):
            image.select(axis + 1, place).add_(1.0)
            changed = fingerprint_of(image)
            image.select(axis + 1, place).sub_(1.0)
            assert not same_fingerprint(fingerprint_of(image), changed), (axis, place)


def planes(shape, period):
    """An image in which only one plane of several across the last axis is dark: 1 there and 1000 elsewhere."""
    image = torch.full(shape, 1000.0) + torch.rand(shape, generator=torch.Generator().manual_seed(1))
    image[..., ::period] -= 999.0
    return image


def test_percentiles_see_every_plane():
    """Every 4th voxel of such a volume lies in one plane of four."""
    image = planes((256, 128, 128), 4)
    expected = np.percentile(image.numpy(), [0.5, 99.5])
    found = [float(one) for one in robust_range(image[None, None])]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    unit = unit_range(image[None])
    assert float(unit.mean()) == pytest.approx(0.75, abs=0.01)


def test_one_way_to_the_unit_range():
    """That of registration is that of the networks that draw fields."""
    image = torch.randn(1, 40, 50, generator=torch.Generator().manual_seed(2)) * 300 + 50
    low, high = np.percentile(image.numpy(), [0.5, 99.5])
    expected = ((image - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(unit_range(image), expected.float(), atol=1e-5, rtol=0)
    assert torch.equal(unit_range(image), to_unit_range(image[None])[0])
    assert torch.equal(unit_range(torch.full((1, 8, 9), 7, dtype=torch.int16)), torch.zeros(1, 8, 9))


@pytest.mark.parametrize("factor", [1.0, 1e-8, 1e8])
def test_an_image_that_is_mostly_empty_and_in_any_unit(factor):
    image = torch.zeros(1, 64, 64)
    image[0, 3, :5] = torch.arange(5.0) * factor
    torch.testing.assert_close(unit_range(image)[0, 3, :5], torch.arange(5.0) / 4)
