"""A look at what a run made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from monai_drdm.augment.run import AugmentReport
from monai_drdm.io import load_image, stem_of
from monai_drdm.io.files import atomically
from monai_drdm.samples import spacing_of
from monai_drdm.transforms.pairs import SIDES


def draw_overview(report: AugmentReport, count: int = 6) -> Path:
    """Draw the first deformed cases of a run beside what they came from, or the first pairs: ``overview.png``.

    Args:
        report: of a run that finished at least one case.
        count: at most this many.

    Raises:
        ValueError: nothing was finished, or nothing is left of what it came from.
    """
    from monai_drdm.viz import contact_sheet, SheetEntry  # matplotlib is an extra

    folder = report.datalist.parent
    entries = json.loads(report.datalist.read_text(encoding="utf-8"))["training"]
    if not entries:
        raise ValueError(f"nothing to draw: no case of {folder} is finished.")
    sheet: list[SheetEntry] = []
    for entry in entries:
        if len(sheet) == count:
            break
        last = "fixed" if "fixed" in entry else "image"
        name = stem_of(entry[last])
        record = json.loads((folder / "records" / f"{name}.json").read_text(encoding="utf-8"))
        if last == "fixed":
            axis = record["params"]["synthesis"]["slice_axis"]
            images = [folder / entry[side] for side in SIDES]
            labels = [folder / entry[key] for key in (f"{side}_label" for side in SIDES) if key in entry]
        else:
            axis, sources = record["params"]["slice_axis"], record["source"]
            if not all(Path(source).is_file() for source in sources.values()):
                continue  # it was moved since
            images = [sources["image"], folder / entry["image"]]
            labels = [sources["label"], folder / entry["label"]] if "label" in entry else []
        (before, spacing), (after, _) = (_plane(path, axis) for path in images)
        outlines: list[Tensor | None] = [None, None]
        if labels:
            outlines = [_plane(path, axis)[0] for path in labels]
        title = "fixed" if last == "fixed" else "deformed"
        sheet.append(SheetEntry(name, before, after, outlines[0], outlines[1], spacing, title))
    if not sheet:
        raise ValueError(f"nothing to draw: what the cases of {folder} came from is no longer there.")
    path = folder / "overview.png"
    figure = contact_sheet(sheet)
    atomically(path, lambda part: figure.savefig(part, dpi=100, metadata={"Software": None}))
    return path


def _plane(path: str | os.PathLike[str], axis: int | None) -> tuple[Tensor, tuple[float, float]]:
    """First channel of an image file, and spacing; of a volume its middle slice across ``axis`` or the coarsest."""
    data = load_image(path).data
    spacing, values = spacing_of(data, None, "image"), data.as_tensor()[0]
    if values.ndim == 3:
        axis = int(np.argmax(spacing)) if axis is None else axis
        values = values.select(axis, values.shape[axis] // 2)
        spacing = tuple(s for d, s in enumerate(spacing) if d != axis)
    return values, (spacing[0], spacing[1])
