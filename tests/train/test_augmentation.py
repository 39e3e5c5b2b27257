import math
from dataclasses import fields, replace
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import Warp
from scipy import ndimage, stats

from monai_drdm.diffusion import diffuse
from monai_drdm.diffusion.schedule import integration_time
from monai_drdm.fields import exp_svf, isotropic_velocity
from monai_drdm.train.augmentation import (
    Appearance,
    change_appearance,
    deform_images,
    Deformed,
    Pose,
    random_pose,
    sample_posed,
    smooth_noise,
    uniform,
)

pytestmark = pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp.*native grid_sample:UserWarning")

SHAPES = [(33, 25), (17, 13, 21)]
THIN = [(17, 1, 13), (1, 17, 13), (17, 13, 1), (1, 21), (21, 1)]
PLAIN = Appearance(gamma=0.0, contrast=0.0, bias=0.0, blur_vox=0.0, noise=0.0)
STILL = Pose(flip=0.0, rotation_deg=0.0, scale=0.0, shift_frac=0.0)


def seeded_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_images(shape, batch=2, channels=1, seed=0, sigma_vox=2.0):
    noise = np.random.default_rng(seed).standard_normal((batch, channels, *shape))
    smooth = ndimage.gaussian_filter(noise, (0, 0, *(sigma_vox,) * len(shape)), mode="nearest")
    return torch.from_numpy((smooth - smooth.min()) / (smooth.max() - smooth.min())).float()


def noise_images(shape, batch=2, channels=1, seed=0):
    return torch.rand((batch, channels, *shape), generator=seeded_generator(seed))


def coordinates(shape):
    return torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij"))


def to_full_grid(ddf, shape):
    """A field of the half grid on the full one, in its voxels: twice as many between voxels twice as dense."""
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    factor = torch.tensor([2.0 if n > 1 else 1.0 for n in shape]).view(1, -1, *(1,) * len(shape))
    return F.interpolate(ddf, shape, mode=mode, align_corners=True) * factor


def points_inside(ddf, margin=0.0):
    """Where ``x + ddf(x)`` is inside the grid: ``(B, 1, *S)``."""
    moved = coordinates(ddf.shape[2:]) + ddf
    size = torch.tensor(ddf.shape[2:]).view(-1, *(1,) * (ddf.ndim - 2))
    return ((moved >= margin) & (moved <= size - 1 - margin)).all(dim=1, keepdim=True)


def still(images):
    """No rotation and no shift."""
    dims = images.ndim - 2
    return torch.eye(dims).repeat(images.shape[0], 1, 1), torch.zeros(images.shape[0], dims)


def values(deformed):
    return {f.name: getattr(deformed, f.name) for f in fields(Deformed)}


def only(**strength):
    return replace(PLAIN, **strength)


# batches


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, *THIN])
def test_every_part_of_a_batch_has_its_shape(shape, channels):
    images, half = noise_images(shape, 3, channels), tuple((n + 1) // 2 for n in shape)
    out = deform_images(images, seeded_generator(), pose=Pose(), appearance=Appearance())
    assert out.image.shape == out.posed.shape == images.shape
    assert out.level.shape == (3,)
    assert out.velocity.shape == out.ddf.shape == (3, len(shape), *half)
    for value in values(out).values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    assert out.image.min() >= 0
    assert out.image.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_a_function_of_the_seed(shape):
    images = noise_images(shape)
    state, before = torch.get_rng_state(), images.clone()
    first, again, other = (
        values(deform_images(images, seeded_generator(seed), pose=Pose(), appearance=Appearance()))
        for seed in (4, 4, 5)
    )
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert not torch.equal(value, other[name]), name
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)


def test_a_generator_goes_on_and_samples_of_a_batch_differ():
    images, generator = noise_images((17, 17), 1).repeat(2, 1, 1, 1), seeded_generator()
    first, second = (values(deform_images(images, generator, pose=Pose())) for _ in range(2))
    for name, value in first.items():
        assert not torch.equal(value, second[name]), name
        assert not torch.equal(value[0], value[1]), name


def test_nothing_carries_gradients():
    out = deform_images(noise_images((17, 17)), seeded_generator(), pose=Pose(), appearance=Appearance())
    assert not any(value.requires_grad for value in values(out).values())


def test_nothing_carries_gradients_even_if_the_images_do():
    images = noise_images((17, 17)).requires_grad_()
    out = deform_images(images, seeded_generator(), pose=Pose(), appearance=Appearance())
    assert [name for name, value in values(out).items() if value.requires_grad] == []


