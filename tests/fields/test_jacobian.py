from itertools import product

import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import given
from hypothesis import strategies as st

from monai_drdm.fields import fold_fraction, jacobian_determinant


def corner_minimum_by_brute_force(ddf):
    """Visit every cell and corner; at each, one-sided differences along the edges that meet there."""
    dims, shape = ddf.shape[0], ddf.shape[1:]
    phi = ddf + np.indices(shape)
    result = np.empty([max(n - 1, 1) for n in shape])
    for cell in np.ndindex(*result.shape):
        determinants = []
        for corner in product((0, 1), repeat=dims):
            here = tuple(c + o if n > 1 else 0 for c, o, n in zip(cell, corner, shape))
            jacobian = np.eye(dims)
            for d in range(dims):
                if shape[d] > 1:
                    low, high = list(here), list(here)
                    low[d], high[d] = cell[d], cell[d] + 1
                    jacobian[:, d] = phi[(slice(None), *high)] - phi[(slice(None), *low)]
            determinants.append(np.linalg.det(jacobian))
        result[cell] = min(determinants)
    return result


def comb(shape, amplitude, axis=0):
    """Displacements of alternating sign from voxel to voxel."""
    ddf = torch.zeros(1, len(shape), *shape)
    sign = 1 - 2 * (torch.arange(shape[axis]) % 2)
    ddf[:, axis] = amplitude * sign.view(-1, *(1,) * (len(shape) - 1 - axis))
    return ddf


def test_central_equals_simpleitk_inside(shape, dtype, smooth_ddf, sitk_field, interior):
    ddf = smooth_ddf(shape, 5.0, sigma_vox=2.0, dtype=dtype)
    expected = SimpleITK.GetArrayFromImage(SimpleITK.DisplacementFieldJacobianDeterminant(sitk_field(ddf[0])))
    actual = jacobian_determinant(ddf, "central")
    assert actual.shape == (1, *shape)
    assert actual.dtype == dtype
    inner = interior(len(shape), 1)
    assert expected[inner].std() > 0.1
    np.testing.assert_allclose(actual[0].numpy()[inner], expected[inner], atol=1e-4)


def test_central_equals_numpy_gradients_everywhere(shape, smooth_ddf):
    ddf = smooth_ddf(shape, 5.0, sigma_vox=2.0, dtype=torch.float64)
    slopes = np.stack([np.gradient(c) for c in ddf[0].numpy()])
    jacobian = np.moveaxis(slopes, (0, 1), (-2, -1)) + np.eye(len(shape))
    np.testing.assert_allclose(jacobian_determinant(ddf, "central")[0].numpy(), np.linalg.det(jacobian), atol=1e-10)


@pytest.mark.parametrize(
    "size", [(7, 9), (2, 2), (1, 8), (8, 1), (4, 5, 6), (1, 5, 4), (5, 1, 4), (5, 4, 1), (1, 6, 1)]
)
def test_corners_equal_brute_force(size, dtype, rng):
    field = rng.uniform(-0.8, 0.8, (len(size), *size))
    actual = jacobian_determinant(torch.from_numpy(field)[None].to(dtype))
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual[0].numpy(), corner_minimum_by_brute_force(field), atol=1e-5)


@pytest.mark.parametrize("scheme", ["corners", "central"])
def test_the_zero_field_has_determinant_one(shape, dtype, scheme):
    determinant = jacobian_determinant(torch.zeros(2, len(shape), *shape, dtype=dtype), scheme)
    assert determinant.shape == (2, *(shape if scheme == "central" else (n - 1 for n in shape)))
    assert torch.equal(determinant, torch.ones_like(determinant))


@pytest.mark.parametrize("scheme", ["corners", "central"])
@given(seed=st.integers(0, 2**32 - 1), shape=st.lists(st.integers(2, 6), min_size=2, max_size=3))
def test_affine_fields_have_the_determinant_of_their_matrix(affine_ddf, scheme, seed, shape):
    matrix = np.random.default_rng(seed).uniform(-2, 2, (len(shape), len(shape)))
    determinant = jacobian_determinant(affine_ddf(matrix, np.ones(len(shape)), tuple(shape)), scheme)
    np.testing.assert_allclose(determinant.numpy(), np.linalg.det(matrix), atol=1e-10)


