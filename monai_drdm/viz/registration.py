"""A figure of one registered pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from monai_drdm.viz.figures import grey_range, LABEL_AFTER, LABEL_BEFORE, plot_outlines, plot_warped_grid, show_image


def registration_figure(
    fixed: Tensor,
    moving: Tensor,
    warped: Tensor,
    ddf: Tensor,
    spacing: Sequence[float],
    labels: tuple[Tensor, Tensor] | None = None,
    title: str = "",
) -> Figure:
    """Show the fixed image, the moving one before and after, both as overlays in two colours, and the warped grid.

    Of a volume, the middle slices across all three axes are shown. In the overlays the fixed image is orange and the
    moving one blue: where both agree, the overlay is grey.

    Args:
        fixed: ``(*S)``.
        moving: ``(*S)``: before the registration, on the grid of the fixed image.
        warped: ``(*S)``: the moving image after the registration.
        ddf: ``(D, *S)`` voxels.
        spacing: mm per voxel along each axis.
        labels: label maps ``(*S)`` of the moving image, before and after; their outlines are plotted on it.
        title: text above everything.
    """
    planes = [None] if fixed.ndim == 2 else [2, 1, 0]
    extent = [n * float(step) for n, step in zip(fixed.shape, spacing)]
    sides = [[extent[axis] for axis in range(fixed.ndim) if axis != hidden] for hidden in planes]
    heights = [min(max(up / right, 0.2), 2.0) for right, up in sides]
    figure = Figure(figsize=(14.4, 2.3 * sum(heights) + 0.8), layout="constrained", facecolor="white")
    rows = figure.subplots(len(planes), 6, squeeze=False, height_ratios=heights)
    for number, (axes, hidden) in enumerate(zip(rows, planes)):
        shown = [axis for axis in range(fixed.ndim) if axis != hidden]
        steps = [float(spacing[axis]) for axis in shown]
        still, before, after = (_plane(one, hidden) for one in (fixed, moving, warped))
        panels = [("fixed", still), ("moving", before), ("moving, registered", after)]
        panels += [("both before", _overlay(still, before)), ("both after", _overlay(still, after))]
        for axis, (name, image) in zip(axes, panels):
            low, high = grey_range(image)
            name = name if number == 0 else ""
            if image.ndim == 3:
                show_image(axis, image[..., 0], steps, name)
                axis.images[0].set_data(image.transpose(0, 1).numpy())
            else:
                show_image(axis, image, steps, name, cmap="gray", vmin=low, vmax=high)
        for axis, label, colour in zip(axes[1:3], labels or (), (LABEL_BEFORE, LABEL_AFTER)):
            plot_outlines(axis, _plane(label, hidden), colour)
        plot_warped_grid(axes[5], _plane(ddf[shown], None if hidden is None else hidden + 1), steps)
        axes[5].set_title("grid, warped" if number == 0 else "", fontsize=11)
    figure.suptitle(title, fontsize=12)
    return figure


def _plane(values: Tensor, hidden: int | None) -> Tensor:
    """The middle slice across an axis."""
    values = values.detach().cpu()
    return values if hidden is None else values.select(hidden, values.shape[hidden] // 2)


def _overlay(fixed: Tensor, moving: Tensor) -> Tensor:
    """``(H, W, 3)`` in [0, 1]: orange where only the fixed image is bright, blue where only the moving one is."""

    def scaled(image: Tensor) -> Tensor:
        low, high = grey_range(image)
        return ((image.float() - low) / (high - low)).clamp(0, 1)

    a, b = scaled(fixed), scaled(moving)
    return torch.stack([a, (a + b) / 2, b], dim=-1)
