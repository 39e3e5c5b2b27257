import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_drdm.metrics import log_jacobian_std, mean_displacement, remove_affine

SHAPES = [(25, 34), (14, 21, 17), (1, 20), (1, 9, 8)]


@pytest.fixture
def noise():
    def make(shape, batch=2, dtype=torch.float64, sigma_vox=0.0):
        field = np.random.default_rng(5).standard_normal((batch, len(shape), *shape))
        return torch.from_numpy(ndimage.gaussian_filter(field, (0, 0, *(sigma_vox,) * len(shape)))).to(dtype)

    return make


def affine_field(matrix, shift, shape):
    field = np.tensordot(matrix, np.indices(shape), axes=1) + np.reshape(shift, (-1, *(1,) * len(shape)))
    return torch.from_numpy(field)[None]


def cosine(shape, axis=0):
    """Even about the middle and of zero mean: orthogonal to every affine function of position."""
    x = (np.arange(shape[axis]) + 0.5) / shape[axis]
    ddf = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
    wave = torch.from_numpy(np.cos(2 * np.pi * x)).view(-1, *(1,) * (len(shape) - 1 - axis))
    for d in range(len(shape)):
        ddf[:, d] = (d + 1) * wave
    return ddf


# remove_affine


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_left_of_an_affine_field(shape, dtype):
    rng = np.random.default_rng(1)
    ddf = affine_field(rng.uniform(-1, 1, (len(shape),) * 2), rng.uniform(-9, 9, len(shape)), shape).to(dtype)
    left = remove_affine(ddf)
    assert left.dtype == dtype
    assert left.abs().max() < (1e-4 if dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_field_orthogonal_to_affine_functions_is_left_alone(shape, axis):
    ddf = cosine(shape, axis)
    torch.testing.assert_close(remove_affine(ddf), ddf)
    torch.testing.assert_close(
        remove_affine(ddf + affine_field(np.eye(len(shape)), 3.0 * np.ones(len(shape)), shape)), ddf
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_remove_affine_equals_least_squares(shape, noise):
    ddf = noise(shape)
    design = np.concatenate((np.ones((1, np.prod(shape))), np.indices(shape).reshape(len(shape), -1))).T
    left = remove_affine(ddf)
    for b in range(2):
        for d in range(len(shape)):
            values = ddf[b, d].numpy().ravel()
            expected = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
            np.testing.assert_allclose(left[b, d].numpy().ravel(), expected, atol=1e-9)


def test_removing_twice_removes_nothing_more(noise):
    once = remove_affine(noise((20, 31)))
    torch.testing.assert_close(remove_affine(once), once)


# mean_displacement


def test_mean_displacement_by_hand():
    ddf = torch.zeros(2, 2, 2, 3)
    ddf[0, 0], ddf[0, 1] = 3.0, -4.0
    ddf[1, 1, 0] = 2.0  # half of the voxels move by 2
    assert mean_displacement(ddf).tolist() == [5.0, 1.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_displacement_equals_numpy(shape, dtype, noise):
    ddf = noise(shape, 3, dtype)
    expected = np.sqrt((ddf.numpy() ** 2).sum(axis=1)).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(mean_displacement(ddf).numpy(), expected, rtol=1e-5)


# log_jacobian_std


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.7])
def test_a_uniform_scaling_stretches_evenly(shape, scale):
    ddf = affine_field((scale - 1) * np.eye(len(shape)), np.zeros(len(shape)), shape)
    assert log_jacobian_std(ddf).item() == pytest.approx(0, abs=1e-12)


def test_log_jacobian_std_of_two_halves():
    edges = torch.cat((torch.full((10,), 0.5), torch.full((10,), -0.4)))  # half the rows stretch, half shrink
    ddf = torch.zeros(1, 2, 21, 6, dtype=torch.float64)
    ddf[0, 0, 1:] = edges.double().cumsum(0)[:, None]
    assert log_jacobian_std(ddf).item() == pytest.approx((np.log(1.5) - np.log(0.6)) / 2, rel=1e-6)


@pytest.mark.parametrize("floor", [1e-3, 1e-2])
def test_folds_count_as_compression_to_the_floor(floor):
    edges = torch.cat((torch.zeros(10), torch.full((10,), -1.5)))
    ddf = torch.zeros(1, 2, 21, 6, dtype=torch.float64)
    ddf[0, 0, 1:] = edges.double().cumsum(0)[:, None]
    assert log_jacobian_std(ddf, floor).item() == pytest.approx(-np.log(floor) / 2, rel=1e-6)


# all of them


@pytest.mark.parametrize("measure", [remove_affine, mean_displacement, log_jacobian_std])
def test_a_batch_equals_its_fields_alone_and_is_not_modified(measure, noise):
    ddf = noise((12, 15), 3, sigma_vox=2.0)
    before = ddf.clone()
    together = measure(ddf)
    assert torch.equal(ddf, before)
    torch.testing.assert_close(together, torch.cat([measure(d[None]) for d in ddf]))


@pytest.mark.parametrize("measure", [remove_affine, mean_displacement])
def test_errors_name_the_argument(measure):
    with pytest.raises(TypeError, match=f"{measure.__name__}: ddf"):
        measure(torch.zeros(1, 2, 4, 4).int())
    with pytest.raises(ValueError, match=f"{measure.__name__}: ddf"):
        measure(torch.zeros(2, 4, 4))