@pytest.mark.parametrize("shape", [*SHAPES, *THIN])
def test_an_image_is_warped_by_the_field_it_comes_with(shape):
    images = noise_images(shape, 2, 2)
    out = deform_images(images, seeded_generator(1))
    expected = Warp(mode="bilinear", padding_mode="border")(images, to_full_grid(out.ddf, shape))
    torch.testing.assert_close(out.image, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.posed, images, rtol=0, atol=1e-5)
    assert (out.image - images).abs().max() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pose_comes_before_the_deformation(shape):
    """The posed image warped by the field is the image, up to a second interpolation."""
    images = smooth_images(shape, 4, sigma_vox=3.0)
    out = deform_images(images, seeded_generator(2), levels=(0.6, 0.8), pose=Pose())
    full = to_full_grid(out.ddf, shape)
    expected = Warp(mode="bilinear", padding_mode="border")(out.posed, full)
    missed = (out.image - expected).abs()[points_inside(full)]
    moved = (out.image - out.posed).abs()[points_inside(full)]
    assert missed.max() < 0.05
    assert missed.mean() < 0.1 * moved.mean()


@pytest.mark.parametrize(("shape", "levels"), [((65, 49), (0.02, 0.2)), ((33, 25, 29), (0.1, 0.2))])
def test_the_velocity_undoes_the_deformation(shape, levels):
    out = deform_images(noise_images(shape, 4), seeded_generator(3), levels=levels)
    times = torch.tensor([integration_time(level, len(shape)) for level in out.level.tolist()])
    back = exp_svf(out.velocity * times.view(-1, *(1,) * (len(shape) + 1)))
    for first, second in ((back, out.ddf), (out.ddf, back)):
        left = Warp(mode="bilinear", padding_mode="border")(first, second) + second
        where = points_inside(second).expand_as(left)
        assert left[where].abs().mean() < 0.02
        assert left[where].abs().max() < 0.15
    assert out.ddf.abs().max() > 0.2


def test_the_velocity_is_that_of_unit_strength_whatever_the_level():
    images = noise_images((33, 33), 64)
    drawn = isotropic_velocity([seeded_generator(s) for s in range(64)], (17, 17)).square().mean().sqrt()
    for level in (0.05, 0.9):
        velocity = deform_images(images, seeded_generator(), levels=(level, level)).velocity
        assert velocity.square().mean().sqrt().item() == pytest.approx(drawn.item(), rel=0.1)


@pytest.mark.parametrize("levels", [(0.02, 1.0), (0.3, 0.5)])
def test_levels_are_uniform_in_their_range(levels):
    level = deform_images(torch.zeros(600, 1, 5, 5), seeded_generator(), levels=levels).level.double()
    assert levels[0] - 1e-6 <= level.min()
    assert level.max() <= levels[1] + 1e-6
    spread = levels[1] - levels[0]
    assert stats.kstest(level.numpy(), "uniform", args=(levels[0], spread)).pvalue > 0.01


@pytest.mark.parametrize("level", [1e-3, 1.0])
def test_the_ends_of_the_range_of_levels_may_be_one(level):
    out = deform_images(noise_images((17, 17)), seeded_generator(), levels=(level, level))
    np.testing.assert_allclose(out.level.numpy(), level, rtol=1e-6)


@pytest.mark.parametrize("shape", [(49, 49), (49, 33), (25, 21, 25)])
def test_a_level_deforms_as_far_as_diffusion_does(shape):
    out = deform_images(torch.zeros(64, 1, *shape), seeded_generator(), levels=(0.6, 0.6))
    half = tuple(out.ddf.shape[2:])
    expected = diffuse([seeded_generator(1000 + s) for s in range(64)], half, 0.6).norm(dim=1).mean().item()
    assert out.ddf.norm(dim=1).mean().item() == pytest.approx(expected, rel=0.15)
    full = diffuse([seeded_generator(2000 + s) for s in range(64)], shape, 0.6).norm(dim=1).mean().item()
    assert to_full_grid(out.ddf, shape).norm(dim=1).mean().item() == pytest.approx(full, rel=0.15)


def test_the_deformation_grows_with_the_level():
    images = torch.zeros(16, 1, 33, 33)
    means = [
        deform_images(images, seeded_generator(), levels=(one, one)).ddf.norm(dim=1).mean().item()
        for one in (0.1, 0.4, 0.7, 1.0)
    ]
    assert all(b > 1.2 * a for a, b in pairwise(means))


