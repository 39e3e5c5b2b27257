from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import Warp
from scipy.ndimage import affine_transform, gaussian_filter, map_coordinates

from monai_drdm.fields import fold_fraction, identity_grid, sample
from monai_drdm.registration import apply_affine, find_affine, register

MIDDLE = ((30, 34), (22, 24, 26))


class Still(torch.nn.Module):
    """A network that moves nothing."""

    def forward(self, images):
        return images.new_zeros(len(images), images.ndim - 2, *images.shape[2:])


def anatomy(shape, seed=0):
    """A bright blob with structure, dark at the border."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    window = np.clip(1.2 - np.sqrt(sum(axis**2 for axis in axes)), 0, 0.6)
    texture = gaussian_filter(rng.normal(size=shape), 2)
    image = window * (1 + 2 * texture / texture.std() / 3)
    return torch.from_numpy(np.clip(image / image.max(), 0, 1)).float()[None, None]


def transformed(image, matrix, shift):
    """``image(matrix x + shift)`` by SciPy."""
    return torch.from_numpy(
        affine_transform(image[0, 0].numpy(), matrix.numpy(), shift.numpy(), order=1, mode="nearest")
    )[None, None]


def about_the_middle(linear, shift, shape):
    middle = torch.tensor([(n - 1) / 2 for n in shape])
    return middle + shift - linear @ middle


@pytest.mark.parametrize("shape", MIDDLE)
def test_an_affine_map_is_found(shape):
    dims = len(shape)
    linear = torch.eye(dims) + 0.12 * torch.randn(dims, dims, generator=torch.Generator().manual_seed(1))
    shift = about_the_middle(linear, 1.5 * torch.ones(dims), shape)
    moving = anatomy(shape)
    fixed = transformed(moving, linear, shift)
    found = find_affine(moving, fixed)
    points = identity_grid(shape)[None]
    true = apply_affine(torch.cat([linear, shift[:, None]], dim=1)[None], points)
    inner = (..., *(slice(4, -4),) * dims)
    apart = (apply_affine(found, points) - true)[inner].norm(dim=1)
    before = (points - true)[inner].norm(dim=1)
    assert float(apart.mean()) < 0.35 < 1.2 < float(before.mean())
    ddf = register(Still(), moving, fixed, affine=True)
    torch.testing.assert_close(ddf, apply_affine(found, points) - points)


def test_every_pair_of_a_batch_gets_its_own_map_and_images_that_fit_keep_theirs():
    moving = torch.cat([anatomy((30, 34), seed) for seed in (0, 1)])
    fixed = torch.cat([moving[:1], moving[1:].roll(3, dims=-1)])
    found = find_affine(moving, fixed)
    alone = torch.cat([find_affine(a[None], b[None]) for a, b in zip(moving, fixed)])
    torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)  # voxels; processors add in other orders
    points = identity_grid((30, 34))[None].expand(2, -1, -1, -1)
    moved = apply_affine(found, points) - points
    assert float(moved[0].abs().max()) < 0.1
    assert float((moved[1, 1] + 3).abs().mean()) < 0.3


def test_constant_images_stay_where_they_are():
    flat = torch.full((1, 1, 12, 1), 0.5)
    assert torch.isfinite(register(Still(), flat, flat, affine=True, refine=2)).all()


@pytest.mark.parametrize("stages", [{"rounds": 2}, {"affine": True}, {"to_moving": torch.eye(2, 3)[None], "rounds": 2}])
def test_every_pair_of_a_batch_is_registered_as_alone(stages):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(2, 2, 3, padding=1)
    moving, fixed = (torch.cat([anatomy((24, 20), seed) for seed in seeds]) for seeds in ((0, 1, 2), (3, 4, 5)))
    alone = [register(network, a[None], b[None], **stages) for a, b in zip(moving, fixed)]
    torch.testing.assert_close(register(network, moving, fixed, **stages), torch.cat(alone), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("moving", [torch.ones(1, 1, 18, 20), torch.full((1, 1, 18, 20), 0.3)])
def test_images_without_structure_stay_where_they_are(moving):
    """Rounding correlates with anything, but by no more than rounding."""
    assert float(register(None, moving, anatomy((18, 20)), affine=True, refine=6).abs().max()) < 1e-3


def test_nothing_is_pulled_to_where_the_moving_image_ends():
    """A moving image that is the fixed one without a third of it: nothing needs to move."""
    fixed, to_moving = anatomy((24, 26, 22)), torch.eye(3, 4)[None]
    to_moving[0, 0, 3] = -8.0
    ddf = register(None, fixed[:, :, 8:], fixed, refine=20, to_moving=to_moving)
    assert float(ddf.abs().max()) < 0.02


@pytest.mark.parametrize(("shown", "enough"), [(2, False), (3, True)])
def test_a_moving_image_of_which_too_little_is_seen_is_named(shown, enough):
    """Windows are 5 voxels wide and may reach beyond the fixed image, at whose border the moving one is seen."""
    fixed, to_moving = anatomy((24, 26, 22)), torch.eye(3, 4)[None]
    to_moving[0, 0, 3] = shown - 24.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ddf = register(None, fixed[:, :, 24 - shown :], fixed, refine=2, to_moving=to_moving)
    said = [str(one.message) for one in caught if "refine changed nothing" in str(one.message)]
    assert bool(said) != enough
    assert enough or not bool(ddf.any())


def test_what_is_seen_of_an_incomplete_image_is_found_as_in_a_whole_one():
    """The moving image lacks a third of the anatomy, and both differ by a smooth field."""
    shape, cut = (40, 36, 32), 14
    waves = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    true = F.interpolate(0.7 * waves, shape, mode="trilinear", align_corners=True)
    whole, errors = anatomy(shape, seed=2), []
    fixed = Warp("bilinear", "border")(whole, true)
    there = (identity_grid(shape)[0] + true[0, 0] > cut + 1) & (fixed[0, 0] > 0.2)
    for lacking in (0, cut):
        to_moving = torch.eye(3, 4)[None]
        to_moving[0, 0, 3] = -lacking
        ddf = register(None, whole[:, :, lacking:], fixed, refine=40, to_moving=to_moving)
        errors.append(float((ddf - true).norm(dim=1)[0][there].mean()))
    assert errors[1] < 1.12 * errors[0] < 0.12


def test_autocast_around_it_changes_nothing():
    moving, fixed = anatomy((22, 24, 26)), anatomy((22, 24, 26), seed=1)
    plain, matrix = register(None, moving, fixed, affine=True, refine=4), find_affine(moving, fixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(register(None, moving, fixed, affine=True, refine=4), plain)
        assert torch.equal(find_affine(moving, fixed), matrix)


def test_the_default_dtype_changes_nothing():
    moving, fixed = anatomy((22, 24)), anatomy((22, 24), seed=1)
    to_moving = torch.tensor([[[1.0, 0.0, 1.0], [0.0, 1.0, -1.0]]])
    plain = [register(None, moving, fixed, affine=True, refine=4, to_moving=one) for one in (None, to_moving)]
    torch.set_default_dtype(torch.float64)
    try:
        again = [register(None, moving, fixed, affine=True, refine=4, to_moving=one) for one in (None, to_moving)]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(again, plain)


def test_images_of_other_grids_are_seen_through_their_headers():
    """A moving image that is twice finer and starts elsewhere, beside SciPy; in all stages, and resampled once."""
    fixed = anatomy((24, 26))
    to_moving = torch.tensor([[[0.0, -2.0, 57.0], [2.0, 0.0, 5.0]]])  # the axes are swapped, and one is turned round
    back = torch.linalg.inv(to_moving[0, :, :2])
    moving = torch.from_numpy(
        affine_transform(
            fixed[0, 0].numpy(), back.numpy(), (-back @ to_moving[0, :, 2]).numpy(), (64, 60), order=1, mode="nearest"
        )
    )[None, None]
    seen = []

    class Remembers(Still):
        def forward(self, images):
            seen.append(images)
            return super().forward(images) + 0.5

    ddf = register(Remembers(), moving, fixed, to_moving=to_moving, rounds=2)
    assert float((seen[0][:, :1] - fixed).abs().mean()) < 0.02
    assert torch.equal(ddf, torch.ones_like(ddf))
    where = (
        np.einsum("ij,jkl->ikl", to_moving[0, :, :2], np.indices((24, 26)) + 0.5)
        + to_moving[0, :, 2].numpy()[:, None, None]
    )
    expected = map_coordinates(moving[0, 0].numpy(), where, order=1, mode="nearest")
    np.testing.assert_allclose(seen[1][0, 0], expected, atol=1e-5)
    shifted = torch.cat([torch.eye(2), torch.tensor([[2.0], [-1.0]])], dim=1)[None]
    elsewhere = sample(moving, apply_affine(to_moving, apply_affine(shifted, identity_grid((24, 26))[None])))
    found = find_affine(moving, elsewhere, to_moving)
    assert float((found - shifted).abs().max()) < 0.3


@pytest.mark.parametrize("shape", MIDDLE)
def test_refinement_finds_what_the_network_missed_without_folds(shape):
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(1, len(shape), *(4,) * len(shape), generator=generator)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    true = F.interpolate(1.5 * waves, shape, mode=mode, align_corners=True)
    moving = anatomy(shape)
    fixed = Warp("bilinear", "border")(moving, true)
    ddf = register(Still(), moving, fixed, refine=25)
    inside = fixed > 0.2
    errors = [float((one - true).norm(dim=1, keepdim=True)[inside].mean()) for one in (ddf, 0 * ddf)]
    assert errors[0] < 0.6 * errors[1]
    assert float(fold_fraction(ddf)) == 0
    assert torch.equal(ddf, register(Still(), moving, fixed, refine=25))


def organ(shape, centre, radius):
    """A bright disc with structure everywhere in it, given in closed form."""
    points = (identity_grid(shape, dtype=torch.float32) - torch.tensor(centre).view(-1, 1, 1)) / radius
    waves = sum((torch.tensor(k).view(-1, 1, 1) * points).sum(0).cos() for k in ((4.0, 1.0), (-2.0, 3.0), (1.0, -5.0)))
    return (torch.sigmoid(8 * (1 - points.norm(dim=0))) * (0.5 + waves / 8))[None, None]


def test_refinement_finds_long_ways_too():
    """A shift in a large image, without an affine map, of which the finest grid alone would find a seventh."""
    shape, centre, shift, radius = (160, 224), (80.0, 100.0), (11.5, -15.4), 48.0
    moving, fixed = organ(shape, [a + b for a, b in zip(centre, shift)], radius), organ(shape, centre, radius)
    ddf = register(None, moving, fixed, refine=60)
    error = (ddf - torch.tensor(shift).view(1, -1, 1, 1)).norm(dim=1, keepdim=True)[fixed > 0.3]
    assert float(error.mean()) < 0.15 * float(torch.tensor(shift).norm())
    assert float(fold_fraction(ddf)) == 0


def test_refinement_of_large_images_on_other_grids():
    """The moving image is twice finer and shifted, as its header says; coarser comparisons must know it."""
    shift, fixed = (9.0, -12.0), organ((160, 144), (80.0, 70.0), 40.0)
    moving = organ((320, 288), [2 * (80 + shift[0]) + 3, 2 * (70 + shift[1]) - 5], 80.0)
    to_moving = torch.tensor([[[2.0, 0.0, 3.0], [0.0, 2.0, -5.0]]])
    ddf = register(None, moving, fixed, refine=60, to_moving=to_moving)
    error = (ddf - torch.tensor(shift).view(1, -1, 1, 1)).norm(dim=1, keepdim=True)[fixed > 0.3]
    assert float(error.mean()) < 0.15 * 15


@pytest.mark.parametrize("shape", [(2, 3), (1, 30), (5, 70), (3, 2, 4), (1, 9, 140)])
def test_refinement_takes_images_of_any_size(shape):
    generator = torch.Generator().manual_seed(0)
    moving, fixed = (torch.rand(1, 1, *shape, generator=generator) for _ in range(2))
    ddf = register(None, moving, fixed, refine=4)
    assert ddf.shape == (1, len(shape), *shape)
    assert torch.isfinite(ddf).all()
    assert float(fold_fraction(ddf)) == 0


def test_refined_fields_never_fold():
    """Noise, which asks for folds everywhere."""
    moving, fixed = torch.rand(1, 1, 20, 22), torch.rand(1, 1, 20, 22)
    ddf = register(Still(), moving, fixed, affine=True, refine=30)
    assert float(ddf.abs().max()) > 0.5
    assert float(fold_fraction(ddf)) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"refine": "5"}, "refine must be a whole number, got '5'"),
        ({"refine": 2.5}, "refine must be a whole number, got 2.5"),
        ({"rounds": True}, "rounds must be a whole number, got True"),
        ({"to_moving": [[[1, 0, 0], [0, 1, 0]]]}, "to_moving must be a floating tensor .* got list"),
        ({"affine": "no"}, "affine must be True or False, got 'no'"),
        ({"moving": np.zeros((1, 1, 8, 8))}, "moving must be a tensor of real numbers .* got ndarray"),
        (
            {"fixed": torch.zeros(1, 1, 8, 8, dtype=torch.complex64)},
            r"fixed must be a tensor of real .* got torch\.complex64",
        ),
    ],
)
def test_wrong_types_are_explained(arguments, says):
    images = {"moving": torch.rand(1, 1, 8, 8), "fixed": torch.rand(1, 1, 8, 8)}
    with pytest.raises(TypeError, match=says):
        register(Still(), **{**images, **arguments})


def test_rounds_are_for_networks():
    with pytest.raises(ValueError, match=r"must be 1 without one, got 2\. For more steps use refine"):
        register(None, torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), refine=2, rounds=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"moving": torch.rand(0, 1, 8, 8), "fixed": torch.rand(0, 1, 8, 8)}, r"moving must hold .* \(0, 1, 8, 8\)"),
        ({"refine": -1}, "refine must be 0 or more steps, got -1"),
        ({"moving": torch.rand(1, 1, 9, 8)}, r"moving must have the shape of fixed, got \(1, 1, 9, 8\)"),
        ({"to_moving": torch.tensor([[[1, 0, torch.nan], [0, 1, 0]]])}, "to_moving must be finite and have an inverse"),
        ({"to_moving": torch.tensor([[[1.0, 2.0, 0.0], [0.5, 1.0, 0.0]]])}, "must be finite and have an inverse"),
        ({"to_moving": torch.eye(2, 3)}, r"to_moving must have shape \(1, 2, 3\), got \(2, 3\)"),
    ],
)
def test_wrong_calls_are_explained(arguments, says):
    images = {"moving": torch.rand(1, 1, 8, 8), "fixed": torch.rand(1, 1, 8, 8)}
    with pytest.raises(ValueError, match=says):
        register(Still(), **{**images, **arguments})


def test_no_network_is_needed():
    """An affine map and refinement alone: what a network that moves nothing leaves to them; and nothing is refused."""
    moving, fixed = anatomy((20, 22)), anatomy((20, 22), seed=1)
    for stages in ({"affine": True}, {"refine": 3}, {"affine": True, "refine": 3}):
        torch.testing.assert_close(register(None, moving, fixed, **stages), register(Still(), moving, fixed, **stages))
    with pytest.raises(ValueError, match="nothing would be registered"):
        register(None, moving, fixed)


def test_pairs_of_a_batch_are_registered_one_by_one():
    """With all stages, and the fields do not depend on what else is in the batch."""
    images = torch.cat([anatomy((20, 22), seed) for seed in (0, 1, 2)])
    moving, fixed = images, images.roll(1, 0)
    together = register(Still(), moving, fixed, affine=True, refine=4)
    for number in range(len(images)):
        alone = register(Still(), moving[number, None], fixed[number, None], affine=True, refine=4)
        torch.testing.assert_close(together[number, None], alone, atol=1e-4, rtol=0)


def test_pairs_that_agree_are_left_alone():
    image = anatomy((20, 22, 18))
    assert float(register(None, image, image, refine=5).abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_every_type_of_numbers_is_registered(dtype):
    moving, fixed = anatomy((20, 22)), anatomy((20, 22), seed=1)
    if dtype == torch.uint8:
        moving, fixed = (moving > 0.5).float(), (fixed > 0.5).float()
    expected = register(None, moving, fixed, affine=True, refine=2)
    found = register(None, moving.to(dtype), fixed.to(dtype), affine=True, refine=2)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.5, rtol=0)


def test_inference_mode_changes_nothing():
    moving, fixed = anatomy((20, 22)), anatomy((20, 22), seed=1)
    expected = register(Still(), moving, fixed, affine=True, refine=2)
    with torch.inference_mode():
        found = register(Still(), anatomy((20, 22)), anatomy((20, 22), seed=1), affine=True, refine=2)
    torch.testing.assert_close(found, expected)


def test_a_network_trains_on_after_an_error():
    class Broken(torch.nn.Module):
        def forward(self, images):
            raise RuntimeError("broken")

    network = Broken().train()
    with pytest.raises(RuntimeError, match="broken"):
        register(network, anatomy((8, 8)), anatomy((8, 8)))
    assert network.training
