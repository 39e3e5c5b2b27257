from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.blocks import Warp

from monai_drdm.fields import gaussian_smooth
from monai_drdm.registration.augmentation import drawn_pairs, intensity_jitter, random_affine, random_flip
from monai_drdm.registration.data import RegistrationBatch


def smooth(*shape, seed=0, width=3.0):
    return gaussian_smooth(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), width)


def _is_mirrored(before, after, axes):
    return torch.equal(after, before.flip([2 + axis for axis, mirror in enumerate(axes) if mirror]))


@pytest.mark.parametrize("shape", [(24, 30), (16, 20, 18)])
def test_mirrored_pairs_still_have_their_field(shape):
    """MONAI's Warp of the mirrored moving image by the mirrored field is the mirrored fixed image."""
    moving, ddf = smooth(2, 1, *shape), 20 * smooth(2, len(shape), *shape, seed=1)
    fixed = Warp("bilinear", "border")(moving, ddf)
    label = (moving > 0).to(torch.uint8)
    pairs = RegistrationBatch(moving, fixed, torch.ones_like(fixed, dtype=torch.bool), ddf, label, label)
    seen = set()
    for seed in range(40):
        new = random_flip(pairs, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(Warp("bilinear", "border")(new.moving, new.ddf), new.fixed, atol=1e-5, rtol=0)
        assert torch.equal(new.moving_label, (new.moving > 0).to(torch.uint8))
        ways = [
            each
            for each in itertools.product((False, True), repeat=len(shape))
            if _is_mirrored(moving, new.moving, each)
        ]
        assert len(ways) == 1
        seen |= set(ways)
    assert len(seen) == 2 ** len(shape)  # every way to mirror, and none


@pytest.mark.parametrize("shape", [(40, 50), (24, 28, 26)])
def test_posed_pairs_still_have_their_field(shape):
    """Inside, MONAI's Warp of the moving image by the new field is the new fixed image, to interpolation error."""
    moving, ddf = smooth(2, 1, *shape, width=4.0), 20 * smooth(2, len(shape), *shape, seed=1, width=4.0)
    monai_warp = Warp("bilinear", "border")
    fixed = monai_warp(moving, ddf)
    label = (fixed > 0).to(torch.uint8)
    inside = torch.zeros_like(fixed, dtype=torch.bool)
    inside[(..., *(slice(4, -4),) * len(shape))] = True
    pairs = RegistrationBatch(moving, fixed, inside, ddf, label, label)
    new = random_affine(pairs, 0.1, torch.Generator().manual_seed(3))
    again = monai_warp(moving, new.ddf)
    apart, before = ((one - again)[new.inside].abs().mean() for one in (new.fixed, fixed))
    assert float(apart) < 0.05 * float(before)
    assert new.moving is moving
    assert 0.3 < float(new.inside.float().mean() / inside.float().mean()) < 1.3
    agree = ((again > 0) == (new.fixed_label > 0))[new.inside].float().mean()
    assert float(agree) > 0.95
    added = (new.ddf - ddf).flatten(2).std(dim=2)
    assert float((added[0] - added[1]).abs().max()) > 0.1  # each its own
    assert random_affine(pairs, 0.0, torch.Generator()) is pairs


def test_images_without_fields_are_mirrored_too():
    image = smooth(1, 1, 20, 20)
    pairs = RegistrationBatch(image, image, torch.ones_like(image, dtype=torch.bool))
    new = [random_flip(pairs, torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert any(not torch.equal(one.moving, image) for one in new)
    assert all(torch.equal(one.moving, one.fixed) and one.ddf is None for one in new)


@pytest.mark.parametrize("shape", [(64, 64), (24, 28, 26)])
def test_repainted_images_show_the_same_in_other_greys(shape):
    image = torch.linspace(0, 1, shape[0]).view(1, 1, -1, *(1,) * (len(shape) - 1)).expand(2, 1, *shape).contiguous()
    new = intensity_jitter(image, 0.3, torch.Generator().manual_seed(0))
    assert new.shape == image.shape
    assert 0 <= float(new.min()) <= float(new.max()) <= 1
    assert float((new[0] - new[1]).abs().mean()) > 0.02  # each its own
    for one in new:
        along = one[0].flatten(1).mean(dim=1)
        assert float(torch.corrcoef(torch.stack([along, torch.linspace(0, 1, shape[0])]))[0, 1]) > 0.8
    assert intensity_jitter(image, 0.0, torch.Generator()) is image
    again = intensity_jitter(image, 0.3, torch.Generator().manual_seed(0))
    assert torch.equal(new, again)


@pytest.mark.parametrize("shape", [(40, 34), (18, 22, 20)])
def test_drawn_pairs_have_their_fields_and_are_new_every_time(shape):
    """Beside MONAI's Warp; one image is resampled twice there, so they agree up to interpolation."""
    image = smooth(2, 1, *shape, width=4.0)
    inside = torch.ones_like(image, dtype=torch.bool)
    pairs = RegistrationBatch(image, image, inside, None, None, (image > 0).to(torch.uint8))
    generator = torch.Generator().manual_seed(0)
    first, second = (drawn_pairs(pairs, 0.5, generator) for _ in range(2))
    again = drawn_pairs(pairs, 0.5, torch.Generator().manual_seed(0))
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("moving", "fixed", "ddf", "inside"))
    lengths = first.ddf.norm(dim=1).flatten(1).mean(dim=1)
    assert float(lengths.min()) > 0.2
    assert not torch.allclose(first.ddf[0], first.ddf[1], atol=0.1)
    assert not torch.allclose(first.ddf, second.ddf, atol=0.1)
    made = Warp("bilinear", "border")(first.moving, first.ddf)
    apart, before = ((one - first.fixed).abs()[first.inside].mean() for one in (made, first.moving))
    assert float(apart) < 0.25 * float(before)
    for label, side in ((first.moving_label, first.moving), (first.fixed_label, first.fixed)):
        assert ((label == 1) == (side > 0)).float().mean() > 0.9
