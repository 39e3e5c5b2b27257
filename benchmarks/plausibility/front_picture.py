"""Draw the front picture of the README, and measure what it shows: real scans, their first draws, an elastic one.

Every row is the first scan of a test split, none of which was trained on: a hippocampus and a brain as volumes, of
which one slice is shown, and a chest X-ray. The X-ray is the first one whose lung mask may be passed on. The columns
are the original, the draws of seeds 0 to 3 at one level, whatever they look like, and MONAI's elastic deformation with
as large a displacement as the four draws have on average, without their affine part, which elastic deformations lack.
For brains the rows also tell how much larger one half is than the other: each half of the original, left and right of
its middle, is deformed, and its volume counted.

    python benchmarks/plausibility/front_picture.py --out docs/images/front.png    # 1 min; writes front_picture.jsonl
    python benchmarks/plausibility/front_picture.py --halves 20                    # 4 min; the brain in more draws
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from monai.data import MetaTensor
from PIL import Image
from torch import Tensor

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import fold_fraction, warp
from monai_drdm.metrics import mean_displacement, remove_affine
from monai_drdm.networks import auto_network, load_network
from monai_drdm.viz import Plane, plot_labels
from monai_drdm.viz.figures import grey_style

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows
from common.scans import Scan, scans
from elastic import elastic_field

ROWS = Path(__file__).with_suffix(".jsonl")
LEVEL, SEEDS = 0.55, (0, 1, 2, 3)
"""The middle of the transforms' default range of levels, and the first draws."""
_COLUMNS = len(SEEDS) + 2
_TILE, _LEFT, _TOP, _GAP = 1.5, 0.3, 0.5, 0.05  # inches


class Subject(NamedTuple):
    """A row of the picture."""

    name: str
    scan: Scan
    axis: int | None
    """The slice of a volume is across it."""
    mirror: int | None = None
    """The axis from right to left, of what is symmetric."""


class Drawn(NamedTuple):
    """A field, and what was measured of it."""

    ddf: Tensor
    measured: dict[str, Any]


def subjects() -> list[Subject]:
    """The first scan of each test split; of the X-rays the first of Montgomery County, whose masks are free."""
    free = next(scan for scan in scans("cxr", "test") if scan.name.startswith("MCUCXR"))
    free = free._replace(image=free.image.transpose(2, 3), label=free.label.transpose(2, 3))  # columns come first here
    return [
        Subject("hippocampus", scans("hippocampus3d", "test")[0], 2),
        Subject("chest X-ray", free, None),
        Subject("brain", scans("ixi3d", "test")[0], 0, mirror=0),
    ]


def draw(subject: Subject, seed: int) -> Drawn:
    """One field of the network in this package for the scan's dimensions."""
    image = subject.scan.image
    model = DRDM(load_network(auto_network(image.ndim - 2)))
    return _measured(subject, model.sample(image, LEVEL, [seed]), f"DRDM {seed}")


def draw_elastic(subject: Subject, displacement: float) -> Drawn:
    """MONAI's elastic deformation with seed 0, as far as asked for: its displacement is linear in its magnitude."""
    image, magnitude = subject.scan.image[0], 1.0
    shape = image.shape[1:]
    for _ in range(3):  # what points out of the image is cut off, so not quite linear
        ddf = elastic_field(shape, magnitude, 0)
        found = _measured(subject, ddf, "elastic")
        magnitude *= displacement / found.measured["displacement_vox"]
    return found


def _measured(subject: Subject, ddf: Tensor, method: str) -> Drawn:
    label = subject.scan.label
    measured = {
        "scan": subject.scan.name,
        "method": method,
        "level": LEVEL,
        "displacement_vox": float(mean_displacement(remove_affine(ddf))),
        "folds": float(fold_fraction(ddf)),
    }
    if subject.mirror is not None:
        measured["larger_half"] = larger_half(label, ddf, subject.mirror)
    return Drawn(ddf, measured)


def larger_half(label: Tensor, ddf: Tensor | None, axis: int) -> float:
    """Volume of the larger half of what is labelled over that of the smaller one, the halves being the original's."""
    inside = (label > 0).float()
    at = torch.arange(label.shape[axis + 2]).view([-1 if d == axis + 2 else 1 for d in range(label.ndim)])
    middle = float((inside * at).sum() / inside.sum())
    halves = torch.cat([inside * (at < middle), inside * (at >= middle)], 1)
    volumes = (halves if ddf is None else warp(halves, ddf)).flatten(2).sum(2)[0]
    return float(volumes.max() / volumes.min())


