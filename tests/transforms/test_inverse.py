"""Taking a deformation back, and the records that make it possible."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, PersistentDataset, set_track_meta, TestTimeAugmentation
from monai.networks.blocks import Warp
from monai.transforms import (
    Compose,
    EnsureTyped,
    Flipd,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandRotate90d,
    RandSpatialCropd,
    RandSpatialCropSamplesd,
    RandWeightedCropd,
)
from monai.transforms.utils import reset_ops_id
from monai.utils import TraceKeys

from monai_drdm import ApplyDDFd, RandDRDMDeform, RandDRDMDeformd
from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.transforms import DeformationParams

KEYS = ("image", "label")
MODES = ("bilinear", "nearest")
SHAPES = [(96, 96), (40, 44, 36)]


def deform(network, **options):
    options = {"prob": 1.0, "mode": MODES, "deformation_level": 0.4, **options}
    return RandDRDMDeformd(KEYS, network=network, **options).set_random_state(1)


def deform_array(network, **options):
    options = {"prob": 1.0, "deformation_level": 0.4, **options}
    return RandDRDMDeform(network, **options).set_random_state(1)


def network_for(small_network, shape):
    return small_network(len(shape), 48 if len(shape) == 2 else 16)


def folding(small_network, **options):
    """A transform whose every draw folds somewhere."""
    options = {"max_fold_fraction": 0.0, "deformation_level": 0.3, "sampler": "reference", **options}
    return deform(small_network(2, 16, scale=30.0), **options)


def interior(data, margin=6):
    return torch.as_tensor(data)[(slice(None), *(slice(margin, -margin),) * (data.ndim - 1))]


def dice(found, truth):
    found, truth = found.as_tensor(), torch.as_tensor(truth)
    present = [int(one) for one in truth.unique() if one > 0]
    scores = [
        2.0 * ((found == one) & (truth == one)).sum() / ((found == one).sum() + (truth == one).sum()) for one in present
    ]
    return float(torch.stack(scores).mean())


def metas(sample):
    """MetaTensors with an affine, a name and a list in their metadata, and a record of their own each."""
    affine = torch.diag(torch.tensor([1.5, 0.5, 2.0, 1.0], dtype=torch.float64))
    made = {
        key: MetaTensor(value.clone(), affine=affine, meta={"name": key, "log": [1]}) for key, value in sample.items()
    }
    return Flipd(KEYS, spatial_axis=0)(made)


def names(data):
    return [operation["class"] for operation in data.applied_operations]


def snapshot(data):
    return {
        key: (value.as_tensor().clone(), copy.deepcopy(value.meta), copy.deepcopy(value.applied_operations))
        for key, value in data.items()
    }


def assert_unchanged(data, before):
    for key, (values, meta, operations) in before.items():
        assert torch.equal(data[key].as_tensor(), values)
        assert data[key].applied_operations == operations
        assert set(data[key].meta) == set(meta)
        assert all(data[key].meta[name] == meta[name] for name in ("name", "log"))
        assert torch.equal(data[key].affine, meta["affine"])


# there and back


@pytest.mark.parametrize("shape", SHAPES)
def test_dictionary_there_and_back(small_network, scan, shape):
    sample = scan(shape)
    transform = deform(network_for(small_network, shape))
    out = transform(sample)
    assert transform.last.statistics.fold_fraction == 0
    back = transform.inverse(out)
    moved = (interior(out["image"]) - interior(sample["image"])).abs()
    missed = (interior(back["image"]) - interior(sample["image"])).abs()
    assert moved.mean() > 0.03
    assert missed.mean() < 0.004
    assert missed.mean() < 0.05 * moved.mean()
    assert dice(out["label"], sample["label"]) < 0.9
    assert dice(back["label"], sample["label"]) >= 0.95
    assert back["label"].dtype == sample["label"].dtype
    assert back["image"].shape == sample["image"].shape


@pytest.mark.parametrize("shape", SHAPES)
def test_array_there_and_back(small_network, scan, shape):
    sample = scan(shape)
    network = network_for(small_network, shape)
    transform = deform_array(network)
    out = transform(sample["image"])
    missed = (interior(transform.inverse(out)) - interior(sample["image"])).abs()
    assert (interior(out) - interior(sample["image"])).abs().mean() > 0.03
    assert missed.mean() < 0.004
    nearest = deform_array(network, mode="nearest")
    assert dice(nearest.inverse(nearest(sample["label"])), sample["label"]) >= 0.95


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("working_size", [32, 64])
def test_labels_return_over_many_fields(small_network, scan, working_size, seed):
    sample = scan((96, 80))
    transform = deform(small_network(2, working_size)).set_random_state(seed)
    back = transform.inverse(transform(sample))
    assert dice(back["label"], sample["label"]) >= 0.95


def test_modes_label_and_bicubic_return(small_network, scan):
    sample = scan((96, 96))
    transform = deform(small_network(2, 48), mode=("bicubic", "label"))
    back = transform.inverse(transform(sample))
    assert (interior(back["image"]) - interior(sample["image"])).abs().mean() < 0.004
    assert dice(back["label"], sample["label"]) >= 0.95


def test_inverse_is_warping_by_the_inverse_field(small_network, scan):
    """MONAI's own Warp with the field that ``.last`` says undoes it gives what ``inverse`` gives."""
    sample = scan((64, 72))
    transform = deform(small_network(2))
    out = transform(sample)
    back = transform.inverse(out)
    expected = Warp("bilinear", "border")(out["image"].as_tensor()[None], transform.last.inverse_ddf[None])[0]
    torch.testing.assert_close(interior(back["image"]), interior(expected), atol=1e-4, rtol=0)


