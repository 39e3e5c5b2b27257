import dataclasses

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from monai_drdm.diffusion import DRDM
from monai_drdm.networks import VelocityUNet
from monai_drdm.transforms import RandDRDMDeformd

pytest.importorskip("matplotlib")

import itertools

from monai_drdm.viz import animate_recovery, recovery_steps, recovery_strip

AFFINE = torch.diag(torch.tensor([-1.0, 1.0, 3.0, 1.0]))  # slices across the body, its left side to the right


def untrained(dims):
    torch.manual_seed(0)
    network = VelocityUNet(dims, channels=(4, 6))
    for one in network.parameters():  # otherwise it predicts 0
        torch.nn.init.normal_(one, std=0.1)
    network.card = dataclasses.replace(network.card, working_size=17, steps=3)
    return network


@pytest.mark.parametrize(("dims", "slice_axis"), [(2, None), (2, 2), (3, None)])
def test_steps_lead_from_the_random_field_to_what_was_applied(dims, slice_axis):
    shape = (20, 24) if slice_axis is None and dims == 2 else (20, 24, 6)
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(1))
    label = (image > 0.7).to(torch.uint8)
    network = untrained(dims)
    sample = {"image": MetaTensor(image, affine=AFFINE), "label": MetaTensor(label, affine=AFFINE)}
    transform = RandDRDMDeformd(
        ["image", "label"],
        mode=["bilinear", "nearest"],
        network=network,
        prob=1.0,
        slice_axis=slice_axis,
        max_displacement_mm=0.5,
    ).set_random_state(3)
    deformed = transform(sample)
    params = transform.last.params
    assert params.scale < 1
    found = recovery_steps(sample["image"], params, sample["label"], network=network)
    assert len(found.steps) == 4
    # slices across the last axis lie as they are
    at = ... if len(shape) == 2 else (..., found_index(label))
    assert torch.equal(found.original.image, image[0][at])
    assert torch.equal(found.steps[-1].ddf, transform.last.ddf[at][:2])
    torch.testing.assert_close(found.steps[-1].image, deformed["image"].as_tensor()[0][at], atol=1e-5, rtol=0)
    assert torch.equal(found.steps[-1].label, deformed["label"].as_tensor()[0][at])
    planar = shape if slice_axis is None else shape[:2]
    spacing = (1.0, 1.0, 3.0)[: len(planar)]
    random = DRDM(network).diffuse(planar, params.deformation_level, [params.seed], spacing)[0] * params.scale
    random = random[at][:2] if len(planar) == 3 else random
    torch.testing.assert_close(found.steps[0].ddf, random, atol=2e-3, rtol=0)


def found_index(label):
    """The slice that holds the middle of what is labelled, by numpy."""
    inside = np.cumsum(np.asarray(label[0]).sum((0, 1)))
    return int(np.searchsorted(inside, inside[-1] / 2))


@pytest.fixture(scope="module")
def found():
    image = torch.rand(1, 30, 20, generator=torch.Generator().manual_seed(1))
    network = untrained(2)
    transform = RandDRDMDeformd("image", network=network, prob=1.0)
    transform({"image": image})
    return recovery_steps(image, transform.last.params, (image > 0.5).byte(), network=network)


def test_the_animation_shows_every_step(found, tmp_path):
    animate_recovery(found, 100).save(tmp_path / "recovery.gif", writer="pillow", dpi=30)
    with Image.open(tmp_path / "recovery.gif") as gif:
        frames = []
        for number in range(gif.n_frames):
            gif.seek(number)
            frames.append((gif.info["duration"], np.asarray(gif.convert("L"))))
    assert sum(duration for duration, _ in frames) == 100 * (3 + 4 + 3)
    different = sum(np.abs(a.astype(int) - b).mean() > 0.1 for (_, a), (_, b) in itertools.pairwise(frames))
    assert different == 3


def test_the_strip_begins_and_ends_with_the_recovery(found):
    titles = [axis.get_title() for axis in recovery_strip(found, panels=2).axes]
    assert titles == ["original", "random field", "after step 3 of 3", "", "", ""]
    images = [axis.images[0].get_array().T for axis in recovery_strip(found, panels=9).axes[:5]]
    np.testing.assert_array_equal(images[0], found.original.image)
    for shown, step in zip(images[1:], found.steps):
        np.testing.assert_array_equal(shown, step.image)
    with pytest.raises(ValueError, match="panels must be 2 or more"):
        recovery_strip(found, panels=1)


def test_a_call_that_did_not_fire_has_no_recovery():
    with pytest.raises(TypeError, match="DeformationParams"):
        recovery_steps(torch.rand(1, 8, 8), None)


@pytest.mark.parametrize("compact", [True, False])
def test_steps_of_a_model_end_with_its_sample(compact):
    model = DRDM(untrained(2))
    images = torch.rand(2, 1, 20, 24, generator=torch.Generator().manual_seed(1))
    steps = model.sample_steps(images, [0.4, 0.7], [1, 2], (1.0, 2.0), compact=compact)
    assert len(steps) == 4
    assert torch.equal(steps[-1], model.sample(images, [0.4, 0.7], [1, 2], (1.0, 2.0), compact=compact))
    if not compact:
        assert torch.equal(steps[0], model.diffuse((20, 24), [0.4, 0.7], [1, 2], (1.0, 2.0)))
