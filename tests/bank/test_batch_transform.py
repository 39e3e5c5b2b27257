from __future__ import annotations

import pickle

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from monai.data import decollate_batch, list_data_collate, MetaTensor
from monai.transforms import Affine, Flip

from monai_drdm import BatchRandDRDMBankd, DeformationBank, RandDRDMBankd
from monai_drdm.transforms import BatchRandDRDMBankD, BatchRandDRDMBankDict

KEYS = ["image", "pseudo", "confidence"]
MODES = ["bilinear", "nearest", "bilinear"]
POSE = {"rotate_range": 0.4, "scale_range": 0.2, "translate_range": 3.0, "flip_prob": 0.5}


@pytest.fixture
def banked(small_network, scan):
    """Four samples with what a network might say of them, and settings of transforms by a bank of their images."""

    def build(shape=(48, 40), names="name", **options):
        samples = []
        for i in range(4):
            image = scan(shape)["image"] * (1 + 0.2 * i)
            one = {"image": MetaTensor(image, meta={"filename_or_obj": f"/data/scan{i}.nii"}), "name": f"scan{i}"}
            one["confidence"] = torch.sigmoid(torch.as_tensor(image) * 3)
            samples.append({**one, "pseudo": (torch.as_tensor(image) * (3 + i)).round().to(torch.uint8)})
        network = small_network(len(shape), working_size=32 if len(shape) == 2 else 16)
        options_of_bank = {"network": network, "fields_per_image": 3, "progress": False}
        bank = DeformationBank.build(samples, id_key=names, **options_of_bank)
        return samples, {"keys": KEYS, "bank": bank, "id_key": names, "prob": 1.0, "mode": MODES, **options}

    return build


def itk_warp(values, ddf, interpolator):
    """SimpleITK's resampling of one channel by a displacement field in voxels, samples outside taken from the edge."""
    dims = ddf.shape[0]
    margin = int(np.ceil(np.abs(ddf).max())) + 2
    padded = np.pad(values, margin, mode="edge").astype(np.float64)
    image = sitk.GetImageFromArray(padded)
    image.SetOrigin([-float(margin)] * dims)
    field = sitk.GetImageFromArray(np.moveaxis(ddf[::-1], 0, -1).astype(np.float64), isVector=True)
    transform = sitk.DisplacementFieldTransform(field)
    grid = sitk.GetImageFromArray(np.zeros(values.shape))
    return sitk.GetArrayFromImage(sitk.Resample(image, grid, transform, interpolator, 0.0, sitk.sitkFloat64))


def test_aliases():
    assert BatchRandDRDMBankD is BatchRandDRDMBankd
    assert BatchRandDRDMBankDict is BatchRandDRDMBankd


@pytest.mark.parametrize(("shape", "pose"), [((48, 40), {}), ((48, 40), POSE), ((20, 24, 18), POSE)])
def test_image_label_and_confidence_move_by_one_field(banked, shape, pose):
    """SimpleITK moves all three, by the field that the transform says it used, to the same place."""
    samples, settings = banked(shape, **pose)
    transform = BatchRandDRDMBankd(**settings).set_random_state(3)
    out = transform(list_data_collate(samples))
    assert out["pseudo"].dtype == torch.uint8
    for i, sample in enumerate(samples):
        ddf = transform.last[i].ddf.numpy()
        assert np.abs(ddf).max() > 0.5
        for key, mode in zip(KEYS, MODES):
            how = sitk.sitkLinear if mode == "bilinear" else sitk.sitkNearestNeighbor
            expected = itk_warp(np.asarray(sample[key][0]), ddf, how)
            found = np.asarray(out[key][i, 0], dtype=np.float64)
            if mode == "nearest":
                assert (found == expected).mean() > 0.995  # sampling points midway between voxels may round either way
            else:
                np.testing.assert_allclose(found, expected, atol=2e-3 * expected.max())


@pytest.mark.parametrize("names", ["name", None])
def test_a_batch_is_its_samples(banked, names):
    """Each sample gets what ``RandDRDMBankd`` makes of it alone, by name or by file."""
    samples, settings = banked(names=names, prob=0.6, seed_key="name", displacement_scale=(0.3, 1.0), **POSE)
    batch, single = BatchRandDRDMBankd(**settings), RandDRDMBankd(**settings)
    out = batch(list_data_collate(samples))
    fired = []
    for i, sample in enumerate(samples):
        alone = single(sample)
        fired.append(batch.last[i] is not None)
        assert fired[-1] == (single.last is not None)
        for key in KEYS:
            torch.testing.assert_close(torch.as_tensor(out[key][i]), torch.as_tensor(alone[key]), atol=1e-5, rtol=0)
    assert 0 < sum(fired) < len(fired)


