import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_drdm.fields import control_grid_velocity, isotropic_velocity
from monai_drdm.fields.random_velocity import draw_normal, NODE_STD


def generators(*seeds):
    return [torch.Generator().manual_seed(s) for s in seeds]


def linear_weights(nodes, size):
    """Matrix of half-voxel-centred linear interpolation from ``nodes`` to ``size`` samples, the edge continued."""
    position = ((np.arange(size) + 0.5) * nodes / size - 0.5).clip(0, nodes - 1)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(nodes)[None]))


# the published recipe


def test_control_grid_velocity_equals_its_recipe_in_numpy():
    source, expected = torch.Generator().manual_seed(7), np.zeros((2, 64, 64))
    for nodes, factor in ((64, 1), (32, 2), (16, 4), (8, 8)):
        noise = torch.randn((1, 2, nodes, nodes), generator=source)[0].numpy() * 4e-5 * factor
        weights = linear_weights(nodes, 64)
        expected += weights @ noise @ weights.T
    np.testing.assert_allclose(control_grid_velocity(generators(7), 2)[0].numpy(), expected, atol=1e-8)


def test_control_grid_covariance_equals_theory():
    """Along one axis: each lattice adds ``(std 2^k)^2`` times its interpolation's own covariance."""
    fields = control_grid_velocity(generators(*range(400)), 2, std=1.0).double().flatten(0, 1).numpy()  # (800, 64, 64)
    grams = [(2.0**k, (w := linear_weights(64 >> k, 64)) @ w.T) for k in range(4)]
    for lag in (0, 1, 2, 4, 8, 16):
        empirical = (fields[:, : 64 - lag] * fields[:, lag:]).mean()
        theory = sum(f**2 * np.diag(g, lag).mean() * np.diag(g).mean() for f, g in grams)
        assert empirical == pytest.approx(theory, abs=0.02 * sum(f**2 for f, _ in grams))
    assert np.abs(fields.mean(axis=0)).max() < 5 * fields.std() / np.sqrt(800)


@pytest.mark.parametrize("scale", range(4))
def test_each_lattice_has_its_published_strength(scale):
    """Regression of the summed field on the lattice's own interpolated noise tells its share apart."""
    seeds, nodes = range(100), 64 >> scale
    fields = control_grid_velocity(generators(*seeds), 2)
    weights = linear_weights(nodes, 64)
    products = []
    for seed, field in zip(seeds, fields.double().numpy()):
        source = torch.Generator().manual_seed(seed)
        for skipped in range(scale):
            torch.randn((1, 2, *(64 >> skipped,) * 2), generator=source)
        unit = weights @ torch.randn((1, 2, nodes, nodes), generator=source)[0].double().numpy() @ weights.T
        products.append(((field * unit).mean(), (unit**2).mean()))
    slope = np.sum([p for p, _ in products]) / np.sum([q for _, q in products])
    assert slope == pytest.approx(NODE_STD * 2**scale, rel=0.15 * 2 ** (2 - scale) if scale < 2 else 0.15)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_control_grid_has_64_nodes_per_axis(dims):
    velocity = control_grid_velocity(generators(0), dims)
    assert velocity.shape == (1, dims, *(64,) * dims)
    assert velocity.dtype == torch.float32


def test_the_strength_is_linear_in_std():
    published, stronger = control_grid_velocity(generators(3), 2), control_grid_velocity(generators(3), 2, 1e-3)
    torch.testing.assert_close(stronger, published * 25)


# isotropic velocities


