"""How much shape can fields change before images become implausible? DRDM beside elastic and random fields.

Of every field, the affine map that fits it best over the labelled area is split off. Two things are measured. *Change
of shape*: the Dice that is missing between the label and its copy under the rest of the field, which no affine
augmentation could make. *Dice lost*: what a segmenter trained on real images loses on the deformed image, compared with
the same image under the affine part alone, so that resampling, pose and size do not count. Structures count that the
segmenter finds in the real image (Dice 0.7 or more). A method is better if it changes more shape at the same loss.
Beside that: the change of shape between two people, one laid on the other by an affine registration of their images.

    python benchmarks/plausibility/curve.py --split test --out docs/images/curve.png
    python benchmarks/plausibility/curve.py --table

Resumable: finished rows are skipped.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import wilcoxon
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import fold_fraction, identity_grid, resize_ddf, resize_image, sample, warp
from monai_drdm.networks import auto_network, load_network, network_sha256
from monai_drdm.registration import apply_affine, find_affine, unit_range

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.labels import dice
from common.rows import append_rows, machine, read_rows
from common.scans import Domain, DOMAINS, Draw, draws, Scan, scans
from elastic import elastic_field
from gates import random_field
from gates_table import FOUND
from segmenters import default_cache, load_segmenter, Segmenter

PATH = Path(__file__).parent / "curve.jsonl"
IMAGES = {2: 30, 3: 10}
LEAST_VOXELS = 100
"""Images with fewer labelled voxels do not count."""
DRDM_LEVELS = (0.2, 0.4, 0.6, 0.8, 1.0)
HALF_LEVELS = (0.4, 0.6, 0.8, 1.0)
"""Levels with half the recovery, which leaves more of the random field."""
DEFAULTS = (0.3, 0.8)
"""Range of levels that the transforms draw from unless told otherwise."""
RANDOM_SHARES = {2: (0.03, 0.06, 0.12, 0.2, 0.3), 3: (0.05, 0.1, 0.2, 0.3, 0.45)}
"""Factors on random fields of level 0.6."""
ELASTIC_MAGNITUDES = {2: (0.003, 0.006, 0.01, 0.02, 0.04), 3: (0.5, 1.5, 3.0, 5.0, 8.0)}
"""Magnitudes of MONAI's elastic deformation, as fractions of the longest side."""
NAMES = {
    "acdc": "heart MR, slices",
    "cxr": "chest X-rays",
    "nuclei": "nuclei, microscopy",
    "limbct": "limbs, CT slices",
    "limbmr": "limbs, MR slices",
    "ixi": "brain MR, slices",
    "ixi3d": "brain MR, volumes",
    "hippocampus3d": "hippocampus MR, volumes",
}
STYLE = {
    "drdm": ("#c0392b", "o", "DRDM"),
    "drdm, recovery 0.5": ("#e59866", "D", "DRDM, half the recovery"),
    "elastic": ("#2471a3", "s", "elastic"),
    "random": ("#888888", "^", "random"),
}
"""Colour, marker and name of the methods in the figure."""
_COLUMNS = 3
"""Of panels in the figure."""
KEY = ("domain", "split", "method", "strength", "image", "seed", "network")


class Method(NamedTuple):
    """One way to draw fields, at one strength."""

    name: str
    strength: float
    model: DRDM | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """What identifies it in a row."""
        network = network_sha256(self.model.network)[:8] if self.model else ""
        return {"method": self.name, "strength": self.strength, "network": network}

    def draw(self, image: Tensor, seed: int) -> Tensor:
        """A field ``(1, D, *S)`` in voxels of the image."""
        if self.model is not None:
            return self.model.sample(image, self.strength, [seed])
        if self.name == "random":
            return self.strength * random_field(image, 0.6, seed)
        return elastic_field(image.shape[2:], self.strength * max(image.shape[2:]), seed)


def methods(dims: int) -> Iterator[Method]:
    """All methods at all strengths."""
    model = DRDM(load_network(auto_network(dims)))
    for level in DRDM_LEVELS:
        yield Method("drdm", level, model)
    half = DRDM(model.network, recovery=0.5)
    for level in HALF_LEVELS:
        yield Method("drdm, recovery 0.5", level, half)
    for share in RANDOM_SHARES[dims]:
        yield Method("random", share)
    for magnitude in ELASTIC_MAGNITUDES[dims]:
        yield Method("elastic", magnitude)


def affine_part(ddf: Tensor, inside: Tensor) -> Tensor:
    """Homogeneous matrix ``(D, D + 1)`` of the map ``x + ddf(x)`` that is fitted where ``inside`` ``(*S)`` is True."""
    here = identity_grid(ddf.shape[2:])[:, inside].double()
    there = here + ddf[0][:, inside].double()
    design = torch.cat((here, torch.ones_like(here[:1])))
    return torch.linalg.lstsq(design.T, there.T).solution.T


