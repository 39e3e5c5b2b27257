from __future__ import annotations

import dataclasses
import locale
import pickle
import shutil

import numpy as np
import pytest
import torch
from monai.data import decollate_batch, list_data_collate, MetaTensor
from monai.networks.blocks import Warp

from monai_drdm import BatchRandDRDMDeformd, RandDRDMDeformd
from monai_drdm.networks import VelocityUNet
from monai_drdm.transforms import BatchRandDRDMDeformD, BatchRandDRDMDeformDict, DeformationParams

SPACINGS = [(1.5, 1.0), (1.5, 1.0), (1.0, 1.0), (1.5, 1.0), (1.0, 1.0), (1.5, 1.0)]


def affine_of(spacing):
    return torch.diag(torch.tensor([*spacing, *[1.0] * (4 - len(spacing))]))


@pytest.fixture
def samples(scan):
    """Six scans of one shape and two spacings, each named, with landmarks."""
    found = []
    for i, spacing in enumerate(SPACINGS):
        one = scan((40, 48))
        image = one["image"] * (1 + 0.1 * i) + 0.01 * i
        found.append(
            {
                "image": MetaTensor(image, affine=affine_of(spacing)),
                "label": MetaTensor(one["label"], affine=affine_of(spacing)),
                "points": torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(i)) * 30 + 5,
                "name": f"scan{i}",
            }
        )
    return found


def both(network, **options):
    """The batch form, and the per-sample form with the same settings."""
    settings = {
        "keys": ["image", "label"],
        "mode": ["bilinear", "nearest"],
        "prob": 0.6,
        "point_keys": "points",
        "seed_key": "name",
        "network": network,
        **options,
    }
    return BatchRandDRDMDeformd(**settings), RandDRDMDeformd(**settings)


def test_aliases():
    assert BatchRandDRDMDeformD is BatchRandDRDMDeformd
    assert BatchRandDRDMDeformDict is BatchRandDRDMDeformd


@pytest.mark.parametrize("space", ["voxel", "world"])
def test_same_as_the_per_sample_form(small_network, samples, space):
    """Firing, fields, warped keys and landmarks, also where spacings differ within the batch."""
    batched, single = both(small_network(2), point_space=space)
    out = batched(list_data_collate(samples))
    fired = 0
    for i, sample in enumerate(samples):
        expected = single(sample)
        assert (batched.last[i] is None) == (single.last is None)
        if single.last is not None:
            fired += 1
            assert (batched.last[i].ddf - single.last.ddf).abs().max() < 1e-3
            assert batched.last[i].params == single.last.params
        torch.testing.assert_close(out["image"][i].as_tensor(), expected["image"].as_tensor(), atol=1e-3, rtol=0)
        torch.testing.assert_close(out["points"][i].as_tensor(), expected["points"].as_tensor(), atol=2e-3, rtol=0)
        assert (out["label"][i].as_tensor() != expected["label"].as_tensor()).float().mean() < 2e-3
        assert torch.equal(out["points_valid"][i], expected["points_valid"])
        assert torch.equal(out["image"][i].affine, samples[i]["image"].affine)
    assert 0 < fired < len(samples)


def test_volumes_move_as_monai_warps_them(small_network, scan):
    sample = scan((20, 24, 18))
    batch = {key: torch.stack([value, value.flip(1)]) for key, value in sample.items()}
    transform = BatchRandDRDMDeformd(
        ["image", "label"], mode=["bilinear", "nearest"], prob=1.0, network=small_network(3, working_size=16)
    )
    out = transform(batch)
    ddf = torch.stack([one.ddf for one in transform.last])
    inside = (..., *(slice(2, -2),) * 3)
    expected = Warp("bilinear", "border")(batch["image"], ddf)
    torch.testing.assert_close(out["image"].as_tensor()[inside], expected[inside], atol=1e-4, rtol=0)
    assert out["label"].dtype == torch.uint8
    assert (ddf[0] - ddf[1]).abs().max() > 0.1