def picture(rows: list[tuple[Subject, list[Drawn]]]) -> Figure:
    """All rows, close to each other."""
    width = _LEFT + _COLUMNS * (_TILE + _GAP) + _GAP
    height = _TOP + len(rows) * (_TILE + _GAP)
    figure = Figure(figsize=(width, height), facecolor="white")
    for number, (subject, found) in enumerate(rows):
        bottom = height - _TOP - (number + 1) * _TILE - number * _GAP
        figure.text(
            0.15 / width,
            (bottom + _TILE / 2) / height,
            subject.name,
            rotation=90,
            ha="center",
            va="center",
            fontsize=13,
        )
        _plot_row(figure, subject, found, bottom)
    for text, first, last in (("original", 0, 0), ("new anatomies: the first four draws", 1, 4), ("elastic", 5, 5)):
        middle = _LEFT + (first + last + 1) / 2 * (_TILE + _GAP)
        figure.text(middle / width, 1 - 0.22 / height, text, ha="center", va="center", fontsize=15, weight="bold")
        if last > first:
            ends = [(_LEFT + x * (_TILE + _GAP)) / width for x in (first + 0.02, last + 0.95)]
            figure.add_artist(_line(ends, 1 - 0.41 / height))
    return figure


def _line(ends: list[float], y: float) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(ends, [y, y], color="#222222", linewidth=1)


def _plot_row(figure: Figure, subject: Subject, found: list[Drawn], bottom: float) -> None:
    """The same square of every image, as wide as the narrower side of the slice and about what is labelled."""
    width, height = figure.get_size_inches()
    image, label = subject.scan.image[0], subject.scan.label[0]
    plane = Plane.of(_placed(image), subject.axis, label)
    side, middle = _square(plane.cut(label))
    fields = [torch.zeros_like(found[0].ddf[0]), *(one.ddf[0] for one in found)]
    for column, ddf in enumerate(fields):
        left = _LEFT + column * (_TILE + _GAP)
        axis = figure.add_axes((left / width, bottom / height, _TILE / width, _TILE / height))
        shown = plane.cut_warped(image, ddf)
        axis.imshow(shown.T, origin="lower", interpolation="bicubic", **grey_style(plane.cut(image)))
        plot_labels(axis, plane.cut_warped(_structures(subject, label), ddf, "nearest"))
        axis.set(xlim=(middle[0] - side, middle[0] + side), ylim=(middle[1] - side, middle[1] + side))
        axis.set_axis_off()


def _square(label: Tensor) -> tuple[float, list[float]]:
    """Half the side of a square within a slice, and its centre, as near to that of the label as it fits."""
    side = min(label.shape) / 2
    found = [(int(one.min()) + int(one.max())) / 2 for one in label.nonzero(as_tuple=True)]
    return side, [min(max(at, side - 0.5), n - side - 0.5) for at, n in zip(found, label.shape)]


def _placed(image: Tensor) -> Tensor:
    """Volumes of both sets lie from left to right, from back to front and from feet to head."""
    affine = torch.eye(4, dtype=torch.float64)
    affine[0, 3] = float(image.ndim == 4)  # a photograph has the identity
    return MetaTensor(image, affine=affine)


def _structures(subject: Subject, label: Tensor) -> Tensor:
    """What is outlined: of brains the ventricles, the brainstem and the cerebellum, as all would hide the image."""
    if subject.name != "brain":
        return label
    chosen = torch.zeros(256, dtype=label.dtype)
    chosen[[7, 12, 8, 9]] = torch.tensor([1, 1, 2, 3], dtype=label.dtype)
    return chosen[label.long()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="PNG to write")
    parser.add_argument("--halves", type=int, default=0, help="only count the halves of the brain in so many draws")
    args = parser.parse_args()
    if args.halves:
        brain = subjects()[2]
        before = larger_half(brain.scan.label, None, 0)
        found = [draw(brain, seed) for seed in range(args.halves)]
        append_rows(ROWS, {"scan": brain.scan.name, "method": "original", "larger_half": before})
        append_rows(ROWS, *(one.measured for one in found[len(SEEDS) :]))  # the first ones belong to the picture
        print(f"larger half over smaller one: original {before:.3f}")
        ratios = torch.tensor([one.measured["larger_half"] for one in found])
        print(f"draws: mean {ratios.mean():.3f}, largest {ratios.max():.3f}")
    if args.out is not None:
        rows = []
        for subject in subjects():
            found = [draw(subject, seed) for seed in SEEDS]
            mean = sum(one.measured["displacement_vox"] for one in found) / len(found)
            rows.append((subject, [*found, draw_elastic(subject, mean)]))
            append_rows(ROWS, *(one.measured for one in rows[-1][1]))
        picture(rows).savefig(args.out, dpi=190)
        with Image.open(args.out) as image:
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)
        print(args.out, args.out.stat().st_size // 1024, "KB")


if __name__ == "__main__":
    main()
