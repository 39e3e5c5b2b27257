import math
from itertools import combinations

import pytest
import SimpleITK
import torch
import torch.nn.functional as F

from monai_drdm import RandDRDMDeform
from monai_drdm.deformation import DeformationParams
from monai_drdm.diffusion import DRDM
from monai_drdm.diffusion.symmetry import find_mirror, half_grid, keep_symmetry, Mirror
from monai_drdm.fields import identity_grid, warp
from monai_drdm.metrics import remove_affine
from monai_drdm.networks import load_network, RecResACNet
from monai_drdm.train.augmentation import smooth_noise

SHAPES = [(61, 49), (41, 33, 37)]


def blobs(seed, shape, nodes=7):
    """Smooth random structures, the same under every seed, in [0, 1]."""
    noise = smooth_noise(torch.Generator().manual_seed(seed), 1, 1, torch.Size(shape), nodes)
    return (0.5 + 0.2 * noise).clamp(0, 1)


def resampled(image, normal, point):
    """The mirror image of an image across a plane, by SimpleITK."""
    dims = image.ndim - 2
    reversed_normal = normal.flip(0).double()  # SimpleITK counts axes from the last
    matrix = torch.eye(dims, dtype=torch.float64) - 2 * torch.outer(reversed_normal, reversed_normal)
    transform = SimpleITK.AffineTransform(dims)
    transform.SetMatrix(matrix.flatten().tolist())
    transform.SetCenter(point.flip(0).double().tolist())
    scan = SimpleITK.GetImageFromArray(image[0, 0].numpy())
    result = SimpleITK.Resample(scan, scan, transform, SimpleITK.sitkLinear, 0.0, SimpleITK.sitkFloat32)
    return torch.from_numpy(SimpleITK.GetArrayFromImage(result))[None, None]


def tilted_plane(shape, axis=0, degrees=12.0, shift=2.0):
    """A plane across an axis, tilted towards the next one, off the middle of the image."""
    normal = torch.eye(len(shape))[axis].clone()
    normal[(axis + 1) % len(shape)] = math.tan(math.radians(degrees))
    normal = normal / normal.norm()
    return normal, torch.tensor([(n - 1) / 2 for n in shape]) + shift * normal


