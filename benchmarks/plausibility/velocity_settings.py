"""Measure on validation images what each part of the velocity sampler contributes.

Variants: as it is; without smoothing what the image does not show; without taking off what the network says of the
original; without both; other numbers of steps and over-relaxations. Every variant draws two fields for every image and
is measured like the gates: unevenness of stretching, displacement without its affine part, diversity, and Dice points
that a segmenter trained on real images loses. Resumable, prints the table from all rows.

    python benchmarks/plausibility/velocity_settings.py --network anatomy-2d --domain acdc ixi cxr
    python benchmarks/plausibility/velocity_settings.py --table
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import DRDM
from monai_drdm.diffusion.recover_velocity import flatness, recovery_step, timetable
from monai_drdm.fields import mend_folds, resize_image, warp
from monai_drdm.networks import load_network, network_sha256, VelocityUNet

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.labels import resize_nearest
from common.rows import append_rows, read_rows
from common.scans import DOMAINS, Draw, draws
from gates import measure_dice, measure_field, random_field
from segmenters import default_cache, load_segmenter, Segmenter

PATH = Path(__file__).parent / "velocity_settings.jsonl"
IMAGES, LEVEL = 16, 0.6
MEASURES = ("displacement_no_affine_256", "log_jacobian_std", "diversity")


class Variant(NamedTuple):
    """One variant of the sampler."""

    steps: int = 12
    over_relaxation: float = 1.25
    smoothed: bool = True
    anchor_every: int = 4
    """Steps between predictions for the original image, or 0 to never make them."""


VARIANTS = (
    Variant(),
    Variant(smoothed=False),
    Variant(anchor_every=0),
    Variant(smoothed=False, anchor_every=0),
    Variant(anchor_every=1),
    Variant(anchor_every=3),
    Variant(anchor_every=6),
    Variant(steps=4),
    Variant(steps=8),
    Variant(steps=16),
    Variant(over_relaxation=1.0),
    Variant(over_relaxation=1.5),
    Variant(over_relaxation=2.0),
)


@torch.no_grad()
def sample(network: VelocityUNet, image: Tensor, seed: int, variant: Variant) -> Tensor:
    """Like ``DRDM.sample``, with parts of the sampler switched on or off."""
    model = DRDM(network, steps=variant.steps, symmetry=0.0)
    grid = model._grid(image.shape[2:], None)
    working = grid.image_to_working(image, network.card.input_range)
    ddf = model._diffuse(grid, LEVEL, [seed], 1)
    unseen = flatness(working, ddf.shape[2:]) * float(variant.smoothed)
    anchor = None
    left, share = timetable([LEVEL], variant.steps, ddf)
    for k in range(variant.steps):
        if variant.anchor_every and k % variant.anchor_every == 0:
            anchor = network(working, left[k])
        ddf = recovery_step(network, working, unseen, ddf, left[k], variant.over_relaxation * share[k], anchor)
    return mend_folds(grid.ddf_to_full(mend_folds(ddf)))


def measure(network: VelocityUNet, draw: Draw, variant: Variant, size: int | None, classes: int, segmenter: Segmenter):
    scan = draw.scan
    shape = (size,) * (scan.image.ndim - 2) if size else tuple(scan.image.shape[2:])
    image = resize_image(scan.image, shape)
    fields = [sample(network, image, seed, variant) for seed in (draw.seed, draw.partner)]
    starts = [random_field(image, LEVEL, seed) for seed in (draw.seed, draw.partner)]
    label = warp(resize_nearest(scan.label, shape), fields[0], "nearest")
    measured = measure_field(*fields, label)
    return {key: measured[key] for key in MEASURES} | measure_dice(scan, fields, starts, segmenter, classes)


def lost(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Mean Dice points lost for every image."""
    found = []
    for row in rows:
        pairs = [(r, d) for draw in row[key] for r, d in zip(row["dice_real"], draw) if None not in (r, d)]
        if pairs:
            found.append(100 * float(np.mean([r - d for r, d in pairs])))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| domain | network | steps | over-relaxation | smoothed | anchored every | n | px without affine at 256 | "
        "σ log det J | diversity | Dice lost | Dice lost under random |",
        "|" + "---|" * 12,
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(
            (row["domain"], row["network"], row["sha256"], *(row[k] for k in Variant._fields)), []
        ).append(row)
    for key, group in groups.items():
        columns = [[row[key] for row in group] for key in MEASURES]
        columns += [lost(group, "dice_deformed"), lost(group, "dice_random")]
        cells = [f"{np.mean(c):.2f} ± {np.std(c) / max(len(c) - 1, 1) ** 0.5:.2f}" for c in columns]
        marks = ["yes" if key[5] else "no", str(key[6] or "never")]
        lines.append(
            f"| {key[0]} | {key[1]} | {key[3]} | {key[4]} | {' | '.join(marks)} | {len(group)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n\nmean ± standard error over images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", help="registry name or .safetensors file")
    parser.add_argument("--domain", nargs="+", choices=tuple(DOMAINS), default=["acdc"])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of trained segmenters")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        network = load_network(args.network)
        assert isinstance(network, VelocityUNet)
        known = {"network": network.card.name, "sha256": network_sha256(network)}
        seen = {(r["domain"], r["sha256"], r["image"], *(r[k] for k in Variant._fields)) for r in read_rows(PATH)}
        for name in args.domain:
            domain, segmenter = DOMAINS[name], load_segmenter(name, args.cache)
            for draw in tqdm(draws(name, "validation", IMAGES), desc=name, unit="image"):
                for variant in VARIANTS:
                    if (name, known["sha256"], draw.scan.name, *variant) in seen:
                        continue
                    row = measure(network, draw, variant, domain.field_size, domain.classes, segmenter)
                    base = {"domain": name, "image": draw.scan.name, "seed": draw.seed, **known}
                    append_rows(PATH, base | variant._asdict() | row)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
