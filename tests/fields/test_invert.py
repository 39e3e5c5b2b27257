import numpy as np
import pytest
import SimpleITK
import torch
from scipy import ndimage
from scipy.optimize import brentq

from monai_drdm.fields import invert


def residual_by_scipy(ddf, inverse, grid):
    """Largest ``|w(x) + ddf(x + w(x))|`` of one field."""
    position = grid + inverse
    back = np.stack([ndimage.map_coordinates(c, position, order=1, mode="nearest") for c in ddf]) + inverse
    return np.linalg.norm(back, axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_inverse_solves_its_equation(shape, dtype, smooth_ddf, voxel_grid, seed):
    ddf = smooth_ddf(shape, 3.0, sigma_vox=5.0, batch=2, seed=seed, dtype=dtype)
    inverse = invert(ddf)
    assert inverse.ddf.dtype == dtype
    assert inverse.residual.shape == inverse.converged.shape == (2,)
    assert inverse.converged.dtype == torch.bool
    assert inverse.converged.all()
    for field, back, reported in zip(ddf.numpy(), inverse.ddf.numpy(), inverse.residual.tolist()):
        worst = residual_by_scipy(field, back, voxel_grid(shape)).max()
        assert worst <= 1.1e-3
        assert reported == pytest.approx(worst, abs=5e-5)


def inverse_by_hand(ddf, iterations, tolerance=1e-3):
    """Broyden's method voxel by voxel in numpy, all of one field ``(D, *S)`` until the last voxel is solved."""
    dims, grid = len(ddf), np.indices(ddf.shape[1:])

    def residual_of(offset):
        return offset + [ndimage.map_coordinates(c, grid + offset, order=1, mode="nearest") for c in ddf]

    offset = -ddf.copy()
    residual = residual_of(offset)
    best, best_size = offset.copy(), np.linalg.norm(residual, axis=0)
    jacobian = np.broadcast_to(np.eye(dims), (*ddf.shape[1:], dims, dims)).copy()
    for _ in range(iterations):
        if (best_size <= tolerance).all():
            break
        step = -np.einsum("...ij,j...->i...", jacobian, residual)
        offset = offset + step
        change = residual_of(offset) - residual
        residual = residual + change
        for voxel in np.ndindex(ddf.shape[1:]):
            s, y, b = step[(slice(None), *voxel)], change[(slice(None), *voxel)], jacobian[voxel]
            scale = s @ b @ y
            jacobian[voxel] = b + np.outer(s - b @ y, s @ b) / (scale if abs(scale) >= 1e-10 else 1e-10)
        size = np.linalg.norm(residual, axis=0)
        better = size < best_size
        best[:, better], best_size[better] = offset[:, better], size[better]
    return best, best_size.max()


@pytest.mark.parametrize("iterations", [0, 1, 2, 3, 6])
def test_the_inverse_by_hand(smooth_ddf, iterations):
    """The first offset is minus the field, the first step the plain one; at every voxel the best so far is kept."""
    ddf = smooth_ddf((11, 13), 3.0, sigma_vox=2.5, dtype=torch.float64)
    expected, worst = inverse_by_hand(ddf[0].numpy(), iterations, tolerance=0.0)
    found = invert(ddf, iterations=iterations, tolerance=0.0)
    np.testing.assert_allclose(found.ddf[0].numpy(), expected, atol=1e-9)
    assert found.residual.item() == pytest.approx(worst, abs=1e-9)
    assert not found.converged


def test_fifty_iterations_to_a_thousandth_of_a_voxel_unless_told_otherwise(smooth_ddf):
    folding = smooth_ddf((17, 19), 6.0, sigma_vox=1.5, seed=3, dtype=torch.float64)
    found = invert(folding)
    assert not found.converged
    assert torch.equal(found.ddf, invert(folding, iterations=50).ddf)
    assert any(not torch.equal(found.ddf, invert(folding, iterations=n).ddf) for n in (45, 49, 55))
    fields = [smooth_ddf((9, 11), 2.0, dtype=torch.float64) * scale for scale in np.linspace(0.6, 1.4, 300)]
    stops_early = [one for one in fields if invert(one, tolerance=1.1e-3).residual.item() > 1e-3]
    assert stops_early
    assert all(invert(one).residual.item() <= 1e-3 for one in stops_early)


def test_a_residual_that_equals_the_tolerance_has_converged():
    """A shift by half a voxel is inverted at once, with a residual of exactly nothing."""
    shift = torch.full((1, 2, 5, 6), 0.5)
    found = invert(shift, iterations=0, tolerance=0.0)
    assert found.residual.item() == 0.0
    assert found.converged.all()


def test_the_inverse_of_nothing_is_nothing(shape, dtype):
    inverse = invert(torch.zeros(1, len(shape), *shape, dtype=dtype))
    assert not inverse.ddf.any()
    assert inverse.residual.tolist() == [0.0]
    assert inverse.converged.all()


def test_the_inverse_of_a_translation_is_the_translation_back(shape, dtype):
    shift = torch.linspace(-6, 3.5, len(shape), dtype=dtype).view(1, -1, *(1,) * len(shape)).expand(1, -1, *shape)
    inverse = invert(shift)
    torch.testing.assert_close(inverse.ddf, -shift)
    assert inverse.converged.all()


@pytest.mark.parametrize("scale", [0.8, 1.25])
def test_the_inverse_of_an_affine_map_is_the_inverse_matrix(shape, dtype, affine_ddf, rotation, interior, scale):
    dims = len(shape)
    matrix, shift = rotation(6, dims) * scale, np.linspace(0.5, -1, dims)
    inverse = invert(affine_ddf(matrix, shift, shape, dtype))
    back = np.linalg.inv(matrix)
    expected = affine_ddf(back, -back @ shift, shape, dtype)
    inner = interior(dims, 5)
    torch.testing.assert_close(inverse.ddf[inner], expected[inner], atol=0.02, rtol=0)


def test_a_stretch_beyond_a_factor_of_two_is_inverted(affine_ddf, voxel_grid):
    ddf = affine_ddf(np.diag([3.0, 2.5]), np.zeros(2), (30, 41))  # the plain fixed-point iteration diverges here
    inverse = invert(ddf)
    assert inverse.converged.all()
    torch.testing.assert_close(
        inverse.ddf, affine_ddf(np.diag([1 / 3, 1 / 2.5]), np.zeros(2), (30, 41)), atol=0.02, rtol=0
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_the_inverse_of_a_sinusoid_equals_its_root(axis):
    length, amplitude, wave = 80, 4.0, 40.0

    def displacement(x):
        return amplitude * np.sin(2 * np.pi * x / wave)

    ddf = torch.zeros(1, 2, length, 7, dtype=torch.float64)
    ddf[:, 0] = torch.from_numpy(displacement(np.arange(length)))[:, None]
    if axis == 1:
        ddf = ddf.flip(1).transpose(2, 3)
    inverse = invert(ddf)
    assert inverse.converged.all()
    inner = np.arange(5, 75)
    roots = [brentq(lambda y, x=x: y + displacement(y) - x, x - 8, x + 8) - x for x in inner]
    found = inverse.ddf[0, axis].movedim(axis, 0)[inner, 3].numpy()
    np.testing.assert_allclose(found, roots, atol=0.02)
    assert not inverse.ddf[0, 1 - axis].abs().max() > 1e-6


def test_the_inverse_equals_simpleitks_inside(shape, smooth_ddf, sitk_field, interior):
    ddf = smooth_ddf(shape, 2.0, sigma_vox=5.0, dtype=torch.float64, taper=True)
    found = SimpleITK.InvertDisplacementField(
        sitk_field(ddf[0]), maximumNumberOfIterations=100, maxErrorToleranceThreshold=1e-4,
        meanErrorToleranceThreshold=1e-5, enforceBoundaryCondition=False,
    )  # fmt: skip
    expected = np.moveaxis(SimpleITK.GetArrayFromImage(found)[..., ::-1], -1, 0)
    inner = interior(len(shape), 3)
    np.testing.assert_allclose(invert(ddf).ddf[0].numpy()[inner], expected[inner], atol=0.02)


def test_a_folding_field_is_reported_and_does_not_taint_its_batch(smooth_ddf):
    good = smooth_ddf((25, 26), 2.0, dtype=torch.float64)
    folding = smooth_ddf((25, 26), 12.0, sigma_vox=2.0, dtype=torch.float64)
    inverse = invert(torch.cat((good, folding)))
    assert inverse.converged.tolist() == [True, False]
    assert inverse.residual[0] <= 1e-3
    assert inverse.residual[1] > 0.1
    assert inverse.ddf.isfinite().all()
    torch.testing.assert_close(inverse.ddf[:1], invert(good).ddf, atol=5e-3, rtol=0)


def test_the_reported_residual_of_a_failure_is_true(smooth_ddf, voxel_grid):
    ddf = smooth_ddf((25, 26), 12.0, sigma_vox=2.0, dtype=torch.float64)
    inverse = invert(ddf, iterations=10)
    worst = residual_by_scipy(ddf[0].numpy(), inverse.ddf[0].numpy(), voxel_grid((25, 26))).max()
    assert not inverse.converged.any()
    assert inverse.residual.item() == pytest.approx(worst, rel=1e-3)


def test_more_iterations_never_make_a_voxel_worse(smooth_ddf, voxel_grid):
    ddf = smooth_ddf((25, 26), 12.0, sigma_vox=2.0, dtype=torch.float64)  # folds: some voxels wander off
    residuals = [
        residual_by_scipy(ddf[0].numpy(), invert(ddf, iterations=n).ddf[0].numpy(), voxel_grid((25, 26)))
        for n in (2, 5, 10, 30)
    ]
    assert (np.diff(residuals, axis=0) <= 1e-9).all()


def test_a_tighter_tolerance_is_reached(shape, smooth_ddf, voxel_grid):
    ddf = smooth_ddf(shape, 2.0, sigma_vox=5.0, dtype=torch.float64)
    inverse = invert(ddf, tolerance=1e-8)
    assert inverse.converged.all()
    assert residual_by_scipy(ddf[0].numpy(), inverse.ddf[0].numpy(), voxel_grid(shape)).max() <= 1e-7


def test_too_few_iterations_do_not_converge(smooth_ddf):
    assert not invert(smooth_ddf((25, 34), 4.0), iterations=1).converged.any()


def test_an_axis_of_length_1():
    ddf = torch.zeros(1, 2, 1, 9)
    ddf[:, 0], ddf[:, 1] = 2.0, 0.75
    inverse = invert(ddf)
    assert inverse.converged.all()
    torch.testing.assert_close(inverse.ddf, -ddf)


def test_half_precision_fields_invert_in_float32(smooth_ddf):
    inverse = invert(smooth_ddf((20, 21), 1.0, dtype=torch.float16))
    assert inverse.ddf.dtype == torch.float32
    assert inverse.converged.all()


def test_the_field_is_not_modified(smooth_ddf):
    ddf = smooth_ddf((15, 16))
    before = ddf.clone()
    invert(ddf).ddf.zero_()
    assert torch.equal(ddf, before)


def test_a_field_that_is_not_finite_does_not_converge():
    assert not invert(torch.full((1, 2, 5, 5), float("nan"))).converged.any()


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="invert: ddf must be a floating tensor"):
        invert(torch.zeros(1, 2, 4, 4).int())
    with pytest.raises(ValueError, match="invert: ddf must have shape"):
        invert(torch.zeros(2, 4, 4))
