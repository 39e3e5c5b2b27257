"""A figure of the results of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from monai.data import MetaTensor
from torch import Tensor

from monai_drdm.augment.output_folder import RECORD
from monai_drdm.augment.run import AugmentReport
from monai_drdm.io import load_ddf, load_image, stem_of
from monai_drdm.io.datalists import read_entries
from monai_drdm.io.files import atomically
from monai_drdm.transforms.pairs import DDF, SIDES

if TYPE_CHECKING:
    from monai_drdm.viz import CaseRow, Plane


class _Shown(NamedTuple):
    """A deformed case: where it came from, and its files."""

    name: str
    sources: dict[str, str]
    level: float
    axis: int | None
    image: Path
    label: Path | None
    field: Path


def plot_overview(report: AugmentReport, count: int = 6) -> Path:
    """Plot the first cases of a run, or its first pairs, as ``overview.png``: one row each.

    The row of a case shows the original, the first draw of each level, and the field of the highest level as a warped
    grid; the row of a pair shows the moving image, the fixed one, and the field between them. Labels are outlined. Of
    volumes one slice is shown, through the middle of what is labelled.

    Args:
        report: of a run that finished at least one case.
        count: number of cases or pairs, at most.

    Raises:
        ValueError: no case was finished, or all source images are gone.
    """
    from monai_drdm.viz import case_rows  # needs matplotlib, which is an extra

    folder = report.datalist.parent
    entries = [entry for entry, _ in read_entries(report.datalist, "training")]
    if not entries:
        raise ValueError(f"nothing to plot: no case of {folder} is finished.")
    if "fixed" in entries[0]:
        rows = [_pair_row(folder, entry) for entry in entries[:count]]
    else:
        rows = [_case_row(draws) for draws in _first_cases(folder, entries, count)]
    if not rows:
        raise ValueError(f"nothing to plot: what the cases of {folder} came from is no longer there.")
    path, figure = folder / "overview.png", case_rows(rows)
    atomically(path, lambda part: figure.savefig(part, dpi=100, metadata={"Software": None}))
    return path


def _first_cases(folder: Path, entries: Sequence[Mapping[str, Any]], count: int) -> list[list[_Shown]]:
    """The draws of the first cases whose sources are still there, the first one of each level."""
    cases: dict[tuple[str, ...], dict[float, _Shown]] = {}
    for draw in _draws(folder, entries):
        key = tuple(draw.sources.values())
        if key not in cases and len(cases) == count:
            break  # the draws of a case stand together
        cases.setdefault(key, {}).setdefault(draw.level, draw)
    return [list(levels.values()) for levels in cases.values()]


def _draws(folder: Path, entries: Sequence[Mapping[str, Any]]) -> Iterator[_Shown]:
    for entry in entries:
        several = not isinstance(entry["image"], str)
        image = entry["image"][0] if several else entry["image"]
        name = stem_of(image).removesuffix("_0") if several else stem_of(image)
        path = folder / "records" / f"{name}.json"
        record = RECORD.read_json(path)
        with RECORD.reading(path):
            sources, params = record["source"], record["params"]
            needed = ["image", "label"] if "label" in entry else ["image"]
            sources = {key: sources[key] for key in needed} | sources
            level, axis = float(params["deformation_level"]), params["slice_axis"]
        if all(Path(source).is_file() for source in sources.values()):
            field = folder / "fields" / f"{name}.nii.gz"
            label = folder / entry["label"] if "label" in entry else None
            yield _Shown(name, sources, level, axis, folder / image, label, field)


def _case_row(draws: Sequence[_Shown]) -> CaseRow:
    """The original, its levels, and the field of the highest one."""
    from monai_drdm.viz import CaseRow, Panel, Plane

    draws = sorted(draws, key=lambda draw: draw.level)
    first, highest = draws[0], draws[-1]
    image = _read(first.sources["image"], first.axis)
    label = None if first.label is None else _read(first.sources["label"], first.axis)
    plane = Plane.of(image, first.axis, label)
    panels = [Panel("original", plane.cut(image), None if label is None else plane.cut(label))]
    for draw in draws:
        panels.append(Panel(f"level {draw.level:g}", *_cut(plane, draw.image, draw.label, draw.axis)))
    if highest.field.is_file():
        ddf = plane.cut_field(load_ddf(highest.field).as_tensor())
        panels.append(Panel(f"field of level {highest.level:g}", ddf=ddf))
    return CaseRow(first.name.rpartition("_level")[0], panels, plane.spacing)


def _pair_row(folder: Path, entry: Mapping[str, str]) -> CaseRow:
    """The moving image, the fixed one, and the field between them."""
    from monai_drdm.viz import CaseRow, Panel, Plane

    name = stem_of(entry["fixed"])
    path = folder / "records" / f"{name}.json"
    record = RECORD.read_json(path)
    with RECORD.reading(path):
        axis = record["params"]["synthesis"]["slice_axis"]
    labels = {side: folder / entry[f"{side}_label"] if f"{side}_label" in entry else None for side in SIDES}
    moving = _read(folder / entry["moving"], axis)
    marks = None if labels["moving"] is None else _read(labels["moving"], axis)
    plane = Plane.of(moving, axis, marks)
    panels = [Panel(side, *_cut(plane, folder / entry[side], labels[side], axis)) for side in SIDES]
    ddf = plane.cut_field(load_ddf(folder / entry[DDF]).as_tensor())
    return CaseRow(name, [*panels, Panel("field from fixed to moving", ddf=ddf)], plane.spacing)


def _cut(plane: Plane, image: Path, label: Path | None, axis: int | None) -> tuple[Tensor, Tensor | None]:
    """The slice of an image file and of its label."""
    return plane.cut(_read(image, axis)), None if label is None else plane.cut(_read(label, axis))


def _read(path: str | Path, axis: int | None) -> MetaTensor:
    """What the run read: one that takes slices across an axis also counts a single slice as a volume."""
    return load_image(path, keep_slice=axis is not None).data
