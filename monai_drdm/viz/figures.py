"""A figure of one deformation, and the panels it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from monai_drdm.fields import fold_fraction, identity_grid, jacobian_determinant

INK = "#222222"
LABEL_BEFORE = "#ffb000"
LABEL_AFTER = "#00c8ff"
LABEL_COLOURS = ("#ffb000", "#00c8ff", "#ff5f8f", "#7ddc5a", "#c49bff", "#ff8a3c", "#f5f05a", "#4fe0c0")
_MOST_OUTLINES = 12
_LARGEST_LOG = 1.0  # of the determinants, at the ends of the colour bar


def deformation_figure(
    original: Tensor,
    diffused: Tensor,
    recovered: Tensor,
    ddf: Tensor,
    label: Tensor | None = None,
    recovered_label: Tensor | None = None,
    spacing: Sequence[float] = (1.0, 1.0),
    title: str = "",
    diffused_label: Tensor | None = None,
) -> Figure:
    """Show the image before, under the random field and after recovery, its labels, the warped grid and the Jacobian.

    Args:
        original: ``(H, W)`` image, or colours ``(3, H, W)``.
        diffused: the image under the random field, like ``original``.
        recovered: the image under the recovered field, like ``original``.
        ddf: ``(2, H, W)`` voxels: the recovered field.
        label: ``(H, W)`` integers of the original.
        recovered_label: ``(H, W)`` integers of the recovered image.
        spacing: mm per voxel along both axes, for the aspect ratio.
        title: text above everything.
        diffused_label: ``(H, W)`` integers of the diffused image.

    Returns:
        A matplotlib figure; ``figure.savefig(path)`` writes it.
    """
    wide, high = fitted_size(original.shape[-2:], spacing, 4.0, 3.6)
    figure = Figure(figsize=(3 * max(wide, 2.4) + 1.0, 2 * high + 1.3), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 3).ravel()
    style = grey_style(original)
    classes = label_values(label)
    panels = (
        ("Original", original, label),
        ("Random field, before recovery", diffused, diffused_label),
        ("After recovery", recovered, recovered_label),
        ("Where the labels were and are", recovered, None),
    )
    for axis, (name, image, outlined) in zip(axes, panels):
        show_image(axis, image, spacing, name, **style)
        plot_labels(axis, outlined, classes)
    if label is None:
        axes[3].set_title("After recovery (no labels given)", fontsize=11)
    for label_map, colour, name in ((label, LABEL_BEFORE, "before"), (recovered_label, LABEL_AFTER, "after")):
        if label_map is not None:
            plot_outlines(axes[3], label_map, colour)
            axes[3].plot([], [], color=colour, label=name)
            axes[3].legend(loc="lower right", fontsize=9, framealpha=0.85)
    plot_warped_grid(axes[4], ddf, spacing)
    mappable = plot_jacobian(axes[5], ddf, spacing)
    bar = figure.colorbar(mappable, ax=axes[5], shrink=0.85, extend="both")
    bar.ax.invert_yaxis()
    bar.set_label("blue: shrinks        red: grows", fontsize=9)
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def fitted_size(shape: Sequence[int], spacing: Sequence[float], width: float, height: float) -> tuple[float, float]:
    """The largest width and height in a box that keep the proportions of a picture."""
    across, above = (n * s for n, s in zip(shape, spacing))
    scale = min(width / across, height / above)
    return across * scale, above * scale


def grey_range(image: Tensor) -> tuple[float, float]:
    """The values shown as black and as white: the smallest and the 99.8th percentile."""
    values = image.detach().cpu().to(torch.float32).numpy()  # torch.quantile takes neither every dtype nor every size
    low, high = float(values.min()), float(np.percentile(values, 99.8))
    return low, max(high, low + 1e-6)


def grey_style(image: Tensor) -> dict[str, Any]:
    """How ``show_image`` shows an image and deformed forms of it alike."""
    low, high = grey_range(image)
    return {"cmap": "gray", "vmin": low, "vmax": high}


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
    frame(axis, position.shape[1:], spacing, "The field, as a warped grid")
    if min(position.shape[1:]) < 2:
        return
    extent_mm = max(n * s for n, s in zip(position.shape[1:], spacing))
    for d in (0, 1):
        step = max(extent_mm / lines / spacing[d], 1e-6)
        levels = np.arange(0, position.shape[d + 1], step)
        axis.contour(position[d].T, levels=levels, colors=INK, linewidths=0.6)


def plot_jacobian(axis: Axes, ddf: Tensor, spacing: Sequence[float] = (1.0, 1.0)) -> AxesImage:
    """Plot the logarithm of the corner Jacobian determinants: red where anatomy grows, blue where it shrinks.

    The determinant is that of the pull-back map, so its logarithm is below 0 where the warped image shows anatomy
    enlarged. Where the field folds there is no logarithm; these cells are black.

    Args:
        axis: a matplotlib axis.
        ddf: ``(2, H, W)`` voxels.
        spacing: mm per voxel along both axes.

    Returns:
        The image, from which matplotlib makes a colour bar.
    """
    field = ddf.detach().cpu()[None]
    determinant = jacobian_determinant(field)[0].numpy()
    logarithm = np.ma.log(np.ma.masked_less_equal(determinant, 0.0))
    mappable = axis.imshow(
        logarithm.T,
        cmap=colormaps["RdBu"].with_extremes(bad="black"),
        norm=CenteredNorm(0.0, _LARGEST_LOG),
        origin="lower",
        extent=(0, determinant.shape[0], 0, determinant.shape[1]),  # a cell lies between voxel centres
    )
    frame(axis, ddf.shape[1:], spacing, f"log-Jacobian; {float(fold_fraction(field)[0]):.2%} of cells fold")
    return mappable


def show_image(axis: Axes, image: Tensor, spacing: Sequence[float], name: str, **style: Any) -> None:
    """Show an image ``(H, W)``, or the colours ``(3, H, W)`` of one, with the first axis to the right.

    The aspect is that of the physical extent.

    Args:
        axis: a matplotlib axis.
        image: of any real type.
        spacing: mm per voxel along both axes.
        name: the title.
        style: what ``imshow`` takes; ``vmin`` and ``vmax`` also scale colours.
    """
    array = image.detach().cpu().float().numpy()
    frame(axis, array.shape[-2:], spacing, name)
    if array.ndim == 3:
        low, high = style["vmin"], style["vmax"]
        axis.imshow(((array.T - low) / (high - low)).clip(0, 1), origin="lower")
    else:
        axis.imshow(array.T, origin="lower", **style)
    axis.set_aspect(spacing[1] / spacing[0])


def frame(axis: Axes, shape: Sequence[int], spacing: Sequence[float], name: str) -> None:
    """Prepare an axis for a picture of a shape: title, limits and aspect; no ticks."""
    axis.set_title(name, fontsize=11, color=INK)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_xlim(-0.5, shape[0] - 0.5)
    axis.set_ylim(-0.5, shape[1] - 0.5)
    axis.set_aspect(spacing[1] / spacing[0])


def label_values(label: Tensor | None) -> list[int]:
    """The classes of a label map without the background, in order."""
    return [] if label is None else [int(value) for value in np.unique(label.detach().cpu().numpy()) if value != 0]


def plot_labels(axis: Axes, label: Tensor | None, classes: Sequence[int] | None = None) -> None:
    """Plot each class of a label map ``(H, W)`` in a colour of its own.

    Few classes are outlined, more than twelve are filled, because outlines would cover the image.

    Args:
        axis: a matplotlib axis.
        label: integers; None plots nothing.
        classes: all classes of the figure in order, which decides their colours; None: those of the label.
    """
    if label is None:
        return
    classes = label_values(label) if classes is None else classes
    if len(classes) <= _MOST_OUTLINES:
        for number, value in enumerate(classes):
            plot_outlines(axis, label == value, LABEL_COLOURS[number % len(LABEL_COLOURS)])
        return
    numbers = np.searchsorted(classes, label.detach().cpu().numpy()) % len(LABEL_COLOURS)
    shown = np.ma.masked_where(label.detach().cpu().numpy() == 0, numbers)
    style: dict[str, Any] = {"cmap": ListedColormap(LABEL_COLOURS), "vmin": 0, "vmax": len(LABEL_COLOURS) - 1}
    axis.imshow(shown.T, alpha=0.4, origin="lower", aspect=axis.get_aspect(), **style)


def plot_outlines(axis: Axes, label: Tensor, colour: str) -> None:
    """Plot the outline of every class of a label map ``(H, W)`` in one colour."""
    array = label.detach().cpu().numpy()
    if min(array.shape) < 2:  # matplotlib needs two rows and two columns
        return
    for value in np.unique(array):
        if value != 0:
            axis.contour((array == value).T.astype(float), levels=[0.5], colors=colour, linewidths=1.2)