def test_isotropic_velocity_equals_interpolation_by_hand():
    """One lattice of spacing 2 on an 8 x 4 grid: 6 x 4 nodes, the image's centre between two of them."""
    velocity = isotropic_velocity(generators(5), (8, 4), finest_node=1 / 4, scales=1)
    lattice = torch.randn((1, 2, 6, 4), generator=torch.Generator().manual_seed(5))[0].numpy()
    position = np.stack(np.meshgrid((np.arange(8) - 3.5) / 2 + 2.5, (np.arange(4) - 1.5) / 2 + 1.5, indexing="ij"))
    expected = [ndimage.map_coordinates(c, position, order=1) * 8e-3 for c in lattice]
    np.testing.assert_allclose(velocity[0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("draw", ["control", "isotropic"])
def test_a_sample_depends_on_its_own_seed_only(shape, draw):
    def velocity(*seeds):
        if draw == "control":
            return control_grid_velocity(generators(*seeds), 2)
        return isotropic_velocity(generators(*seeds), shape)

    together = velocity(1, 2, 3)
    for b, seed in enumerate((1, 2, 3)):
        torch.testing.assert_close(together[b : b + 1], velocity(seed), rtol=1e-5, atol=1e-9)
    assert torch.equal(together, velocity(1, 2, 3))
    assert not torch.allclose(together[0], together[1])


def test_draws_are_standard_normal_and_advance_their_generator():
    source = generators(11)
    numbers = torch.cat((draw_normal((20000,), source), draw_normal((20000,), source)))
    assert not torch.equal(numbers[0], numbers[1])
    assert numbers.mean().item() == pytest.approx(0, abs=0.02)
    assert numbers.std().item() == pytest.approx(1, abs=0.02)
    assert numbers.pow(4).mean().item() == pytest.approx(3, abs=0.15)


def test_the_global_random_state_is_left_alone(shape):
    before = torch.get_rng_state()
    isotropic_velocity(generators(0), shape)
    control_grid_velocity(generators(0), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("size", "spacing"), [((64, 32), (1.0, 2.0)), ((24, 60), (3.0, 0.7)), ((12, 24, 18), (3.0, 1.0, 2.0))]
)
def test_every_component_is_equally_strong_in_millimetres(size, spacing):
    velocity = isotropic_velocity(generators(*range(300)), size, spacing)
    mm = velocity.double() * torch.tensor(spacing).view(1, -1, *(1,) * len(size))
    std = mm.pow(2).mean(dim=(0, *range(2, mm.ndim))).sqrt()
    np.testing.assert_allclose(std.numpy(), std.mean().item(), rtol=0.05)


def test_fields_vary_over_the_same_millimetres_along_every_axis():
    """Anisotropic voxels, and nodes many voxels apart: equal correlation at equal physical distance."""
    fields = isotropic_velocity(generators(*range(400)), (64, 32), (1.0, 2.0), finest_node=1 / 8, scales=1).double()
    for lag_mm in (2, 4, 8, 12):
        rows = (fields[:, 0, :-lag_mm] * fields[:, 0, lag_mm:]).mean()
        columns = (fields[:, 0, :, : -lag_mm // 2] * fields[:, 0, :, lag_mm // 2 :]).mean()
        assert rows.item() == pytest.approx(columns.item(), abs=0.06 * fields[:, 0].var().item())


def test_the_strength_of_the_finest_lattice_is_a_thousandth_of_the_longest_side():
    size, spacing = (30, 50), (2.0, 1.0)  # nodes 1/10 of 60 mm apart, 3 and 6 voxels
    velocity = isotropic_velocity(generators(*range(400)), size, spacing, finest_node=1 / 10, scales=1)
    mm = velocity.double() * torch.tensor(spacing).view(1, 2, 1, 1)
    # nodes lie 3 voxels apart along rows, 6 along columns; a fraction f between two leaves f^2 + (1 - f)^2
    variance = 1.0
    for count, per_voxel in ((30, 1 / 3), (50, 1 / 6)):
        f = ((np.arange(count) - (count - 1) / 2) * per_voxel + 0.5) % 1
        variance *= (f**2 + (1 - f) ** 2).mean()
    assert mm.pow(2).mean().sqrt().item() == pytest.approx(0.06 * np.sqrt(variance), rel=0.02)


def test_coarser_lattices_are_stronger_in_proportion():
    def variance(scales):
        fields = isotropic_velocity(generators(*range(300)), (64, 64), finest_node=1 / 16, scales=scales)
        return fields.double().pow(2).mean().item()

    one, two, three = variance(1), variance(2), variance(3)
    assert (two - one) / one == pytest.approx(4, rel=0.25)
    assert (three - two) / one == pytest.approx(16, rel=0.25)


@pytest.mark.parametrize(
    ("coarse", "spacing"), [((32, 32), (2.0, 2.0)), ((16, 32), (4.0, 2.0)), ((16, 16, 8), (2.0, 2.0, 4.0))]
)
def test_twice_the_resolution_samples_the_same_physical_field(coarse, spacing):
    """The centre of each coarse voxel lies between fine ones; nodes fall on voxel faces, so their mean is exact."""
    finer = tuple(2 * n for n in coarse)
    low = isotropic_velocity(generators(9), coarse, spacing, finest_node=1 / 4, scales=2)
    high = isotropic_velocity(generators(9), finer, [s / 2 for s in spacing], finest_node=1 / 4, scales=2)
    pool = torch.nn.functional.avg_pool2d if len(coarse) == 2 else torch.nn.functional.avg_pool3d
    torch.testing.assert_close(pool(high, 2) / 2, low, atol=1e-6, rtol=1e-4)  # halved: fine voxels to coarse voxels


def test_as_many_nodes_as_fit_whatever_floating_point_says():
    """Five node spacings and one more on either side of the centre of ten: 0.1 / (10 * 0.1 / 12) * 5 is above 6."""
    assert 10 / 2 * (0.1 / (10 * 0.1 * (1 / 12))) > 6
    one, tenth = (isotropic_velocity(generators(3), (10, 10), (s, s), finest_node=1 / 12, scales=1) for s in (1.0, 0.1))
    torch.testing.assert_close(one, tenth)  # one node more would change all numbers
    source = torch.Generator().manual_seed(3)
    lattice = torch.randn((1, 2, 14, 14), generator=source)[0].numpy()
    at = (np.arange(10) - 4.5) * 1.2 + 6.5
    position = np.stack(np.meshgrid(at, at, indexing="ij"))
    expected = [ndimage.map_coordinates(c, position, order=1) * 1e-2 for c in lattice]
    np.testing.assert_allclose(tenth[0].numpy(), expected, atol=1e-6)


def test_four_lattices_from_a_32nd_of_the_longest_side_unless_told_otherwise():
    """Between the centres of 65 voxels: the default spacing of nodes, and with it every number, is 65 / 32 voxels."""
    default = isotropic_velocity(generators(1), (65, 40))
    assert torch.equal(default, isotropic_velocity(generators(1), (65, 40), finest_node=0.03125, scales=4))
    assert not torch.equal(default, isotropic_velocity(generators(1), (65, 40), finest_node=1 / 33))


def test_only_proportions_of_the_spacing_matter(shape):
    spacing = np.linspace(0.5, 2, len(shape))
    a = isotropic_velocity(generators(2), shape, spacing)
    b = isotropic_velocity(generators(2), shape, spacing * 8)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        isotropic_velocity(generators(2), shape), isotropic_velocity(generators(2), shape, (3.0,) * len(shape))
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (1, 1, 1), (5, 1, 7), (2, 301)])
def test_any_size_gives_a_finite_field(size):
    velocity = isotropic_velocity(generators(0, 1), size)
    assert velocity.shape == (2, len(size), *size)
    assert velocity.isfinite().all()
    assert velocity.dtype == torch.float32


@pytest.mark.parametrize("size", [(8,), (8, 8, 8, 8), (8, 0), (-1, 8)])
def test_a_shape_that_is_no_image_is_refused(size):
    with pytest.raises(ValueError, match="isotropic_velocity: shape must be 2 or 3 sizes of 1 or more"):
        isotropic_velocity(generators(0), size)


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 1.0, 1.0), (1.0, 0.0), (1.0, -1.0), (float("nan"), 1.0)])
def test_a_spacing_that_does_not_fit_is_refused(spacing):
    with pytest.raises(ValueError, match="isotropic_velocity: spacing must be 2 positive numbers in mm"):
        isotropic_velocity(generators(0), (8, 8), spacing)


