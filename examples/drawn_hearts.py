"""Short-axis slices of hearts, drawn: data for examples that need none of yours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

KEYS = ["image", "label"]


def draw_heart(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A short-axis slice as a child would draw it: 1 right ventricle, 2 wall, 3 left ventricle; every one differs."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1

    def blob(centre: Sequence[float], radius: Sequence[float], bumps: float) -> np.ndarray:
        dy, dx = (y - centre[0]) / radius[0], (x - centre[1]) / radius[1]
        angle = np.arctan2(dy, dx)
        outline = 1 + sum(
            bumps / k * generator.normal() * np.cos(k * angle + generator.uniform(0, 2 * np.pi)) for k in (2, 3, 4)
        )
        return np.hypot(dy, dx) < outline

    centre = generator.uniform(-0.12, 0.12, 2)
    cavity = generator.uniform(0.14, 0.26, 2)
    wall = cavity + generator.uniform(0.07, 0.14)
    beside = centre - [generator.uniform(-0.1, 0.1), wall[1] + generator.uniform(-0.02, 0.08)]
    inner, outer = blob(centre, cavity, 0.08), blob(centre, wall, 0.05)
    right = blob(beside, generator.uniform(0.16, 0.34, 2), 0.12)
    label = np.where(inner, 3, np.where(outer | inner, 2, np.where(right, 1, 0)))
    image = 0.12 + 0.3 * blob([0, 0], generator.uniform(0.75, 0.98, 2), 0.05)
    for _ in range(6):
        place, extent = generator.uniform(-0.8, 0.8, 2), generator.uniform(0.05, 0.25, 2)
        image = np.where(blob(place, extent, 0.2), generator.uniform(0.1, 0.9), image)
    blood, muscle = generator.uniform(0.7, 0.95), generator.uniform(0.3, 0.5)
    image = np.choose(label, [image, blood, muscle, blood]) + generator.normal(0, 0.03, image.shape)
    return image.clip(0, 1).astype(np.float32), label.astype(np.uint8)


def draw_data(folder: Path, count: int, size: int) -> None:
    """Write drawn scans and their labels as NIfTI."""
    generator = np.random.default_rng(0)
    for number in range(count):
        for key, array in zip(KEYS, draw_heart(generator, size)):
            (folder / f"{key}s").mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{key}s" / f"scan{number:05d}.nii.gz")
