"""How a random field is recovered, step by step: as a strip of pictures and as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from monai_drdm.deformation import DeformationParams, FieldDrawer
from monai_drdm.deformation.options import NetworkLike
from monai_drdm.deformation.record import check_record
from monai_drdm.samples import as_tensor, spacing_of
from monai_drdm.viz.figures import (
    fitted_size,
    grey_style,
    INK,
    label_values,
    plot_labels,
    plot_warped_grid,
    show_image,
)
from monai_drdm.viz.planes import Plane

_PAUSE = 3  # frames for which the first and the last picture stay


class RecoveryStep(NamedTuple):
    """One slice of an image under a field on its way from random to recovered."""

    title: str
    image: Tensor
    """``(H, W)``, or the colours ``(3, H, W)``."""
    label: Tensor | None
    """``(H, W)``."""
    ddf: Tensor
    """``(2, H, W)`` pixels: the part of the field that lies in the slice."""


class RecoverySteps(NamedTuple):
    """What ``recovery_steps`` found."""

    original: RecoveryStep
    """The slice as it was given; its field is 0."""
    steps: list[RecoveryStep]
    """Before recovery, and after each step of it."""
    spacing: tuple[float, float]
    """Millimetres per pixel."""


def recovery_steps(
    image: Tensor,
    params: DeformationParams,
    label: Tensor | None = None,
    *,
    network: NetworkLike = "auto",
    pixdim: Sequence[float] | None = None,
) -> RecoverySteps:
    """Draw a recorded field again and keep what one slice of the image looks like after every step.

    Args:
        image: ``(C, *S)``, the image that was deformed, before it was.
        params: the record, such as ``transform.last.params``.
        label: ``(C, *S)`` label map of the image.
        network: the one that drew the field: registry name, safetensors file or loaded network.
        pixdim: millimetres per voxel of an image without an affine.

    Raises:
        TypeError: ``params`` is no record of ``RandDRDMDeform`` or ``RandDRDMDeformd``. A call that did not fire has
            none.
        ValueError: an image that does not fit the network, a label of another grid, or a record of another network.
    """
    check_record(params, DeformationParams)
    values, spacing = as_tensor(image, "image"), spacing_of(image, pixdim, "image")
    fields = FieldDrawer(network).replay_steps(values, spacing, params)
    plane = Plane.of(image, params.slice_axis, label, pixdim)
    marks = None if label is None else as_tensor(label, "label")
    if marks is not None and marks.shape[1:] != values.shape[1:]:
        raise ValueError(f"label must have the grid of image, {tuple(values.shape[1:])}, got {tuple(marks.shape[1:])}.")

    def step(title: str, ddf: Tensor) -> RecoveryStep:
        moved = None if marks is None else plane.cut_warped(marks, ddf, "nearest").cpu()
        return RecoveryStep(title, plane.cut_warped(values, ddf).cpu(), moved, plane.cut_field(ddf).cpu())

    last = len(fields) - 1
    titles = ["random field", *(f"after step {k} of {last}" for k in range(1, last + 1))]
    steps = [step(title, stored.ddf()) for title, stored in zip(titles, fields)]
    given = None if marks is None else plane.cut(marks).cpu()
    original = RecoveryStep("original", plane.cut(values).cpu(), given, torch.zeros_like(steps[0].ddf))
    return RecoverySteps(original, steps, plane.spacing)


def recovery_strip(found: RecoverySteps, panels: int = 5) -> Figure:
    """Show the original, the random field, some steps and the recovered image side by side, above their fields.

    Args:
        found: by ``recovery_steps``.
        panels: how many steps are shown, at least the first and the last.

    Raises:
        ValueError: fewer than two panels.
    """
    if panels < 2:
        raise ValueError(f"recovery_strip: panels must be 2 or more, got {panels}.")
    chosen = np.linspace(0, len(found.steps) - 1, min(panels, len(found.steps))).round().astype(int)
    shown = [found.original, *(found.steps[k] for k in chosen)]
    wide, high = fitted_size(shown[0].image.shape[-2:], found.spacing, 2.4, 2.4)
    size = (len(shown) * (max(wide, 1.3) + 0.1), 2 * (high + 0.1) + 0.3)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    for axes, step in zip(figure.subplots(2, len(shown), squeeze=False).T, shown):
        _plot_step(axes, step, found)
        axes[0].set_title(step.title, fontsize=9, color=INK)
    return figure


def animate_recovery(found: RecoverySteps, interval_ms: int = 250) -> FuncAnimation:
    """An animation of the recovery: the image and its labels beside the field, first and last picture a little longer.

    ``animate_recovery(found).save("recovery.gif", writer="pillow")`` writes it; ``.to_jshtml()`` is for notebooks.

    Args:
        found: by ``recovery_steps``.
        interval_ms: how long each picture stays, in milliseconds.
    """
    wide, high = fitted_size(found.original.image.shape[-2:], found.spacing, 4.0, 4.0)
    width, height, edge, title = 2 * wide + 0.3, high + 0.5, 0.1, 0.4
    figure = Figure(figsize=(width, height), facecolor="white")  # a layout engine would double the time of each picture
    boxes = [(edge + k * (wide + edge), edge, wide, height - edge - title) for k in (0, 1)]
    axes = [figure.add_axes((x / width, y / height, w / width, h / height)) for x, y, w, h in boxes]
    last = len(found.steps) - 1
    order = [0] * _PAUSE + list(range(last + 1)) + [last] * _PAUSE

    def show(frame: int) -> None:
        for artist in [*axes[0].images, *axes[0].collections, *axes[1].collections]:
            artist.remove()  # quicker than to clear the axes
        _plot_step(axes, found.steps[frame], found)
        axes[0].set_title(found.steps[frame].title, fontsize=11, color=INK)
        axes[1].set_title("field", fontsize=11, color=INK)

    return FuncAnimation(figure, show, frames=order, init_func=lambda: None, interval=interval_ms)


def _plot_step(axes: Sequence[Axes], step: RecoveryStep, found: RecoverySteps) -> None:
    """An image with its labels, and its field."""
    above, below = axes
    show_image(above, step.image, found.spacing, "", **grey_style(found.original.image))
    plot_labels(above, step.label, label_values(found.original.label))
    plot_warped_grid(below, step.ddf, found.spacing, lines=24)
    below.set_title("")