@pytest.mark.parametrize("axis", [0, 1])
def test_corners_see_a_comb_and_central_differences_do_not(shape, axis):
    ddf = comb(shape, 0.6, axis)
    corners, central = jacobian_determinant(ddf), jacobian_determinant(ddf, "central")
    torch.testing.assert_close(corners.min(), torch.tensor(1 - 2 * 0.6))
    inner = central.movedim(axis + 1, 0)[1:-1]  # the border has one-sided differences
    torch.testing.assert_close(inner, torch.ones_like(inner))
    cells = shape[axis] - 1  # the first of each pair of cells folds
    assert fold_fraction(ddf).item() == pytest.approx((cells + 1) // 2 / cells)
    assert fold_fraction(ddf, "central").item() <= 2 / shape[axis] + 1e-6


def test_a_comb_below_half_a_voxel_does_not_fold(shape):
    assert fold_fraction(comb(shape, 0.49)).item() == 0
    assert fold_fraction(comb(shape, 0.5)).item() > 0  # a determinant of 0 counts as a fold


@pytest.mark.parametrize("scheme", ["corners", "central"])
@pytest.mark.parametrize("size", [(1, 6), (6, 1), (1, 5, 4), (5, 1, 4), (5, 4, 1)])
def test_along_an_axis_of_length_1_nothing_stretches(scheme, size):
    ddf = torch.zeros(1, len(size), *size)
    stretched = next(d for d, n in enumerate(size) if n > 1)
    ddf[:, size.index(1)] = 3.0
    slope = torch.arange(float(size[stretched])).view(-1, *(1,) * (len(size) - 1 - stretched))
    ddf[:, stretched] = 0.25 * slope
    determinant = jacobian_determinant(ddf, scheme)
    expected = size if scheme == "central" else [max(n - 1, 1) for n in size]
    assert determinant.shape == (1, *expected)
    torch.testing.assert_close(determinant, torch.full_like(determinant, 1.25))


@pytest.mark.parametrize("folded", [0, 1, 4, 12])
def test_fold_fraction_of_a_known_number_of_folded_rows(dtype, folded):
    slope = torch.zeros(24, dtype=dtype)
    slope[6 : 6 + folded] = -1.5
    ddf = torch.zeros(2, 2, 25, 11, dtype=dtype)
    ddf[1, 0, 1:] = slope.cumsum(0)[:, None]
    assert fold_fraction(ddf).tolist() == pytest.approx([0.0, folded / 24])


def test_fold_fraction_of_one_displaced_voxel():
    ddf = torch.zeros(1, 3, 5, 6, 7)
    ddf[0, 0, 2, 3, 3] = 1.5  # passes the voxel after it: the eight cells around meet it at a corner
    # behind the voxel its edge has 1 + 1.5, ahead of it 1 - 1.5: the four cells ahead fold
    assert fold_fraction(ddf).item() == pytest.approx(4 / (4 * 5 * 6))


def test_the_determinant_of_a_batch_equals_its_samples_alone(shape, smooth_ddf):
    ddf = smooth_ddf(shape, 4.0, batch=3)
    for scheme in ("corners", "central"):
        alone = torch.cat([jacobian_determinant(d[None], scheme) for d in ddf])
        assert torch.equal(jacobian_determinant(ddf, scheme), alone)


def test_the_field_is_not_modified(shape, smooth_ddf):
    ddf = smooth_ddf(shape)
    before = ddf.clone()
    for scheme in ("corners", "central"):
        jacobian_determinant(ddf, scheme)
        fold_fraction(ddf, scheme)
    assert torch.equal(ddf, before)


@pytest.mark.parametrize("scheme", ["corners", "central"])
def test_half_precision_is_differenced_in_float32(scheme):
    assert jacobian_determinant(torch.zeros(1, 2, 4, 4, dtype=torch.float16), scheme).dtype == torch.float32


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="scheme must be 'corners' or 'central', got 'forward'"):
        jacobian_determinant(torch.zeros(1, 2, 4, 4), "forward")
    with pytest.raises(ValueError, match="scheme must be"):
        fold_fraction(torch.zeros(1, 2, 4, 4), "forward")
    with pytest.raises(TypeError, match="jacobian_determinant: ddf"):
        jacobian_determinant(torch.zeros(1, 2, 4, 4).int())
    with pytest.raises(ValueError, match="jacobian_determinant: ddf must have shape"):
        jacobian_determinant(torch.zeros(3, 4, 4))
