"""Measure the fields of images that show nothing beside those of cardiac slices, from the same seeds.

python benchmarks/plausibility/constant_images.py
python benchmarks/plausibility/constant_images.py --table
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_drdm.deformation import FieldDrawer
from monai_drdm.metrics import mean_displacement, remove_affine

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, read_rows
from common.scans import acdc_slices, DOMAINS

PATH = Path(__file__).parent / "constant_images.jsonl"
LEVELS = (0.3, 0.6, 0.8)
FIGURES = ("mean", "rest", "largest", "folds")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| level | image | n | mean px | px without affine | largest px | folding cells % |", "|---" * 7 + "|"]
    for level in LEVELS:
        for kind in ("constant", "slice"):
            some = [row for row in rows if (row["level"], row["kind"]) == (level, kind)]
            mean, rest, largest, folds = (np.mean([row[n] for row in some]) for n in FIGURES)
            figures = f"{mean:.1f} | {rest:.1f} | {largest:.1f} | {100 * folds:.3f}"
            lines.append(f"| {level} | {kind} | {len(some)} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    for level in () if args.table else LEVELS:
        drawer = FieldDrawer("anatomy-2d", deformation_level=level)
        for seed, image in acdc_slices(DOMAINS["acdc"].splits["test"], args.count):
            for kind, shown in (("constant", torch.zeros_like(image[0])), ("slice", image[0])):
                drawn = drawer.draw(shown, (1.0, 1.0), seed)
                found, rest = drawn.statistics, float(mean_displacement(remove_affine(drawn.ddf[None])))
                row = {"level": level, "kind": kind, "seed": seed, "mean": found.mean_displacement_vox, "rest": rest}
                append_rows(PATH, row | {"largest": found.max_displacement_vox, "folds": found.fold_fraction})
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