def test_records_and_the_last_draw_replay(small_network, samples):
    batched, single = both(small_network(2))
    batch = list_data_collate(samples)
    out = batched(batch)
    again = batched(batch, randomize=False)
    assert torch.equal(out["image"].as_tensor(), again["image"].as_tensor())
    records = [None if one is None else one.params for one in batched.last]
    replayed = batched(batch, params=records)
    assert torch.equal(out["image"].as_tensor(), replayed["image"].as_tensor())
    i = next(i for i, record in enumerate(records) if record is not None)
    alone = single(samples[i], params=records[i])
    torch.testing.assert_close(alone["image"].as_tensor(), out["image"][i].as_tensor(), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="batch of 6; this one is of 2"):
        batched(list_data_collate(samples[:2]), randomize=False)
    with pytest.raises(ValueError, match="one record or None per sample"):
        batched(batch, params=records[:2])


def test_decollated_samples_are_inverted(small_network, samples):
    batched, _ = both(small_network(2), deformation_level=0.3)
    out = decollate_batch(batched(list_data_collate(samples)))
    for i, (sample, moved) in enumerate(zip(samples, out)):
        back = batched.inverse({key: moved[key] for key in ("image", "label", "points")})
        assert back["image"].applied_operations == []
        error = (back["image"] - sample["image"]).as_tensor().abs().mean()
        torch.testing.assert_close(back["points"].as_tensor(), sample["points"], atol=1e-2, rtol=0)
        if batched.last[i] is None:
            assert error == 0
        else:
            assert error < 0.2 * (moved["image"] - sample["image"]).as_tensor().abs().mean()


def test_plain_tensors_in_a_training_step(small_network, scan):
    sample = scan((40, 36))
    image, label = (torch.stack([sample[key]] * 4) for key in ("image", "label"))
    kept = image.clone()
    transform = BatchRandDRDMDeformd(
        ["image", "label"], mode=["bilinear", "nearest"], prob=0.5, network=small_network(2)
    ).set_random_state(3)
    moved, label_out = transform.deform(image.requires_grad_(), label)
    assert type(moved) is torch.Tensor
    assert type(label_out) is torch.Tensor
    assert torch.equal(image, kept)
    for i, one in enumerate(transform.last):
        assert torch.equal(moved[i], image[i]) == (one is None)
    assert {one is None for one in transform.last} == {True, False}
    with pytest.raises(ValueError, match="one tensor for each of the keys"):
        transform.deform(image)


def test_without_firing_nothing_is_drawn_and_integers_become_float(small_network, scan):
    sample = scan((20, 20))
    batch = {"image": (sample["image"] * 100).to(torch.int16)[None], "label": sample["label"][None]}
    transform = BatchRandDRDMDeformd(
        ["image", "label"], mode=["bilinear", "nearest"], prob=0.0, network=small_network(2)
    )
    out = transform(batch)
    assert transform.last == [None]
    assert out["image"].dtype == torch.float32
    assert torch.equal(out["image"].as_tensor(), batch["image"].float())
    assert torch.equal(out["label"].as_tensor(), batch["label"])


def test_seeds_from_the_state(small_network, scan):
    """The same state, the same fields; another batch, others. A pickled transform has no fields in it."""
    batch = {"image": torch.stack([scan((32, 32))["image"]] * 3)}
    transform = BatchRandDRDMDeformd("image", prob=1.0, network=small_network(2)).set_random_state(5)
    first = transform(batch)["image"].as_tensor()
    second = transform(batch)["image"].as_tensor()
    again = transform.set_random_state(5)(batch)["image"].as_tensor()
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 1e-3
    assert (first[0] - first[1]).abs().max() > 1e-3
    assert not pickle.loads(pickle.dumps(transform)).last


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b.pop("image"), KeyError, "image"),
        (lambda b: b.update(label=b["label"][:2]), ValueError, "one batch size"),
        (lambda b: b.update(label=b["label"][..., 1:]), ValueError, "one spatial shape"),
        (lambda b: b.update(image=b["image"].as_tensor()[0]), ValueError, "batch"),
        (lambda b: b.update(points=b["points"][0]), ValueError, r"points \(6, C, N, D\)"),
        (lambda b: b.update(name=["one"]), ValueError, "one value per sample"),
        (lambda b: b.update(image=b["image"] * np.nan), ValueError, "NaN"),
    ],
)
def test_wrong_batches(small_network, samples, change, error, message):
    batched, _ = both(small_network(2), prob=1.0)
    batch = list_data_collate(samples)
    change(batch)
    with pytest.raises(error, match=message):
        batched(batch)