def test_flips_are_those_of_monai(banked):
    """Without displacement, a flip and a pose are MONAI's ``Affine``, and a flip alone its ``Flip``."""
    samples, settings = banked(displacement_scale=0.0, **POSE)
    transform = BatchRandDRDMBankd(**settings).set_random_state(0)
    out = transform(list_data_collate(samples))
    signs = []
    for i, sample in enumerate(samples):
        matrix = np.array(transform.last[i].banked.matrix)
        signs.append(np.sign(np.linalg.det(matrix)))
        expected = Affine(affine=matrix, padding_mode="border", image_only=True)(sample["image"])
        torch.testing.assert_close(torch.as_tensor(out["image"][i]), torch.as_tensor(expected), atol=1e-4, rtol=0)
    assert set(signs) == {-1.0, 1.0}
    plain = {key: value for key, value in settings.items() if key not in POSE} | {"flip_prob": 1.0}
    flipped = BatchRandDRDMBankd(**plain)(list_data_collate(samples))
    expected = torch.stack([torch.as_tensor(Flip()(sample["image"])) for sample in samples])
    torch.testing.assert_close(torch.as_tensor(flipped["image"]), expected, atol=1e-5, rtol=0)


def test_records_replay_and_inverse(banked):
    samples, settings = banked((64, 56), prob=0.5, displacement_scale=(0.4, 0.6), rotate_range=0.2)
    transform = BatchRandDRDMBankd(**settings).set_random_state(6)
    data = list_data_collate(samples)
    out = transform(data)
    records = [None if one is None else one.banked for one in transform.last]
    assert {record is None for record in records} == {False, True}
    for again in (transform(data, randomize=False), transform(data, params=records)):
        assert torch.equal(again["image"].as_tensor(), out["image"].as_tensor())
    with pytest.raises(ValueError, match="one record or None per sample: 4, got 3"):
        transform(data, params=records[:3])
    with pytest.raises(ValueError, match="of a batch of 4; this one is of 2"):
        transform(list_data_collate(samples[:2]), randomize=False)
    inner = (slice(None), slice(16, -16), slice(16, -16))
    for sample, moved in zip(samples, decollate_batch(out["image"])):
        back = transform.inverse(dict.fromkeys(KEYS, moved))["image"]
        assert (back - sample["image"])[inner].abs().mean() < 0.02
    assert pickle.loads(pickle.dumps(transform)).last == []


def test_what_does_not_fit(banked):
    samples, settings = banked()
    with pytest.raises(TypeError, match="box_keys"):
        BatchRandDRDMBankd(**settings, box_keys="boxes")
    with pytest.raises(ValueError, match="flip_prob must be in"):
        BatchRandDRDMBankd(**{**settings, "flip_prob": 2})
    data = list_data_collate(samples)
    transform = BatchRandDRDMBankd(**settings)
    with pytest.raises(ValueError, match="id_key must hold one value per sample: 4, got 3"):
        transform({**data, "name": data["name"][:3]})
    with pytest.raises(KeyError, match="'unknown' is not in the deformation bank"):
        transform({**data, "name": [*data["name"][:3], "unknown"]})
    with pytest.raises(ValueError, match="drawn on another image"):
        transform({**data, "name": data["name"][::-1]})


def test_a_batch_that_was_not_collated_has_one_name(banked):
    """MONAI collates names to a list; a sample that was given a batch axis by hand still has one of them."""
    samples, settings = banked(names=None)
    transform = BatchRandDRDMBankd(**{**settings, "keys": ["image"], "mode": "bilinear"})
    image = samples[1]["image"]
    meta = {"filename_or_obj": "/data/scan1.nii"}
    transform({"image": MetaTensor(image[None], meta=meta)})
    assert transform.last[0].banked.identity == "/data/scan1.nii"
    with pytest.raises(ValueError, match="filename_or_obj must hold one value per sample: 2, got 1"):
        transform({"image": MetaTensor(torch.stack([image, image]), meta=meta)})
