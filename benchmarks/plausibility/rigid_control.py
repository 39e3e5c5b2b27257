"""Measure the Dice that the segmenters lose by resampling alone, under random rotations and shifts.

No shape changes; images are interpolated and labels take their nearest voxel, as with any field. On small images this
is a large part of the loss under deformation, and no sampler can lose less.

    python benchmarks/plausibility/rigid_control.py --domain acdc cxr ixi hippocampus3d ixi3d
    python benchmarks/plausibility/rigid_control.py --table
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.fields import identity_grid, warp
from monai_drdm.train.augmentation import Pose, random_pose

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.labels import dice
from common.rows import append_rows, read_rows
from common.scans import DOMAINS, draws
from segmenters import default_cache, load_segmenter

PATH = Path(__file__).parent / "rigid_control.jsonl"
IMAGES = {2: 50, 3: 20}
POSE = Pose(flip=0.0, rotation_deg=10.0, scale=0.0, shift_frac=0.02)


def rigid_ddf(shape: tuple[int, ...], seed: int) -> Tensor:
    """Field ``(1, D, *S)`` in voxels of a random rotation and shift."""
    matrix, shift = random_pose(torch.Generator().manual_seed(seed), 1, shape, POSE)
    centre = torch.tensor([(n - 1) / 2 for n in shape]).view(-1, *(1,) * len(shape))
    grid = identity_grid(shape) - centre
    return (torch.einsum("ij,j...->i...", matrix[0], grid) - grid + shift[0].view(centre.shape))[None]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| domain | n | Dice lost under rotation and shift |", "|---|---|---|"]
    for domain in dict.fromkeys(row["domain"] for row in rows):
        values = []
        for row in rows:
            pairs = [(a, b) for a, b in zip(row["dice_real"], row["dice_moved"]) if None not in (a, b)]
            if row["domain"] == domain and pairs:
                values.append(100 * float(np.mean([a - b for a, b in pairs])))
        error = np.std(values) / math.sqrt(max(len(values) - 1, 1))
        lines.append(f"| {domain} | {len(values)} | {np.mean(values):.2f} ± {error:.2f} |")
    return "\n".join(lines) + "\n\nmean ± standard error over images"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", nargs="+", choices=tuple(DOMAINS), default=[])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of trained segmenters")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    done = {(row["domain"], row["image"], row["seed"]) for row in read_rows(PATH)}
    for name in [] if args.table else args.domain:
        domain, segmenter = DOMAINS[name], load_segmenter(name, args.cache)
        for draw in tqdm(draws(name, "test", IMAGES[domain.spatial_dims]), desc=name, unit="image"):
            if (name, draw.scan.name, draw.seed) in done:
                continue
            image, label = draw.scan.image, draw.scan.label
            ddf = rigid_ddf(tuple(image.shape[2:]), draw.seed)
            moved = dice(segmenter(warp(image, ddf)), warp(label, ddf, "nearest"), domain.classes)
            row = {"domain": name, "image": draw.scan.name, "seed": draw.seed}
            row |= {"dice_real": dice(segmenter(image), label, domain.classes), "dice_moved": moved}
            append_rows(PATH, row)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
