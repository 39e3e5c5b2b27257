import numpy as np
import pytest
import torch

from monai_drdm.diffusion import WorkingGrid
from monai_drdm.fields import identity_grid, resize_ddf

UNIT = (0.0, 1.0)


def ramp(*shape):
    k = torch.arange(float(torch.tensor(shape).prod()))
    return (k / k.max()).reshape(1, 1, *shape)


@pytest.mark.parametrize(
    ("shape", "spacing", "size", "expected"),
    [
        ((256, 256), (1.0, 1.0), 256, (256, 256)),
        ((300, 200), (1.0, 1.0), 150, (150, 100)),
        ((100, 100), (1.0, 3.0), 96, (33, 96)),
        ((512, 512, 40), (0.7, 0.7, 5.0), 128, (128, 128, 70)),
        ((10, 20, 40), (4.0, 2.0, 1.0), 32, (30, 31, 32)),
        ((1, 512), (1.0, 1.0), 256, (1, 256)),
        ((3, 512), (1.0, 0.001), 64, (64, 17)),
        ((2, 512), (1.0, 1.0), 64, (2, 64)),
        ((1, 1), (1.0, 1.0), 64, (1, 1)),
    ],
)
def test_proportions_are_physical(shape, spacing, size, expected):
    grid = WorkingGrid.of(shape, spacing, size)
    assert grid.shape == expected
    assert grid.full_shape == shape


@pytest.mark.parametrize(("shape", "spacing"), [((100, 60), (1.0, 3.0)), ((64, 48, 12), (0.8, 0.8, 5.0))])
def test_spacing_keeps_the_extent_between_outer_voxels(shape, spacing):
    grid = WorkingGrid.of(shape, spacing, 48)
    for n, s, w, ws in zip(shape, spacing, grid.shape, grid.spacing):
        assert ws * (w - 1) == pytest.approx(s * (n - 1))
    assert max(grid.spacing) / min(grid.spacing) < 1.15  # isotropic but for rounding


def test_only_ratios_of_spacing_matter():
    one, ten = (WorkingGrid.of((90, 50), (s, 2 * s), 64) for s in (1.0, 10.0))
    assert one.shape == ten.shape
    assert [10 * s for s in one.spacing] == pytest.approx(ten.spacing)


def test_percentiles_are_robust():
    image = ramp(64, 64)
    spoiled = image.clone()
    spoiled[0, 0, 3, 3], spoiled[0, 0, 40, 9] = 1e6, -1e6
    grid = WorkingGrid.of((64, 64), (1.0, 1.0), 64)
    clean, robust = (grid.image_to_working(x, UNIT) for x in (image, spoiled))
    keep = image.ne(spoiled).logical_not()
    torch.testing.assert_close(clean[keep], robust[keep], rtol=0, atol=2e-3)
    assert float(robust.min()) == 0.0
    assert float(robust.max()) == 1.0


@pytest.mark.parametrize("shape", [(2, 1), (3, 4), (13, 31), (64, 80), (9, 10, 11)])
def test_percentiles_are_numpys(shape):
    image = torch.rand(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    mapped = WorkingGrid.of(shape, (1.0,) * len(shape), max(shape)).image_to_working(image, UNIT)
    for one, found in zip(image.double().numpy(), mapped):
        low, high = np.percentile(one, [0.5, 99.5])
        np.testing.assert_allclose(found, ((one - low) / (high - low)).clip(0, 1), atol=1e-5)


def test_percentiles_of_a_large_image_see_every_slice():
    volume = torch.zeros(1, 1, 1024, 1024, 2)
    volume[..., 0] = torch.linspace(0, 0.01, 1024)
    volume[..., 1] = torch.linspace(0, 1, 1024)[:, None]
    grid = WorkingGrid.of((1024, 1024, 2), (1, 1, 1), 32)
    bright = grid.image_to_working(volume, (0, 1))[..., 1]
    assert (bright > 0.99).float().mean() < 0.1  # the 99.5th percentile is near 1, not near 0.01


def test_percentiles_are_those_of_each_sample():
    grid = WorkingGrid.of((32, 32), (1.0, 1.0), 32)
    images = torch.cat([ramp(32, 32), 1000 * ramp(32, 32) - 300, -ramp(32, 32)])
    working = grid.image_to_working(images, UNIT)
    torch.testing.assert_close(working[0], working[1], rtol=0, atol=1e-4)
    for b in range(3):
        torch.testing.assert_close(
            grid.image_to_working(images[b : b + 1], UNIT), working[b : b + 1], rtol=0, atol=1e-6
        )


def test_all_channels_share_a_scale():
    grid = WorkingGrid.of((16, 16), (1.0, 1.0), 16)
    working = grid.image_to_working(torch.cat([ramp(16, 16), 0.5 * ramp(16, 16)], dim=1), UNIT)
    torch.testing.assert_close(working[:, 1].max(), 0.5 * working[:, 0].max(), rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.int16, torch.float16, torch.float32, torch.float64])
