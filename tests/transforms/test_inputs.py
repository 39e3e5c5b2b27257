"""Data that MONAI pipelines hand over now and then."""

from __future__ import annotations

import dataclasses
import pickle
import threading

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import EnsureTyped, Flip, Rotate90

from monai_drdm import ApplyDDFd, RandDRDMDeform, RandDRDMDeformd
from monai_drdm.fields import exp_svf
from monai_drdm.networks import save_network
from monai_drdm.transforms.points import Motion, move_boxes


def constant(value, shape=(24, 20)):
    return torch.full((len(shape), *shape), float(value))


def test_batches_are_refused(small_network, scan):
    batch = next(iter(DataLoader(Dataset([scan((24, 20))] * 2, EnsureTyped(["image"])), batch_size=2)))["image"]
    for prob in (0.0, 1.0):
        with pytest.raises(ValueError, match="decollate"):
            RandDRDMDeform(small_network(2), prob=prob, slice_axis=0)(batch)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_metadata_that_cannot_be_copied_are_shared(small_network, scan, prob):
    lock, notes = threading.Lock(), ["mine"]
    image = MetaTensor(scan((24, 20))["image"], meta={"lock": lock, "notes": notes})
    out = RandDRDMDeform(small_network(2), prob=prob)(image)
    assert out.meta["lock"] is lock
    out.meta["notes"].append("theirs")
    assert notes == ["mine"]


def test_read_only_arrays_stay_as_they_are(small_network, scan):
    array = scan((24, 20))["image"].numpy().copy()
    array.flags.writeable = False
    before = array.copy()
    out = RandDRDMDeform(small_network(2), prob=0.0)(array)
    out += 1.0
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_wrong_modes_of_a_call_are_noticed_at_once(small_network, scan, prob):
    transform = RandDRDMDeform(small_network(2), prob=prob)
    with pytest.raises(ValueError, match="mode"):
        transform(scan((24, 20))["image"], mode="linear")
    with pytest.raises(ValueError, match="padding_mode"):
        transform(scan((24, 20))["image"], padding_mode="wrap")


def test_wrong_devices_are_noticed_when_the_transform_is_built(small_network):
    with pytest.raises(ValueError, match="device"):
        RandDRDMDeform(small_network(2), device="nonsense")


def test_world_points_of_a_slice_that_leaves_the_plane(small_network, scan):
    affine = torch.tensor([[0.5, 0, 3, 0], [2, 0.1, 0, 0], [0, 2, 0.2, 0], [0, 0, 0, 1]], dtype=torch.float64)
    sample = {"image": MetaTensor(scan((24, 20))["image"], affine=affine), "points": torch.zeros(1, 2, 2)}
    transform = RandDRDMDeformd("image", network=small_network(2), point_keys="points", point_space="world", prob=1.0)
    with pytest.raises(ValueError, match="parallel to the world's x and y"):
        transform(sample)


def test_a_given_field_is_copied_once_and_shared_by_all_records(scan):
    given = constant(0.0)
    transform = ApplyDDFd(["image", "label"], given)
    given += 4
    outs = [transform(scan((24, 20))) for _ in range(2)]
    fields = [out[key].applied_operations[-1]["extra_info"]["field"] for out in outs for key in ("image", "label")]
    assert len({id(field) for field in fields}) == 1
    assert float(transform.last.ddf.abs().max()) == 0.0
    torch.testing.assert_close(outs[0]["image"].as_tensor(), scan((24, 20))["image"])


def test_landmarks_return_to_rounding(scan):
    wave = torch.sin(torch.arange(64) / 5)[None, :, None] * torch.tensor([2.0, -3.0])[:, None, None]
    ddf = wave.expand(2, 64, 48).contiguous()
    points = torch.rand(1, 500, 2, dtype=torch.float64) * torch.tensor([63.0, 47.0])
    sample = {**scan((64, 48)), "points": points}
    transform = ApplyDDFd("image", ddf, point_keys="points")
    out = transform(sample)
    assert float((out["points"] - points).abs().max()) > 1
    torch.testing.assert_close(transform.inverse(out)["points"].as_tensor(), points, rtol=0, atol=1e-5)


