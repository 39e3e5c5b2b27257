"""The phantoms of benchmarks/registration, whose fields are known in closed form."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator

FOLDER = Path(__file__).parents[2] / "benchmarks" / "registration"


@pytest.fixture
def phantoms(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("phantoms")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def numbers(how):
    """Centre, half axes, shift and angle of the first pair, as numpy has them."""
    return [one[0].double().numpy() for one in how]


def circle(points, how):
    """Complex numbers of points ``(2, H, W)``: the ellipse is the unit circle."""
    centre, semiaxes, _, _ = numbers(how)
    at = (points - centre) / semiaxes
    return at[0] + 1j * at[1]


def grid(phantoms):
    return np.stack(np.meshgrid(*[np.arange(phantoms.SIZE, dtype=float)] * 2, indexing="ij"))


@pytest.mark.parametrize("seed", range(4))
def test_each_part_moves_as_it_is_told(phantoms, seed):
    """In coordinates in which the ellipse is a circle, the organ turns, and the wall turns back, less far outside."""
    pairs, how = phantoms.organs(1, generator(seed)), phantoms.slide(1, generator(seed))
    _, _, shift, angle = numbers(how)
    at = grid(phantoms)
    here, there = circle(at + shift, how), circle(at + pairs.ddf[0].double().numpy(), how)
    organ = np.abs(here) < 1
    turn = np.where(organ, angle[0], -angle[0] / np.maximum(np.abs(here), 1) ** 2)
    np.testing.assert_allclose(there, here * np.exp(1j * turn), atol=1e-5)
    np.testing.assert_array_equal(pairs.regions[0, 0].numpy(), np.where(organ, 1, 2))
    assert 0.15 < organ.mean() < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_parts_neither_overlap_nor_part(phantoms, seed):
    """Points on the interface stay on it, whichever part they belong to, and the parts pass each other along it."""
    how = phantoms.slide(1, generator(seed))
    centre, semiaxes, shift, angle = numbers(how)
    round_ = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    unit = np.stack([np.cos(round_), np.sin(round_)])[..., None]
    interface = torch.from_numpy(centre + semiaxes * unit - shift)[None].float()  # in the fixed image
    organ, wall = (circle(move(interface)[0].double().numpy(), how)[:, 0] for move in (how.organ, how.wall))
    np.testing.assert_allclose(np.abs(organ), 1, atol=1e-5)
    np.testing.assert_allclose(np.abs(wall), 1, atol=1e-5)
    np.testing.assert_allclose(np.angle(organ / wall), 2 * angle.item(), atol=1e-5)
    apart = np.abs(angle.item()) * np.sqrt(semiaxes.prod())
    assert phantoms.APART[0] <= apart <= phantoms.APART[1]


def test_regions_come_from_the_same_part_and_keep_its_area(phantoms):
    """Each voxel of the fixed image comes from its own part; the motion changes no area."""
    for seed in range(4):
        pairs, how = phantoms.organs(1, generator(seed)), phantoms.slide(1, generator(seed))
        source = np.abs(circle(grid(phantoms) + pairs.ddf[0].double().numpy(), how))
        np.testing.assert_array_equal(source < 1, pairs.regions[0, 0].numpy() == 1)
        organ = pairs.first[0].double().numpy()
        slopes = [np.gradient(organ[axis]) for axis in (0, 1)]
        jacobian = (1 + slopes[0][0]) * (1 + slopes[1][1]) - slopes[0][1] * slopes[1][0]
        np.testing.assert_allclose(jacobian, 1, atol=1e-4)


@pytest.mark.parametrize("name", ["blocks", "organs"])
def test_the_field_takes_the_moving_image_to_the_fixed_one(phantoms, name):
    """Away from the interface, where interpolation mixes both parts, and from what comes from beyond the image."""
    pairs = phantoms.PHANTOMS[name](1, generator(3))
    moving, fixed = pairs.images[0].double().numpy()
    at = grid(phantoms) + pairs.ddf[0].double().numpy()
    axes = (np.arange(phantoms.SIZE),) * 2
    part = pairs.regions[0, 0].double().numpy()
    found = RegularGridInterpolator(axes, moving, bounds_error=False)(np.moveaxis(at, 0, -1))
    # voxels of the moving image around the point all belong to the part
    origin = np.abs(circle(grid(phantoms), phantoms.slide(1, generator(3)))) < 1 if name == "organs" else part == 1
    around = RegularGridInterpolator(axes, origin.astype(float), bounds_error=False)(np.moveaxis(at, 0, -1))
    pure = np.isfinite(found) & (np.abs(around - (part == 1)) < 1e-9)
    assert pure.mean() > 0.7
    np.testing.assert_allclose(found[pure], fixed[pure], atol=1e-5)
    still = np.abs(moving - fixed)[pure].mean()
    assert still > 0.03  # doing nothing would not do


def test_blocks_slide_along_their_line(phantoms):
    pairs = phantoms.blocks(3, generator(0))
    assert pairs.ddf[:, 1].abs().max() == 0
    for ddf, regions in zip(pairs.ddf, pairs.regions):
        first, second = (ddf[0][regions[0] == part].unique() for part in (1, 2))
        assert len(first) == len(second) == 1
        assert 2 * phantoms.APART[0] <= abs(float(first - second)) <= 2 * phantoms.APART[1] + 1e-5
