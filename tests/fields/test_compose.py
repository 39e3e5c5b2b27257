import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.networks.blocks import DVF2DDF
from scipy import ndimage
from scipy.linalg import expm

from monai_drdm.fields import compose, exp_svf, power, warp

SCIPY_MODES = {"border": "nearest", "zeros": "grid-constant", "reflection": "mirror"}


def compose_with_scipy(first, second, grid, mode="nearest"):
    position = grid + second
    return np.stack([ndimage.map_coordinates(c, position, order=1, mode=mode) for c in first]) + second


def vortex(shape, strength):
    """A divergence-free velocity that vanishes on the border; returns the samples and the function of position."""
    rows, columns = (n - 1 for n in shape)

    def velocity(x):
        u, v = np.pi * x[0] / rows, np.pi * x[1] / columns
        return strength * np.stack(
            (np.sin(u) ** 2 * np.sin(v) * np.cos(v) * rows, -(np.sin(v) ** 2) * np.sin(u) * np.cos(u) * columns)
        )

    return velocity


# compose


@pytest.mark.parametrize("padding_mode", SCIPY_MODES)
def test_compose_equals_its_formula_in_scipy(shape, dtype, smooth_ddf, voxel_grid, padding_mode):
    first, second = smooth_ddf(shape, 3.0, seed=1, dtype=dtype), smooth_ddf(shape, 4.0, seed=2, dtype=dtype)
    expected = compose_with_scipy(first[0].numpy(), second[0].numpy(), voxel_grid(shape), SCIPY_MODES[padding_mode])
    actual = compose(first, second, padding_mode)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual[0].numpy(), expected, atol=1e-4)


def test_the_zero_field_is_neutral(shape, dtype, smooth_ddf):
    ddf = smooth_ddf(shape, 3.0, dtype=dtype)
    zero = torch.zeros_like(ddf)
    torch.testing.assert_close(compose(ddf, zero), ddf, atol=1e-5, rtol=0)
    torch.testing.assert_close(compose(zero, ddf), ddf, atol=0, rtol=0)


def test_translations_add(shape):
    a, b = (torch.linspace(lo, hi, len(shape)).view(1, -1, *(1,) * len(shape)) for lo, hi in ((-2, 3), (4, 0.5)))
    composed = compose(a.expand(1, -1, *shape), b.expand(1, -1, *shape))
    torch.testing.assert_close(composed, (a + b).expand(1, -1, *shape))


def test_affine_maps_multiply(shape, dtype, affine_ddf, rotation, interior):
    dims = len(shape)
    first, second = rotation(8, dims), np.diag(np.linspace(0.9, 1.1, dims))
    first_shift, second_shift = np.linspace(0.5, -1, dims), np.linspace(-0.4, 1, dims)
    composed = compose(
        affine_ddf(first, first_shift, shape, dtype), affine_ddf(second, second_shift, shape, dtype)
    )  # x -> first(second(x))
    expected = affine_ddf(first @ second, first @ second_shift + first_shift, shape, dtype)
    inner = interior(dims, 5)
    torch.testing.assert_close(composed[inner], expected[inner], atol=1e-4, rtol=0)


def test_composition_is_associative_inside(shape, smooth_ddf, interior):
    a, b, c = (smooth_ddf(shape, 1.0, seed=s, sigma_vox=6.0, dtype=torch.float64) for s in range(3))
    left, right = compose(compose(a, b), c), compose(a, compose(b, c))
    inner = interior(len(shape), 4)
    torch.testing.assert_close(left[inner], right[inner], atol=0.02, rtol=0)
    assert (left - (a + b + c)).abs().max() > 0.05  # far from trivial: the plain sum is not the composition


def test_warping_by_the_composition_equals_warping_twice(shape, smooth_ddf, voxel_grid, interior):
    image = torch.from_numpy(np.cos(voxel_grid(shape) / 4).prod(axis=0))[None, None]
    a = smooth_ddf(shape, 2.0, sigma_vox=5.0, dtype=torch.float64)
    b = smooth_ddf(shape, 1.0, sigma_vox=5.0, dtype=torch.float64, seed=1) + 2
    twice, once, swapped = warp(warp(image, a), b), warp(image, compose(a, b)), warp(image, compose(b, a))
    inner = interior(len(shape), 5)
    assert (twice - once)[inner].abs().max() < 0.02  # two linear interpolations against one
    assert (twice - swapped)[inner].abs().max() > 0.04