def test_large_boxes_enclose_what_they_become():
    """Against the deformed mask, whose voxels say where the box went to half a voxel."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 3, 9, 9, 9, generator=generator) * 1.5
    ddf = exp_svf(torch.nn.functional.interpolate(coarse, (72,) * 3, mode="trilinear", align_corners=True))
    mask = torch.zeros(1, 1, 72, 72, 72)
    mask[..., 8:64, 8:64, 8:64] = 1
    warped = Warp(mode="bilinear", padding_mode="border")(mask, ddf)[0, 0] > 0.5
    moved = move_boxes(torch.tensor([[8.0, 8, 8, 64, 64, 64]]), Motion(ddf[0]), "xyzxyz")[0]
    where = warped.nonzero()
    torch.testing.assert_close(moved[:3], where.amin(dim=0).double(), rtol=0, atol=0.8)
    torch.testing.assert_close(moved[3:], where.amax(dim=0).double() + 1, rtol=0, atol=0.8)
    assert float((moved - torch.tensor([8.0, 8, 8, 64, 64, 64])).abs().max()) > 1.5


def test_a_named_network_pickles_small():
    transform = RandDRDMDeformd(["image", "label"], point_keys="points", seed_key="name")
    assert len(pickle.dumps(transform)) < 2000


@pytest.mark.parametrize("turn", [Flip(0), Rotate90(1, (0, 2)), Rotate90(1, (0, 1))])
def test_pixdim_goes_with_data_that_were_turned(small_network, scan, turn):
    """They had no affine, so MONAI made one of steps of 1 mm."""
    image = turn(MetaTensor(scan((16, 18, 7))["image"]))
    transform = RandDRDMDeform(small_network(3), prob=1.0, pixdim=(1.0, 2.0, 5.0))
    transform(image)
    spacing = dict(zip((16, 18, 7), (1.0, 2.0, 5.0)))
    assert transform.last.spacing == tuple(spacing[n] for n in image.shape[1:])


def test_a_single_number_is_no_pixdim(small_network):
    with pytest.raises(TypeError, match=r"pixdim must be 2 or 3 numbers in mm, one for each spatial axis, got 1\.0"):
        RandDRDMDeform(small_network(2), pixdim=1.0)


def test_pixdim_does_not_replace_an_affine(small_network, scan):
    image = MetaTensor(scan((16, 18, 7))["image"], affine=torch.diag(torch.tensor([-1.0, 1.0, 3.0, 1.0])))
    transform = RandDRDMDeform(small_network(3), prob=1.0, pixdim=(1.0, 2.0, 5.0))
    transform(image)
    assert transform.last.spacing == (1.0, 1.0, 3.0)


def test_a_plain_image_has_the_spacing_of_the_label_whose_affine_it_gets(small_network, scan):
    sample = scan((16, 18, 7))
    sample["label"] = MetaTensor(sample["label"], affine=torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0])))
    transform = RandDRDMDeformd(["image", "label"], network=small_network(3), prob=1.0)
    out = transform(sample)
    assert transform.last.spacing == (1.0, 1.0, 5.0)
    assert torch.equal(out["image"].affine, sample["label"].affine)


def test_affines_of_micrometres_are_told_apart(small_network, scan):
    sample = scan((24, 20))
    for key, step in (("image", 2.5e-4), ("label", 5e-4)):
        sample[key] = MetaTensor(sample[key], affine=torch.diag(torch.tensor([step, step, 1.0, 1.0])))
    with pytest.raises(ValueError, match="must have one affine"):
        RandDRDMDeformd(["image", "label"], network=small_network(2))(sample)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_bicubic_volumes_are_refused_at_once(small_network, scan, prob):
    transform = RandDRDMDeformd("image", network=small_network(3), prob=prob, mode="bicubic")
    with pytest.raises(ValueError, match="exists in 2D only"):
        transform(scan((12, 12, 12)))


@pytest.mark.parametrize("params", [{}, "{}", 3])
def test_params_that_are_no_record(small_network, scan, params):
    sample = scan((24, 20))
    with pytest.raises(TypeError, match=r"params must be DeformationParams.*from_json"):
        RandDRDMDeformd("image", network=small_network(2))(sample, params=params)
    with pytest.raises(TypeError, match=r"params must be DeformationParams.*from_json"):
        RandDRDMDeform(small_network(2))(sample["image"], params=params)


def test_the_last_field_may_be_changed(scan):
    transform = ApplyDDFd("image", constant(1.0))
    first = transform(scan((24, 20)))["image"]
    transform.last.ddf.mul_(5)
    assert torch.equal(transform(scan((24, 20)))["image"], first)


def test_a_network_file_that_is_replaced(small_network, scan, tmp_path, monkeypatch):
    """The file that is there counts, under the name that it has from where one is."""
    image = scan((24, 20))["image"]

    def name_of(path):
        transform = RandDRDMDeform(path, prob=1.0)
        transform(image)
        return transform.last.params.network

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        network = small_network(2)
        network.card = dataclasses.replace(network.card, name=folder)
        save_network(network, tmp_path / folder / "n.safetensors")
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        assert name_of("n.safetensors") == folder
    assert name_of(tmp_path / "a" / "n.safetensors") == "a"
    (tmp_path / "b" / "n.safetensors").replace(tmp_path / "a" / "n.safetensors")
    assert name_of(tmp_path / "a" / "n.safetensors") == "b"
