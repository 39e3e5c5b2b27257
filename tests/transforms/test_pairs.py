from __future__ import annotations

import pickle

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from hypothesis import given, HealthCheck, settings
from hypothesis import strategies as st
from monai.data import DataLoader, Dataset, MetaTensor
from monai.networks.blocks import Warp
from scipy import ndimage

from monai_drdm import RandDRDMDeformd, RandDRDMPaird
from monai_drdm.fields import fold_fraction, resize_ddf
from monai_drdm.transforms import PairParams, RandDRDMPairD, RandDRDMPairDict

KEYS, MODES = ["image", "label"], ["bilinear", "nearest"]


def pair(network="auto", **options):
    options = {"keys": KEYS, "mode": MODES, "steps": 3} | options
    return RandDRDMPaird(options.pop("keys"), network, **options).set_random_state(4)


def trace(point, ddf):
    """Where a voxel of the warped image was sampled, by an interpolation that is not ours."""
    sampled = [ndimage.map_coordinates(c, point[:, None], order=1, mode="nearest")[0] for c in ddf.numpy()]
    return point + np.array(sampled)


def test_aliases():
    assert RandDRDMPairD is RandDRDMPairDict is RandDRDMPaird


@pytest.mark.parametrize("shape", [(70, 56), (22, 26, 20)])
def test_the_fixed_image_is_the_moving_one_seen_through_the_field(scan, shape):
    """On coordinates, which interpolation reproduces exactly: what moving and fixed hold says where they came from."""
    sample = scan(shape)
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij")
    transform = pair(keys=[*KEYS, "at"], mode=[*MODES, "bilinear"])
    out = transform({**sample, "at": torch.stack(axes)})
    ddf = out["ddf"]
    assert ddf.shape == (len(shape), *shape)
    assert ddf.norm(dim=0).mean() > 0.4
    again = Warp("bilinear", "border")(out["moving_at"].as_tensor()[None], ddf[None])[0]
    last = torch.tensor(shape).view(-1, *(1,) * len(shape)) - 1
    inside = torch.ones(shape, dtype=torch.bool)  # beyond the border of either image nothing is known
    for position in (torch.stack(axes) + ddf, again):
        inside &= ((position > 2) & (position < last - 2)).all(dim=0)
    assert inside.float().mean() > 0.4
    assert (again - out["fixed_at"].as_tensor())[:, inside].abs().max() < 0.1  # a field is read between voxels
    image = Warp("bilinear", "border")(out["moving"].as_tensor()[None], ddf[None])[0]
    blur = (image - out["fixed"].as_tensor())[:, inside].abs()
    assert blur.mean() < 0.05 * sample["image"].std()
    where = out["fixed_at"].as_tensor().round().long()
    assert (sample["label"][(slice(None), *where)] != out["fixed_label"].as_tensor()).float().mean() < 2e-3
    assert torch.equal(out["image"], sample["image"])
    assert out["fixed_label"].dtype == sample["label"].dtype


def test_simpleitk_makes_the_same_fixed_image(scan):
    out = pair()(scan((24, 20, 28)))
    field = sitk.GetImageFromArray(out["ddf"].double().numpy()[::-1].transpose(1, 2, 3, 0).copy(), isVector=True)
    moving = sitk.GetImageFromArray(out["moving"].as_tensor()[0].numpy())
    warped = sitk.Warp(moving, field, sitk.sitkLinear, moving.GetSize(), edgePaddingValue=float("nan"))
    warped = torch.from_numpy(sitk.GetArrayFromImage(warped))
    ours = Warp("bilinear", "border")(out["moving"].as_tensor()[None], out["ddf"][None])[0, 0]
    there = torch.isfinite(warped)
    assert there.float().mean() > 0.7
    torch.testing.assert_close(warped[there], ours[there], atol=1e-4, rtol=0)
    assert (warped - out["fixed"].as_tensor()[0])[there].abs().mean() < 0.02


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    shape=st.one_of(st.tuples(*[st.integers(9, 60)] * 2), st.tuples(*[st.integers(9, 24)] * 3)),
    spacing=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=3, max_size=3),
    turned=st.booleans(),
)
def test_pairs_are_exact_whatever_the_grid(scan, seed, shape, spacing, turned):
    """Landmarks follow a path traced by SciPy, going there and back misses little, nothing folds."""
    dims = len(shape)
    affine = torch.diag(torch.tensor([*spacing[:dims], *[1.0] * (4 - dims)], dtype=torch.float64))
    if turned:
        affine[:dims, :dims] = affine[:dims, :dims].flip(0)
    sample = {key: MetaTensor(value, affine=affine) for key, value in scan(shape).items()}
    middle = torch.tensor([(n - 1) / 2 for n in shape])
    sample["points"] = (middle + torch.tensor([[0.0] * dims, [1.5] * dims])).view(1, 2, dims)
    transform = pair(point_keys="points", synthesis_level=0.4, augmentation_level=0.4).set_random_state(seed)
    out = transform(sample)
    assert float(fold_fraction(out["ddf"][None])) <= 1e-4
    residual = compose_by_scipy(out["ddf"], out["inverse_ddf"])
    assert residual.mean() < 0.05
    assert residual.max() <= max(1e-2, 1.1 * float(out["inverse_residual"]))
    fixed, moving = out["fixed_points"].as_tensor()[0].numpy(), out["moving_points"].as_tensor()[0].numpy()
    known = (out["fixed_points_valid"] & out["moving_points_valid"])[0]
    for f, m, ok in zip(fixed, moving, known):
        if ok:
            assert np.abs(trace(f, out["ddf"]) - m).max() < 0.1
    assert torch.equal(out["moving"].affine, affine)