def test_warping_a_linear_image_twice_is_exact(shape, smooth_ddf, voxel_grid, interior):
    a, b = (smooth_ddf(shape, 2.0, seed=s, dtype=torch.float64) for s in (1, 2))
    image = torch.from_numpy(voxel_grid(shape))[None]  # linear interpolation of coordinates has no error
    inner = interior(len(shape), 5)
    torch.testing.assert_close(warp(warp(image, a), b)[inner], warp(image, compose(a, b))[inner])


@pytest.mark.parametrize(("first", "second"), [(3, 1), (1, 3), (3, 3)])
def test_a_composed_batch_equals_its_samples_alone(shape, smooth_ddf, first, second):
    a, b = smooth_ddf(shape, 2.0, batch=first, seed=1), smooth_ddf(shape, 2.0, batch=second, seed=2)
    together = compose(a, b)
    for i in range(3):
        alone = compose(a[min(i, first - 1)][None], b[min(i, second - 1)][None])
        assert torch.equal(together[i], alone[0])


def test_compose_does_not_modify_its_inputs(shape, smooth_ddf):
    a, b = smooth_ddf(shape, seed=1), smooth_ddf(shape, seed=2)
    before = a.clone(), b.clone()
    compose(a, b).zero_()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_compose_on_an_axis_of_length_1():
    a, b = torch.zeros(1, 2, 1, 9), torch.zeros(1, 2, 1, 9)
    a[:, 0], a[:, 1], b[:, 0], b[:, 1] = 1.0, 2.0, 3.0, -0.5
    composed = compose(a, b)
    assert composed[0, :, 0, 4].tolist() == [4.0, 1.5]


@pytest.mark.parametrize(
    ("error", "match", "first", "second"),
    [
        (TypeError, "compose: first", torch.zeros(1, 2, 4, 4).long(), torch.zeros(1, 2, 4, 4)),
        (TypeError, "compose: second", torch.zeros(1, 2, 4, 4), None),
        (ValueError, "compose: first", torch.zeros(2, 4, 4), torch.zeros(1, 2, 4, 4)),
        (ValueError, "compose: second", torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4)),
        (ValueError, "first and second must share one grid", torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 5, 4)),
        (ValueError, "batch sizes of first and second", torch.zeros(2, 2, 4, 4), torch.zeros(3, 2, 4, 4)),
    ],
)
def test_compose_errors_name_the_argument(error, match, first, second):
    with pytest.raises(error, match=match):
        compose(first, second)


# power


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 20])
def test_power_equals_naive_composition(shape, dtype, smooth_ddf, voxel_grid, interior, n):
    ddf = smooth_ddf(shape, 0.2, sigma_vox=8.0, dtype=dtype)
    expected, grid = np.zeros(ddf.shape[1:]), voxel_grid(shape)
    for _ in range(n):
        expected = compose_with_scipy(expected, ddf[0].numpy(), grid)
    actual = power(ddf, n)
    assert actual.dtype == dtype
    inner = interior(len(shape), 4)
    np.testing.assert_allclose(actual[0].numpy()[inner], expected[inner], atol=1e-5 if n < 3 else 5e-3)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 20])
def test_power_of_a_contraction_equals_the_matrix_power(shape, affine_ddf, n):
    matrix = np.diag(np.linspace(0.9, 0.97, len(shape)))  # never leaves the grid, and linear fields sample exactly
    expected = affine_ddf(np.linalg.matrix_power(matrix, n), np.zeros(len(shape)), shape)
    actual = power(affine_ddf(matrix, np.zeros(len(shape)), shape), n)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


def test_power_takes_a_count_per_sample(shape, smooth_ddf, interior):
    ddf, counts = smooth_ddf(shape, 0.2, batch=5, sigma_vox=8.0), [0, 7, 1, 2, 5]
    together, inner = power(ddf, torch.tensor(counts)), interior(len(shape), 4)
    for b, n in enumerate(counts):
        naive = torch.zeros_like(ddf[:1])
        for _ in range(n):
            naive = compose(naive, ddf[b : b + 1])
        torch.testing.assert_close(together[b : b + 1][inner], naive[inner], atol=5e-3, rtol=0)
        assert torch.equal(together[b : b + 1], power(ddf[b : b + 1], n))