def test_ct_in_hounsfield_units(dtype):
    hounsfield = (-1024 + 4000 * ramp(40, 30, 20)).round().to(dtype)
    working = WorkingGrid.of((40, 30, 20), (1.0, 1.0, 2.0), 40).image_to_working(hounsfield, UNIT)
    expected = WorkingGrid.of((40, 30, 20), (1.0, 1.0, 2.0), 40).image_to_working(ramp(40, 30, 20), UNIT)
    assert working.dtype == torch.float32
    assert working.shape == (1, 1, 40, 30, 39)
    assert float(working.min()) >= 0.0
    assert float(working.max()) <= 1.0
    torch.testing.assert_close(working, expected, rtol=0, atol=2e-3)


def test_input_range_of_the_network():
    grid = WorkingGrid.of((32, 32), (1.0, 1.0), 16)
    unit, wide = (grid.image_to_working(ramp(32, 32), r) for r in (UNIT, (-2.0, 2.0)))
    torch.testing.assert_close(wide, 4 * unit - 2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -1000.0, 7.5])
def test_constant_image_goes_to_the_lower_end(value):
    working = WorkingGrid.of((20, 30), (1.0, 1.0), 16).image_to_working(torch.full((1, 1, 20, 30), value), (-1.0, 1.0))
    assert bool((working == -1.0).all())


def test_mostly_bright_image_keeps_what_is_dark():
    """Both percentiles are those of the bright ground; the full range takes their place."""
    image = torch.ones(1, 1, 64, 64)
    image[0, 0, 30:32, 30:32] = torch.tensor([[-1.0, 0.0], [0.5, 0.75]])
    working = WorkingGrid.of((64, 64), (1.0, 1.0), 64).image_to_working(image, UNIT)
    torch.testing.assert_close(working, (image + 1) / 2)


def test_percentiles_of_a_large_image_are_those_of_about_a_million_voxels():
    """Every fifth of these: 2 and 4 divide the first size, 3 the second."""
    image = torch.rand(1, 1, 1448, 1449, generator=torch.Generator().manual_seed(0))
    low, high = np.percentile(image.flatten()[::5].double().numpy(), [0.5, 99.5])
    found = WorkingGrid.of((1448, 1449), (1.0, 1.0), 1449).image_to_working(image, UNIT)
    np.testing.assert_allclose(found, ((image.numpy() - low) / (high - low)).clip(0, 1), atol=1e-6)


def test_mostly_empty_image_keeps_what_it_has():
    image = torch.zeros(1, 1, 64, 64)
    image[0, 0, 30:32, 30:32] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    working = WorkingGrid.of((64, 64), (1.0, 1.0), 64).image_to_working(image, UNIT)
    torch.testing.assert_close(working, image / 4)


def test_input_is_not_modified():
    image = ramp(30, 30)
    before = image.clone()
    WorkingGrid.of((30, 30), (1.0, 1.0), 12).image_to_working(image, UNIT)
    assert torch.equal(image, before)


