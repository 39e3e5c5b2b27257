"""A figure of one deformation, and the panels it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from monai_drdm.fields import fold_fraction, identity_grid, jacobian_determinant

_INK = "#222222"
LABEL_BEFORE = "#ffb000"
LABEL_AFTER = "#00c8ff"


def deformation_figure(
    original: Tensor,
    diffused: Tensor,
    recovered: Tensor,
    ddf: Tensor,
    label: Tensor | None = None,
    recovered_label: Tensor | None = None,
    spacing: Sequence[float] = (1.0, 1.0),
    title: str = "",
) -> Figure:
    """Show the original, diffused and recovered image, label outlines, the warped grid and the Jacobian map.

    Args:
        original: ``(H, W)`` image.
        diffused: ``(H, W)``: the image under the random field.
        recovered: ``(H, W)``: the image under the recovered field.
        ddf: ``(2, H, W)`` voxels: the recovered field.
        label: ``(H, W)`` integers of the original.
        recovered_label: ``(H, W)`` integers of the recovered image.
        spacing: mm per voxel along both axes, for the aspect ratio.
        title: text above everything.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.
    """
    figure = Figure(figsize=(12.0, 6.9), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3).ravel()
    low, high = grey_range(original)
    panels = (
        ("Original", original),
        ("Diffused: random field", diffused),
        ("Recovered", recovered),
    )
    for axis, (name, image) in zip(axes, panels):
        show_image(axis, image, spacing, name, cmap="gray", vmin=low, vmax=high)
    show_image(axes[3], recovered, spacing, "Labels: before and after", cmap="gray", vmin=low, vmax=high)
    for label_map, colour, name in ((label, LABEL_BEFORE, "before"), (recovered_label, LABEL_AFTER, "after")):
        if label_map is not None:
            plot_outlines(axes[3], label_map, colour)
            axes[3].plot([], [], color=colour, label=name)
    if label is not None:
        axes[3].legend(loc="lower right", fontsize=9, framealpha=0.85)
    plot_warped_grid(axes[4], ddf, spacing)
    mappable = plot_jacobian(axes[5], ddf, spacing)
    figure.colorbar(mappable, ax=axes[5], shrink=0.8)
    figure.suptitle(title, fontsize=12, color=_INK)
    return figure


def grey_range(image: Tensor) -> tuple[float, float]:
    """The values shown as black and as white: the smallest and the 99.8th percentile."""
    values = image.detach().cpu().to(torch.float32).numpy()  # torch.quantile takes neither every dtype nor every size
    low, high = float(values.min()), float(np.percentile(values, 99.8))
    return low, max(high, low + 1e-6)


def plot_warped_grid(axis: Axes, ddf: Tensor, spacing: Sequence[float] = (1.0, 1.0), lines: int = 32) -> None:
    """Plot where the lines of a regular grid on the original lie in the warped image.

    The lines are level sets of ``x + ddf(x)``, so they are exact although the field is not inverted.

    Args:
        axis: a matplotlib axis.
        ddf: ``(2, H, W)`` voxels.
        spacing: mm per voxel along both axes.
        lines: grid lines along the longer side.
    """
    position = (identity_grid(ddf.shape[1:]) + ddf.detach().cpu().float()).numpy()
    _frame(axis, position.shape[1:], spacing, "Grid of the original, warped")
    if min(position.shape[1:]) < 2:
        return
    extent_mm = max(n * s for n, s in zip(position.shape[1:], spacing))
    for d in (0, 1):
        step = max(extent_mm / lines / spacing[d], 1e-6)
        levels = np.arange(0, position.shape[d + 1], step)
        axis.contour(position[d].T, levels=levels, colors=_INK, linewidths=0.6)


def plot_jacobian(axis: Axes, ddf: Tensor, spacing: Sequence[float] = (1.0, 1.0)) -> AxesImage:
    """Plot the corner Jacobian determinants: red where anatomy grows, blue where it shrinks, black where it folds.

    The determinant is that of the pull-back map, so it is below 1 where the warped image shows anatomy enlarged.

    Args:
        axis: a matplotlib axis.
        ddf: ``(2, H, W)`` voxels.
        spacing: mm per voxel along both axes.

    Returns:
        The image, from which matplotlib makes a colour bar.
    """
    field = ddf.detach().cpu()[None]
    determinant = jacobian_determinant(field)[0].numpy()
    name = f"Jacobian determinant, folds {float(fold_fraction(field)[0]):.2%}"
    mappable = axis.imshow(
        np.ma.masked_less_equal(determinant, 0.0).T,
        cmap=colormaps["RdBu"].with_extremes(bad="black"),
        norm=TwoSlopeNorm(1.0, 0.0, 2.5),
        origin="lower",
        extent=(0, determinant.shape[0], 0, determinant.shape[1]),  # a cell lies between voxel centres
    )
    _frame(axis, ddf.shape[1:], spacing, name)
    return mappable


def show_image(axis: Axes, image: Tensor, spacing: Sequence[float], name: str, **style: Any) -> None:
    """Show an image ``(H, W)`` in its physical proportions, with the first axis to the right."""
    array = image.detach().cpu().float().numpy()
    _frame(axis, array.shape, spacing, name)
    axis.imshow(array.T, origin="lower", **style)
    axis.set_aspect(spacing[1] / spacing[0])


def _frame(axis: Axes, shape: Sequence[int], spacing: Sequence[float], name: str) -> None:
    axis.set_title(name, fontsize=11, color=_INK)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlim(-0.5, shape[0] - 0.5)
    axis.set_ylim(-0.5, shape[1] - 0.5)
    axis.set_aspect(spacing[1] / spacing[0])


def plot_outlines(axis: Axes, label: Tensor, colour: str) -> None:
    """Plot the outline of every class of a label map ``(H, W)``."""
    array = label.detach().cpu().numpy()
    if min(array.shape) < 2:  # matplotlib needs two rows and two columns
        return
    for value in np.unique(array):
        if value != 0:
            axis.contour((array == value).T.astype(float), levels=[0.5], colors=colour, linewidths=1.2)