def compose_by_scipy(ddf, inverse):
    """``|inverse(x) + ddf(x + inverse(x))|`` at every voxel."""
    at = np.indices(ddf.shape[1:]) + inverse.numpy()
    back = np.stack([ndimage.map_coordinates(c, at, order=1, mode="nearest") for c in ddf.numpy()])
    return np.linalg.norm(inverse.numpy() + back, axis=0)


def test_both_images_are_resampled_once(scan):
    """The fixed image is warped from the given one: warping the moving one again would blur it more."""
    noise = {"image": torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))}
    out = pair(keys=["image"], mode="bilinear")(noise)
    twice = Warp("bilinear", "border")(out["moving"].as_tensor()[None], out["ddf"][None])[0]
    once = float(out["fixed"].as_tensor().std() / out["moving"].as_tensor().std())
    assert once == pytest.approx(1.0, abs=0.05)
    assert float(twice.std() / out["moving"].as_tensor().std()) < 0.9


def test_the_moving_image_is_that_of_the_plain_transform_with_its_record(scan):
    sample, transform = scan((50, 40)), pair()
    out = transform(sample)
    plain = RandDRDMDeformd(KEYS, mode=MODES, prob=1.0)(sample, params=transform.last.augmentation.params)
    for name, key in (("moving", "image"), ("moving_label", "label")):
        assert torch.equal(out[name].as_tensor(), plain[key].as_tensor())
    onwards = RandDRDMDeformd("image", prob=1.0)({"image": out["moving"]}, params=transform.last.synthesis.params)
    assert (onwards["image"].as_tensor() - out["fixed"].as_tensor()).abs().mean() < 0.01


def test_without_augmentation_the_moving_image_is_the_given_one(scan):
    sample = scan((40, 44))
    out = pair(augmentation_level=None, inverse=False)(sample)
    assert torch.equal(out["moving"].as_tensor(), sample["image"])
    assert not {"inverse_ddf", "inverse_residual"} & set(out)
    expected = Warp("bilinear", "border")(sample["image"][None], out["ddf"][None])[0]
    torch.testing.assert_close(out["fixed"].as_tensor()[..., 4:-4, 4:-4], expected[..., 4:-4, 4:-4], atol=1e-4, rtol=0)


def test_not_firing_leaves_nothing_to_register(scan):
    sample, transform = scan((40, 44)), pair(prob=0.0)
    out = transform(sample)
    assert transform.last is None
    assert torch.equal(out["moving"].as_tensor(), sample["image"])
    assert torch.equal(out["fixed_label"].as_tensor(), sample["label"])
    assert float(out["ddf"].abs().max()) == float(out["inverse_ddf"].abs().max()) == float(out["inverse_residual"]) == 0
    fired = pair()(sample)
    assert {key: (value.shape, value.dtype) for key, value in out.items()} == {
        key: (value.shape, value.dtype) for key, value in fired.items()
    }


def test_replay_records_and_seeds(scan):
    sample, transform = {**scan((48, 40)), "name": "case 1"}, pair(seed_key="name")
    out = transform(sample)
    again = transform(sample, randomize=False)
    record = PairParams.from_json(transform.last.params.to_json())
    assert record == transform.last.params
    replayed = pair(prob=0.0)(sample, params=record)
    other = pickle.loads(pickle.dumps(pair(seed_key="name"))).set_random_state(99)(sample)
    for found in (again, replayed, other):
        assert torch.equal(found["ddf"], out["ddf"])
        assert torch.equal(found["fixed"].as_tensor(), out["fixed"].as_tensor())
    assert transform.last.params.augmentation.seed != transform.last.params.synthesis.seed
    assert not torch.equal(transform({**sample, "name": "case 2"})["ddf"], out["ddf"])


def test_inverse_brings_both_sides_back(scan):
    sample, transform = scan((64, 56)), pair(point_keys="points")
    sample["points"] = torch.tensor([[[30.0, 25.0], [20.5, 33.0]]])
    out = transform(sample)
    back = transform.inverse(out)
    for side in ("moving", "fixed"):
        changed = (out[side].as_tensor() - sample["image"]).abs()[..., 8:-8, 8:-8].mean()
        left = (back[side].as_tensor() - sample["image"]).abs()[..., 8:-8, 8:-8].mean()
        assert left < 0.2 * changed
        torch.testing.assert_close(back[f"{side}_points"].as_tensor(), sample["points"], atol=1e-2, rtol=0)


