"""Deformations of plain tensors, without MONAI."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from monai.networks.blocks import Warp

from monai_drdm import RandDRDMDeform
from monai_drdm.deformation import FieldDrawer
from monai_drdm.deformation.network_source import NetworkSource

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


def test_lists_of_other_lengths_are_refused_and_lose_no_image(small_network):
    drawer, image = FieldDrawer(small_network(2), steps=1), torch.rand(1, 20, 24)
    with pytest.raises(ValueError, match="images and spacings and seeds must be equally many"):
        drawer.draw_batch([image, image], [(1.0, 1.0)], [1, 2])
    with pytest.raises(ValueError, match="'images': 1, 'spacings': 1, 'seeds': 3"):
        drawer.draw_batch([image], [(1.0, 1.0)], [1, 2, 3])
    record = drawer.draw(image, (1.0, 1.0), 3).params
    with pytest.raises(ValueError, match="'params': 2"):
        drawer.replay_batch([image], [(1.0, 1.0)], [record, record])
    with pytest.raises(ValueError, match=r"with a channel and a voxel or more, got \(0, 20, 24\)"):
        drawer.draw(image[:0], (1.0, 1.0), 3)


@pytest.mark.parametrize("level", [0.5, (0.3, 0.8)])
def test_seeds_are_whole_numbers_of_32_bits(small_network, level):
    drawer, image = FieldDrawer(small_network(2), steps=1, deformation_level=level), torch.rand(1, 20, 24)
    drawn = drawer.draw(image, (1.0, 1.0), np.random.default_rng(0).integers(2**32))
    assert type(json.loads(drawn.params.to_json())["seed"]) is int
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295"):
            drawer.draw(image, (1.0, 1.0), seed)
    with pytest.raises(TypeError, match="seed"):
        drawer.draw(image, (1.0, 1.0), 1.5)


def test_limits_may_be_any_real_number_and_nothing_else(small_network):
    image = torch.rand(1, 20, 24, generator=torch.Generator().manual_seed(0))
    for limit in (np.float32(0.3), 1):
        drawn = FieldDrawer(small_network(2), steps=1, max_displacement_mm=limit).draw(image, (1.0, 1.0), 0)
        assert type(json.loads(drawn.params.to_json())["scale"]) is float
        assert drawn.statistics.max_displacement_mm <= float(limit)
    for options in ({"max_displacement_mm": torch.tensor(0.3)}, {"max_fold_fraction": "0"}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be a number"):
            FieldDrawer(small_network(2), **options)


def test_weights_that_change_are_moved_to_the_device_again(small_network):
    network = small_network(2)
    source, device = NetworkSource(network), torch.device("meta")
    first = source.load(2, device)
    assert first is not network
    assert source.load(2, device) is first
    network.load_state_dict({name: value + 1 for name, value in network.state_dict().items()})
    assert source.load(2, device) is not first
    with torch.inference_mode():  # whose tensors count no changes
        assert NetworkSource(small_network(2)).load(2, device).card.name == "untrained-2d"


def test_networks_that_predict_no_numbers_are_named(small_network):
    network = small_network(2)
    network.conv_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="network 'untrained-2d' predicts NaN or infinity"):
        FieldDrawer(network, steps=1).draw(torch.rand(1, 20, 24), (1.0, 1.0), 0)