def test_padding_mode_of_the_call_is_that_of_the_inverse(small_network):
    ones = torch.ones(1, 48, 48)
    shift = torch.zeros(2, 48, 48)
    shift[0] = 6.0
    transform = deform_array(small_network(2), padding_mode="zeros")
    out = transform(ones, field=shift)
    assert out.applied_operations[-1]["extra_info"]["padding_mode"] == "zeros"
    back = transform.inverse(out).as_tensor()
    rows = torch.arange(48)[None, :, None].expand(1, 48, 48)
    torch.testing.assert_close(out.as_tensor(), (rows < 42).float(), atol=1e-5, rtol=0)  # out(x) = in(x + 6)
    torch.testing.assert_close(back, (rows >= 6).float(), atol=1e-5, rtol=0)  # back(x) = out(x - 6)
    border = transform.inverse(transform(ones, padding_mode="border", field=shift))
    torch.testing.assert_close(border.as_tensor(), ones, atol=1e-5, rtol=0)


def test_a_given_shift_returns_exactly(small_network, scan):
    sample = scan((40, 48))
    shift = torch.zeros(2, 40, 48)
    shift[0], shift[1] = 3.0, -2.0
    transform = deform(small_network(2))
    back = transform.inverse(transform(sample, field=shift))
    assert torch.equal(interior(back["label"]), interior(sample["label"]))
    torch.testing.assert_close(interior(back["image"]), interior(sample["image"]), atol=1e-5, rtol=0)


def test_stack_of_slices_there_and_back(small_network, scan):
    sample = scan((64, 5, 64))
    transform = deform(small_network(2), slice_axis=1)
    out = transform(sample)
    assert dice(out["label"], sample["label"]) < 0.9
    assert dice(transform.inverse(out)["label"], sample["label"]) >= 0.95


def test_a_real_cardiac_slice_there_and_back(data, published_weights):
    with np.load(data / "acdc" / "acdc2d_160.npz") as file:
        images, labels, patients, slices = (file[name] for name in ("image", "label", "patient", "slice"))
    index = int(np.flatnonzero((patients == 70) & (slices == 4))[0])
    transform = deform("zheng2026-cmr-2d", deformation_level=0.6).set_random_state(3)
    sample = {
        "image": torch.from_numpy(images[index])[None].float() / 255,
        "label": torch.from_numpy(labels[index])[None],
    }
    assert set(sample["label"].unique().tolist()) == {0, 1, 2, 3}
    out = transform(sample)
    assert dice(out["label"], sample["label"]) < 0.85
    assert dice(transform.inverse(out)["label"], sample["label"]) >= 0.95