def measure(scan: Scan, ddf: Tensor, segmenter: Segmenter, classes: int) -> dict[str, Any]:
    """Change of shape and Dice lost by one field, on the grid of the scan."""
    dims, grid = ddf.shape[1], identity_grid(scan.image.shape[2:])
    if int((scan.label > 0).sum()) < LEAST_VOXELS:
        return {"shape_points": None, "dice_lost": None, "folds": float(fold_fraction(ddf))}
    matrix = affine_part(ddf, scan.label[0, 0] > 0)
    linear, shift = matrix[:, :dims].float(), matrix[:, dims].float().view(-1, *(1,) * dims)
    posed = torch.einsum("ij,j...->i...", linear, grid) + shift
    back = torch.einsum("ij,j...->i...", torch.linalg.inv(linear), grid - shift)[None]
    rest = back + sample(ddf, back)  # the affine map undone, then the field
    changed = dice(sample(scan.label, rest, "nearest"), scan.label, classes)
    real = dice(segmenter(scan.image), scan.label, classes)
    moved = dice(segmenter(warp(scan.image, ddf)), warp(scan.label, ddf, "nearest"), classes)
    affine = dice(segmenter(sample(scan.image, posed[None])), sample(scan.label, posed[None], "nearest"), classes)
    lost = [
        100 * (a - b)
        for a, b, c in zip(affine, moved, real)
        if a is not None and b is not None and c is not None and c >= FOUND
    ]
    missing = [100 * (1 - one) for one in changed if one is not None]
    return {
        "shape_points": float(np.mean(missing)) if missing else None,
        "dice_lost": float(np.mean(lost)) if lost else None,
        "folds": float(fold_fraction(ddf)),
    }


def run(domain: Domain, split: str, cache: Path) -> None:
    """Write the rows of a domain that are not there."""
    done = {tuple(row.get(name) for name in KEY) for row in read_rows(PATH)}
    segmenter = load_segmenter(domain.name, cache)
    every = list(methods(domain.spatial_dims))
    for draw in tqdm(draws(domain.name, split, IMAGES[domain.spatial_dims]), desc=domain.name):
        rows = []
        for method in every:
            row = {"domain": domain.name, "split": split, "image": draw.scan.name, "seed": draw.seed} | method.columns
            if tuple(row[name] for name in KEY) not in done:
                rows.append(row | measure(draw.scan, _field(method, domain, draw), segmenter, domain.classes))
        append_rows(PATH, *(row | machine() for row in rows))
    if (domain.name, split) not in {(row["domain"], row["split"]) for row in _people(read_rows(PATH))}:
        append_rows(PATH, *(row | {"split": split} for row in people(domain, split)))


def _field(method: Method, domain: Domain, draw: Draw) -> Tensor:
    """A field on the grid of the scan; hearts are deformed on a larger one, as in ``gates.py``."""
    shape = (domain.field_size,) * domain.spatial_dims if domain.field_size else tuple(draw.scan.image.shape[2:])
    return resize_ddf(method.draw(resize_image(draw.scan.image, shape), draw.seed), draw.scan.image.shape[2:])


def people(domain: Domain, split: str) -> Iterator[dict[str, Any]]:
    """Dice missing between the labels of neighbouring test scans after the affine registration of their images."""
    if domain.spatial_dims == 2 and domain.name != "cxr":
        return  # slices of two people need not show the same
    every = scans(domain.name, split)[: IMAGES[domain.spatial_dims] + 1]
    for moving, fixed in pairwise(every):
        shape = tuple(fixed.image.shape[2:])
        image = resize_image(moving.image, shape)
        where = apply_affine(
            find_affine(unit_range(image[0])[None], unit_range(fixed.image[0])[None]), identity_grid(shape)[None]
        )
        scale = torch.tensor([(n - 1) / (m - 1) for n, m in zip(moving.label.shape[2:], shape)])
        label = sample(moving.label, where * scale.view(1, -1, *(1,) * len(shape)), "nearest", "zeros")
        missing = [100 * (1 - one) for one in dice(label, fixed.label, domain.classes) if one is not None]
        yield {
            "domain": domain.name,
            "method": "another person",
            "image": f"{moving.name} on {fixed.name}",
            "shape_points": float(np.mean(missing)),
        }


def _people(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["method"] == "another person"]


def summary(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[float, ...]]]:
    """For each domain and method: strength, mean and standard error of both measures, folds, number of images."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["method"] != "another person" and row["shape_points"] is not None and row["dice_lost"] is not None:
            groups[row["domain"], row["method"], row["strength"]].append(row)
    found: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for (domain, method, strength), group in sorted(groups.items()):
        numbers: list[float] = [strength]
        for name in ("shape_points", "dice_lost"):
            values = [row[name] for row in group]
            numbers += [float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))]
        found[domain, method].append((*numbers, 100 * float(np.mean([row["folds"] for row in group])), len(group)))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of all strengths."""
    lines = ["| images | fields | strength | n | change of shape, points | Dice lost, points | folds % |"]
    lines.append("|" + "---|" * 7)
    for (domain, method), points in summary(rows).items():
        for strength, shape, shape_error, lost, lost_error, folds, count in points:
            cells = [
                NAMES[domain],
                STYLE[method][2],
                f"{strength:g}",
                f"{count:.0f}",
                f"{shape:.1f} ± {shape_error:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} | {lost:.1f} ± {lost_error:.1f} | {folds:.3f} |")
    for domain in NAMES:
        values = [row["shape_points"] for row in _people(rows) if row["domain"] == domain]
        if values:
            error = np.std(values, ddof=1) / np.sqrt(len(values))
            shown = f"{np.mean(values):.1f} ± {error:.1f}"
            lines.append(f"| {NAMES[domain]} | another person | – | {len(values)} | {shown} | – | – |")
    return "\n".join(lines) + "\n\nmean ± standard error over images"


