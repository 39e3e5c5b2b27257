"""Cases below each other: one row of panels for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure
from torch import Tensor

from monai_drdm.viz.figures import fitted_size, grey_style, INK, label_values, plot_labels, plot_warped_grid, show_image

_TILE = 2.5
_NARROWEST = 1.3  # room for titles
_GAP, _MARGIN, _TITLE, _NAME = 0.1, 0.12, 0.22, 0.24  # all in inches


class Panel(NamedTuple):
    """An image with the outlines of its label, or a field as a warped grid."""

    title: str
    image: Tensor | None = None
    """``(H, W)``, or the colours ``(3, H, W)``."""
    label: Tensor | None = None
    """``(H, W)`` integers."""
    ddf: Tensor | None = None
    """``(2, H, W)`` pixels."""


class CaseRow(NamedTuple):
    """The panels of a case, all of one shape; the first one holds the original."""

    name: str
    panels: Sequence[Panel]
    spacing: tuple[float, float] = (1.0, 1.0)


def case_rows(rows: Sequence[CaseRow]) -> Figure:
    """Show one row a case, in physical proportions: images with outlines of labels, and fields as warped grids.

    Raises:
        ValueError: no rows, or a row without panels or whose first panel has no image.
    """
    if not rows or not all(row.panels and row.panels[0].image is not None for row in rows):
        raise ValueError("case_rows: rows must hold at least one case, each beginning with an image.")
    sizes = [_tile(row) for row in rows]
    column = max(_NARROWEST, *(width for width, _ in sizes))
    count = max(len(row.panels) for row in rows)
    classes = sorted({value for row in rows for panel in row.panels for value in label_values(panel.label)})
    width = 2 * _MARGIN + count * column + (count - 1) * _GAP
    height = 2 * _MARGIN + sum(_NAME + _TITLE + one for _, one in sizes) + _GAP * (len(rows) - 1)
    figure = Figure(figsize=(width, height), facecolor="white")
    top = height - _MARGIN
    for row, (wide, high) in zip(rows, sizes):
        figure.text(_MARGIN / width, (top - 0.05) / height, row.name, fontsize=10, weight="bold", color=INK, va="top")
        below = top - _NAME - _TITLE - high
        for number, panel in enumerate(row.panels):
            left = _MARGIN + number * (column + _GAP) + (column - wide) / 2
            _plot(figure, (left / width, below / height, wide / width, high / height), panel, row, classes)
        top = below - _GAP
    return figure


def _tile(row: CaseRow) -> tuple[float, float]:
    image = row.panels[0].image
    assert image is not None
    return fitted_size(image.shape[-2:], row.spacing, _TILE, _TILE)


def _plot(
    figure: Figure, box: tuple[float, float, float, float], panel: Panel, row: CaseRow, classes: list[int]
) -> None:
    axis = figure.add_axes(box)
    original = row.panels[0].image
    assert original is not None
    if panel.ddf is not None:
        plot_warped_grid(axis, panel.ddf, row.spacing, lines=24)
    elif panel.image is not None:
        show_image(axis, panel.image, row.spacing, panel.title, **grey_style(original))
        plot_labels(axis, panel.label, classes)
    axis.set_title(panel.title, fontsize=9, color=INK, pad=4)
