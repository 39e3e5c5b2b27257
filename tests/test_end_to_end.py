"""The main job: scans through Compose, CacheDataset and DataLoader, random anatomy for everybody, real scans if any."""

from __future__ import annotations

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, decollate_batch, list_data_collate, MetaTensor
from monai.networks.blocks import Warp
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    ScaleIntensityRangePercentilesd,
    SplitDimd,
)

from monai_drdm import RandDRDMDeformd
from monai_drdm.fields import fold_fraction
from monai_drdm.networks import RecResACNet
from monai_drdm.train.synthetic import synthetic_labels

KEYS = ["image", "label"]
TURN = np.array([[0.8, -0.6, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])


def loading():
    return [
        LoadImaged(keys=KEYS),
        EnsureChannelFirstd(keys=KEYS),
        ScaleIntensityRangePercentilesd(keys="image", lower=1, upper=99, b_min=0, b_max=1, clip=True),
    ]


@pytest.mark.parametrize(
    ("scans", "shape", "spacing"), [(2, (96, 72), (0.8, 1.3)), (1, (64, 20, 6), (1.1, 1.3, 4.0))], ids=["2D", "3D"]
)
def test_random_anatomy_with_the_shipped_networks(tmp_path, scans, shape, spacing):
    """From files to batches and back, with nothing but what comes with the package."""
    dims, modes = len(shape), ("bilinear", "nearest")
    items = [random_anatomy(tmp_path / str(seed), shape, spacing, seed) for seed in range(1, scans + 1)]
    originals, affines = [Compose(loading())(item) for item in items], [nib.load(one["image"]).affine for one in items]
    deform = RandDRDMDeformd(keys=KEYS, network="auto", prob=1.0, deformation_level=0.6, mode=modes)
    dataset = CacheDataset(items, Compose([*loading(), deform]), progress=False)
    loader = DataLoader(dataset, batch_size=scans, num_workers=0, generator=torch.Generator().manual_seed(1))
    epochs = []
    for _ in range(2):
        batch = next(iter(loader))
        epochs.append(batch["image"])
        assert (deform.last.params.network, deform.last.params.deformation_level) == (f"anatomy-{dims}d", 0.6)
        for deformed, original, affine in zip(decollate_batch(batch), originals, affines):
            assert deformed["image"].shape == deformed["label"].shape == (1, *shape)
            assert deformed["label"].dtype == original["label"].dtype
            assert deformed["label"].unique().tolist() == original["label"].unique().tolist()
            np.testing.assert_allclose(deformed["image"].affine, affine, atol=1e-5)
            np.testing.assert_allclose(deformed["label"].affine, affine, atol=1e-5)
            back = dataset.transform.inverse(deformed)
            assert dice(deformed["label"], original["label"]) < 0.85  # it did move
            assert dice(back["label"], original["label"]) > 0.85
            assert back["label"].dtype == original["label"].dtype
        # the last scan of the batch: image and label moved by the transform's last field, and back by its inverse
        for key, mode in zip(KEYS, modes):
            before, after = originals[-1][key].as_tensor()[None].float(), batch[key][-1:].as_tensor().float()
            assert_nearly_everywhere_equal(Warp(mode, "border")(before, deform.last.ddf[None]), after)
            returned = back[key].as_tensor()[None].float()
            assert_nearly_everywhere_equal(Warp(mode, "border")(after, deform.last.inverse_ddf[None]), returned)
        assert_plausible(deform.last, spacing)
    assert ((epochs[0] - epochs[1]).abs().flatten(1).mean(dim=1) > 0.02).all()  # a new anatomy each epoch


def assert_nearly_everywhere_equal(warped, expected):
    """A few voxels lie between two neighbours that are equally near."""
    assert ((warped - expected).abs() > 1e-3).float().mean() < 2e-3


def assert_plausible(deformation, spacing):
    """No folds, by the transform's measure and by central differences, and neither tiny nor huge displacements."""
    field, dims = deformation.ddf.double().numpy(), len(spacing)
    jacobian = np.stack([np.stack(np.gradient(component)) for component in field], axis=0)
    jacobian = np.moveaxis(jacobian, (0, 1), (-2, -1)) + np.eye(dims)
    assert (np.linalg.det(jacobian) > 0).all()
    assert deformation.statistics.fold_fraction <= 1e-4
    moved_mm = np.linalg.norm(field * np.reshape(spacing, (-1, *(1,) * dims)), axis=0)
    longest_mm = max(n * s for n, s in zip(field.shape[1:], spacing))
    assert 0.01 * longest_mm < moved_mm.mean() < 0.12 * longest_mm
    assert moved_mm.max() < 0.25 * longest_mm
    assert deformation.statistics.mean_displacement_mm == pytest.approx(moved_mm.mean(), rel=1e-4)


def random_anatomy(folder, shape, spacing, seed):
    """NIfTI files of a label map of organs, shells and vessels, and of an image with a grey value for each of them."""
    generator = torch.Generator().manual_seed(seed)
    label = synthetic_labels(generator, 1, shape)[0, 0]
    kept = [value for value in label.unique() if (label == value).sum() > label.numel() / 50]  # what cannot get lost
    label = sum((label == value) * number for number, value in enumerate(kept))
    grey = torch.linspace(0, 900, len(kept))[torch.randperm(len(kept), generator=generator)]
    image = grey[label] + 20 * torch.randn(shape, generator=generator)
    folder.mkdir()
    return write_nifti(folder, image.numpy().astype(np.int16), label.numpy().astype(np.uint8), spacing)


def write_nifti(folder, image, label, spacing):
    """Both on an oblique grid."""
    affine = np.eye(4)
    affine[:3, :3] = TURN @ np.diag([*spacing, 1.0][:3])
    affine[:3, 3] = (-30.0, 12.0, 5.0)
    item = {key: str(folder / f"{key}.nii.gz") for key in KEYS}
    for key, values in zip(KEYS, (image, label)):
        nib.save(nib.Nifti1Image(values, affine), item[key])
    return item


def dice(found, truth):
    """Mean over all structures."""
    pairs = [(found == value, truth == value) for value in truth.unique() if value > 0]
    return float(np.mean([float(2 * (a & b).sum() / (a.sum() + b.sum())) for a, b in pairs]))


def test_cardiac_slices_with_published_weights(data, published_weights):
    folder = data / "acdc" / "volumes"
    names = ["patient001_frame01", "patient003_frame01"]
    items = [{"image": str(folder / f"{n}_image.nii.gz"), "label": str(folder / f"{n}_label.nii.gz")} for n in names]
    deform = RandDRDMDeformd(keys=KEYS, mode=["bilinear", "nearest"], prob=1.0, deformation_level=0.6)
    fixed = [
        *loading(),
        CenterSpatialCropd(keys=KEYS, roi_size=(200, 210, 1)),
        SplitDimd(keys=KEYS, dim=-1, keepdim=False, list_output=True),
    ]
    dataset = CacheDataset(items, Compose([*fixed, deform]), cache_rate=1.0, progress=False)
    loader = DataLoader(dataset, batch_size=2, num_workers=0, collate_fn=list_data_collate)
    originals = [Compose(fixed)(item)[0] for item in items]
    epochs = [next(iter(loader)) for _ in range(2)]
    for batch in epochs:
        assert batch["image"].shape == (2, 1, 200, 210)
        assert batch["label"].shape == (2, 1, 200, 210)
        assert torch.isfinite(batch["image"]).all()
        for b, original in enumerate(originals):
            assert set(batch["label"][b].unique().tolist()) <= set(original["label"].unique().tolist())
            assert (batch["image"][b] - original["image"]).abs().mean() > 0.01  # it did move
            # the left ventricle is still there, of a plausible size
            area, before = ((one == 3).sum().item() for one in (batch["label"][b], original["label"]))
            assert 0.4 * before < area < 2.5 * before
    assert not torch.equal(epochs[0]["image"], epochs[1]["image"])  # a new anatomy each epoch
    statistics = deform.last.statistics
    assert statistics.fold_fraction <= 1e-4
    assert statistics.mean_displacement_vox > 2


@pytest.mark.parametrize("kind", ["whole_head", "thick_slices"])
def test_volumes_with_untrained_3d_weights(request, kind, tmp_path):
    if kind == "whole_head":
        folder = request.getfixturevalue("data") / "ixi" / "whole_head"
        item = {key: str(min(folder.glob(f"{key}_*.nii.gz"))) for key in KEYS}
        shape, spacing = (60, 72, 66), (2.0, 2.0, 2.0)
    else:
        shape, spacing = (48, 48, 12), (1.0, 1.0, 5.0)
        item = ellipsoids(tmp_path, shape, spacing)
    network = RecResACNet(3).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=1e-5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(network.conv_out.bias)
    network.card = dataclasses.replace(network.card, working_size=24, steps=1)
    deform = RandDRDMDeformd(
        keys=KEYS, mode=["bilinear", "label"], prob=1.0, network=network, deformation_level=0.4, max_displacement_mm=15
    )
    fixed = Compose([*loading(), CenterSpatialCropd(keys=KEYS, roi_size=shape)])
    dataset = CacheDataset([item], Compose([*fixed.transforms, deform]), cache_rate=1.0, progress=False)
    batch = next(iter(DataLoader(dataset, batch_size=1, num_workers=0)))
    assert batch["image"].shape == batch["label"].shape == (1, 1, *shape)
    original = fixed(item)
    assert batch["label"].dtype == original["label"].dtype
    assert set(batch["label"].unique().tolist()) <= set(original["label"].unique().tolist())
    assert isinstance(batch["image"], MetaTensor)
    np.testing.assert_allclose(batch["image"].affine[0], original["image"].affine)
    millimetres = deform.last.ddf * torch.tensor(spacing).view(3, 1, 1, 1)
    assert 1.0 < millimetres.norm(dim=0).max() <= 15.001
    assert fold_fraction(deform.last.ddf[None]) <= 1e-4


def ellipsoids(folder, shape, spacing):
    """One in another."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    label = (radius < 0.8).astype(np.uint8) + (radius < 0.4)
    return write_nifti(folder, (np.cos(6 * radius) * 300).astype(np.float32), label, spacing)