def test_appearance_changes_nothing_but_the_image():
    images = smooth_images((33, 25), 3)
    plain = values(deform_images(images, seeded_generator(7), pose=Pose()))
    changed = values(deform_images(images, seeded_generator(7), pose=Pose(), appearance=Appearance()))
    for name in plain:
        assert torch.equal(plain[name], changed[name]) == (name != "image"), name


@pytest.mark.parametrize("shape", SHAPES)
def test_posed_and_deformed_images_are_resampled_once(shape):
    """Images of the coordinates tell where the same seed reads other images."""
    images = noise_images(shape)
    where = deform_images(coordinates(shape).repeat(2, *(1,) * (len(shape) + 1)), seeded_generator(8), pose=Pose())
    out = deform_images(images, seeded_generator(8), pose=Pose())
    for positions, sampled in ((where.image, out.image), (where.posed, out.posed)):
        for one, position, result in zip(images[:, 0].numpy(), positions.numpy(), sampled[:, 0].numpy()):
            expected = ndimage.map_coordinates(one, position, order=1, mode="nearest")
            np.testing.assert_allclose(result, expected, atol=1e-3)


# appearance


def two_tone(shape, batch=6):
    """A ball of 0.9 on 0.1."""
    grid, centre = coordinates(shape), torch.tensor([(n - 1) / 2 for n in shape]).view(-1, *(1,) * len(shape))
    ball = (grid - centre).norm(dim=0) < 0.35 * min(shape)
    return torch.where(ball, 0.9, 0.1).expand(batch, 1, *shape).clone()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(49, 41), (25, 21, 27)])
def test_edges_stay_where_they_are(shape, seed):
    images = two_tone(shape)
    mask = images > 0.5
    for before, after in zip(mask, change_appearance(images, seeded_generator(seed), Appearance())):
        threshold = (after[before].mean() + after[~before].mean()) / 2
        assert ((after > threshold) == before).float().mean() > 0.97
        assert after[before].mean() > after[~before].mean() + 0.2


@pytest.mark.parametrize("shape", [(49, 41), (25, 21, 27)])
def test_edges_stay_exactly_without_noise(shape):
    images = two_tone(shape)
    after = change_appearance(images, seeded_generator(1), Appearance(bias=0.1, noise=0.0))
    for before, one in zip(images > 0.5, after):
        threshold = (one[before].mean() + one[~before].mean()) / 2
        assert ((one > threshold) == before).float().mean() > 0.99


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, -3.0, 7.0])
@pytest.mark.parametrize("shape", [(17, 13), (9, 1, 7), (1, 1)])
def test_constant_images_stay_finite_and_in_range(shape, value):
    for seed in range(5):
        out = change_appearance(torch.full((3, 2, *shape), value), seeded_generator(seed), Appearance())
        assert out.shape == (3, 2, *shape)
        assert out.isfinite().all()
        assert out.min() >= 0
        assert out.max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_an_appearance_of_nothing_changes_nothing(shape):
    images = noise_images(shape, 3, 2)
    torch.testing.assert_close(change_appearance(images, seeded_generator(), PLAIN), images, rtol=0, atol=1e-6)


def test_gamma_is_one_power_for_each_image():
    images = noise_images((15, 16), 200, 2) * 0.8 + 0.1
    power = change_appearance(images, seeded_generator(), only(gamma=0.4)).log() / images.log()
    power = power.flatten(1)
    torch.testing.assert_close(power, power[:, :1].expand_as(power), rtol=1e-3, atol=0)
    log = power[:, 0].log().numpy()
    assert np.abs(log).max() <= 0.4 + 1e-3
    assert stats.kstest(log, "uniform", args=(-0.4, 0.8)).pvalue > 0.01


def test_contrast_is_a_factor_around_the_mean():
    images = noise_images((15, 16), 200) * 0.4 + 0.3
    after = change_appearance(images, seeded_generator(), only(contrast=0.3)).flatten(1)
    before = images.flatten(1)
    torch.testing.assert_close(after.mean(dim=1), before.mean(dim=1), rtol=0, atol=1e-5)
    factor = ((after.std(dim=1)) / before.std(dim=1)).numpy()
    centred = before - before.mean(dim=1, keepdim=True)
    torch.testing.assert_close(
        after - after.mean(dim=1, keepdim=True), centred * torch.from_numpy(factor)[:, None], rtol=0, atol=1e-5
    )
    assert stats.kstest(factor, "uniform", args=(0.7, 0.6)).pvalue > 0.01


