"""Time our networks at their default steps beside the published network as released, in seconds per sample.

Everything is timed in one run, in turns, so that the machine is the same for all: one 256² ACDC slice in 2D, one
80×96×80 brain volume in 3D, one sample at a time, level 0.6, after one untimed sample each. Every timing is a row; the
table is of medians with the smallest and largest, and of the median ratio within a turn. Rows hold the load average
of the machine: above the number of threads, others were at work and seconds say little.

    python benchmarks/speed/cost.py --networks anatomy-2d anatomy-3d --turns 5
    python benchmarks/speed/cost.py --table
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import resize_image
from monai_drdm.networks import load_network, network_sha256

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows
from common.scans import draws

PATH = Path(__file__).parent / "cost.jsonl"
LEVEL = 0.6
Timed = tuple[dict[str, Any], DRDM, Tensor]


def prepare(name: str, sampler: str = "auto") -> Timed:
    """Load one network; returns the columns of its rows, its model and the image."""
    network = load_network(name)
    model = DRDM(network, sampler)
    if network.spatial_dims == 2:
        image = resize_image(draws("acdc", "test", 1)[0].scan.image, (256, 256))
    else:
        image = draws("ixi3d", "test", 1)[0].scan.image
    base = {"network": network.card.name, "sha256": network_sha256(network), "sampler": model.sampler}
    return base | {"steps": model.steps, "shape": list(image.shape[2:]), "level": LEVEL}, model, image


def run(timed: list[Timed], turns: int) -> None:
    """Time every network once per turn, for ``turns`` turns."""
    where = machine() | {"run": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    for turn in tqdm(range(-1, turns), unit="turn"):  # turn -1 warms up
        for base, model, image in timed:
            start = time.perf_counter()
            model.sample(image, LEVEL, [max(turn, 0)])
            seconds = time.perf_counter() - start
            if turn >= 0:
                load = os.getloadavg()[0]
                append_rows(PATH, base | {"turn": turn, "seconds": seconds, "load_average": load} | where)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with one table per run."""
    lines = []
    for run_name in sorted({row["run"] for row in rows}):
        ours = [row for row in rows if row["run"] == run_name]
        first, load = ours[0], max(row["load_average"] for row in ours)
        lines.append(
            f"\n{run_name}: {first['processor']}, {first['threads']} threads, torch {first['torch']}, "
            f"load at most {load:.1f}\n"
        )
        lines += ["| network | sampler | steps | image | n | s a sample | reference : this |", "|" + "---|" * 7]
        reference = {row["turn"]: row["seconds"] for row in ours if row["sampler"] == "reference"}
        for key in dict.fromkeys(_key(row) for row in ours):
            seconds = {row["turn"]: row["seconds"] for row in ours if _key(row) == key}
            values = np.array(list(seconds.values()))
            spread = f"{np.median(values):.3f} ({values.min():.3f} to {values.max():.3f})"
            ratios = [reference[turn] / value for turn, value in seconds.items() if turn in reference]
            flat = len(key[-1]) == 2
            ratio = f"{np.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})" if ratios and flat else "–"
            name, _, sampler, steps, shape = key
            size = "×".join(map(str, shape))
            lines.append(f"| {name} | {sampler} | {steps} | {size} | {len(values)} | {spread} | {ratio} |")
    return "\n".join(lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["network"], row["sha256"], row["sampler"], row["steps"], tuple(row["shape"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["anatomy-2d", "anatomy-3d"], help="names or .safetensors")
    parser.add_argument("--reference", default="zheng2026-cmr-2d", help="published network, sampled as released")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads (default: all)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.table:
        run([prepare(args.reference, "reference"), *map(prepare, args.networks)], args.turns)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
