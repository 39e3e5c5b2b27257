"""A 2D network on volumes: one in-plane field for the whole stack."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import DiceMetric
from monai.networks.blocks import Warp
from monai.networks.utils import one_hot

from monai_drdm import RandDRDMDeform, RandDRDMDeformd
from monai_drdm.fields import warp
from monai_drdm.transforms import DeformationParams

SPACING = (0.75, 2.5, 1.5)  # squares are exact, so norms of affine columns are too
SHAPES = {0: (6, 40, 48), 1: (40, 7, 48), 2: (40, 48, 5)}
AXES = [0, 1, 2]


@pytest.fixture(scope="module")
def network(small_network):
    return small_network(2)


def deform(network, slice_axis, keys=("image", "label"), **options):
    options.setdefault("mode", tuple("nearest" if key == "label" else "bilinear" for key in keys))
    return RandDRDMDeformd(keys, network=network, prob=1.0, slice_axis=slice_axis, **options)


def with_spacing(sample, spacing=SPACING):
    affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
    return {key: MetaTensor(value, affine=affine) for key, value in sample.items()}


def in_plane(axis, values):
    return tuple(v for d, v in enumerate(values) if d != axis)


def mean_dice(a, b):
    one, other = (one_hot(x.as_tensor().long()[None], 3) for x in map(MetaTensor, (a, b)))
    return float(DiceMetric(include_background=False)(one, other).mean())


def test_refused_without_slice_axis(network, scan):
    for transform in (deform(network, None), RandDRDMDeform(network, prob=1.0)):
        sample = scan((24, 24, 6))
        with pytest.raises(ValueError, match="slice_axis"):
            transform(sample if isinstance(transform, RandDRDMDeformd) else sample["image"])


@pytest.mark.parametrize("slice_axis", [3, -1, True, False, "2", 0.5, (0,)])
def test_not_an_axis(network, slice_axis):
    for build in (lambda: deform(network, slice_axis), lambda: RandDRDMDeform(network, slice_axis=slice_axis)):
        with pytest.raises((ValueError, TypeError), match="slice_axis"):
            build()


@pytest.mark.parametrize("value", [2.0, np.int64(2)])
def test_a_number_equal_to_an_axis_is_refused_or_works(network, scan, value):
    """What the constructor lets through must not fail when the transform first fires."""
    try:
        transform = deform(network, value).set_random_state(1)
    except (ValueError, TypeError) as error:
        assert "slice_axis" in str(error)  # noqa: PT017
        return
    sample = scan(SHAPES[2])
    plain = deform(network, 2).set_random_state(1)
    assert torch.equal(transform(sample)["image"].as_tensor(), plain(sample)["image"].as_tensor())
    assert DeformationParams.from_json(transform.last.params.to_json()) == plain.last.params


def test_of_an_image_of_two_dimensions(network, scan):
    for axis in AXES:
        with pytest.raises(ValueError, match="slice_axis"):
            deform(network, axis)(scan((40, 48)))


def test_of_a_network_of_three_dimensions(small_network, scan):
    with pytest.raises(ValueError, match="2D"):
        deform(small_network(3), 2)(scan((24, 24, 6)))


@pytest.mark.parametrize("axis", AXES)
def test_field_is_in_plane_and_the_same_in_every_slice(network, scan, axis):
    shape = SHAPES[axis]
    transform = deform(network, axis).set_random_state(3)
    out = transform(with_spacing(scan(shape)))
    ddf = transform.last.ddf
    assert ddf.shape == (3, *shape)
    assert ddf.dtype == torch.float32
    assert not ddf[axis].any()
    for k in range(shape[axis]):
        assert torch.equal(ddf.select(axis + 1, k), ddf.select(axis + 1, 0))
    others = [d for d in range(3) if d != axis]
    assert (ddf[others].flatten(1).abs().amax(dim=1) > 0.5).all()
    assert out["image"].shape == out["label"].shape == (1, *shape)
    torch.testing.assert_close(out["image"].affine, torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64)))
    assert transform.last.params.slice_axis == axis


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING])
@pytest.mark.parametrize("axis", AXES)
def test_equals_the_2d_transform_on_the_middle_slice(network, scan, axis, spacing):
    shape = SHAPES[axis]
    sample = scan(shape)
    sample["image"] = sample["image"] + 0.2 * torch.rand(1, *shape, generator=torch.Generator().manual_seed(axis))
    stack = deform(network, axis).set_random_state(5)
    stack(with_spacing(sample, spacing))
    flat = deform(network, None, pixdim=in_plane(axis, spacing)).set_random_state(5)
    flat({key: value.select(axis + 1, shape[axis] // 2) for key, value in sample.items()})
    others = [d for d in range(3) if d != axis]
    assert torch.equal(stack.last.ddf.select(axis + 1, 0)[others], flat.last.ddf)
    same = dataclasses.replace(stack.last.params, slice_axis=None)
    assert same == flat.last.params
    # another slice would have given another field, so the comparison can fail
    flat({key: value.select(axis + 1, 0) for key, value in sample.items()}, params=same)
    assert not torch.equal(stack.last.ddf.select(axis + 1, 0)[others], flat.last.ddf)


def test_spacing_across_slices_does_not_matter_and_in_plane_spacing_does(network, scan):
    fields = []
    for spacing in ((1.0, 1.0, 1.0), (1.0, 1.0, 8.0), (1.0, 3.0, 1.0)):
        transform = deform(network, 2).set_random_state(5)
        transform(with_spacing(scan(SHAPES[2]), spacing))
        fields.append(transform.last.ddf)
    assert torch.equal(fields[0], fields[1])
    assert not torch.equal(fields[0], fields[2])


def test_spacing_of_a_permuted_and_flipped_affine(network, scan):
    affine = torch.zeros(4, 4, dtype=torch.float64)
    affine[2, 0], affine[0, 1], affine[1, 2], affine[3, 3] = -0.75, 2.5, -1.5, 1.0
    sample = scan(SHAPES[1])
    turned, plain = (deform(network, 1).set_random_state(2) for _ in range(2))
    turned({key: MetaTensor(value, affine=affine) for key, value in sample.items()})
    plain(with_spacing(sample))
    assert torch.equal(turned.last.ddf, plain.last.ddf)


@pytest.mark.parametrize("axis", AXES)
def test_image_is_every_slice_warped_in_2d(network, axis):
    shape = SHAPES[axis]
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    transform = deform(network, axis, ("image",)).set_random_state(4)
    out = transform({"image": image})["image"].as_tensor()
    others = [d for d in range(3) if d != axis]
    ddf = transform.last.ddf.select(axis + 1, 0)[others][None]
    monai_warp = Warp(mode="bilinear", padding_mode="border")
    for k in range(shape[axis]):
        one = image.select(axis + 1, k)[None]
        got = out.select(axis + 1, k)[None]
        torch.testing.assert_close(got, warp(one, ddf), atol=1e-4, rtol=0)
        # MONAI's Warp may use its own border handling; the interior is common ground
        where = torch.stack(torch.meshgrid(*map(torch.arange, one.shape[2:]), indexing="ij")) + ddf[0]
        last = torch.tensor(one.shape[2:]).view(2, 1, 1) - 2
        inside = ((where > 1) & (where < last)).all(dim=0)
        assert inside.float().mean() > 0.3
        torch.testing.assert_close(got[0, 0][inside], monai_warp(one, ddf)[0, 0][inside], atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["nearest", "label"])
@pytest.mark.parametrize("axis", AXES)
def test_label_is_every_slice_warped_in_2d_and_ids_are_exact(network, scan, axis, mode):
    shape = SHAPES[axis]
    sample = scan(shape, torch.int64)
    big = 2**40 + 1
    sample["label"] = torch.where(sample["label"] == 2, big, sample["label"])
    transform = deform(network, axis, mode=("bilinear", mode)).set_random_state(4)
    out = transform(sample)["label"].as_tensor()
    assert out.dtype == torch.int64
    assert set(out.unique().tolist()) == {0, 1, big}
    others = [d for d in range(3) if d != axis]
    ddf = transform.last.ddf.select(axis + 1, 0)[others][None]
    for k in range(shape[axis]):
        expected = warp(sample["label"].select(axis + 1, k)[None], ddf, mode)[0]
        disagree = (out.select(axis + 1, k) != expected).float().mean()
        assert disagree < 2e-3  # only ties may break differently


@pytest.mark.parametrize("axis", AXES)
def test_inverse_restores(network, axis):
    shape = [96, 96, 96]
    shape[axis] = 6
    axes = [torch.linspace(-1, 1, n) for n in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    radius = grid[[d for d in range(3) if d != axis]].norm(dim=0)
    # small enough to stay in the image: what has left it cannot come back
    label = ((radius < 0.55).to(torch.uint8) + (radius < 0.3).to(torch.uint8))[None]
    image = torch.exp(-3 * radius**2)[None]
    sample = with_spacing({"image": image, "label": label})
    transform = deform(network, axis, deformation_level=0.3).set_random_state(0)
    out = transform(sample)
    assert mean_dice(out["label"], label) < 0.9  # it did move
    back = transform.inverse(out)
    assert mean_dice(back["label"], label) >= 0.95
    assert (back["image"].as_tensor() - image).abs().mean() < 0.5 * (out["image"].as_tensor() - image).abs().mean()
    assert back["label"].applied_operations == []
    assert not transform.last.inverse_ddf[axis].any()


@pytest.mark.parametrize("axis", AXES)
def test_one_slice(network, scan, axis):
    shape = [40, 48, 44]
    shape[axis] = 1
    sample = scan(tuple(shape))
    transform = deform(network, axis).set_random_state(6)
    out = transform(sample)
    flat = deform(network, None).set_random_state(6)
    expected = flat({key: value.squeeze(axis + 1) for key, value in sample.items()})
    torch.testing.assert_close(
        out["image"].as_tensor().squeeze(axis + 1), expected["image"].as_tensor(), atol=1e-4, rtol=0
    )
    assert transform.last.ddf.shape == (3, *shape)
    assert all(np.isfinite(v) for v in transform.last.statistics.to_dict().values() if isinstance(v, float))
    assert transform.inverse(out)["image"].shape == (1, *shape)


@pytest.mark.parametrize("channel", [None, 1, -1])
def test_channels(network, scan, channel):
    shape = SHAPES[2]
    first = scan(shape)["image"]
    other = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    image = torch.cat((first, other))
    transform = deform(network, 2, ("image",), image_channel=channel).set_random_state(3)
    out = transform({"image": image})["image"].as_tensor()
    assert out.shape == (2, *shape)
    seen = image.mean(dim=0, keepdim=True) if channel is None else other
    alone = deform(network, 2, ("image",)).set_random_state(3)
    alone({"image": seen})
    assert torch.equal(transform.last.ddf, alone.last.ddf)
    for c in range(2):
        expected = warp(image[None, c : c + 1], transform.last.ddf[None])[0]
        torch.testing.assert_close(out[c : c + 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("axis", AXES)
def test_statistics_are_those_of_the_plane(network, scan, axis):
    transform = deform(network, axis).set_random_state(3)
    transform(with_spacing(scan(SHAPES[axis])))
    statistics = transform.last.statistics
    assert all(np.isfinite(v) for v in statistics.to_dict().values() if isinstance(v, (int, float)))
    plane = transform.last.ddf.select(axis + 1, 0)
    length = plane.norm(dim=0)
    assert statistics.max_displacement_vox == pytest.approx(float(length.max()), rel=1e-5)
    assert statistics.mean_displacement_vox == pytest.approx(float(length.mean()), rel=1e-4)
    mm = (plane * torch.tensor(SPACING).view(3, 1, 1)).norm(dim=0)
    assert statistics.max_displacement_mm == pytest.approx(float(mm.max()), rel=1e-5)
    assert statistics.fold_fraction <= 1e-4


@pytest.mark.parametrize("axis", AXES)
def test_max_displacement(network, scan, axis):
    transform = deform(network, axis, max_displacement_mm=2.0).set_random_state(3)
    transform(with_spacing(scan(SHAPES[axis])))
    length = (transform.last.ddf.double() * torch.tensor(SPACING).view(3, 1, 1, 1)).norm(dim=0)
    assert float(length.max()) <= 2.0
    assert float(length.max()) == pytest.approx(2.0, rel=1e-3)
    assert transform.last.params.scale < 1


def test_replay(network, scan):
    sample = with_spacing(scan(SHAPES[1]))
    transform = deform(network, 1, max_displacement_mm=2.0).set_random_state(3)
    out = transform(sample)
    record = DeformationParams.from_json(transform.last.params.to_json())
    for other_axis in (None, 0):  # the record's own axis counts
        other = deform(network, other_axis, deformation_level=0.9).set_random_state(8)
        again = other(sample, params=record)
        assert torch.equal(other.last.ddf, transform.last.ddf)
        assert torch.equal(again["image"].as_tensor(), out["image"].as_tensor())
        assert torch.equal(again["label"].as_tensor(), out["label"].as_tensor())
        assert other.last.params == record
        assert mean_dice(other.inverse(again)["label"], sample["label"]) > 0.9


def test_landmarks_stay_in_their_slice(network, scan):
    shape = SHAPES[2]
    points = torch.tensor([[[20.0, 24.0, 0.0], [15.0, 30.0, 3.25], [25.0, 20.0, 4.0]]])
    transform = deform(network, 2, point_keys="points").set_random_state(3)
    out = transform({**scan(shape), "points": points})
    moved = out["points"].as_tensor()
    torch.testing.assert_close(moved[..., 2], points[..., 2], atol=1e-4, rtol=0)
    assert (moved - points)[..., :2].abs().max() > 0.3
    torch.testing.assert_close(transform.inverse(out)["points"].as_tensor(), points, atol=1e-2, rtol=0)


def test_array_form_gives_the_same(network, scan):
    image = scan(SHAPES[0])["image"]
    array = RandDRDMDeform(network, prob=1.0, slice_axis=0).set_random_state(9)
    keyed = deform(network, 0, ("image",)).set_random_state(9)
    out = array(image)
    assert torch.equal(out.as_tensor(), keyed({"image": image})["image"].as_tensor())
    back = array.inverse(out).as_tensor()
    assert (back - image).abs().mean() < 0.5 * (out.as_tensor() - image).abs().mean()