@pytest.mark.parametrize("shape", [(41, 49), (25, 21, 27)])
def test_bias_is_a_smooth_factor_within_its_bounds(shape):
    images = torch.full((8, 1, *shape), 0.5)
    factor = change_appearance(images, seeded_generator(), only(bias=0.3)) / 0.5
    assert 0.7 - 1e-5 <= factor.min() < 0.75
    assert 1.25 < factor.max() <= 1.3 + 1e-5
    for d in range(2, factor.ndim):
        # four nodes a side, so many voxels between them: no jumps
        assert factor.diff(dim=d).abs().max() < 0.25


def test_blur_is_gaussian_and_one_for_the_batch():
    images, sigmas, found = noise_images((21, 23), 2), np.linspace(0.01, 0.9, 90), []
    for seed in range(10):
        after = change_appearance(images, seeded_generator(seed), only(blur_vox=0.8))[:, 0].numpy()
        blurred = [ndimage.gaussian_filter(images[:, 0].numpy(), (0, s, s), mode="nearest") for s in sigmas]
        residuals = [np.abs(b - after).max() for b in blurred]
        assert np.min(residuals) < 0.02
        found.append(sigmas[np.argmin(residuals)])
    assert max(found) < 0.82
    assert np.ptp(found) > 0.3


def test_noise_is_white_and_of_its_strength():
    images = torch.full((300, 1, 20, 20), 0.5)
    missed = (change_appearance(images, seeded_generator(), only(noise=0.06)) - images).flatten(1)
    strength = missed.std(dim=1).numpy()
    assert stats.kstest(strength, "uniform", args=(0.0, 0.06)).pvalue > 0.01
    assert missed.mean().abs() < 1e-3
    neighbours = (missed[:, 1:] * missed[:, :-1]).mean() / missed.square().mean()
    assert neighbours.abs() < 0.02


# posed sampling