@pytest.mark.parametrize(
    ("shape", "spacing"), [((90, 50), (1.0, 1.0)), ((41, 60), (1.0, 3.0)), ((30, 20, 9), (1.0, 1.5, 4.0))]
)
def test_affine_field_comes_to_the_full_grid_and_back(shape, spacing):
    grid, dims = WorkingGrid.of(shape, spacing, 32), len(shape)
    matrix = 0.1 * torch.arange(1.0, dims * dims + 1).reshape(dims, dims).sin()
    shift = torch.arange(1.0, dims + 1)
    axes = (1,) * dims

    def affine(x, scale):
        """The map ``u = A x + b`` of working voxels, seen in voxels ``scale`` times as many along each axis."""
        per_axis = scale.view(-1, *axes)
        return per_axis * (torch.einsum("ij,j...->i...", matrix, x / per_axis) + shift.view(-1, *axes))

    working = affine(identity_grid(grid.shape), torch.ones(dims))[None]
    scale = torch.tensor([(n - 1) / (w - 1) for n, w in zip(shape, grid.shape)])
    full = grid.ddf_to_full(working)
    torch.testing.assert_close(full, affine(identity_grid(shape), scale)[None], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(resize_ddf(full, grid.shape), working, rtol=1e-4, atol=1e-3)


# odd grids, and the half grids on them


@pytest.mark.parametrize(
    ("shape", "spacing", "size", "expected"),
    [
        ((256, 256), (1.0, 1.0), 161, (161, 161)),
        ((300, 200), (1.0, 1.0), 151, (151, 101)),
        ((100, 100), (1.0, 3.0), 97, (33, 97)),
        ((512, 512, 40), (0.7, 0.7, 5.0), 129, (129, 129, 71)),
        ((1, 512), (1.0, 1.0), 161, (1, 161)),
        ((3, 512), (1.0, 0.001), 65, (65, 17)),
        ((2, 512), (1.0, 1.0), 65, (3, 65)),
        ((1, 1, 1), (1.0, 1.0, 1.0), 97, (1, 1, 1)),
    ],
)
def test_odd_grids(shape, spacing, size, expected):
    grid = WorkingGrid.of(shape, spacing, size, odd=True)
    assert grid.shape == expected
    assert grid.full_shape == shape
    for n, s, w, ws in zip(shape, spacing, grid.shape, grid.spacing):
        assert ws * (w - 1) == pytest.approx(s * (n - 1))
        assert (w == 1) == (n == 1)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 33, 64, 97])
@pytest.mark.parametrize(
    ("shape", "spacing"), [((90, 47), (1.0, 1.3)), ((31, 64, 7), (2.0, 1.0, 4.0)), ((5, 1), (1, 9))]
)
def test_odd_grids_are_next_to_the_others(shape, spacing, size):
    grid, odd = WorkingGrid.of(shape, spacing, size), WorkingGrid.of(shape, spacing, size, odd=True)
    assert all(n % 2 == 1 for n in odd.shape)
    assert all(abs(a - b) <= 1 for a, b in zip(grid.shape, odd.shape))


def carried(shape, extent):
    """A field that is linear in millimetres, seen on a grid of any shape over the same extent, in its voxels."""
    voxel = torch.tensor([e / max(n - 1, 1) for n, e in zip(shape, extent)]).view(-1, *(1,) * len(shape))
    millimetres = identity_grid(shape) * voxel
    matrix = 0.1 * torch.arange(1.0, len(shape) ** 2 + 1).reshape(len(shape), -1).cos()
    moves = torch.tensor([float(e > 0) for e in extent]).view(-1, *(1,) * len(shape))
    moved = torch.einsum("ij,j...->i...", matrix, millimetres) + 1.5
    return (moved * moves / torch.where(voxel > 0, voxel, 1.0))[None]


@pytest.mark.parametrize(
    ("shape", "spacing", "coarser"),
    [
        ((90, 50), (1.0, 1.0), (17, 10)),
        ((9, 80), (1.0, 1.0), (3, 17)),
        ((5, 60), (10.0, 1.0), (5, 17)),
        ((12, 13), (1.0, 1.0), (12, 13)),
        ((1, 50), (1.0, 1.0), (1, 17)),
        ((30, 20, 4), (1.0, 1.5, 9.0), (17, 17, 4)),
    ],
)
def test_a_half_grid_comes_to_the_image_compact_or_in_full(shape, spacing, coarser):
    """The coarser of half grid and image, axis by axis, loses nothing of a field that is linear."""
    grid = WorkingGrid.of(shape, spacing, 33, odd=True)
    extent = [(n - 1) * s for n, s in zip(shape, spacing)]
    half = tuple((n + 1) // 2 for n in grid.shape)
    ddf = carried(half, extent)
    compact = grid.ddf_to_compact(ddf)
    assert compact.shape[2:] == tuple(min(h, n) for h, n in zip(half, shape)) == coarser
    torch.testing.assert_close(compact, carried(coarser, extent), rtol=1e-4, atol=1e-4)
    expected = carried(shape, extent)
    torch.testing.assert_close(grid.ddf_to_full(ddf), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(resize_ddf(compact, shape), expected, rtol=1e-4, atol=1e-3)


def test_nothing_moves_along_one_voxel():
    grid = WorkingGrid.of((1, 40), (3.0, 1.0), 33, odd=True)
    ddf = torch.ones(1, 2, 1, 17)
    for brought in (grid.ddf_to_compact(ddf), grid.ddf_to_full(ddf)):
        assert bool((brought[:, 0] == 0).all())
        assert bool((brought[:, 1] > 0).all())
