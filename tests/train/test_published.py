import numpy as np
import pytest
import torch

from monai_drdm.diffusion import diffuse_published
from monai_drdm.fields import fold_fraction, fractions_to_voxels, warp
from monai_drdm.train import build_config
from monai_drdm.train.published import (
    draw_published_batch,
    published_fields,
    published_folding,
    published_loss,
    PublishedTarget,
)
from monai_drdm.train.recovery import draw_images

STILL = [f"{name}=0" for name in ("flip", "rotation_deg", "scale", "shift_frac")]
PLAIN = [f"{name}=0" for name in ("gamma", "contrast", "bias", "blur_vox", "noise")]


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def released(t, batch, size, dims):
    """What the release makes of the same noise."""
    return diffuse_published([seeded()] * batch, size, dims, t)


@pytest.mark.parametrize(
    ("dims", "size", "steps"), [(2, 256, (1, 8, 25, 48, 64, 79)), (2, 65, (1, 64)), (3, 32, (3,)), (3, 33, (48,))]
)
def test_fields_are_the_released_ones(dims, size, steps):
    """The total field to 1.5 % of its mean displacement, the small one to a tenth of a pixel at 256."""
    fields = published_fields(seeded(), torch.tensor(steps), size, dims)
    for b, t in enumerate(steps):
        total, last = (fractions_to_voxels(field)[b] for field in released(t, len(steps), size, dims))
        got_total, got_last = (fractions_to_voxels(field)[b] for field in fields)
        assert got_total.shape == (dims, *(size,) * dims)
        missed = (got_total - total).norm(dim=0).mean()
        assert missed <= 0.015 * total.norm(dim=0).mean() + 1e-6
        torch.testing.assert_close(got_last, last, rtol=0, atol=0.15 * size / 256)


def test_fields_fold_as_often_as_the_released_ones():
    ours = fold_fraction(fractions_to_voxels(published_fields(seeded(), torch.full((8,), 79), 256, 2)[0])).mean()
    theirs = fold_fraction(fractions_to_voxels(released(79, 8, 256, 2)[0])).mean()
    assert theirs > 0.1
    assert ours == pytest.approx(float(theirs), rel=0.05)


def test_a_time_step_does_not_change_the_others():
    together = published_fields(seeded(), torch.tensor([5, 70]), 64, 2)
    for other in (1, 40):
        fields = published_fields(seeded(), torch.tensor([5, other]), 64, 2)
        for field, expected in zip(fields, together):
            torch.testing.assert_close(field[0], expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [0, 80, -1])
def test_other_time_steps_are_refused(t):
    with pytest.raises(ValueError, match=r"t must be in \[1, 80\)"):
        published_fields(seeded(), torch.tensor([3, t]), 32, 2)


def test_time_steps_are_all_from_1_to_79():
    config = build_config(settings=["network=recresacnet", "working_size=17", "batch_size=800", *STILL, *PLAIN])
    _, t, target = draw_published_batch(config, None, seeded())
    assert t.dtype == torch.int64
    assert set(t.tolist()) == set(range(1, 80))
    assert (target.last.flatten(1).abs().amax(dim=1) > 0).all()


def test_levels_limit_the_time_steps():
    settings = ["network=recresacnet", "working_size=17", "batch_size=100", "level_low=0.25", "level_high=0.5"]
    _, t, _ = draw_published_batch(build_config(settings=settings), None, seeded())
    assert (int(t.min()), int(t.max())) == (20, 40)


@pytest.mark.parametrize("size", [32, 33])
def test_images_are_warped_by_the_total_field_alone(size):
    settings = ["network=recresacnet", f"working_size={size}", "batch_size=3", *STILL, *PLAIN]
    config = build_config(settings=settings)
    image, _, target = draw_published_batch(config, None, seeded())
    undeformed = draw_images(config, None, seeded())  # drawn first, from the same generator
    expected = warp(undeformed, target.total, "bicubic", "zeros").clamp(0, 1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-4)


def target_of(last):
    return PublishedTarget(torch.zeros_like(last), last)


def test_the_loss_adds_its_terms_in_their_weights():
    """A constant shift back by half: a quarter of the distance, opposite direction, no roughness."""
    last = torch.full((2, 2, 16, 16), 0.05)
    weights = ["distance_weight=3", "angle_weight=5", "smoothness_weight=7"]
    config = build_config(settings=["network=recresacnet", *weights])
    assert published_loss(config, -0.5 * last, target_of(last)).item() == pytest.approx(3 * 0.25 - 5, rel=1e-4)
    slope = torch.arange(16.0).view(1, 1, 16, 1) * torch.tensor([0.01, 0.0]).view(1, 2, 1, 1)
    # differences of 0.01 along one of two axes, for one of two components
    rough = published_loss(config, (-last + slope).contiguous(), target_of(last))
    smooth = published_loss(
        build_config(settings=["network=recresacnet", *weights[:2], "smoothness_weight=0"]),
        (-last + slope).contiguous(),
        target_of(last),
    )
    assert (rough - smooth).item() == pytest.approx(7 * (0.01 - 1e-4) / 4, rel=1e-4)


def test_weights_are_the_published_ones(reference):
    """Recorded from the release: its three terms on a prediction and a target."""
    config = build_config(settings=["network=recresacnet"])
    with np.load(reference / "loss_parity.npz") as file:
        known = {name: torch.from_numpy(file[name]) for name in file if "2d" in name}
    parts = {name.split("2d")[0].rstrip("_"): value for name, value in known.items()}
    loss = published_loss(config, parts["pred"], target_of(parts["target"]))
    torch.testing.assert_close(
        loss, parts["distance"] + parts["angle"] + 10 * parts["regular_l1"], rtol=1e-4, atol=1e-5
    )


def test_a_step_back_that_folds_costs_something():
    still = target_of(torch.zeros(1, 2, 12, 12))
    grid = torch.arange(12.0).view(1, 1, 12, 1).expand(1, 1, 12, 12)
    mirrored = torch.cat((-2 * grid, torch.zeros_like(grid)), dim=1) / 12
    assert published_folding(torch.zeros(1, 2, 12, 12), still).item() == 0
    assert published_folding(mirrored, still).item() == pytest.approx(0.1 + 1, rel=1e-4)
