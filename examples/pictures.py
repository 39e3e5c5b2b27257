"""Figures of the examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def show(axes: Axes, image: torch.Tensor, label: torch.Tensor, title: str = "", style: str = "solid") -> None:
    """A slice ``(1, H, W)`` and the outlines of its label ``(H, W)``."""
    axes.imshow(np.asarray(image[0]).T, cmap="gray", origin="lower")
    for value in np.unique(np.asarray(label))[1:]:
        colors = [f"C{int(value)}"]
        axes.contour(value == np.asarray(label).T, [0.5], colors=colors, linestyles=style, linewidths=1.2)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def draw_curves(story: Sequence[dict[str, float]], titles: dict[str, str]) -> Figure:
    """Values against iterations, one panel a key of ``titles``."""
    figure = Figure(figsize=(3 * len(titles), 3), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles.items()):
        axes.plot([one["step"] for one in story], [one[key] for one in story])
        axes.set(xlabel="iteration", title=title)
    return figure


def draw_overlays(samples: Sequence[dict[str, Any]], found: Sequence[torch.Tensor], count: int = 6) -> Figure:
    """Outlines of what was found in images ``(1, *S)``; true ones, where they are known, below."""
    chosen = [int(i) for i in np.linspace(0, len(samples) - 1, min(count, len(samples)))]
    known = "label" in samples[0]
    figure = Figure(figsize=(2.5 * len(chosen), 2.7 * (1 + known)), layout="constrained")
    rows = figure.subplots(1 + known, len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        one = samples[index]
        maps = {f"found: {one['name']}": found[index], **({"truth": one["label"]} if known else {})}
        for axes, (title, label) in zip(rows[:, column], maps.items()):
            show(axes, _middle(one["image"]), _middle(label)[0], title)
    return figure


def _middle(image: torch.Tensor) -> torch.Tensor:
    """A 2D image ``(1, H, W)``; of a volume, its middle slice along the last axis."""
    return image if image.ndim == 3 else image[..., image.shape[-1] // 2]