# one generator for a whole batch


def test_samples_from_one_generator_follow_each_other():
    """Lattice by lattice, sample by sample: the numbers are those the generator gives in that order."""
    velocity = isotropic_velocity(generators(5) * 3, (8, 4), finest_node=1 / 4, scales=2)
    source, expected = torch.Generator().manual_seed(5), np.zeros((3, 2, 8, 4))
    for spacing, nodes in ((2, (6, 4)), (4, (4, 4))):
        index = [(np.arange(n) - (n - 1) / 2) / spacing + (m - 1) / 2 for n, m in zip((8, 4), nodes)]
        position = np.stack(np.meshgrid(*index, indexing="ij"))
        for b in range(3):
            lattice = torch.randn((1, 2, *nodes), generator=source)[0].numpy()
            expected[b] += [ndimage.map_coordinates(c, position, order=1) * 8e-3 * spacing / 2 for c in lattice]
    np.testing.assert_allclose(velocity.numpy(), expected, atol=1e-6)


def test_samples_from_one_generator_are_independent_and_fixed_by_its_seed(shape):
    velocity = isotropic_velocity(generators(4) * 40, shape)
    assert torch.equal(velocity, isotropic_velocity(generators(4) * 40, shape))
    assert not torch.equal(velocity, isotropic_velocity(generators(5) * 40, shape))
    flat = velocity.double().flatten(1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    cosine = (flat @ flat.T)[~torch.eye(40, dtype=torch.bool)]
    assert cosine.max() < 0.95
    assert cosine.mean().abs() < 0.05
    apart = isotropic_velocity(generators(*range(40)), shape).double().square().mean()
    assert velocity.double().square().mean().item() == pytest.approx(apart.item(), rel=0.25)


def test_one_generator_goes_on_between_calls(shape):
    (source,) = generators(4)
    first, second = (isotropic_velocity([source] * 2, shape) for _ in range(2))
    assert not torch.allclose(first, second)