def two_halves(shape, **plane):
    """A body of random structures that are the same on both sides of a plane."""
    normal, point = tilted_plane(shape, **plane)
    image = blobs(1, shape)
    side = ((identity_grid(shape) - point.view(-1, *(1,) * len(shape))) * normal.view(-1, *(1,) * len(shape))).sum(0)
    away = (identity_grid(shape) - point.view(-1, *(1,) * len(shape))).square().sum(0).sqrt()
    body = torch.sigmoid((0.42 * min(shape) - away) / 1.5)
    return torch.where(side > 0, image, resampled(image, normal, point)) * body, normal, point


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("axis", "degrees", "shift"), [(0, 0.0, 0.0), (1, 12.0, 2.0), (0, -20.0, -1.0)])
def test_the_plane_of_two_like_halves_is_found(shape, axis, degrees, shift):
    image, normal, point = two_halves(shape, axis=axis, degrees=degrees, shift=shift)
    found = find_mirror(image)
    assert float(found.weight) > 0.9
    assert abs(float(found.normal[0] @ normal)) > math.cos(math.radians(2.0))
    assert abs(float((found.point[0] - point) @ normal)) < 0.02 * max(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_an_image_without_like_halves_is_not_symmetric(shape, seed):
    assert float(find_mirror(blobs(seed, shape)).weight) == 0.0


@pytest.mark.parametrize("shape", [(40, 40), (20, 24, 28), (1, 30, 30), (5, 3), (1, 1)])
def test_constant_images_have_no_plane(shape):
    found = find_mirror(torch.full((2, 3, *shape), 0.4))
    assert found.weight.tolist() == [0.0, 0.0]
    assert found.normal.shape == found.point.shape == (2, len(shape))
    assert bool(torch.isfinite(found.point).all())


@pytest.mark.parametrize("seed", range(4))
def test_a_round_field_of_view_does_not_make_an_image_symmetric(seed):
    x, y = identity_grid((97, 97)) - 48
    view = (x.square() + y.square()).sqrt() < 44
    assert float(find_mirror(blobs(seed, (97, 97), nodes=9) * view).weight) == 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_air_around_an_object_does_not_matter(shape, seed):
    """An outline agrees with itself more than what is inside it, the more so the smaller the object is in the image."""
    for share in (0.2, 0.6):
        pad = [round(share * n) for n in reversed(shape) for _ in range(2)]
        assert float(find_mirror(F.pad(blobs(seed, shape), pad)).weight) == 0.0
        image, normal, point = two_halves(shape, axis=0, degrees=8.0, shift=1.0)
        found = find_mirror(F.pad(image, pad))
        assert float(found.weight) > 0.9
        assert abs(float(found.normal[0] @ normal)) > math.cos(math.radians(2.0))
        moved = point + torch.tensor([float(n) for n in pad[::-2]])
        assert abs(float((found.point[0] - moved) @ normal)) < 0.02 * max(shape)


@pytest.mark.parametrize("side", [5, 8])
def test_a_symmetric_image_that_is_cut_on_one_side_is_symmetric(side):
    image = two_halves((121, 97), degrees=4.0)[0]
    assert float(find_mirror(image[:, :, 16 + side :]).weight) > 0.9


def test_rounding_does_not_choose_among_planes_that_are_as_good():
    x, y = identity_grid((81, 81)) - 40
    diamond = ((x.abs() + y.abs()) < 30).float()[None, None]
    ring = diamond * (0.5 + 0.4 * torch.cos((x.abs() + y.abs()) / 3))
    first = find_mirror(ring)
    for seed in range(3):
        noise = 1e-6 * torch.rand(ring.shape, generator=torch.Generator().manual_seed(seed))
        found = find_mirror(ring + noise)
        torch.testing.assert_close(found.normal, first.normal, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.point, first.point, atol=1e-3, rtol=0)


def test_slices_that_resemble_each_other_are_no_symmetry():
    """A thin slab is its own mirror image from one face to the other, which says nothing of the anatomy."""
    slab = blobs(1, (61, 49, 3))
    slab = torch.cat((slab, slab[..., 1:2], slab[..., :1]), dim=-1)
    assert float(find_mirror(slab).weight) == 0.0


def test_each_image_of_a_batch_has_its_own_plane():
    images = [two_halves((61, 49), axis=0)[0], blobs(0, (61, 49)), two_halves((61, 49), axis=1)[0]]
    together = find_mirror(torch.cat(images))
    for row, image in enumerate(images):
        for whole, alone in zip(together, find_mirror(image)):
            torch.testing.assert_close(whole[row], alone[0])
    assert together.normal.abs().argmax(dim=1)[::2].tolist() == [0, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_fields_are_mirrored_as_a_vector_is(shape):
    """A field that is its own mirror image stays; one that is minus its mirror image goes, unless it is rigid."""
    middle = torch.tensor([(n - 1) / 2 for n in shape])
    mirror = Mirror(torch.eye(len(shape))[:1], middle[None], torch.ones(1))
    x, y = (identity_grid(shape)[d] - middle[d] for d in (0, 1))
    zero = [torch.zeros(shape)] * (len(shape) - 2)
    even = torch.stack([torch.sin(x / 6) * torch.cos(y / 5), torch.cos(x / 7) + y / 9, *zero])[None]
    odd = torch.stack([0.1 * (x / 8) ** 2 * torch.cos(y / 6), torch.sin(x / 4) * torch.cos(y / 3), *zero])[None]
    rigid = torch.stack([0.7 - 0.1 * y, 0.1 * x, *zero])[None]
    torch.testing.assert_close(keep_symmetry(even, mirror, 1.0), even, atol=1e-4, rtol=0)
    torch.testing.assert_close(keep_symmetry(rigid, mirror, 1.0), rigid, atol=1e-4, rtol=0)
    left = keep_symmetry(odd, mirror, 1.0)
    assert float(remove_affine(left).norm()) < 1e-3 * float(odd.norm())
    half = keep_symmetry(even + odd, mirror, 0.5)
    torch.testing.assert_close(half, even + (odd + left) / 2, atol=1e-4, rtol=0)
    unsure = mirror._replace(weight=torch.tensor([0.5]))
    torch.testing.assert_close(keep_symmetry(even + odd, unsure, 1.0), half, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(61, 49), (81, 9), (41, 13, 37)])
def test_what_stays_of_an_asymmetric_field_is_its_rigid_part(shape):
    """The shift and the turn that a least-squares solver fits, on grids with unequal sides too."""
    dims, middle = len(shape), torch.tensor([(n - 1) / 2 for n in shape])
    away = identity_grid(shape) - middle.view(-1, *(1,) * dims)
    odd = torch.stack(
        [0.1 * away[1] + 0.5, 0.02 * away[0] * torch.cos(away[0] / 9), *(0.03 * away[0] for _ in shape[2:])]
    )
    design = [torch.eye(dims)[d].view(-1, *(1,) * dims).expand_as(odd) for d in range(dims)]
    for a, b in combinations(range(dims), 2):
        turn = torch.zeros_like(odd)
        turn[a], turn[b] = away[b], -away[a]
        design.append(turn)
    columns = torch.stack([one.flatten() for one in design], dim=1)
    mirror = Mirror(torch.eye(dims)[:1], middle[None], torch.ones(1))
    flipped = odd.flip(1).clone()
    flipped[0] *= -1
    odd = (odd - flipped) / 2
    fitted = columns @ torch.linalg.lstsq(columns, odd.flatten()[:, None]).solution
    torch.testing.assert_close(keep_symmetry(odd[None], mirror, 1.0).flatten()[:, None], fitted, atol=1e-3, rtol=0)


def test_what_has_no_mirror_image_stays():
    shape = (101, 41)
    mirror = Mirror(torch.tensor([[1.0, 0.0]]), torch.tensor([[30.0, 20.0]]), torch.ones(1))
    ddf = torch.cat([smooth_noise(torch.Generator().manual_seed(d), 1, 1, shape, 9) for d in (0, 1)], 1)
    kept = keep_symmetry(ddf, mirror, 1.0)
    assert torch.equal(kept[:, :, 67:], ddf[:, :, 67:])
    assert float((kept - ddf)[:, :, :60].abs().mean()) > 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_symmetric_image_stays_symmetric_under_the_field(shape):
    """SimpleITK mirrors the deformed image across the tilted plane."""
    image, normal, point = two_halves(shape, axis=0, degrees=8.0, shift=1.0)
    mirror = Mirror(normal[None], point[None], torch.ones(1))
    random = torch.cat(
        [3 * smooth_noise(torch.Generator().manual_seed(d), 1, 1, shape, 5) for d in range(len(shape))], 1
    )
    random = remove_affine(random)

    def asymmetry(ddf):
        moved = warp(image, ddf)
        return float((resampled(moved, normal, point) - moved).abs().mean())

    assert asymmetry(keep_symmetry(random, mirror, 1.0)) < 0.35 * asymmetry(random)


def test_planes_on_the_half_grid():
    normal, point = tilted_plane((61, 49))
    halved = half_grid(Mirror(normal[None], point[None], torch.ones(1)), (61, 49))
    torch.testing.assert_close(halved.point[0], point / 2)
    torch.testing.assert_close(halved.normal[0], normal)
    flat = half_grid(Mirror(normal[None], point[None], torch.ones(1)), (61, 1))
    torch.testing.assert_close(flat.point[0], point / torch.tensor([2.0, 1.0]))
    assert abs(float(flat.normal[0] @ torch.tensor([-normal[1] / 2, normal[0]]))) < 1e-6


def odd_part(ddf):
    """What differs from the mirror image across the first axis, without its affine part."""
    mirrored = ddf.flip(2).clone()
    mirrored[:, 0] *= -1
    return float(remove_affine((ddf - mirrored) / 2).norm(dim=1).mean())


def test_recovered_halves_stay_alike_as_far_as_is_asked():
    network, image = load_network("anatomy-2d"), two_halves((97, 81), axis=0, degrees=0.0, shift=0.0)[0]
    drawn = [DRDM(network, symmetry=share).sample(image, 0.6, [3]) for share in (0.0, 0.3, 1.0)]
    odd = [odd_part(ddf) for ddf in drawn]
    assert odd[2] < 0.35 * odd[0]
    assert odd[2] < odd[1] < odd[0]
    unlike = blobs(5, (97, 81))
    free, kept = (DRDM(network, symmetry=share).sample(unlike, 0.6, [3]) for share in (0.0, 1.0))
    assert torch.equal(free, kept)


def test_records_say_how_symmetric_a_field_was_kept():
    """Those of version 1.0 say nothing, and are replayed as that version drew."""
    image = two_halves((65, 65), degrees=0.0)[0][0]
    free, kept = (
        RandDRDMDeform(prob=1.0, deformation_level=0.6, symmetry=share).set_random_state(1) for share in (0.0, 1.0)
    )
    for transform in (free, kept):
        transform(image)
    assert (free.last.ddf - kept.last.ddf).abs().max() > 0.5
    record = DeformationParams.from_json(kept.last.params.to_json())
    assert (record.symmetry, free.last.params.symmetry) == (1.0, 0.0)
    field = kept.last.ddf
    free(image, params=record)
    torch.testing.assert_close(free.last.ddf, field, atol=1e-4, rtol=0)
    entries = {name: value for name, value in record.__dict__.items() if name != "symmetry"}
    kept(image, params=DeformationParams(**entries))
    expected = RandDRDMDeform(prob=1.0, deformation_level=0.6, symmetry=0.0).set_random_state(1)
    expected(image)
    torch.testing.assert_close(kept.last.ddf, expected.last.ddf, atol=1e-4, rtol=0)


@pytest.mark.parametrize("symmetry", [1.5, -0.1, True, "all", float("nan")])
def test_impossible_symmetry(symmetry):
    with pytest.raises(ValueError, match="symmetry must be a number in"):
        DRDM(load_network("anatomy-2d"), symmetry=symmetry)
    with pytest.raises(ValueError, match="symmetry must be a number in"):
        DRDM(RecResACNet(spatial_dims=2), symmetry=symmetry)
    with pytest.raises(ValueError, match="symmetry must be a number in"):
        RandDRDMDeform(symmetry=symmetry)
