"""The registrations of other packages in benchmarks/registration, and what masks hide from them."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter, shift

FOLDER = Path(__file__).parents[2] / "benchmarks" / "registration"


@pytest.fixture
def baselines(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("baselines")


def tensor(values):
    return torch.from_numpy(np.array(values))[None, None]


@pytest.fixture(scope="module")
def two_balls():
    """Two balls, of which the first moves by 2 voxels along the last axis and the second by 2 along the first one."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in (16, 16, 34)], indexing="ij"))

    def ball(*centre):
        apart = np.linalg.norm(at - np.reshape(centre, (3, 1, 1, 1)), axis=0)
        return gaussian_filter((apart < 4).astype(np.float32), 1)

    moving, fixed = ball(8, 8, 9) + ball(9, 8, 25), ball(8, 8, 7) + ball(7, 8, 25)
    return tensor(moving), tensor(fixed), tensor(np.broadcast_to(at[2] < 16, moving.shape))


@pytest.mark.parametrize("name", ["demons", "bspline"])
def test_what_no_mask_shows_does_not_push(baselines, two_balls, name):
    moving, fixed, first = two_balls
    method = getattr(baselines, name)
    without, masked = method(moving, fixed), method(moving, fixed, (first, first))
    second = (slice(None), 0, slice(5, 11), slice(5, 11), slice(22, 29))
    assert without[0, 2, 5:11, 5:11, 5:11].mean() > 0.5  # the first ball moves in both
    assert masked[0, 2, 5:11, 5:11, 5:11].mean() > 0.5
    assert without[second].mean() > 0.5  # and the second one only if it is seen
    assert masked[second].abs().mean() < 0.2


def test_foreground_keeps_what_is_enclosed_and_no_padding(baselines):
    image = np.zeros((24, 24, 24), dtype=np.float32)
    image[6:18, 6:18, 6:18] = 1
    image[9:15, 9:15, 9:15] = 0  # a hole
    inside = np.ones(image.shape, dtype=bool)
    inside[:, :, 17:] = False
    found = baselines.foreground(tensor(image), tensor(inside))[0, 0].numpy()
    expected = np.zeros(image.shape, dtype=bool)
    expected[6:18, 6:18, 6:18] = True
    assert found[expected & inside].all()
    assert not found[~inside].any()
    assert not found[:2].any()  # more than the margin away


def test_the_start_of_all_is_not_led_by_what_is_beyond_the_masks(baselines):
    """A shift is found although both images are alike where no mask is."""
    rng = np.random.default_rng(0)
    content = gaussian_filter(rng.normal(size=(30, 30, 30)), 3)
    content = (content - content.min()) / np.ptp(content)
    frame = gaussian_filter(rng.normal(size=(30, 30, 30)), 1)
    frame = (frame - frame.min()) / np.ptp(frame)
    inside = np.zeros(content.shape, dtype=bool)
    inside[6:24, 6:24, 5:23] = True
    other = np.roll(inside, 2, axis=0)
    moved = (3.0, -2.0, 1.0)
    fixed = tensor(np.where(inside, content, frame)).float()
    moving = tensor(np.where(other, shift(content, moved, order=1, mode="nearest"), frame)).float()
    start = baselines.affine_start
    middle = torch.tensor([15.0, 15.0, 14.0])

    def found(*masks):
        matrix = start(moving, fixed, *masks)[0]
        return (matrix[:, :3] @ middle + matrix[:, 3] - middle).numpy()

    np.testing.assert_allclose(found((tensor(other), tensor(inside))), moved, atol=0.3)
    assert np.abs(found() - moved).max() > 0.6
