"""Labels on a segmenter's grid, and how well two of them agree."""

from __future__ import annotations

import torch
from torch import Tensor


def dice(predicted: Tensor, label: Tensor, classes: int) -> list[float | None]:
    """Dice of every class from 1 to ``classes``; None for a class that the label does not contain."""
    found: list[float | None] = []
    for value in range(1, classes + 1):
        a, b = predicted == value, label == value
        found.append(2 * float((a & b).sum()) / float(a.sum() + b.sum()) if bool(b.any()) else None)
    return found


def resize_nearest(label: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resample a label ``(B, 1, *S)`` to ``shape`` by nearest neighbour; the outermost voxels stay outermost."""
    for axis, new in enumerate(shape):
        index = torch.linspace(0, label.shape[axis + 2] - 1, new).round().long()
        label = label.index_select(axis + 2, index)
    return label


def margins(image: Tensor, grid: tuple[int, ...]) -> list[int]:
    """The padding that centres an image ``(B, C, *S)`` on a larger grid, in the order that ``F.pad`` expects."""
    room = [n - m for n, m in zip(grid, image.shape[2:])]
    return [side for r in reversed(room) for side in (r // 2, r - r // 2)]
