"""Curves of motion separability, and the bounds of registration networks on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from torch import Tensor


def separability_figure(
    distances: Sequence[float],
    curves: Mapping[str, Tensor] | None = None,
    bounds: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None,
    *,
    unit: str = "voxel",
) -> Figure:
    """Largest difference of displacement against the distance of points.

    Args:
        distances: distances at which the curves are given; bounds are plotted up to the largest.
        curves: for each name values ``(B, len(distances))`` of ``registration.motion_separability``. Several fields are
            plotted as their mean, in a band from the smallest to the largest.
        bounds: for each name the ``starts`` and ``plateaus`` of ``registration.separability_bound``.
        unit: of both axes.

    Raises:
        ValueError: neither curves nor bounds, or values that do not fit the distances.
    """
    if not distances or not (curves or bounds):
        raise ValueError("separability_figure: give distances, and curves or bounds to plot over them.")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", facecolor="white")
    axis = figure.subplots()
    for name, values in (curves or {}).items():
        if values.ndim != 2 or values.shape[1] != len(distances):
            raise ValueError(
                f"separability_figure: {name!r} must have shape (B, {len(distances)}), got {tuple(values.shape)}."
            )
        rows = values.detach().cpu().double()
        (line,) = axis.plot(distances, rows.nanmean(dim=0), label=name, linewidth=1.8)
        if len(rows) > 1:
            axis.fill_between(
                distances, rows.amin(dim=0), rows.amax(dim=0), color=line.get_color(), alpha=0.2, linewidth=0
            )
    for name, (starts, plateaus) in (bounds or {}).items():
        end = max(float(max(distances)), float(starts[-1]) + 1)
        axis.step([0, *starts, end], [0, *plateaus, plateaus[-1]], where="post", label=name, linestyle="--")
    axis.set_xlabel(f"distance of points, at most ({unit})")
    axis.set_ylabel(f"difference of displacement, largest ({unit})")
    axis.set_xlim(0, None)
    axis.set_ylim(0, None)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure
