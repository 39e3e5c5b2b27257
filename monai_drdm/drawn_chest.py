"""A drawn slice through a chest, with its label map: a scan for demonstrations that needs no file and no licence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monai_drdm.fields import gaussian_smooth

STRUCTURES = {1: "right lung", 2: "left lung", 3: "heart muscle", 4: "blood", 5: "bone"}
"""What the numbers of the label map mean; 0 is everything else."""
SPACING_MM = 1.6
_SHAPE = (240, 180)
_LUNG, _FAT, _MUSCLE, _BLOOD, _BONE = 0.07, 0.3, 0.5, 0.78, 0.95
_Mask = NDArray[np.bool_]


def draw_chest() -> tuple[Tensor, Tensor]:
    """A slice as computed tomography with contrast agent shows it, and its label map: the same at every call.

    Returns:
        The image in [0, 1] and the labels ``STRUCTURES``, each ``(1, H, W)``. The first axis runs from the right side
        of the body to its left, the second one from back to front. Voxels measure ``SPACING_MM`` along both.
    """
    sheet = _Sheet()
    _draw_wall(sheet)
    _draw_lungs(sheet)
    _draw_heart_and_vessels(sheet)
    _draw_spine(sheet)
    tissue = gaussian_smooth(torch.from_numpy(sheet.generator.normal(size=(1, 1, *_SHAPE))), 0.8)
    image = gaussian_smooth(torch.from_numpy(sheet.image)[None, None], 0.7)
    image = image + (0.035 * (image > 0.2) + 0.012) * tissue / tissue.std()
    return image[0].clamp(0, 1).float(), torch.from_numpy(sheet.label)[None]


@dataclass
class _Sheet:
    """What is drawn on. Positions and lengths are millimetres from the middle: to the left side, to the front."""

    image: NDArray[np.float64] = field(default_factory=lambda: np.zeros(_SHAPE))
    label: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(_SHAPE, np.uint8))
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def blob(self, centre: Sequence[float], radii: Sequence[float], degrees: float = 0, bumps: float = 0.02) -> _Mask:
        """An ellipse, turned and with a bumpy outline."""
        place = [(np.arange(n) - (n - 1) / 2) * SPACING_MM - c for n, c in zip(_SHAPE, centre)]
        x, y = np.meshgrid(*place, indexing="ij")
        turn = np.radians(degrees)
        u, v = (x * np.cos(turn) + y * np.sin(turn)) / radii[0], (y * np.cos(turn) - x * np.sin(turn)) / radii[1]
        angle, outline = np.arctan2(v, u), 1.0
        for waves in (2, 3, 4, 5):
            phase = self.generator.uniform(0, 2 * np.pi)
            outline = outline + bumps * self.generator.normal() * np.cos(waves * angle + phase)
        return np.asarray(np.hypot(u, v) < outline)

    def paint(self, inside: _Mask, value: float, structure: int = 0) -> None:
        """Give a region its intensity and its label."""
        self.image[inside], self.label[inside] = value, structure


def _draw_wall(sheet: _Sheet) -> None:
    """Skin, fat, muscles and ribs."""
    sheet.paint(sheet.blob((0, 0), (162, 114), bumps=0.012), _FAT)
    sheet.paint(sheet.blob((0, 0), (143, 97), bumps=0.01), _MUSCLE)
    for side in (-1, 1):
        for degrees in (-62, -35, -8, 20, 47, 70):
            turn = np.radians(degrees)
            place = (side * 130 * np.cos(turn), 84 * np.sin(turn))
            along = np.degrees(np.arctan2(84 * np.cos(turn), -130 * np.sin(turn)))
            sheet.paint(sheet.blob(place, (15, 4.5), side * along), _BONE, 5)
            sheet.image[sheet.blob(place, (11, 2), side * along)] = 0.62  # marrow
    sheet.paint(sheet.blob((2, 84), (21, 6)), _BONE, 5)  # breastbone


def _draw_lungs(sheet: _Sheet) -> None:
    """Both lungs with their vessels, which are part of them."""
    for side, structure in ((-1, 1), (1, 2)):
        lung = sheet.blob((side * 71, -3), (49, 73), side * 4, 0.03) & sheet.blob((0, 0), (122, 76), bumps=0)
        sheet.paint(lung, _LUNG, structure)
        for _ in range(30):
            far = sheet.generator.uniform(0, 1)
            place = (side * (30 + 85 * far), sheet.generator.uniform(-60, 55))
            wide = 1.2 + 2.2 * (1 - far) * sheet.generator.uniform(0.4, 1)
            long = wide * sheet.generator.uniform(1, 4)
            direction = np.degrees(np.arctan2(place[1] + 10, place[0])) + sheet.generator.normal(0, 20)
            sheet.image[lung & sheet.blob(place, (long, wide), direction)] = _MUSCLE


def _draw_heart_and_vessels(sheet: _Sheet) -> None:
    """The heart in its fat, with both ventricles and atria, the aorta, the gullet and the airways."""
    sheet.paint(sheet.blob((14, 16), (64, 50), -24), _FAT)
    sheet.paint(sheet.blob((0, -30), (34, 40), 0), _FAT)
    sheet.paint(sheet.blob((-24, 16), (21, 25), 20), _BLOOD, 4)  # right atrium
    sheet.paint(sheet.blob((4, -14), (30, 17), 8), _BLOOD, 4)  # left atrium
    sheet.paint(sheet.blob((16, 34), (42, 25), -28), _MUSCLE, 3)
    sheet.paint(sheet.blob((14, 36), (37, 20), -28), _BLOOD, 4)  # right ventricle
    sheet.paint(sheet.blob((41, 10), (35, 26), -32), _MUSCLE, 3)
    sheet.paint(sheet.blob((38, 11), (24, 14), -32), _BLOOD, 4)  # left ventricle
    sheet.paint(sheet.blob((24, -48), (12.5, 12.5)), _MUSCLE)
    sheet.paint(sheet.blob((24, -48), (11.5, 11.5)), _BLOOD, 4)  # aorta
    sheet.paint(sheet.blob((6, -40), (8, 5)), _MUSCLE)  # gullet


def _draw_spine(sheet: _Sheet) -> None:
    """A vertebra with the canal of the spinal cord, between the muscles of the back."""
    for side in (-1, 1):
        sheet.paint(sheet.blob((side * 33, -84), (28, 13), side * 8), _MUSCLE)
        sheet.paint(sheet.blob((side * 24, -76), (24, 5.5), side * -18), _BONE, 5)
    sheet.paint(sheet.blob((0, -93), (4.5, 15)), _BONE, 5)
    sheet.paint(sheet.blob((0, -58), (22, 17)), _BONE, 5)
    sheet.image[sheet.blob((0, -57), (19, 14))] = 0.66  # marrow
    sheet.paint(sheet.blob((0, -79), (13, 10)), _BONE, 5)
    sheet.paint(sheet.blob((0, -79), (9.5, 7.5)), _FAT)
    sheet.paint(sheet.blob((0, -79), (5.5, 4.5)), _MUSCLE)
