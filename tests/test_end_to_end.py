"""The main job: real scans through Compose, CacheDataset and DataLoader."""

from __future__ import annotations

import dataclasses

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset, DataLoader, list_data_collate, MetaTensor
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

KEYS = ["image", "label"]


def loading():
    return [
        LoadImaged(keys=KEYS),
        EnsureChannelFirstd(keys=KEYS),
        ScaleIntensityRangePercentilesd(keys="image", lower=1, upper=99, b_min=0, b_max=1, clip=True),
    ]


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
def test_volumes_with_untrained_3d_weights(data, kind, tmp_path):
    if kind == "whole_head":
        folder = data / "ixi" / "whole_head"
        item = {key: str(min(folder.glob(f"{key}_*.nii.gz"))) for key in KEYS}
        shape, spacing = (90, 120, 120), (2.0, 2.0, 2.0)
    else:
        shape, spacing = (96, 96, 24), (1.0, 1.0, 5.0)
        item = _thick_volume(tmp_path, shape, spacing)
    network = RecResACNet(3).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=1e-5, generator=torch.Generator().manual_seed(0))
    torch.nn.init.zeros_(network.conv_out.bias)
    network.card = dataclasses.replace(network.card, working_size=24, steps=1)
    deform = RandDRDMDeformd(
        keys=KEYS, mode=["bilinear", "label"], prob=1.0, network=network, deformation_level=0.4, max_displacement_mm=15
    )
    dataset = CacheDataset([item], Compose([*loading(), deform]), cache_rate=1.0, progress=False)
    batch = next(iter(DataLoader(dataset, batch_size=1, num_workers=0)))
    assert batch["image"].shape == batch["label"].shape == (1, 1, *shape)
    original = Compose(loading())(item)
    assert batch["label"].dtype == original["label"].dtype
    assert set(batch["label"].unique().tolist()) <= set(original["label"].unique().tolist())
    assert isinstance(batch["image"], MetaTensor)
    np.testing.assert_allclose(batch["image"].affine[0], original["image"].affine)
    millimetres = deform.last.ddf * torch.tensor(spacing).view(3, 1, 1, 1)
    assert 1.0 < millimetres.norm(dim=0).max() <= 15.001
    assert fold_fraction(deform.last.ddf[None]) <= 1e-4


def _thick_volume(folder, shape, spacing):
    """A real cardiac volume is not needed here: a phantom of ellipsoids on an oblique, anisotropic grid."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    label = (radius < 0.8).astype(np.uint8) + (radius < 0.4)
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag(spacing)
    item = {key: str(folder / f"{key}.nii.gz") for key in KEYS}
    nib.save(nib.Nifti1Image((np.cos(6 * radius) * 300).astype(np.float32), affine), item["image"])
    nib.save(nib.Nifti1Image(label, affine), item["label"])
    return item