@pytest.mark.parametrize("shape", [*SHAPES, *THIN])
def test_no_pose_is_a_warp(shape):
    images, ddf = noise_images(shape, 2, 3), 3 * torch.randn(2, len(shape), *shape)
    expected = Warp(mode="bilinear", padding_mode="border")(images, ddf)
    torch.testing.assert_close(sample_posed(images, ddf, *still(images)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("shape", "plane"), [((17, 17), (0, 1)), ((13, 13, 9), (0, 1)), ((9, 13, 13), (1, 2))])
def test_a_right_angle_is_rot90(shape, plane):
    images = noise_images(shape)
    i, j = plane
    matrix, shift = still(images)
    matrix[:, i, i] = matrix[:, j, j] = 0.0
    matrix[:, i, j], matrix[:, j, i] = -1.0, 1.0  # out(x) = image(M x): M maps axis i to j
    zero = torch.zeros(2, len(shape), *shape)
    expected = torch.rot90(images, -1, (i + 2, j + 2))
    torch.testing.assert_close(sample_posed(images, zero, matrix, shift), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [*SHAPES, *THIN])
def test_a_reflection_is_a_flip(shape):
    images, zero = noise_images(shape), torch.zeros(2, len(shape), *shape)
    for axis in range(len(shape)):
        matrix, shift = still(images)
        matrix[:, axis, axis] = -1.0
        expected = images.flip(axis + 2)
        torch.testing.assert_close(sample_posed(images, zero, matrix, shift), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shift_is_a_roll_with_its_border_continued(shape):
    images, zero = noise_images(shape), torch.zeros(2, len(shape), *shape)
    matrix, shift = still(images)
    shift[0, 0], shift[1, -1] = 3.0, -2.0
    out = sample_posed(images, zero, matrix, shift)
    rolled = torch.stack([images[0].roll(-3, 1), images[1].roll(2, -1)])
    torch.testing.assert_close(out[0, :, :-3], rolled[0, :, :-3], rtol=0, atol=1e-4)
    torch.testing.assert_close(out[1, ..., 2:], rolled[1, ..., 2:], rtol=0, atol=1e-4)
    torch.testing.assert_close(out[0, :, -3:], images[0, :, -1:].expand_as(out[0, :, -3:]), rtol=0, atol=1e-4)
    torch.testing.assert_close(out[1, ..., :2], images[1, ..., :1].expand_as(out[1, ..., :2]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_field_and_pose_compose_exactly_on_a_ramp(shape):
    """``image(c + M (x + ddf(x) - c) + shift)`` of a linear image, where that lies inside."""
    dims, batch = len(shape), 3
    slope = torch.linspace(-0.7, 1.1, dims)
    images = torch.einsum("d,d...->...", slope, coordinates(shape)).expand(batch, 1, *shape)
    ddf = 2 * smooth_images(shape, batch, dims, seed=1) - 1
    matrix, shift = random_pose(seeded_generator(1), batch, shape, Pose())
    centre = torch.tensor([(n - 1) / 2 for n in shape])
    offset = torch.movedim(coordinates(shape) + ddf, 1, -1) - centre
    position = torch.stack([o @ m.T + centre + s for o, m, s in zip(offset, matrix, shift)])
    inside = ((position >= 0) & (position <= 2 * centre)).all(dim=-1)[:, None]
    out = sample_posed(images, ddf, matrix, shift)
    assert inside.float().mean() > 0.5
    torch.testing.assert_close(out[inside], (position @ slope)[:, None][inside], rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(17, 17), (13, 13, 13), (17, 13)])
def test_permuted_axes_make_transposes(shape):
    images, zero = noise_images(shape), torch.zeros(2, len(shape), *shape)
    only = Pose(flip=0.0, permute=1.0, rotation_deg=0.0, scale=0.0, shift_frac=0.0)
    seen = set()
    for seed in range(12):
        matrix, shift = random_pose(seeded_generator(seed), 2, shape, only)
        out = sample_posed(images, zero, matrix, shift)
        for image, posed in zip(images, out):
            orders = [
                order
                for order in permutations(range(len(shape)))
                if image.permute(0, *(d + 1 for d in order)).shape == posed.shape
                and torch.allclose(image.permute(0, *(d + 1 for d in order)), posed, atol=1e-4)
            ]
            seen.update(orders)
            assert len(orders) == 1
    assert len(seen) == (math.factorial(len(shape)) if len(set(shape)) == 1 else 1)


@pytest.mark.parametrize("shape", [(17, 17), (13, 13, 13)])
def test_an_image_is_resampled_once(shape):
    """Half a voxel by the field and half by the pose is a whole one, which blurs nothing."""
    images, half = noise_images(shape), torch.full((2, len(shape), *shape), 0.5)
    matrix, _ = still(images)
    matrix[1, :2, :2] = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    shift = matrix.sum(dim=2) / 2
    out = sample_posed(images, half, matrix, shift)
    first = images[0].roll((-1,) * len(shape), tuple(range(1, len(shape) + 1)))
    inner = (..., *(slice(2, -2),) * len(shape))
    torch.testing.assert_close(out[0][inner], first[inner], rtol=0, atol=1e-4)
    turned = torch.rot90(images[1], -1, (1, 2)).roll((-1,) * len(shape), tuple(range(1, len(shape) + 1)))
    torch.testing.assert_close(out[1][inner], turned[inner], rtol=0, atol=1e-4)


def test_coordinates_are_not_rounded_under_autocast():
    shape = (129, 97)
    images = noise_images(shape)
    ddf = 2 * smooth_images(shape, 2, 2, seed=1) - 1
    matrix, shift = random_pose(seeded_generator(1), 2, shape, Pose())
    expected = sample_posed(images, ddf, matrix, shift)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sample_posed(images, ddf, matrix, shift)
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=1e-3)


# poses


@pytest.mark.parametrize("dims", [2, 3])
def test_a_pose_is_within_its_bounds(dims):
    pose, shape = Pose(flip=0.5, rotation_deg=15.0, scale=0.3, shift_frac=0.1), (20, 40, 80)[:dims]
    matrix, shift = (value.double() for value in random_pose(seeded_generator(), 500, shape, pose))
    assert matrix.shape == (500, dims, dims)
    assert shift.shape == (500, dims)
    length = matrix.norm(dim=1)
    assert length.min() >= math.exp(-0.3) - 1e-5
    assert length.max() <= math.exp(0.3) + 1e-5
    assert stats.kstest(length.log().flatten().numpy(), "uniform", args=(-0.3, 0.6)).pvalue > 0.01
    gram = torch.einsum("bki,bkj->bij", matrix / length[:, None], matrix / length[:, None])
    torch.testing.assert_close(gram, torch.eye(dims, dtype=torch.float64).expand_as(gram), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(matrix).abs(), length.prod(dim=1), rtol=1e-4, atol=0)
    assert 0.4 < (torch.linalg.det(matrix) > 0).double().mean() < 0.6
    # no turn by more than 15 degrees brings one axis to more than 45 from itself or its opposite
    assert torch.diagonal(matrix / length[:, None], dim1=1, dim2=2).abs().min() > math.cos(math.radians(15 * dims))
    for d, size in enumerate(shape):
        assert stats.kstest(shift[:, d].numpy(), "uniform", args=(-0.1 * size, 0.2 * size)).pvalue > 0.01


def test_rotations_are_uniform_in_their_range():
    matrix, _ = random_pose(seeded_generator(), 500, (9, 9), replace(STILL, rotation_deg=30.0))
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])).double()
    assert stats.kstest(angle.numpy(), "uniform", args=(-30, 60)).pvalue > 0.01
    torch.testing.assert_close(torch.linalg.det(matrix), torch.ones(500), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_flips_happen_as_often_as_asked(dims):
    matrix, _ = random_pose(seeded_generator(), 600, (9,) * dims, replace(STILL, flip=0.3))
    signs = torch.diagonal(matrix, dim1=1, dim2=2)
    torch.testing.assert_close(matrix, torch.diag_embed(signs))
    assert signs.abs().eq(1).all()
    np.testing.assert_allclose((signs < 0).float().mean(dim=0).numpy(), 0.3, atol=0.07)
    always, _ = random_pose(seeded_generator(), 3, (9,) * dims, replace(STILL, flip=1.0))
    torch.testing.assert_close(always, -torch.eye(dims).expand_as(always))
    never, shift = random_pose(seeded_generator(), 3, (9,) * dims, STILL)
    torch.testing.assert_close(never, torch.eye(dims).expand_as(never))
    assert shift.abs().max() == 0


@pytest.mark.parametrize("shape", [(17, 13), (9, 11, 13), (9, 1, 13)])
def test_a_batch_flipped_along_all_axes(shape):
    images = noise_images(shape)
    out = deform_images(images, seeded_generator(), pose=replace(STILL, flip=1.0))
    expected = images.flip(tuple(range(2, images.ndim)))
    torch.testing.assert_close(out.posed, expected, rtol=0, atol=1e-4)
    warped = Warp(mode="bilinear", padding_mode="border")(expected, to_full_grid(out.ddf, shape))
    torch.testing.assert_close(out.image, warped, rtol=0, atol=1e-3)


# noise


@pytest.mark.parametrize(
    ("shape", "nodes"),
    [((40, 60), 4), ((60, 40), 9), ((20, 14, 30), 5), ((12, 1, 30), 4), ((17, 17), 40), ((1, 30), 4)],
)
def test_smooth_noise_has_unit_variance_at_its_nodes(shape, nodes):
    noise = smooth_noise(seeded_generator(), 300, 2, shape, nodes)
    assert noise.shape == (300, 2, *shape)
    corners = noise[(..., *(slice(None, None, max(n - 1, 1)) for n in shape))].double()  # ends are nodes
    assert corners.mean().item() == pytest.approx(0, abs=0.08)
    assert corners.square().mean().item() == pytest.approx(1, rel=0.1)
    assert noise.square().mean() < 1.1
    assert not torch.allclose(noise[0], noise[1])
    assert not torch.allclose(noise[:, 0], noise[:, 1])


@pytest.mark.parametrize("shape", [(6, 8), (4, 8, 6)])
def test_as_many_voxels_as_nodes_are_white_noise(shape):
    noise = smooth_noise(seeded_generator(3), 2, 1, shape, 8)
    expected = torch.randn((2, 1, *shape), generator=seeded_generator(3))
    torch.testing.assert_close(noise, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(65, 49), (33, 41, 25)])
def test_few_nodes_are_smooth(shape):
    coarse, fine = (smooth_noise(seeded_generator(), 20, 1, shape, nodes) for nodes in (3, 12))
    slopes = [torch.stack([n.diff(dim=d).square().mean() for d in range(2, n.ndim)]).mean() for n in (coarse, fine)]
    assert slopes[0] < 0.15 * slopes[1]
    assert slopes[0].sqrt() < 0.12


def test_uniform_numbers_fill_their_range():
    numbers = uniform(seeded_generator(), (20, 100), -2.0, 5.0)
    assert numbers.shape == (20, 100)
    assert stats.kstest(numbers.flatten().double().numpy(), "uniform", args=(-2, 7)).pvalue > 0.01
