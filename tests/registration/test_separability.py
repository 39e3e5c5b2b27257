from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from monai_drdm.registration import motion_separability, separability_bound


def exhaustive(ddf, reach, regions=None):
    """All pairs within reach of each other, shift by shift."""
    best = -np.inf
    for shift in product(*(range(-r, r + 1) for r in reach)):
        here, there = (
            tuple(slice(max(0, sign * s), n + min(0, sign * s)) for s, n in zip(shift, ddf.shape[1:]))
            for sign in (1, -1)
        )
        apart = np.abs(ddf[(slice(None), *here)] - ddf[(slice(None), *there)])
        if regions is not None:
            apart = apart[:, (regions[here] == 1) & (regions[there] == 2)]
        best = max(best, apart.max(initial=-np.inf))
    return best


@given(
    seed=st.integers(0, 2**31),
    shape=st.one_of(st.tuples(*[st.integers(1, 12)] * 2), st.tuples(*[st.integers(1, 7)] * 3)),
    p=st.integers(0, 9),
)
def test_equals_exhaustive_shifts(seed, shape, p):
    rng = np.random.default_rng(seed)
    ddf, regions = rng.normal(size=(2, len(shape), *shape)), rng.integers(0, 3, size=(2, 1, *shape))
    reach = [min(p, n - 1) for n in shape]
    found = motion_separability(torch.from_numpy(ddf), [p])[:, 0].numpy()
    np.testing.assert_allclose(found, [exhaustive(one, reach) for one in ddf])
    between = motion_separability(torch.from_numpy(ddf), [p], regions=torch.from_numpy(regions))[:, 0].numpy()
    expected = [exhaustive(one, reach, region[0]) for one, region in zip(ddf, regions)]
    np.testing.assert_allclose(between, np.where(np.isinf(expected), np.nan, expected))


def test_a_step_has_its_height_from_one_voxel_on():
    ddf = torch.zeros(1, 2, 20, 30)
    ddf[:, 1, :, 13:] = 7.5
    assert motion_separability(ddf, [0, 0.9, 1, 2, 29]).tolist() == [[0.0, 0.0, 7.5, 7.5, 7.5]]


def test_a_linear_ramp_grows_with_the_distance_until_the_border():
    ddf = torch.zeros(1, 3, 9, 12, 10, dtype=torch.float64)
    ddf[:, 2] = 0.25 * torch.arange(12.0, dtype=torch.float64).view(12, 1)
    expected = 0.25 * np.minimum([0, 1, 3, 8, 11, 40], 11)
    np.testing.assert_allclose(motion_separability(ddf, [0, 1, 3, 8, 11, 40])[0], expected)


def test_distances_may_be_a_tensor():
    ddf = torch.rand(2, 2, 9, 8)
    found = motion_separability(ddf, torch.tensor([1.0, 3.0]))
    assert torch.equal(found, motion_separability(ddf, [1, 3]))


def test_millimetres_count_for_distances_and_displacements():
    ddf = torch.zeros(1, 2, 16, 16, dtype=torch.float64)
    ddf[:, 0] = 0.5 * torch.arange(16.0).view(16, 1)
    found = motion_separability(ddf, [1.9, 2, 5, 6], spacing=(2.0, 1.0))
    np.testing.assert_allclose(found[0], [0.0, 1.0, 2.0, 3.0])  # a voxel of 2 mm moves by 1 mm more than the one before


def test_two_organs_that_slide_differ_only_where_they_are_near():
    ddf, regions = torch.zeros(1, 2, 10, 20), torch.zeros(1, 1, 10, 20)
    regions[..., :6], regions[..., 10:] = 1, 2
    ddf[:, 0, :, :6], ddf[:, 0, :, 10:] = 2.0, -1.0
    found = motion_separability(ddf, [1, 4, 5, 12], regions=regions)[0]
    assert torch.isnan(found[:2]).all()  # nobody is within 4 voxels of the other organ
    assert found[2:].tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"distances": []}, "distances must be"),
        ({"distances": [-1]}, "distances must be"),
        ({"distances": [1.0, float("inf")]}, "distances must be"),
        ({"distances": [1], "spacing": (1.0,)}, "spacing must be 2"),
        ({"distances": [1], "spacing": (1.0, 0.0)}, "spacing must be 2"),
        ({"distances": [1], "regions": torch.zeros(1, 1, 4, 5)}, "regions must have shape"),
    ],
)
def test_refuses_what_does_not_fit(arguments, says):
    with pytest.raises(ValueError, match=says):
        motion_separability(torch.zeros(1, 2, 4, 4), **arguments)


@pytest.mark.parametrize(
    ("pools", "dilations", "starts"),
    [
        ((16, 8, 4, 2, 1), (1, 1, 1, 1, 1), (1, 4, 10, 22, 46)),
        ((2, 2, 2, 2, 1), (8, 4, 2, 1, 1), (1, 4, 8, 16, 32)),
        ((1,) * 5, (16, 8, 4, 2, 1), (1, 3, 7, 15, 31)),
    ],
    ids=["q=0", "q=3", "q=4"],
)
def test_bounds_of_the_published_structures(pools, dilations, starts):
    bound = separability_bound(pools, dilations=dilations)
    assert bound.plateaus == (4, 12, 28, 60, 124)
    assert bound.starts == starts
    assert [bound.at(p) for p in (0, 0.5, *starts)] == [0, 0, *bound.plateaus]
    assert [bound.at(p - 1) for p in starts[1:]] == [4, 12, 28, 60]
    assert bound.at(1000) == 124


def test_other_numbers_of_stacked_convolutions():
    assert separability_bound((2, 1), dilations=(3, 2), convolutions=1) == ((1, 4), (4, 16))
    assert separability_bound((2, 1), dilations=(3, 2), convolutions=3).plateaus == (12, 48)


def test_dilations_are_named():
    """What was the second argument were the reaches, twice the dilations."""
    with pytest.raises(TypeError):
        separability_bound((2, 1), (3, 2))


@pytest.mark.parametrize("pools", [(), (2,), (0, 1), (1, 2)])
def test_bounds_need_levels_from_coarse_to_fine(pools):
    with pytest.raises(ValueError, match="separability_bound"):
        separability_bound(pools, dilations=(2, 2))