def test_power_does_not_modify_its_input(smooth_ddf):
    ddf = smooth_ddf((9, 10))
    before = ddf.clone()
    for n in (0, 1, 2, 3):
        power(ddf, n).zero_()
        assert torch.equal(ddf, before)


@pytest.mark.parametrize(
    "n", [-1, 1.5, torch.tensor([1, -1]), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0]), torch.ones(2, 1).long()]
)
def test_power_refuses_other_counts(n):
    with pytest.raises(ValueError, match="power: n must be a non-negative integer"):
        power(torch.zeros(2, 2, 4, 4), n)


def test_power_checks_the_field():
    with pytest.raises(TypeError, match="power: ddf"):
        power(torch.zeros(1, 2, 4, 4).int(), 2)


# exponential


@pytest.mark.filterwarnings("ignore:.*native grid_sample")
@pytest.mark.parametrize("squarings", [1, 4, 7])
def test_exp_equals_monai_for_the_same_squarings(shape, dtype, smooth_ddf, squarings):
    svf = smooth_ddf(shape, 4.0, dtype=dtype, batch=2)
    expected = DVF2DDF(num_steps=squarings, mode="bilinear", padding_mode="border")(svf)
    torch.testing.assert_close(exp_svf(svf, squarings), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("squarings", [None, 8])
def test_exp_equals_fine_euler_integration_of_the_analytic_velocity(voxel_grid, squarings):
    shape = (65, 49)
    velocity, position = vortex(shape, 0.2), voxel_grid(shape)
    for _ in range(4000):
        position = position + velocity(position) / 4000
    expected = position - voxel_grid(shape)
    assert np.abs(expected).max() > 3
    actual = exp_svf(torch.from_numpy(velocity(voxel_grid(shape)))[None], squarings)[0].numpy()
    np.testing.assert_allclose(actual, expected, atol=0.06)
    assert np.sqrt(((actual - expected) ** 2).mean()) < 0.015


def test_exp_equals_fine_euler_integration_of_the_sampled_velocity(voxel_grid, smooth_ddf):
    shape = (13, 17, 11)
    svf, position = smooth_ddf(shape, 2.0, taper=True, dtype=torch.float64), voxel_grid(shape)
    for _ in range(1000):
        step = [ndimage.map_coordinates(c, position, order=1, mode="nearest") for c in svf[0].numpy()]
        position = position + np.stack(step) / 1000
    np.testing.assert_allclose(exp_svf(svf)[0].numpy(), position - voxel_grid(shape), atol=0.06)


def test_exp_of_a_linear_contraction_equals_the_matrix_exponential(shape, affine_ddf):
    dims = len(shape)
    generator = np.diag(np.linspace(-0.3, -0.1, dims))
    svf = affine_ddf(np.eye(dims) + generator, np.zeros(dims), shape)
    torch.testing.assert_close(exp_svf(svf), affine_ddf(expm(generator), np.zeros(dims), shape), atol=0.03, rtol=0)
    exact = affine_ddf(expm(generator), np.zeros(dims), shape)
    torch.testing.assert_close(exp_svf(svf, 20), exact, atol=1e-5, rtol=0)
    after_five = affine_ddf(np.linalg.matrix_power(np.eye(dims) + generator / 32, 32), np.zeros(dims), shape)
    torch.testing.assert_close(exp_svf(svf, 5), after_five, atol=1e-10, rtol=0)


def test_exp_of_a_constant_velocity_is_a_translation(shape, dtype):
    velocity = torch.linspace(-7.5, 4, len(shape), dtype=dtype).view(1, -1, *(1,) * len(shape)).expand(1, -1, *shape)
    torch.testing.assert_close(exp_svf(velocity), velocity)


def test_exp_forward_and_backward_cancel(shape, smooth_ddf):
    svf = smooth_ddf(shape, 2.0, sigma_vox=5.0, taper=True, dtype=torch.float64)
    there, back = exp_svf(svf), exp_svf(-svf)
    assert there.abs().max() > 1
    assert compose(there, back).abs().max() < 0.12
    assert compose(there, back).abs().mean() < 0.015


@pytest.mark.parametrize("squarings", [None, 0, 7])
def test_exp_of_zero_is_zero(shape, dtype, squarings):
    zero = torch.zeros(2, len(shape), *shape, dtype=dtype)
    assert torch.equal(exp_svf(zero, squarings), zero)


def test_exp_squares_no_more_than_it_may(shape, smooth_ddf):
    svf = torch.cat([smooth_ddf(shape, 0.2), smooth_ddf(shape, 6.0)])
    assert torch.equal(exp_svf(svf, at_most=12), exp_svf(svf))
    assert torch.equal(exp_svf(svf, at_most=1)[:1], exp_svf(svf)[:1])
    assert torch.equal(exp_svf(svf, at_most=1)[1:], exp_svf(svf, 1)[1:])


@pytest.mark.parametrize(
    ("largest", "squarings"),
    [(0.01, 0), (0.125, 0), (0.126, 1), (0.25, 1), (0.251, 2), (1.0, 3), (1.001, 4), (2.0, 4), (7.9, 6), (8.1, 7)],
)
def test_exp_begins_with_an_eighth_of_a_voxel(shape, smooth_ddf, largest, squarings):
    """The fewest squarings for which the first step is at most that, also at exact powers of two; SciPy composes."""
    svf = smooth_ddf(shape, 1.0, dtype=torch.float64)
    svf[(0, 0, *(n // 2 for n in shape))] = 1.0  # exactly
    svf = svf.clamp(-1, 1) * largest
    expected = svf[0].numpy() / 2**squarings
    for _ in range(squarings):
        position = np.indices(shape) + expected
        expected = expected + [ndimage.map_coordinates(c, position, order=1, mode="nearest") for c in expected]
    np.testing.assert_allclose(exp_svf(svf)[0].numpy(), expected, atol=1e-10)
    assert np.abs(exp_svf(svf, squarings + 1)[0].numpy() - expected).max() > 1e-6  # another number would show


def test_exp_with_a_limit_reads_nothing_back_from_the_device():
    field = torch.empty(2, 2, 9, 9, device="meta")  # it has no values to read
    assert exp_svf(field, at_most=3).shape == field.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        exp_svf(field)


@pytest.mark.parametrize("arguments", [{"squarings": -1}, {"at_most": -1}])
def test_exp_refuses_negative_numbers(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be 0 or more"):
        exp_svf(torch.zeros(1, 2, 4, 4), **arguments)


@given(seed=st.integers(0, 2**31), strength=st.floats(0.01, 6.0))
def test_exp_never_folds_a_smooth_velocity(smooth_ddf, seed, strength):
    ddf = exp_svf(smooth_ddf((24, 19), strength, seed=seed, taper=True, dtype=torch.float64))
    slopes = np.stack([np.gradient(c) for c in ddf[0].numpy()]) + np.eye(2)[..., None, None]
    assert (np.linalg.det(np.moveaxis(slopes, (0, 1), (-2, -1))) > 0).all()


@pytest.mark.parametrize(("given", "got"), [(torch.float16, torch.float32), (torch.float64, torch.float64)])
def test_exp_computes_in_float32_or_better(given, got):
    assert exp_svf(torch.ones(1, 2, 5, 6, dtype=given)).dtype == got


@pytest.mark.parametrize("squarings", [None, 0, 3])
def test_exp_does_not_modify_its_input(smooth_ddf, squarings):
    svf = smooth_ddf((9, 10))
    before = svf.clone()
    exp_svf(svf, squarings).zero_()
    assert torch.equal(svf, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_exp_refuses_velocities_that_are_not_finite(value):
    svf = torch.zeros(1, 2, 4, 4)
    svf[0, 0, 1, 1] = value
    with pytest.raises(ValueError, match="exp_svf: svf must be finite"):
        exp_svf(svf)


def test_exp_errors_name_the_argument():
    with pytest.raises(ValueError, match="exp_svf: squarings must be 0 or more, got -1"):
        exp_svf(torch.zeros(1, 2, 4, 4), -1)
    with pytest.raises(TypeError, match="exp_svf: svf must be a floating tensor"):
        exp_svf(torch.zeros(1, 2, 4, 4).int())
    with pytest.raises(ValueError, match="exp_svf: svf must have shape"):
        exp_svf(torch.zeros(2, 4, 4))