def comparisons(rows: list[dict[str, Any]]) -> str:
    """Markdown: DRDM with half the recovery at level 0.6 against others where they change shape about as much.

    Of each method the strength counts whose mean change of shape is nearest. Images of a person are averaged first,
    where their names begin with the person's.
    """
    lines = ["| images | DRDM, half the recovery, minus | strength | n | change of shape | Dice lost | p (Wilcoxon) |"]
    lines.append("|" + "---|" * 7)
    curves = summary(rows)
    for domain, method in curves:
        half = [point for point in curves[domain, "drdm, recovery 0.5"] if point[0] == 0.6]
        if method.startswith("drdm, ") or not half:
            continue
        strength = min(curves[domain, method], key=lambda point: abs(point[1] - half[0][1]))[0]
        ours, theirs = (by_person(rows, domain, *one) for one in (("drdm, recovery 0.5", 0.6), (method, strength)))
        differences = np.array([ours[name] - theirs[name] for name in ours if name in theirs])
        shape, lost = differences.mean(axis=0)
        cells = [
            NAMES[domain],
            STYLE[method][2],
            f"{strength:g}",
            str(len(differences)),
            f"{shape:+.1f}",
            f"{lost:+.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {wilcoxon(differences[:, 1]).pvalue:.2g} |")
    return "\n".join(lines)


def by_person(rows: list[dict[str, Any]], domain: str, method: str, strength: float) -> dict[str, np.ndarray]:
    """Mean change of shape and Dice lost of each person (of each image, if the name does not say who it is)."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        wanted = (row["domain"], row["method"], row.get("strength")) == (domain, method, strength)
        if wanted and row["shape_points"] is not None and row["dice_lost"] is not None:
            found[row["image"].split()[0]].append((row["shape_points"], row["dice_lost"]))
    return {name: np.mean(values, axis=0) for name, values in found.items()}


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Dice lost against change of shape, one panel for each kind of image."""
    curves = summary(rows)
    domains = [name for name in NAMES if any(domain == name for domain, _ in curves)]
    lines = -(-len(domains) // _COLUMNS)
    drawn = Figure(figsize=(3.3 * _COLUMNS, 3.1 * lines), layout="constrained", facecolor="white")
    for axis, domain in zip(drawn.subplots(lines, _COLUMNS, squeeze=False).flat, domains):
        found = {method: np.array(curves[domain, method]) for method in STYLE if (domain, method) in curves}
        limit = 1.15 * max(found[method][:, 1].max() for method in found if method.startswith("drdm"))
        for method, points in found.items():
            colour, marker, label = STYLE[method]
            x, x_error, y, y_error = points[:, 1:5].T
            axis.errorbar(x, y, y_error, x_error, color=colour, marker=marker, ms=4, label=label)
        strengths = found["drdm"][:, 0]
        usual = found["drdm"][(strengths >= DEFAULTS[0]) & (strengths <= DEFAULTS[1])]
        axis.plot(usual[:, 1], usual[:, 3], color=STYLE["drdm"][0], lw=6, alpha=0.25, label="default levels")
        shown = np.concatenate([points[points[:, 1] <= limit, 3] for points in found.values()])
        low, high = min(0.0, shown.min()), shown.max()
        room = 0.1 * (high - low)
        axis.set(title=NAMES[domain], xlabel="change of shape, points", xlim=(0, limit), ylim=(low - room, high + room))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in drawn.axes[len(domains) :]:
        axis.set_axis_off()
    for axis in drawn.axes[::_COLUMNS]:
        axis.set_ylabel("Dice lost by a segmenter, points")
    drawn.axes[0].legend(frameon=False, fontsize=8)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", nargs="+", choices=tuple(DOMAINS), default=list(NAMES))
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of trained segmenters")
    parser.add_argument("--out", type=Path, help="PNG to write")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that are there")
    args = parser.parse_args()
    if not args.table:
        torch.set_num_threads(1)
        for name in args.domain:
            run(DOMAINS[name], args.split, args.cache)
    rows = [row for row in read_rows(PATH) if row["split"] == args.split]
    if args.out is not None:
        figure(rows).savefig(args.out, dpi=150)
    print(table(rows), comparisons(rows), sep="\n\n")


if __name__ == "__main__":
    main()
