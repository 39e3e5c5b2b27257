import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_drdm.fields import exp_svf, fractions_to_voxels
from monai_drdm.train.published import angle_loss, distance_loss, sample_at, smoothness_loss
from monai_drdm.train.velocity import relative_energy, velocity_loss
from monai_drdm.training.folding import folding_loss

SHAPES = [(17, 12), (9, 7, 11)]
LOSSES_OF_TWO = [distance_loss, angle_loss, velocity_loss]


def noise(*size, seed=0, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def coordinates(shape):
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij"))


def linear_ddf(matrix, shape):
    """The field with ``x + ddf(x) = matrix x``."""
    matrix = torch.as_tensor(matrix, dtype=torch.float64)
    return torch.einsum("ij,j...->i...", matrix - torch.eye(len(shape)), coordinates(shape))[None]


def waves(shape, strength):
    """Displacements along every axis that vary slowly along all of them."""
    grid = coordinates(shape)
    return torch.stack([strength * torch.sin(0.4 * grid.sum(dim=0) + d) for d in range(len(shape))])[None]


def alternating(shape, strength, axes):
    """Displacements along the first axis whose sign alternates along some axes."""
    ddf = torch.zeros(1, len(shape), *shape, dtype=torch.float64)
    ddf[0, 0] = strength * (1 - 2 * (coordinates(shape)[list(axes)].sum(dim=0) % 2))
    return ddf


def smallest_triangle(ddf):
    """Twice the smallest signed area of the corner triangles of a moved 2D grid, in plain numpy."""
    y, x = (coordinates(ddf.shape[1:]) + ddf).numpy()
    corners = [(slice(None, -1), slice(None, -1)), (slice(1, None), slice(None, -1))]
    corners += [(slice(1, None), slice(1, None)), (slice(None, -1), slice(1, None))]
    areas = []
    for k in range(4):
        here, after, before = corners[k], corners[(k + 1) % 4], corners[k - 1]
        a = (y[after] - y[here], x[after] - x[here])
        b = (y[before] - y[here], x[before] - x[here])
        areas.append(a[0] * b[1] - a[1] * b[0])
    return np.min(areas)


# the published terms


@pytest.fixture(scope="module", params=[2, 3], ids=["2d", "3d"])
def recorded(request, reference):
    suffix = f"{request.param}d"
    with np.load(reference / "loss_parity.npz") as file:
        return {name.removesuffix(suffix).rstrip("_"): torch.from_numpy(file[name]) for name in file if suffix in name}


def test_sampling_equals_the_release(recorded):
    sampled = sample_at(recorded["pred"], fractions_to_voxels(recorded["target"]))
    torch.testing.assert_close(
        sampled, recorded["pred_at_target"], rtol=1e-5, atol=1e-5 * recorded["pred"].std().item()
    )


def test_distance_and_angle_equal_the_release(recorded):
    sampled = sample_at(recorded["pred"], fractions_to_voxels(recorded["target"]))
    for prediction in (sampled, recorded["pred_at_target"]):
        torch.testing.assert_close(
            distance_loss(prediction, recorded["target"]), recorded["distance"], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(angle_loss(prediction, recorded["target"]), recorded["angle"], rtol=1e-5, atol=1e-8)


def test_smoothness_equals_the_release(recorded):
    torch.testing.assert_close(smoothness_loss(recorded["pred"]), recorded["regular_l1"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampling_reads_the_prediction_where_the_field_points(shape):
    predicted, ddf = noise(1, len(shape), *shape), 2.5 * noise(1, len(shape), *shape, seed=1)
    where = (coordinates(shape) + ddf[0]).numpy()
    expected = [ndimage.map_coordinates(p, where, order=1, mode="nearest") for p in predicted[0].numpy()]
    np.testing.assert_allclose(sample_at(predicted, ddf)[0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_is_zero_for_the_way_back_and_one_for_nothing(shape):
    ddf = noise(3, len(shape), *shape) + 3
    assert distance_loss(-ddf, ddf).item() == 0
    assert distance_loss(torch.zeros_like(ddf), ddf).item() == pytest.approx(1, abs=1e-5)
    assert distance_loss(ddf, ddf).item() == pytest.approx(4, abs=1e-4)
    assert distance_loss(-0.75 * ddf, ddf).item() == pytest.approx(1 / 16, abs=1e-5)


@pytest.mark.parametrize("shape", [(33, 25), (17, 21, 19)])
def test_the_inverse_of_a_flow_has_no_distance_left(shape):
    grid = coordinates(shape)
    velocity = torch.stack([torch.sin(grid[d] * torch.pi / (n - 1)) for d, n in enumerate(shape)])[None]
    ddf, back = exp_svf(velocity), exp_svf(-velocity)
    inside = (..., *(slice(2, -2),) * len(shape))  # the field ends at the border, where nothing is left to relate to
    assert distance_loss(sample_at(back, ddf)[inside], ddf[inside]).item() < 0.01
    assert angle_loss(sample_at(back, ddf)[inside], ddf[inside]).item() < -0.995
    assert distance_loss(back[inside], ddf[inside]).item() > distance_loss(sample_at(back, ddf)[inside], ddf[inside])


@pytest.mark.parametrize("degrees", [0, 40, 90, 135, 180])
def test_the_angle_is_a_cosine_whatever_the_lengths(degrees):
    ddf = noise(2, 2, 8, 9)
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turned = torch.einsum("ij,bj...->bi...", torch.tensor([[c, -s], [s, c]]), ddf)
    lengths = 0.1 + noise(2, 1, 8, 9, seed=1).abs()
    assert angle_loss(turned * lengths, ddf).item() == pytest.approx(c, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_smoothness_of_a_linear_field_is_the_mean_of_its_slopes_beyond_what_is_free(shape):
    slopes = 0.1 * noise(len(shape), len(shape), seed=2)
    ddf = linear_ddf(slopes + torch.eye(len(shape)), shape)
    for free in (0.0, 1e-4, 0.08):
        expected = (slopes.abs() - free).clamp(min=0).mean().item()
        assert smoothness_loss(ddf, free).item() == pytest.approx(expected, rel=1e-9)
    assert smoothness_loss(ddf, 1.0).item() == 0
    assert smoothness_loss(ddf + 5).item() == pytest.approx(smoothness_loss(ddf).item(), rel=1e-9)


def test_smoothness_weighs_axes_alike_whatever_their_size():
    ddf = torch.zeros(1, 2, 3, 40, dtype=torch.float64)
    ddf[0, 0] = 0.5 * coordinates((3, 40))[0]
    assert smoothness_loss(ddf, 0.0).item() == pytest.approx(0.5 / 4)
    assert smoothness_loss(ddf.mT, 0.0).item() == pytest.approx(0.5 / 4)


def test_axes_of_one_voxel_have_no_differences():
    flat = noise(2, 3, 6, 1, 7)
    expected = (flat.diff(dim=2).abs().mean() + flat.diff(dim=4).abs().mean()) / 2
    assert smoothness_loss(flat, 0.0).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1)])
def test_a_single_voxel_is_smooth(shape):
    assert smoothness_loss(noise(2, len(shape), *shape)).item() == 0


# folding


@pytest.mark.parametrize("shape", [*SHAPES, (1, 8), (5, 1, 6), (1, 1)])
def test_the_identity_shifts_and_gentle_fields_do_not_fold(shape):
    assert folding_loss(torch.zeros(2, len(shape), *shape)).item() == 0
    assert folding_loss(torch.full((2, len(shape), *shape), 7.5)).item() == 0
    assert folding_loss(waves(shape, 0.4)).item() == 0


@pytest.mark.parametrize("margin", [0.1, 0.5])
@pytest.mark.parametrize("factor", [1.5, 1.0, 0.6, 0.3, 0.0, -0.5, -2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_a_magnification_is_its_determinant_short_of_the_margin(shape, factor, margin):
    ddf = linear_ddf(factor * torch.eye(len(shape), dtype=torch.float64), shape)
    expected = max(0.0, margin - factor ** len(shape))
    assert folding_loss(ddf, margin).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_any_linear_map_is_its_determinant_short_of_the_margin(shape, seed):
    matrix = noise(len(shape), len(shape), seed=seed)
    matrix[0] *= -torch.linalg.det(matrix).sign()  # turns space inside out
    expected = 0.1 - np.linalg.det(matrix.numpy())
    assert folding_loss(linear_ddf(matrix, shape)).item() == pytest.approx(expected, rel=1e-9)


def test_an_axis_of_one_voxel_cannot_fold():
    ddf = linear_ddf(torch.diag(torch.tensor([-0.5, -9.0, 0.8])), (6, 1, 5))
    assert folding_loss(ddf).item() == pytest.approx(0.1 + 0.4)


@pytest.mark.parametrize("shape", SHAPES)
def test_fields_that_central_differences_miss_cost_something(shape):
    strength, inner = 0.6, (slice(1, -1),) * len(shape)
    checkerboard = alternating(shape, strength, range(len(shape)))
    comb = alternating(shape, strength, [0])
    for ddf in (checkerboard, comb):
        assert np.abs(np.gradient(ddf[0, 0].numpy(), axis=0)[inner]).max() < 1e-12
    # every cell of the checkerboard has an edge along the first axis that is turned around, of the comb every other
    assert folding_loss(checkerboard).item() == pytest.approx(0.1 - (1 - 2 * strength))
    assert folding_loss(comb).item() == pytest.approx((0.1 - (1 - 2 * strength)) / 2)
    assert folding_loss(0.7 * checkerboard).item() == 0  # edges of 1 - 0.84, more than the margin


def test_descent_of_the_loss_unfolds_a_field():
    ddf = 0.8 * noise(1, 2, 12, 13, seed=3)
    assert smallest_triangle(ddf[0]) < -1
    ddf.requires_grad_()
    optimiser = torch.optim.Adam([ddf], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for _ in range(400):
        optimiser.zero_grad()
        loss = folding_loss(ddf)
        loss.backward()
        optimiser.step()
        schedule.step()
    assert loss.item() < 1e-3
    assert smallest_triangle(ddf[0].detach()) > 0


def test_folding_averages_over_the_batch():
    shape = (6, 7)
    batch = torch.cat([linear_ddf(a * torch.eye(2, dtype=torch.float64), shape) for a in (1.0, 0.0, 0.2)])
    assert folding_loss(batch).item() == pytest.approx((0 + 0.1 + 0.06) / 3)


# velocities


@pytest.mark.parametrize("shape", SHAPES)
def test_the_velocity_loss_is_relative(shape):
    velocity, predicted = noise(3, len(shape), *shape), noise(3, len(shape), *shape, seed=1)
    assert velocity_loss(velocity, velocity).item() == 0
    assert velocity_loss(torch.zeros_like(velocity), velocity).item() == pytest.approx(1, abs=1e-5)
    assert velocity_loss(1.5 * velocity, velocity).item() == pytest.approx(0.25, abs=1e-5)
    whole = velocity_loss(predicted, velocity).item()
    for scale in (0.05, 30.0):
        assert velocity_loss(scale * predicted, scale * velocity).item() == pytest.approx(whole, rel=1e-3)


def test_every_sample_counts_alike_whatever_its_strength():
    velocity, predicted = noise(3, 2, 8, 9), noise(3, 2, 8, 9, seed=1)
    strength = torch.tensor([0.1, 1.0, 100.0]).view(3, 1, 1, 1)
    velocity, predicted = velocity * strength, predicted * strength
    each = [((p - v) ** 2).mean().item() / (v**2).mean().item() for p, v in zip(predicted, velocity)]
    assert velocity_loss(predicted, velocity).item() == pytest.approx(np.mean(each), rel=1e-4)
    first_missed = torch.cat((torch.zeros_like(velocity[:1]), velocity[1:]))
    assert velocity_loss(first_missed, velocity).item() == pytest.approx(1 / 3, rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_differences_weigh_fine_waves_like_coarse_ones(share):
    """Two waves along one axis: squares of sines, and of their differences ``2 sin(πk/N) cos``, in closed form."""
    size, coarse, fine = 64, (3.0, 2), (0.25, 16)
    position = torch.arange(size, dtype=torch.float64)

    def wave(strength, count):
        return strength * torch.sin(2 * torch.pi * count * position / size)

    def rough(strength, count):  # over a whole period; the difference across its end is not counted
        slope = 2 * strength * np.sin(np.pi * count / size) * torch.cos(2 * torch.pi * count * (position + 0.5) / size)
        return slope[:-1]

    start = torch.zeros(1, 2, size, 1, dtype=torch.float64)
    start[0, 0, :, 0] = wave(*coarse) + wave(*fine)
    left = torch.zeros_like(start)
    left[0, 0, :, 0] = wave(*fine)
    squares = fine[0] ** 2 / (coarse[0] ** 2 + fine[0] ** 2)
    differences = float(rough(*fine).square().mean() / (rough(*coarse) + rough(*fine)).square().mean())
    expected = (1 - share) * squares + share * differences
    assert differences > 10 * squares
    assert relative_energy(left, start, share, 1e-12).item() == pytest.approx(expected, rel=1e-6)
    assert relative_energy(start, start, share, 1e-12).item() == pytest.approx(1, rel=1e-6)
    predicted, velocity = -start, left - start
    assert velocity_loss(predicted, velocity, share).item() == pytest.approx(
        relative_energy(left, velocity, share, 1e-7).item(), rel=1e-6
    )


# gradients and odd sizes


@pytest.mark.parametrize("loss", LOSSES_OF_TWO)
@pytest.mark.parametrize("zero", ["prediction", "target", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_zero(loss, zero, dtype):
    predicted, target = noise(2, 2, 5, 6, dtype=dtype), noise(2, 2, 5, 6, seed=1, dtype=dtype)
    if zero in ("prediction", "both"):
        predicted = torch.zeros_like(predicted)
    if zero in ("target", "both"):
        target = torch.zeros_like(target)
    predicted.requires_grad_()
    value = loss(predicted, target)
    value.backward()
    assert value.isfinite()
    assert predicted.grad.isfinite().all()


@pytest.mark.parametrize("loss", [smoothness_loss, folding_loss])
def test_gradients_of_the_regularisers_are_finite_at_zero(loss):
    ddf = torch.zeros(2, 3, 5, 6, 1, requires_grad=True)
    loss(ddf).backward()
    assert ddf.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES_OF_TWO)
@pytest.mark.parametrize("shape", [(8, 9), (1, 9), (5, 1, 6), (1, 1)])
def test_descent_of_a_data_term_makes_it_smaller(loss, shape):
    predicted, target = noise(2, len(shape), *shape), noise(2, len(shape), *shape, seed=1)
    predicted.requires_grad_()
    before = loss(predicted, target)
    before.backward()
    assert predicted.grad.abs().max() > 0
    step = 1e-4 / predicted.grad.norm()
    assert loss(predicted.detach() - step * predicted.grad, target) < before


def test_sampling_passes_gradients_to_the_prediction():
    predicted, ddf = noise(1, 2, 7, 8).requires_grad_(), torch.zeros(1, 2, 7, 8, dtype=torch.float64)
    ddf[:, 0] = 2.0  # whole voxels: each prediction is read once but for those at the end, read by all beyond
    sample_at(predicted, ddf).sum().backward()
    expected = torch.tensor([0.0, 0, 1, 1, 1, 1, 3], dtype=torch.float64).view(1, 1, 7, 1).expand_as(predicted)
    torch.testing.assert_close(predicted.grad, expected)