# records


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_one_record_per_key_and_none_after_the_inverse(small_network, scan, prob):
    sample = metas(scan((40, 40)))
    transform = deform(small_network(2), prob=prob)
    out = transform(sample)
    for key in KEYS:
        assert names(out[key]) == ["Flip", "RandDRDMDeformd"]
        assert out[key].applied_operations[-1][TraceKeys.DO_TRANSFORM] is bool(prob)
    back = transform.inverse(out)
    for key in KEYS:
        assert names(back[key]) == ["Flip"]
        if prob == 0:
            assert torch.equal(back[key].as_tensor(), sample[key].as_tensor())


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_neither_way_touches_its_input(small_network, scan, prob):
    sample = metas(scan((40, 40)))
    transform = deform(small_network(2), prob=prob)
    before = snapshot(sample)
    out = transform(sample)
    assert_unchanged(sample, before)
    after = snapshot(out)
    back = transform.inverse(out)
    assert_unchanged(out, after)
    for key in KEYS:  # nor do later edits of the outputs reach it
        for result in (out, back):
            result[key].meta["log"].append(2)
            result[key].affine[0, 3] = 7.0
            result[key].applied_operations.clear()
            if prob > 0:  # an idle call hands the values themselves on, as MONAI's transforms do
                result[key].as_tensor().zero_()
    assert_unchanged(sample, before)


def test_array_form_touches_no_input(small_network, scan):
    image = metas(scan((40, 40)))["image"]
    transform = deform_array(small_network(2))
    before = snapshot({"image": image})
    out = transform(image)
    after = snapshot({"image": out})
    back = transform.inverse(out)
    assert_unchanged({"image": image}, before)
    assert_unchanged({"image": out}, after)
    assert names(out) == ["Flip", "RandDRDMDeform"]
    assert names(back) == ["Flip"]


def test_metadata_returns(small_network, scan):
    sample = metas(scan((40, 40)))
    transform = deform(small_network(2))
    back = transform.inverse(transform(sample))
    for key in KEYS:
        torch.testing.assert_close(back[key].affine, sample[key].affine, rtol=0, atol=0)
        assert back[key].meta["name"] == key


def test_records_of_others_stay_in_order(small_network, scan):
    sample = scan((48, 48))
    transform = deform(small_network(2))
    pipeline = Compose([RandFlipd(KEYS, prob=1, spatial_axis=0), transform, RandRotate90d(KEYS, prob=1)])
    out = pipeline({key: MetaTensor(value.clone()) for key, value in sample.items()})
    expected = {key: [copy.deepcopy(out[key].applied_operations[i]) for i in (0, 2)] for key in KEYS}
    back = transform.inverse(out)
    for key in KEYS:
        assert names(out[key]) == ["RandFlipd", "RandDRDMDeformd", "RandRotate90d"]
        assert names(back[key]) == ["RandFlipd", "RandRotate90d"]
        assert back[key].applied_operations == expected[key]


def test_pipeline_returns_whole(small_network, scan):
    sample = scan((96, 96))
    pipeline = Compose(
        [RandFlipd(KEYS, prob=1, spatial_axis=0), deform(small_network(2, 48)), RandRotate90d(KEYS, prob=1, max_k=1)]
    ).set_random_state(0)
    out = pipeline({key: MetaTensor(value.clone()) for key, value in sample.items()})
    back = pipeline.inverse(out)
    assert dice(back["label"], sample["label"]) >= 0.95
    assert (interior(back["image"]) - interior(sample["image"])).abs().mean() < 0.004
    assert back["image"].applied_operations == []


def test_a_foreign_transform_cannot_take_the_record(small_network, scan):
    out = deform(small_network(2))({key: MetaTensor(value) for key, value in scan((32, 32)).items()})
    with pytest.raises(RuntimeError, match="RandDRDMDeformd"):
        RandFlipd(KEYS, prob=1).inverse(out)
    foreign = ApplyDDFd(KEYS, torch.zeros(2, 32, 32), mode=MODES)
    with pytest.raises(ValueError, match="no record of this transform"):
        foreign.inverse(out)
    with pytest.raises(ValueError, match="no record of this transform"):
        deform_array(small_network(2)).inverse(out["image"])


