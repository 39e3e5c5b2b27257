import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from monai_drdm.fields import crop, gaussian_smooth, resize_ddf, resize_image, warp

SIZES = [((25, 34), (41, 19)), ((25, 34), (13, 70)), ((14, 21, 17), (20, 11, 33)), ((14, 21, 17), (7, 40, 17))]


def positions(old, new):
    """Where the new voxel centres lie in the old grid: first on first, last on last."""
    axes = [np.arange(n) * ((o - 1) / (n - 1)) for o, n in zip(old, new)]
    return np.stack(np.meshgrid(*axes, indexing="ij"))


# fields


@pytest.mark.parametrize(("old", "new"), [(5, 2), (2, 5), (2, 3), (3, 2), (4, 1), (1, 4), (2, 1), (1, 2)])
def test_displacements_along_short_axes(old, new):
    """First voxel on first and last on last, so that displacements scale by (new - 1) / (old - 1).

    An axis of one voxel has no such distance; its displacement scales with the number of voxels.
    """
    ddf = torch.ones(1, 2, old, 3, dtype=torch.float64)
    factor = (new - 1) / (old - 1) if old > 1 and new > 1 else new / old
    resized = resize_ddf(ddf, (new, 3))
    torch.testing.assert_close(resized[:, 0], torch.full((1, new, 3), factor, dtype=torch.float64))
    torch.testing.assert_close(resized[:, 1], torch.ones(1, new, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_of_integers_are_not_resized(dtype):
    with pytest.raises(TypeError, match="resize_image: image must be floating"):
        resize_image(torch.ones(1, 1, 4, 4, dtype=dtype), (2, 2))


def test_crop_takes_the_first_voxels_unless_told_otherwise():
    assert crop(torch.arange(5.0).view(1, 1, 5, 1), (2, 1)).flatten().tolist() == [0.0, 1.0]
    assert crop(torch.arange(5.0).view(1, 1, 5, 1), (2, 1), centre=True).flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_a_resized_field_equals_scipy_interpolation_scaled_per_axis(smooth_ddf, dtype, old, new):
    ddf = smooth_ddf(old, 3.0, batch=2, dtype=dtype)
    resized = resize_ddf(ddf, new)
    assert resized.shape == (2, len(old), *new)
    assert resized.dtype == dtype
    for b in range(2):
        for d, (o, n) in enumerate(zip(old, new)):
            expected = ndimage.map_coordinates(ddf[b, d].numpy(), positions(old, new), order=1, mode="nearest")
            np.testing.assert_allclose(resized[b, d].numpy(), expected * (n - 1) / (o - 1), atol=1e-4)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_an_affine_map_stays_the_same_map(affine_ddf, rotation, old, new):
    dims = len(old)
    matrix, shift = rotation(12, dims) * 1.1, np.linspace(2, -1, dims)
    zoom = np.diag([(n - 1) / (o - 1) for o, n in zip(old, new)])  # old voxels to new voxels
    expected = affine_ddf(zoom @ matrix @ np.linalg.inv(zoom), zoom @ shift, new)
    torch.testing.assert_close(resize_ddf(affine_ddf(matrix, shift, old), new), expected)


@pytest.mark.parametrize(("old", "new"), [((25, 34), (49, 67)), ((14, 9, 8), (27, 17, 15))])
def test_refining_a_field_and_going_back_is_exact(smooth_ddf, old, new):
    ddf = smooth_ddf(old, 3.0, dtype=torch.float64)  # every old centre is a new one
    torch.testing.assert_close(resize_ddf(resize_ddf(ddf, new), old), ddf)


def test_a_round_trip_to_any_finer_grid_is_close(shape, smooth_ddf):
    ddf = smooth_ddf(shape, 3.0, sigma_vox=5.0, dtype=torch.float64)
    finer = tuple(2 * n + 3 for n in shape)
    torch.testing.assert_close(resize_ddf(resize_ddf(ddf, finer), shape), ddf, atol=0.06, rtol=0)


def test_warping_commutes_with_resizing(shape, smooth_ddf, voxel_grid, interior):
    finer = tuple(2 * n - 1 for n in shape)
    image = torch.from_numpy(np.cos(voxel_grid(shape) / 4).prod(axis=0))[None, None]
    ddf = smooth_ddf(shape, 2.0, sigma_vox=5.0, dtype=torch.float64) + 2
    resized_after = resize_image(warp(image, ddf), finer)
    resized_before = warp(resize_image(image, finer), resize_ddf(ddf, finer))
    inner = interior(len(shape), 6)
    error = (resized_before - resized_after)[inner].abs().max()
    assert error < 0.02
    unscaled = warp(resize_image(image, finer), resize_ddf(ddf, finer) / 2)
    assert (unscaled - resized_after)[inner].abs().max() > 4 * error


@pytest.mark.parametrize("resize", [resize_ddf, resize_image])
def test_the_same_shape_changes_nothing(shape, smooth_ddf, resize):
    ddf = smooth_ddf(shape)
    assert torch.equal(resize(ddf, shape), ddf)


@pytest.mark.parametrize(("old", "new"), [((1, 9), (1, 17)), ((9, 1), (5, 1)), ((1, 6, 7), (1, 12, 3))])
def test_an_axis_of_length_1_keeps_its_displacement(old, new):
    ddf = torch.full((1, len(old), *old), 1.5, dtype=torch.float64)
    resized = resize_ddf(ddf, new)
    for d, (o, n) in enumerate(zip(old, new)):
        factor = 1.0 if o == n == 1 else (n - 1) / (o - 1)
        torch.testing.assert_close(resized[:, d], torch.full((1, *new), 1.5 * factor, dtype=torch.float64))


@pytest.mark.parametrize("new", [(4,), (4, 5, 6), (4, 0), (4, -1)])
def test_a_shape_that_does_not_fit_is_refused(new):
    with pytest.raises(ValueError, match="resize_ddf: shape must have 2 sizes of 1 or more"):
        resize_ddf(torch.zeros(1, 2, 8, 9), new)
    with pytest.raises(ValueError, match="resize_image: shape must have 2 sizes of 1 or more"):
        resize_image(torch.zeros(1, 1, 8, 9), new)


def test_resizing_a_field_checks_it():
    with pytest.raises(TypeError, match="resize_ddf: ddf"):
        resize_ddf(torch.zeros(1, 2, 4, 4).int(), (5, 5))


# images


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_a_resized_image_equals_scipy_smoothing_and_interpolation(rng, dtype, old, new):
    image = rng.standard_normal((2, *old))
    sigma = [max(0.0, (o / n - 1) / 2) for o, n in zip(old, new)]
    radius = [max(1, math.ceil(3 * s)) for s in sigma]
    resized = resize_image(torch.from_numpy(image)[None].to(dtype), new)
    assert resized.dtype == dtype
    for c in range(2):
        smooth = ndimage.gaussian_filter(image[c], sigma, mode="nearest", radius=radius)
        expected = ndimage.map_coordinates(smooth, positions(old, new), order=1, mode="nearest")
        np.testing.assert_allclose(resized[0, c].numpy(), expected, atol=1e-4)


def test_shrinking_an_image_removes_what_the_new_grid_cannot_hold():
    stripes = torch.cos(torch.pi * torch.arange(64.0)).view(1, 1, 64, 1).expand(1, 1, 64, 64)
    shrunk = resize_image(stripes, (16, 16))
    aliased = F.interpolate(stripes, (16, 16), mode="bilinear", align_corners=True)
    assert aliased.abs().max() > 0.5
    assert shrunk[..., 2:-2, :].abs().max() < 0.02


def test_shrinking_keeps_a_ramp():
    ramp = torch.linspace(0, 1, 61, dtype=torch.float64).view(1, 1, 61, 1).expand(1, 1, 61, 30)
    expected = torch.linspace(0, 1, 21, dtype=torch.float64).view(21, 1).expand(21, 30)
    inner = slice(4, -4)
    torch.testing.assert_close(resize_image(ramp, (21, 30))[0, 0, inner], expected[inner])


# smoothing


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.3, 6.0])
def test_smoothing_equals_scipy(shape, rng, dtype, sigma):
    image = rng.standard_normal((2, 3, *shape))
    smooth = gaussian_smooth(torch.from_numpy(image).to(dtype), sigma)
    axes = tuple(range(2, image.ndim))
    expected = ndimage.gaussian_filter(image, sigma, mode="nearest", radius=max(1, math.ceil(3 * sigma)), axes=axes)
    assert smooth.dtype == dtype
    np.testing.assert_allclose(smooth.numpy(), expected, atol=1e-5)


