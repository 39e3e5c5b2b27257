"""A figure of the results of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TYPE_CHECKING

import numpy as np
from torch import Tensor

from monai_drdm.augment.output_folder import RECORD
from monai_drdm.augment.run import AugmentReport
from monai_drdm.io import load_image, stem_of
from monai_drdm.io.datalists import read_entries
from monai_drdm.io.files import atomically
from monai_drdm.samples import spacing_of
from monai_drdm.transforms.pairs import SIDES

if TYPE_CHECKING:
    from monai_drdm.viz import SheetEntry


def plot_overview(report: AugmentReport, count: int = 6) -> Path:
    """Plot the first deformed cases of a run beside their sources, or the first pairs, as ``overview.png``.

    Args:
        report: of a run that finished at least one case.
        count: number of cases or pairs, at most.

    Raises:
        ValueError: no case was finished, or all source images are gone.
    """
    from monai_drdm.viz import contact_sheet  # needs matplotlib, which is an extra

    folder = report.datalist.parent
    entries = [entry for entry, _ in read_entries(report.datalist, "training")]
    if not entries:
        raise ValueError(f"nothing to plot: no case of {folder} is finished.")
    sheet: list[SheetEntry] = []
    for entry in entries:
        if len(sheet) == count:
            break
        row = _pair(folder, entry) if "fixed" in entry else _deformed_case(folder, entry)
        if row is not None:
            sheet.append(row)
    if not sheet:
        raise ValueError(f"nothing to plot: what the cases of {folder} came from is no longer there.")
    path = folder / "overview.png"
    figure = contact_sheet(sheet)
    atomically(path, lambda part: figure.savefig(part, dpi=100, metadata={"Software": None}))
    return path


def _deformed_case(folder: Path, entry: Mapping[str, Any]) -> SheetEntry | None:
    """The first source image beside its deformed copy. None if the source file no longer exists."""
    several = not isinstance(entry["image"], str)
    image = entry["image"][0] if several else entry["image"]
    name = stem_of(image).removesuffix("_0") if several else stem_of(image)
    path = folder / "records" / f"{name}.json"
    record = RECORD.read_json(path)
    with RECORD.reading(path):
        sources, axis = record["source"], record["params"]["slice_axis"]
        images = (sources["image"], folder / image)
        labels = (sources["label"], folder / entry["label"]) if "label" in entry else None
    if not all(Path(source).is_file() for source in sources.values()):
        return None
    return _sheet_entry(name, images, labels, axis, "deformed")


def _pair(folder: Path, entry: Mapping[str, str]) -> SheetEntry:
    """A moving image beside the fixed one."""
    name = stem_of(entry["fixed"])
    path = folder / "records" / f"{name}.json"
    record = RECORD.read_json(path)
    with RECORD.reading(path):
        axis = record["params"]["synthesis"]["slice_axis"]
    moving, fixed = (folder / entry[side] for side in SIDES)
    labels = [folder / entry[key] for key in (f"{side}_label" for side in SIDES) if key in entry]
    return _sheet_entry(name, (moving, fixed), (labels[0], labels[1]) if labels else None, axis, "fixed")


def _sheet_entry(
    name: str,
    images: tuple[str | Path, str | Path],
    labels: tuple[str | Path, str | Path] | None,
    axis: int | None,
    after_name: str,
) -> SheetEntry:
    from monai_drdm.viz import SheetEntry

    (before, spacing), (after, _) = (_plane(path, axis) for path in images)
    label_before, label_after = (None, None) if labels is None else (_plane(path, axis)[0] for path in labels)
    return SheetEntry(name, before, after, label_before, label_after, spacing, after_name)


def _plane(path: str | os.PathLike[str], axis: int | None) -> tuple[Tensor, tuple[float, float]]:
    """The first channel of an image file and its spacing; for a volume, the middle slice.

    Args:
        path: the file.
        axis: the axis across which a volume is sliced; None: the one with the largest spacing.
    """
    data = load_image(path).data
    spacing, values = spacing_of(data, None, "image"), data.as_tensor()[0]
    if values.ndim == 3:
        axis = int(np.argmax(spacing)) if axis is None else axis
        values = values.select(axis, values.shape[axis] // 2)
        spacing = tuple(s for d, s in enumerate(spacing) if d != axis)
    return values, (spacing[0], spacing[1])