def test_bfloat16_draws_nearly_the_same_field_and_its_record_says_so(scan):
    batch = {"image": torch.stack([scan((65, 49))["image"]] * 2)}
    transforms = [
        BatchRandDRDMDeformd("image", prob=1.0, deformation_level=0.4, steps=3, precision=precision)
        for precision in ("float32", "bfloat16")
    ]
    for transform in transforms:
        transform.set_random_state(3)(batch)
    exact, half = (transform.last[0] for transform in transforms)
    apart = (exact.ddf - half.ddf).norm(dim=0).mean()
    assert 0 < apart < 0.05 * exact.ddf.norm(dim=0).mean()
    assert (exact.params.precision, half.params.precision) == ("float32", "bfloat16")
    single = RandDRDMDeformd("image", prob=1.0)
    single({"image": batch["image"][0]}, params=DeformationParams.from_json(half.params.to_json()))
    assert (single.last.ddf - half.ddf).abs().max() < 1e-3


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_draws_the_same_field(samples):
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")  # torch.compile reads its sources so; libraries leave others behind
    # of one spacing, since every shape that the network meets is compiled anew, for half a minute
    batch = list_data_collate([sample for sample, spacing in zip(samples, SPACINGS) if spacing == SPACINGS[0]])
    network = VelocityUNet(2, channels=(4, 6))
    network.card = dataclasses.replace(network.card, working_size=33)
    torch.nn.init.normal_(network.out.weight, std=0.1)
    settings = {"prob": 0.7, "network": network, "steps": 2}
    compiled, plain = (
        BatchRandDRDMDeformd("image", compiled=flag, **settings).set_random_state(1) for flag in (True, False)
    )
    out, expected = compiled(batch), plain(batch)
    assert sum(one is not None for one in plain.last) > 1
    torch.testing.assert_close(out["image"].as_tensor(), expected["image"].as_tensor(), atol=1e-3, rtol=0)
    assert [one and one.params for one in compiled.last] == [one and one.params for one in plain.last]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"precision": "float16"}, "precision must be 'float32' or 'bfloat16'"),
        ({"precision": "bfloat16", "published": True}, "need sampler 'velocity'"),
        ({"compiled": True, "published": True}, "need sampler 'velocity'"),
    ],
)
def test_precision_and_compilation_are_for_our_networks(filled_network, arguments, says):
    network = filled_network(2) if arguments.pop("published", False) else "auto"
    with pytest.raises(ValueError, match=says):
        BatchRandDRDMDeformd("image", network=network, **arguments)


def test_landmarks_that_were_lost_stay_lost(small_network, samples):
    batched, single = both(small_network(2), prob=1.0)
    for sample in samples:
        sample["points_valid"] = torch.tensor([[True, False, True, True]])
    out = batched(list_data_collate(samples))
    for i, sample in enumerate(samples):
        assert torch.equal(out["points_valid"][i], single(sample)["points_valid"])
    assert not out["points_valid"][:, :, 1].any()
    batch = list_data_collate(samples) | {"points_valid": torch.ones(6, 3)}
    with pytest.raises(ValueError, match=r"points_valid.* Rename it"):
        batched(batch)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_unsigned_labels(small_network, samples, dtype):
    """Exact ids, also where some samples of a batch fire and others do not."""
    batched, single = both(small_network(2), point_keys=())
    labels = torch.stack([sample["label"].as_tensor() for sample in samples]).to(dtype)
    out = batched(list_data_collate(samples) | {"label": labels})["label"]
    assert out.dtype == dtype
    assert any(one is None for one in batched.last)
    assert any(one is not None for one in batched.last)
    for i, sample in enumerate(samples):
        assert torch.equal(out[i].long(), single(sample)["label"].as_tensor().long())


