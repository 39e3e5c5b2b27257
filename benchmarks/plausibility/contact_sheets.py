"""Draw contact sheets to look at: every row shows an image and several deformed versions of it.

Volumes have one row for each of their three central planes. Above every draw: its mean displacement without the affine
part, in pixels at 256, and its folds.

    python benchmarks/plausibility/contact_sheets.py --network anatomy-2d --domain acdc --out acdc.png
    python benchmarks/plausibility/contact_sheets.py --network random --domain ixi3d --images 4 --out random.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from monai_drdm.fields import fold_fraction, resize_ddf, resize_image, warp
from monai_drdm.metrics import mean_displacement, remove_affine

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.scans import Domain, DOMAINS, draws
from gates import Method, methods

_TILE_INCHES, _TITLE_INCHES, _DPI = 2.0, 0.2, 100
_OUTLINE = "#ffb000"
_SEED_STEP = 10_000_000


def planes(volume: Tensor, domain: Domain) -> list[Tensor]:
    """Upright 2D pictures of ``(1, 1, *S)``: the image itself, or the three central planes of a volume."""
    image = volume[0, 0]
    if domain.name in ("acdc", "cxr", "nuclei"):
        return [image]
    flat = [image] if image.ndim == 2 else [image.select(axis, n // 2) for axis, n in enumerate(image.shape)]
    return [torch.rot90(one) for one in flat]


def sheet(method: Method, domain: Domain, split: str, level: float, images: int, columns: int, labels: bool) -> Figure:
    """Draw fields for all images and arrange the results as one figure."""
    rows: list[list[tuple[str, Tensor, Tensor]]] = []
    for draw in tqdm(draws(domain.name, split, images), unit="image"):
        scan = draw.scan
        shape = (domain.field_size,) * domain.spatial_dims if domain.field_size else tuple(scan.image.shape[2:])
        image = resize_image(scan.image, shape)
        shown = [(scan.name[:24], scan.image, scan.label)]
        for k in range(columns):
            ddf = method.draw(image, level, draw.seed + _SEED_STEP * k)
            rest = float(mean_displacement(remove_affine(ddf))) * 256 / max(shape)
            title = f"{rest:.1f} px, folds {float(fold_fraction(ddf)):.3%}"
            ddf = resize_ddf(ddf, scan.image.shape[2:])
            shown.append((title, warp(scan.image, ddf), warp(scan.label, ddf, "nearest")))
        cut = [(title, planes(one, domain), planes(label, domain)) for title, one, label in shown]
        rows += [[(title, one[k], label[k]) for title, one, label in cut] for k in range(len(cut[0][1]))]
    return arrange(rows, labels)


def arrange(rows: list[list[tuple[str, Tensor, Tensor]]], labels: bool) -> Figure:
    """A figure of rows of pictures with titles and labels; each row has the grey values of its first picture."""
    width, height = _TILE_INCHES * len(rows[0]), (_TILE_INCHES + _TITLE_INCHES) * len(rows)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    top = _TITLE_INCHES / height
    figure.subplots_adjust(0, 0, 1, 1 - top, wspace=0.02, hspace=_TITLE_INCHES / _TILE_INCHES)
    for line, row in zip(axes, rows):
        low, high = float(row[0][1].min()), float(row[0][1].quantile(0.998))
        for axis, (title, image, label) in zip(line, row):
            axis.imshow(image.numpy(), cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            for value in label.unique().tolist() if labels else []:
                axis.contour((label == value).float().numpy(), levels=[0.5], colors=_OUTLINE, linewidths=0.7)
            axis.set_title(title, fontsize=7, pad=2)
            axis.set_axis_off()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", required=True, help="registry name, .safetensors file, or random")
    parser.add_argument("--domain", choices=tuple(DOMAINS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--steps", type=int, help="recovery steps; default: the card's")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--level", type=float, default=0.6)
    parser.add_argument("--images", type=int, help="default: 10, and 4 volumes")
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--labels", action="store_true", help="outline the labels")
    parser.add_argument("--threads", type=int, help="torch threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    domain = DOMAINS[args.domain]
    (method,) = methods(args.network, [args.sampler], [args.steps] if args.steps else [])
    count = args.images or (10 if domain.spatial_dims == 2 else 4)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(method, domain, args.split, args.level, count, args.draws, args.labels).savefig(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