def test_smoothing_takes_a_width_per_axis(shape, rng):
    image, sigma = rng.standard_normal(shape), [1.5, 0.0, 3.0][: len(shape)]
    expected = ndimage.gaussian_filter(image, sigma, mode="nearest", truncate=3.0)
    smooth = gaussian_smooth(torch.from_numpy(image)[None, None], sigma)[0, 0]
    np.testing.assert_allclose(smooth.numpy(), expected, atol=2e-3)


def test_smoothing_spreads_one_voxel_into_a_gaussian():
    image = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    image[..., 20, 20] = 1
    smooth = gaussian_smooth(image, 2.5)[0, 0]
    x = np.arange(41) - 20.0
    gauss = np.exp(-0.5 * (x / 2.5) ** 2)
    assert smooth.sum().item() == pytest.approx(1)
    np.testing.assert_allclose(smooth.numpy(), np.outer(gauss, gauss) / gauss.sum() ** 2, atol=1e-4)


def test_smoothing_leaves_constants_and_does_not_modify(shape):
    image = torch.full((1, 1, *shape), 3.5, dtype=torch.float64)
    smooth = gaussian_smooth(image, 2.0)
    torch.testing.assert_close(smooth, image)
    smooth.zero_()
    assert torch.equal(image, torch.full_like(image, 3.5))


def test_smoothing_by_nothing_changes_nothing(shape, rng):
    image = torch.from_numpy(rng.standard_normal((1, 1, *shape)))
    assert torch.equal(gaussian_smooth(image, 0.0), image)


# cropping


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("old", "new"), [((9, 12), (4, 7)), ((9, 12), (9, 12)), ((7, 8, 9), (1, 8, 4))])
def test_crop_equals_slicing(old, new, centre):
    image = torch.arange(2 * math.prod(old)).view(1, 2, *old)
    start = [(o - n) // 2 if centre else 0 for o, n in zip(old, new)]
    expected = image.numpy()[(..., *(slice(s, s + n) for s, n in zip(start, new)))]
    np.testing.assert_array_equal(crop(image, new, centre=centre).numpy(), expected)