def test_two_instances_take_their_own_records(small_network, scan):
    sample = scan((64, 64))
    first, second = deform(small_network(2)), deform(small_network(2)).set_random_state(9)
    once = first(sample)
    twice = second(once)
    fields = [twice["image"].applied_operations[i]["extra_info"]["field"] for i in (0, 1)]
    back = first.inverse(twice)
    (left,) = back["image"].applied_operations
    assert left["extra_info"]["field"] is fields[1]
    expected = Warp("bilinear", "border")(twice["image"].as_tensor()[None], fields[0].inverse().ddf)[0]
    torch.testing.assert_close(interior(back["image"]), interior(expected), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="no record of this transform"):
        first.inverse(back)
    with pytest.raises(ValueError, match="no record of this transform"):
        second.inverse(once)


def test_the_same_instance_twice_returns_last_first(small_network, scan):
    sample = scan((96, 96))
    transform = deform(small_network(2, 48), deformation_level=0.3)
    once = transform(sample)
    twice = transform(once)
    fields = [one["extra_info"]["field"] for one in twice["image"].applied_operations]
    assert not torch.equal(fields[0].ddf(), fields[1].ddf())
    back = transform.inverse(twice)
    assert back["image"].applied_operations[0]["extra_info"]["field"] is fields[0]
    assert (interior(back["image"]) - interior(once["image"])).abs().mean() < 0.004
    home = transform.inverse(back)
    assert dice(home["label"], sample["label"]) >= 0.93  # four times to the nearest
    assert (interior(home["image"], 12) - interior(sample["image"], 12)).abs().mean() < 0.006
    with pytest.raises(ValueError, match="inverted already"):
        transform.inverse(home)


