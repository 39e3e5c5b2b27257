"""Contact sheets: many deformations in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from monai_drdm.viz.figures import grey_range, LABEL_AFTER, LABEL_BEFORE, plot_outlines, show_image

_MAX_COLUMNS = 6


class SheetEntry(NamedTuple):
    """An image ``(H, W)`` before and after a deformation, each with a label map ``(H, W)`` or None."""

    name: str
    before: Tensor
    after: Tensor
    label_before: Tensor | None = None
    label_after: Tensor | None = None
    spacing: tuple[float, float] = (1.0, 1.0)
    after_name: str = "deformed"


def contact_sheet(entries: Sequence[SheetEntry]) -> Figure:
    """Show each original above its deformed image, with label outlines; the entries stand side by side.

    Raises:
        ValueError: no entries.
    """
    if not entries:
        raise ValueError("contact_sheet: entries must hold at least one image, got none.")
    columns = min(len(entries), _MAX_COLUMNS)
    blocks = -(-len(entries) // columns)
    figure = Figure(figsize=(2.6 * columns, 5.6 * blocks), layout="constrained", facecolor="white")
    axes = figure.subplots(2 * blocks, columns, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    for number, entry in enumerate(entries):
        block, column = divmod(number, columns)
        low, high = grey_range(entry.before)
        shown = (
            (entry.before, entry.label_before, LABEL_BEFORE, entry.name),
            (entry.after, entry.label_after, LABEL_AFTER, entry.after_name),
        )
        for row, (image, label, colour, title) in enumerate(shown):
            axis = axes[2 * block + row, column]
            axis.set_axis_on()
            show_image(axis, image, entry.spacing, title, cmap="gray", vmin=low, vmax=high)
            axis.title.set_fontsize(8)
            if label is not None:
                plot_outlines(axis, label, colour)
    return figure


def middle_plane(image: Tensor) -> Tensor:
    """The first channel ``(H, W)`` of an image ``(C, *S)``; for a volume, its middle slice across the last axis."""
    first = image[0].detach().cpu()
    return first if first.ndim == 2 else first[..., first.shape[-1] // 2]