def test_inverse_takes_back_the_latest_call_only(scan):
    transform = pair(point_keys="points")
    first = transform(scan((64, 56)) | {"points": torch.tensor([[[30.0, 25.0]]])})
    given = {"image": first["fixed"], "label": first["fixed_label"], "points": first["fixed_points"]}
    back = transform.inverse(transform(given))
    for side in ("moving", "fixed"):
        assert len(back[side].applied_operations) == len(given["image"].applied_operations) == 1
        torch.testing.assert_close(back[f"{side}_points"].as_tensor(), given["points"].as_tensor(), atol=1e-2, rtol=0)
        assert len(back[f"{side}_points"].applied_operations) == len(given["points"].applied_operations) == 2


def test_records_of_other_transforms_are_refused(scan):
    transform = RandDRDMDeformd(KEYS, mode=MODES, prob=1.0, steps=3)
    transform(scan((20, 20)))
    with pytest.raises(TypeError, match=r"params must be PairParams, .* got DeformationParams"):
        pair()(scan((20, 20)), params=transform.last.params)


def test_workers_make_the_pairs_of_their_names(scan):
    data = [{**scan((33, 33)), "name": f"case {i}"} for i in range(4)]
    transform = pair(seed_key="name", steps=1)
    expected = [transform(one) for one in data]
    loader = DataLoader(Dataset(data, transform), batch_size=2, num_workers=2)
    ddf = torch.cat([batch["ddf"] for batch in loader])
    assert torch.equal(ddf, torch.stack([one["ddf"] for one in expected]))


def test_an_in_plane_field_moves_a_stack(scan):
    out = pair(slice_axis=2)(scan((40, 36, 5)))
    assert float(out["ddf"][2].abs().max()) == 0
    assert torch.equal(out["ddf"][:2, ..., 0], out["ddf"][:2, ..., 4])
    assert out["ddf"][:2].abs().max() > 0.5


def test_spacing_makes_fields_alike_in_millimetres(scan):
    """A volume that is half as fine along one axis moves half as many voxels along it."""
    fine = scan((48, 48))["image"]
    coarse = fine[..., ::2]
    fields = []
    for image, spacing in ((fine, (1.0, 1.0)), (coarse, (1.0, 2.0))):
        transform = RandDRDMPaird("image", pixdim=spacing, synthesis_level=0.5, augmentation_level=None, steps=3)
        fields.append(transform.set_random_state(0)({"image": image})["ddf"])
    mm = [float(ddf[1].abs().mean()) * step for ddf, step in zip(fields, (1.0, 2.0))]
    assert mm[1] == pytest.approx(mm[0], rel=0.25)
    assert resize_ddf(fields[1][None], (48, 48)).shape == fields[0][None].shape


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ({"moving": 0}, ValueError, r"\['moving'\], which the data hold already"),
        ({"ddf": 0}, ValueError, r"\['ddf'\]"),
        ({"image": None}, TypeError, "image"),
    ],
)
def test_refuses_samples_that_do_not_fit(scan, data, error, says):
    with pytest.raises(error, match=says):
        pair()({**scan((20, 20)), **data})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_key": "other"}, "image_key must be one of keys"),
        ({"on_fold": "skip"}, "on_fold='skip'"),
        ({"augmentation_level": 0.0}, "deformation_level"),
        ({"synthesis_level": 2}, "deformation_level"),
    ],
)
def test_refuses_arguments_out_of_range(options, says):
    with pytest.raises(ValueError, match=says):
        pair(**options)


def test_a_missing_image_key_is_named(scan):
    sample = scan((20, 20))
    del sample["image"]
    with pytest.raises(KeyError, match="image"):
        pair(allow_missing_keys=True)(sample)


@pytest.mark.parametrize("text", ["", "{}", '{"augmentation": null, "synthesis": {}}', "[]"])
def test_records_are_checked(text):
    with pytest.raises(ValueError, match="cannot be read as a record"):
        PairParams.from_json(text)


@pytest.mark.parametrize("options", [{"prob": 0.0}, {"augmentation_level": None}])
def test_what_is_done_to_the_pair_in_place_changes_neither_the_sample_nor_the_other_image(scan, small_network, options):
    sample = scan((40, 32))
    before = sample["image"].clone()
    pair = RandDRDMPaird(["image", "label"], mode=["bilinear", "nearest"], network=small_network(2), **options)
    made = pair.set_random_state(0)(sample)
    fixed = made["fixed"].clone()
    made["moving"].fill_(9.0)
    made["moving_label"].fill_(1)
    assert torch.equal(torch.as_tensor(sample["image"]), torch.as_tensor(before))
    assert torch.equal(torch.as_tensor(made["fixed"]), torch.as_tensor(fixed))
    assert int(sample["label"].max()) > 1