def test_fired_idle_and_skipped_records_have_the_same_entries(small_network, scan):
    sample = {**scan((32, 32)), "points": torch.rand(1, 5, 2) * 31, "boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]])}
    keys = (*KEYS, "points", "boxes")
    transforms = [
        deform(small_network(2), point_keys="points", box_keys="boxes", prob=1.0),
        deform(small_network(2), point_keys="points", box_keys="boxes", prob=0.0),
        folding(small_network, point_keys="points", box_keys="boxes", on_fold="skip"),
    ]
    outs = [transform(sample) for transform in transforms]
    for key in keys:
        records = [out[key].applied_operations[-1] for out in outs]
        assert [record[TraceKeys.DO_TRANSFORM] for record in records] == [True, False, False]
        assert len({frozenset(record) for record in records}) == 1
        infos = [record[TraceKeys.EXTRA_INFO] for record in records]
        assert len({frozenset(info) for info in infos}) == 1
        assert all(isinstance(info["params"], str) for info in infos)
        for info in infos:
            assert {type(a) for a in info.values()} == {type(a) for a in infos[0].values()}
            assert None not in [value for value in info.values() if not isinstance(value, torch.Tensor)]
    skipping = transforms[2]
    assert skipping.last.statistics.fold_action == "skip"
    assert_replays(skipping, sample, folding(small_network, point_keys="points", box_keys="boxes", on_fold="raise"))
    back = skipping.inverse(outs[2])
    for key in keys:
        assert torch.equal(back[key].as_tensor(), sample[key])
        assert back[key].applied_operations == []


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_modes_stand_in_the_record(small_network, scan, prob):
    transform = deform(small_network(2), prob=prob, padding_mode=("zeros", "reflection"))
    out = transform(scan((32, 32)))
    infos = {key: out[key].applied_operations[-1]["extra_info"] for key in KEYS}
    assert [infos[key]["mode"] for key in KEYS] == ["bilinear", "nearest"]
    assert [infos[key]["padding_mode"] for key in KEYS] == ["zeros", "reflection"]
    overridden = deform_array(small_network(2), prob=prob)(scan((32, 32))["image"], mode="nearest")
    assert overridden.applied_operations[-1]["extra_info"]["mode"] == "nearest"


def test_the_field_is_shared_between_keys_and_by_copies(small_network, scan):
    out = deform(small_network(2))(scan((32, 32)))
    field = out["image"].applied_operations[-1]["extra_info"]["field"]
    for carrier in (out["label"], out["image"].clone(), copy.deepcopy(out["image"]), copy.deepcopy(out)["label"]):
        assert carrier.applied_operations[-1]["extra_info"]["field"] is field


def test_records_are_small(small_network, scan):
    out = deform(small_network(2, 64))(scan((256, 256)))
    (record,) = out["image"].applied_operations
    field = record["extra_info"]["field"]
    assert field.values.dtype == torch.int16
    assert field.values.shape == (2, 64, 64)
    assert len(pickle.dumps(record)) < 64_000
    assert len(pickle.dumps(out["image"])) - len(pickle.dumps(MetaTensor(out["image"].as_tensor()))) < 64_000


# what the record holds is what was applied


def assert_stored_is_applied(transform, out):
    stored = [out[key].applied_operations[-1]["extra_info"]["field"] for key in KEYS]
    for field in stored:
        assert torch.equal(field.ddf(), transform.last.ddf)
    assert transform.last.ddf.norm(dim=0).max() > 0.5


@pytest.mark.parametrize("shape", [(50, 70), (24, 20, 28)])
def test_stored_field_is_the_applied_one(small_network, scan, shape):
    transform = deform(small_network(len(shape), 16))
    sample = scan(shape)
    out = transform(sample)
    assert_stored_is_applied(transform, out)
    expected = Warp("bilinear", "border")(sample["image"][None], transform.last.ddf[None])[0]
    torch.testing.assert_close(interior(out["image"], 2), interior(expected, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("limit", [0.7, 2.0, 5.0])
def test_stored_field_keeps_the_displacement_limit(small_network, scan, limit):
    spacing = (1.5, 0.5)
    transform = deform(small_network(2), max_displacement_mm=limit, pixdim=spacing, deformation_level=0.8)
    out = transform(scan((60, 90)))
    stored = out["image"].applied_operations[-1]["extra_info"]["field"].ddf()
    assert torch.equal(stored, transform.last.ddf)
    largest = (stored.double() * torch.tensor(spacing).double().view(2, 1, 1)).norm(dim=0).max()
    assert 0.99 * limit < largest <= limit
    assert transform.last.params.scale < 1


@pytest.mark.parametrize("policy", ["rescale", "resample", "keep"])
def test_what_a_fold_policy_left_is_stored_and_replays(small_network, scan, policy):
    sample = scan((40, 40))
    transform = folding(small_network, on_fold=policy)
    out = transform(sample)
    assert transform.last.statistics.fold_action != "none"
    assert_stored_is_applied(transform, out)
    assert_replays(transform, sample, folding(small_network, on_fold="raise"))


def assert_replays(transform, sample, other):
    other(sample, params=DeformationParams.from_json(transform.last.params.to_json()))
    assert torch.equal(other.last.ddf, transform.last.ddf)


@pytest.mark.parametrize("slice_axis", [0, 1, 2])
def test_stored_field_of_a_stack(small_network, scan, slice_axis):
    shape = [30, 34]
    shape.insert(slice_axis, 4)
    transform = deform(small_network(2), slice_axis=slice_axis)
    out = transform(scan(tuple(shape)))
    field = out["image"].applied_operations[-1]["extra_info"]["field"]
    assert torch.equal(field.ddf(), transform.last.ddf)
    assert field.ddf().shape == (3, *shape)
    assert field.ddf()[slice_axis].abs().max() == 0
    assert field.values.shape[0] == 2
    assert len(pickle.dumps(field)) < 10_000  # one slice, not the stack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_fields_are_stored_exactly(small_network, scan, dtype):
    field = torch.randn(2, 40, 40, generator=torch.Generator().manual_seed(0), dtype=dtype) * 1.234567
    transform = deform(small_network(2))
    out = transform(scan((40, 40)), field=field)
    given = field.clone()
    field.zero_()  # what the caller does later is not what was applied
    stored = out["image"].applied_operations[-1]["extra_info"]["field"].ddf()
    assert stored.dtype == dtype
    assert torch.equal(stored, given)


def test_replay_stores_the_same_field(small_network, scan):
    sample = scan((40, 48))
    transform = deform(small_network(2))
    out = transform(sample)
    again = deform(small_network(2))(sample, params=transform.last.params)
    fields = [one["image"].applied_operations[-1]["extra_info"]["field"] for one in (out, again)]
    assert torch.equal(fields[0].values, fields[1].values)
    assert fields[0].step == fields[1].step


# calls that leave nothing to take back, and misuse


def test_not_invertible(small_network, scan):
    transform = deform(small_network(2), invertible=False)
    out = transform({key: MetaTensor(value) for key, value in scan((32, 32)).items()})
    assert [out[key].applied_operations for key in KEYS] == [[], []]
    with pytest.raises(ValueError, match="invertible=False"):
        transform.inverse(out)
    array = deform_array(small_network(2), invertible=False)
    with pytest.raises(ValueError, match="invertible=False"):
        array.inverse(array(scan((32, 32))["image"]))


def test_data_without_metadata(small_network, scan):
    sample = scan((32, 32))
    with pytest.raises(TypeError, match=r"'image' must be a MetaTensor.*got Tensor"):
        deform(small_network(2)).inverse(sample)
    with pytest.raises(TypeError, match="MetaTensor"):
        deform_array(small_network(2)).inverse(sample["image"].numpy())


def test_untracked_metadata(small_network, scan):
    sample = {key: MetaTensor(value) for key, value in scan((32, 32)).items()}
    transform = deform(small_network(2))
    tracked = transform(sample)
    try:
        set_track_meta(False)
        out = transform(sample, randomize=False)
        idle = deform(small_network(2), prob=0.0)(sample)
        assert [type(one[key]) for one in (out, idle) for key in KEYS] == [torch.Tensor] * 4
        array = deform_array(small_network(2))(sample["image"])
        assert type(array) is torch.Tensor
        with pytest.raises(TypeError, match="set_track_meta"):
            transform.inverse(out)
        back = transform.inverse(tracked)  # made while it was tracked
    finally:
        set_track_meta(True)
    assert torch.equal(out["image"], tracked["image"].as_tensor())
    assert type(back["label"]) is torch.Tensor
    assert torch.equal(back["label"], transform.inverse(tracked)["label"].as_tensor())


def test_untraced_calls_leave_no_record(small_network, scan):
    transform = deform(small_network(2))
    with transform.trace_transform(False):
        out = transform(scan((32, 32)))
    assert [out[key].applied_operations for key in KEYS] == [[], []]
    with pytest.raises(ValueError, match="tracing off"):
        transform.inverse(out)
    assert names(transform(scan((32, 32)))["image"]) == ["RandDRDMDeformd"]


def test_data_of_another_shape(small_network, scan):
    transform = deform(small_network(2))
    out = transform(scan((32, 40)))
    out["image"] = out["image"][:, :, :-1]
    with pytest.raises(ValueError, match=r"'image' must have the spatial shape \(32, 40\).*got \(32, 39\)"):
        transform.inverse(out)


CROPS = [
    RandCropByPosNegLabeld(KEYS, "label", (24, 27), num_samples=2),
    RandSpatialCropSamplesd(KEYS, (24, 27), num_samples=2, random_size=False),
    RandWeightedCropd(KEYS, "label", (24, 27), num_samples=2),
]


@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize("crop", CROPS, ids=lambda one: type(one).__name__)
def test_patches_return_to_where_they_were_cut_from(small_network, scan, crop, prob):
    """MONAI has no inverse of crops of several samples. Around the patch there is nothing, as with its other crops."""
    sample = scan((49, 40))
    transform = deform(small_network(2), prob=prob)
    pipeline = Compose([EnsureTyped(KEYS), transform, crop, RandFlipd(KEYS, prob=1, spatial_axis=0)]).set_random_state(
        2
    )
    for patch in pipeline(sample):
        row, column = (int(n) for n in patch["image"].affine[:2, 3])
        last = row - 23 if patch["image"].affine[0, 0] < 0 else row  # the patch was flipped
        back = pipeline.inverse({key: patch[key] for key in KEYS})
        field = back_field(transform, (49, 40))
        for key, mode in zip(KEYS, MODES):
            placed = torch.zeros(1, 1, 49, 40)
            placed[0, :, last : last + 24, column : column + 27] = patch[key].as_tensor().flip(1).float()
            expected = Warp(mode, "border")(placed, field)[0]
            torch.testing.assert_close(back[key].as_tensor().float(), expected, atol=1e-4, rtol=0)
            assert back[key].applied_operations == []
            assert torch.equal(back[key].affine, torch.eye(4, dtype=torch.float64))
            assert back[key].dtype == patch[key].dtype


def back_field(transform, shape):
    return torch.zeros(1, 2, *shape) if transform.last is None else transform.last.inverse_ddf[None]


def test_shapes_that_cannot_be_taken_back_say_what_came_later(small_network, scan):
    transform = deform(small_network(2))
    crop = RandSpatialCropd(KEYS, (20, 20), random_size=False)
    patch = crop(transform(scan((40, 40))))
    with pytest.raises(ValueError, match=r"got \(20, 20\)\. Take back RandSpatialCrop first, which came later"):
        transform.inverse(patch)
    sample = CROPS[0](transform(scan((40, 40))))[0]
    flipped = Flipd(KEYS, spatial_axis=0)(sample)
    with pytest.raises(ValueError, match="Take back RandCropByPosNegLabel, Flip first"):
        transform.inverse(flipped)


def test_test_time_augmentation_with_crops_of_varying_size(small_network, scan):
    """MONAI leaves the padding of a batch on predictions. One sample a batch needs none."""
    sample = scan((40, 40))
    crop = RandSpatialCropd(KEYS, (16, 16), max_roi_size=(36, 36), random_size=True)
    steps = [EnsureTyped(KEYS), deform(small_network(2)), crop]

    def augmented(batch_size):
        pipeline = Compose(steps).set_random_state(3)
        settings = {"inferrer_fn": lambda image: image * 1.0, "orig_key": "image", "return_full_data": True}
        return TestTimeAugmentation(pipeline, batch_size, 0, progress=False, **settings)(sample, num_examples=4)

    for one in augmented(1):
        seen = one != 0
        assert seen.float().mean() > 0.1
        assert (one - sample["image"])[seen].abs().median() < 0.02
    with pytest.raises(RuntimeError) as error:
        augmented(4)
    assert "use batch_size=1" in str(error.value.__cause__)


def test_pending_operations_on_top(small_network, scan):
    transform = deform(small_network(2))
    out = Flipd(KEYS, spatial_axis=0, lazy=True)(transform(scan((32, 40))))
    assert out["image"].has_pending_operations
    with pytest.raises(ValueError, match="pending lazy operations"):
        transform.inverse(out)


def test_missing_keys(small_network, scan):
    transform = deform(small_network(2))
    out = transform(scan((32, 32)))
    with pytest.raises(KeyError, match="label"):
        transform.inverse({"image": out["image"]})
    lenient = deform(small_network(2), allow_missing_keys=True)
    out = lenient(scan((32, 32)))
    alone = lenient.inverse({"label": out["label"]})
    assert set(alone) == {"label"}
    assert torch.equal(alone["label"].as_tensor(), lenient.inverse(out)["label"].as_tensor())


# other processes, caches and files


@pytest.mark.parametrize("travel", [lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy, copy.copy])
def test_copies_take_the_records_of_the_original(small_network, scan, travel):
    sample = scan((48, 48))
    transform = deform(small_network(2))
    out = transform(sample)
    expected = transform.inverse(out)
    traveller = travel(transform)
    assert traveller is not transform
    for one, data in ((traveller, out), (transform, traveller(sample, params=transform.last.params))):
        back = one.inverse(data)
        for key in KEYS:
            assert torch.equal(back[key].as_tensor(), expected[key].as_tensor())
            assert back[key].applied_operations == []


def test_data_that_travelled(small_network, scan):
    transform = deform(small_network(2))
    out = transform(scan((48, 48)))
    travelled = pickle.loads(pickle.dumps(out))
    expected, back = transform.inverse(out), transform.inverse(travelled)
    assert torch.equal(back["image"].as_tensor(), expected["image"].as_tensor())


def test_erased_ids(small_network, scan):
    sample = scan((48, 48))
    first, second = deform(small_network(2)), deform(small_network(2)).set_random_state(9)
    out = reset_ops_id(second(first(sample)))
    assert {one[TraceKeys.ID] for one in out["image"].applied_operations} == {TraceKeys.NONE}
    fields = [one["extra_info"]["field"] for one in out["image"].applied_operations]
    for transform, left in ((first, fields[1]), (second, fields[0])):
        (record,) = transform.inverse(out)["image"].applied_operations
        assert record["extra_info"]["field"] is left
    stranger = deform(small_network(2))
    (record,) = stranger.inverse(out)["image"].applied_operations
    assert record["extra_info"]["field"] is fields[0]  # it takes the latest
    with pytest.raises(ValueError, match="no record of this transform"):
        ApplyDDFd(KEYS, torch.zeros(2, 48, 48), mode=MODES).inverse(out)
    with pytest.raises(ValueError, match="no record of this transform"):
        deform_array(small_network(2)).inverse(out["image"])


def test_persistent_cache(small_network, scan, tmp_path):
    """What stands before the random part is cached on disk, records and fields included, with ids erased."""
    sample = scan((48, 48))
    wave = 3 * torch.sin(torch.linspace(0, 3.14, 48))
    smooth = torch.stack([wave[:, None].expand(48, 48), torch.zeros(48, 48)])

    def dataset():
        pipeline = Compose([EnsureTyped(KEYS), ApplyDDFd(KEYS, smooth, mode=MODES), deform(small_network(2))])
        return PersistentDataset([sample], pipeline.set_random_state(0), cache_dir=tmp_path, track_meta=True)

    first = dataset()[0]
    (cached,) = tmp_path.glob("*.pt")
    written = cached.stat().st_mtime_ns
    again = dataset()
    out = again[0]
    assert cached.stat().st_mtime_ns == written  # it was read, not made again
    for key in KEYS:
        assert torch.equal(out[key].as_tensor(), first[key].as_tensor())
        assert names(out[key]) == ["ApplyDDFd", "RandDRDMDeformd"]
        assert out[key].applied_operations[0][TraceKeys.ID] == TraceKeys.NONE
        assert torch.equal(out[key].applied_operations[0]["extra_info"]["field"].ddf(), smooth)
    back = again.transform.inverse(out)
    assert back["image"].applied_operations == []
    assert dice(out["label"], sample["label"]) < 0.9
    assert dice(back["label"], sample["label"]) >= 0.93


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_saved_tensors_load_with_weights_only(small_network, scan, prob):
    transform = deform(small_network(2), prob=prob)
    out = transform(scan((48, 48)))
    buffer = io.BytesIO()
    torch.save(out, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    field = loaded["image"].applied_operations[-1]["extra_info"]["field"]
    assert isinstance(field, StoredField)
    assert torch.equal(field.ddf(), transform.last.ddf if prob else torch.zeros(2, 48, 48))
    back, expected = transform.inverse(loaded), transform.inverse(out)
    assert torch.equal(back["label"].as_tensor(), expected["label"].as_tensor())


# what was computed from the outputs


def test_predictions_return(small_network, scan):
    """Channels, dtype and values may differ from what was deformed; the record and the grid count."""
    sample = scan((64, 64))
    transform = deform(small_network(2))
    out = transform(sample)
    image = out["image"]
    prediction = torch.cat([image, 1 - image, 2 * image]).double()
    assert isinstance(prediction, MetaTensor)
    back = transform.inverse({"image": prediction, "label": out["label"]})["image"]
    single = transform.inverse(out)["image"].as_tensor().double()
    assert back.dtype == torch.float64
    torch.testing.assert_close(back.as_tensor(), torch.cat([single, 1 - single, 2 * single]), atol=1e-4, rtol=0)


def test_segmentations_return(small_network, scan):
    sample = scan((96, 96))
    transform = deform(small_network(2, 48))
    out = transform(sample)
    onehot = torch.cat([(out["label"] == one).float() for one in range(3)])
    segmentation = onehot.argmax(dim=0, keepdim=True)
    assert isinstance(segmentation, MetaTensor)
    assert segmentation.dtype == torch.int64
    back = transform.inverse({"image": out["image"], "label": segmentation})["label"]
    assert back.dtype == torch.int64
    assert torch.equal(back.as_tensor(), transform.inverse(out)["label"].as_tensor().long())
    # under the record of the image it is interpolated, as any integer image
    assert (
        transform.inverse({"image": segmentation.copy_meta_from(out["image"]), "label": out["label"]})["image"].dtype
        == torch.float32
    )


def test_inverse_keeps_gradients(small_network, scan):
    transform = deform_array(small_network(2))
    image = scan((40, 40))["image"].requires_grad_(True)
    back = transform.inverse(transform(image))
    back.as_tensor().sum().backward()
    assert torch.isfinite(image.grad).all()
    assert image.grad.sum() == pytest.approx(40 * 40, rel=1e-3)  # each output is a weighted mean of inputs