def test_gradients_flow_through_the_warp(small_network, samples):
    batched, _ = both(small_network(2), prob=1.0)
    batch = list_data_collate(samples)
    batch["image"] = batch["image"].as_tensor().requires_grad_()
    batched(batch)["image"].square().sum().backward()
    assert batch["image"].grad.abs().sum() > 0


@pytest.mark.parametrize("params", ["record", {}, [{}] * 6])
def test_params_that_are_no_records(small_network, samples, params):
    batched, _ = both(small_network(2))
    with pytest.raises(TypeError, match="params must be"):
        batched(list_data_collate(samples), params=params)


@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize("affine", [None, torch.diag(torch.tensor([2.0, 3.0, 1.0, 1.0]))])
def test_batches_with_one_affine_or_none_fall_apart_into_samples_with_theirs(scan, small_network, prob, affine):
    """MONAI takes row ``i`` of what a batch has for an affine as that of sample ``i``."""
    batch = {key: torch.stack([torch.as_tensor(scan((24, 28))[key])] * 3) for key in ("image", "label")}
    if affine is not None:
        batch = {key: MetaTensor(value, affine=affine) for key, value in batch.items()}
    settings = {"mode": ["bilinear", "nearest"], "network": small_network(2), "steps": 1}
    transform = BatchRandDRDMDeformd(["image", "label"], prob=prob, **settings).set_random_state(0)
    out = transform(batch)
    expected = torch.eye(4, dtype=torch.float64) if affine is None else affine.double()
    for one in decollate_batch(out):
        for key in ("image", "label"):
            torch.testing.assert_close(one[key].affine.double(), expected)
        again = RandDRDMDeformd(["image", "label"], prob=1.0, **settings)(one)
        torch.testing.assert_close(again["image"].affine.double(), expected)
        torch.testing.assert_close(transform.inverse(one)["image"].affine.double(), expected)
    with pytest.raises(ValueError, match=r"inverse: 'image' is a batch\. Take it apart first"):
        transform.inverse(out)


@pytest.mark.parametrize("plain", ["image", "label"])
def test_plain_tensors_beside_images_with_affines_get_these(samples, small_network, plain):
    batch = list_data_collate([{key: one[key] for key in ("image", "label")} for one in samples])
    affines = torch.stack([one[plain].affine for one in samples])
    batch[plain] = batch[plain].as_tensor()
    settings = {"mode": ["bilinear", "nearest"], "prob": 1.0, "network": small_network(2), "steps": 1}
    transform = BatchRandDRDMDeformd(["image", "label"], **settings)
    out = transform(batch)
    torch.testing.assert_close(out[plain].affine, affines)
    torch.testing.assert_close(transform(out)[plain].affine, affines)
    for one, affine in zip(decollate_batch(out), affines):
        torch.testing.assert_close(one[plain].affine, affine)


def test_a_seed_of_one_sample_may_be_a_number_in_a_tensor(scan, small_network):
    one = scan((24, 28))
    batch = {"image": torch.as_tensor(one["image"])[None], "seed": torch.tensor(5)}
    options = {"prob": 1.0, "network": small_network(2), "steps": 1, "seed_key": "seed"}
    found = BatchRandDRDMDeformd(["image"], **options)(batch)["image"][0]
    expected = RandDRDMDeformd(["image"], **options)({"image": torch.as_tensor(one["image"]), "seed": torch.tensor(5)})
    torch.testing.assert_close(found.as_tensor(), expected["image"].as_tensor(), atol=1e-4, rtol=0)
