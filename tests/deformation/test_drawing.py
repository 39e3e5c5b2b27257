"""Deformations of plain tensors, without MONAI."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from monai.networks.blocks import Warp

from monai_drdm import RandDRDMDeform
from monai_drdm.deformation import FieldDrawer

WITHOUT_MONAI = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("monai", "nibabel", "SimpleITK", "ignite"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
import torch
from monai_drdm.deformation import FieldDrawer
image = torch.rand(1, 40, 30, generator=torch.Generator().manual_seed(0))
deformation = FieldDrawer("auto", deformation_level=0.5).draw(image, (1.0, 1.0), seed=7)
assert deformation.warp(image).shape == image.shape
print(float(deformation.ddf.norm(dim=0).mean()), deformation.statistics.fold_fraction)
"""


def test_fields_are_drawn_and_applied_without_monai():
    done = subprocess.run([sys.executable, "-c", WITHOUT_MONAI], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    displacement, folds = map(float, done.stdout.split())
    assert 0.2 < displacement < 6
    assert folds <= 1e-4


@pytest.mark.filterwarnings("ignore:monai.networks.blocks.Warp")
@pytest.mark.parametrize("shape", [(40, 33), (17, 20, 14)])
def test_a_deformation_warps_as_monai_does(small_network, scan, shape):
    sample = scan(shape)
    drawer = FieldDrawer(small_network(len(shape)), deformation_level=0.4)
    deformation = drawer.draw(sample["image"], (1.0,) * len(shape), seed=3)
    assert deformation.ddf.norm(dim=0).max() > 0.5
    expected = Warp("bilinear", "border")(sample["image"][None], deformation.ddf[None])[0]
    torch.testing.assert_close(deformation.warp(sample["image"]), expected, rtol=0, atol=1e-4)
    label = deformation.warp(sample["label"], "nearest")
    expected = Warp("nearest", "border")(sample["label"][None].float(), deformation.ddf[None])[0]
    assert (label != expected).float().mean() < 1e-3  # halves may be rounded either way
    assert label.dtype == sample["label"].dtype


def test_records_are_those_of_the_transform(small_network, scan):
    image, network = scan((40, 33))["image"], small_network(2)
    deformation = FieldDrawer(network, deformation_level=(0.2, 0.6)).draw(image, (1.0, 1.0), seed=11)
    transform = RandDRDMDeform(network)
    out = transform(image, params=deformation.params)
    assert torch.equal(transform.last.ddf, deformation.ddf)
    assert torch.equal(out.as_tensor(), deformation.warp(image))
    again = FieldDrawer(network).replay(image, (1.0, 1.0), deformation.params)
    assert torch.equal(again.ddf, deformation.ddf)


def test_a_field_that_was_skipped_leaves_the_image_alone(small_network, scan):
    image = scan((40, 40))["image"]
    rough = small_network(2, working_size=16, scale=300.0)
    drawer = FieldDrawer(rough, deformation_level=1.0, sampler="reference", on_fold="skip", max_fold_fraction=0.0)
    deformation = drawer.draw(image, (1.0, 1.0), seed=1)
    assert deformation.skipped
    assert torch.equal(deformation.warp(image), image)
    assert deformation.warp(image.byte()).dtype == torch.float32
    assert deformation.warp(image.byte(), "nearest").dtype == torch.uint8
