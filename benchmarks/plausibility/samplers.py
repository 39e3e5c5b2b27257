"""Compare samplers of the published cardiac network: folds, displacement, log-Jacobian, passes and time.

50 ACDC test slices at level 0.6 and 25 at level 0.8, resized to 256². Each slice goes through all samplers one after
the other, so that their times compare. Resumable: finished rows are skipped. Prints the table from all rows.

    python benchmarks/plausibility/samplers.py                # run what is missing, then print the table
    python benchmarks/plausibility/samplers.py --table        # only print the table
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import fold_fraction
from monai_drdm.metrics import log_jacobian_std, mean_displacement, remove_affine
from monai_drdm.networks import load_network

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows
from common.scans import acdc_slices

PLAN = {0.6: 50, 0.8: 25}
PATIENTS = {"validation": range(61, 71), "test": range(71, 81)}
SAMPLERS = ("reference", "fast")
COLUMNS = {
    "folds_corner": ("corner folds %", 100, 4), "folds_central": ("central folds %", 100, 4),
    "displacement_px": ("mean px", 1, 2), "displacement_no_affine_px": ("px without affine", 1, 2),
    "log_jacobian_std": ("σ log det J", 1, 3), "seconds": ("s", 1, 2),
}  # fmt: skip


def measures(ddf: Tensor) -> dict[str, float]:
    return {
        "folds_corner": float(fold_fraction(ddf)),
        "folds_central": float(fold_fraction(ddf, "central")),
        "displacement_px": float(mean_displacement(ddf)),
        "displacement_no_affine_px": float(mean_displacement(remove_affine(ddf))),
        "log_jacobian_std": float(log_jacobian_std(ddf)),
    }


def run(path: Path, split: str, plan: dict[float, int]) -> None:
    """Measure what ``path`` does not contain yet."""
    done = {(row["level"], row["slice"], row["sampler"]) for row in read_rows(path)}
    network = load_network("zheng2026-cmr-2d")
    models = {name: DRDM(network, name) for name in SAMPLERS}
    jobs = [(level, *item) for level, count in plan.items() for item in acdc_slices(PATIENTS[split], count)]
    where = machine()
    for level, index, image in tqdm(jobs, desc="slices"):
        for name, model in models.items():
            if (level, index, name) in done:
                continue
            start = time.perf_counter()
            ddf = model.sample(image, level, [index])
            seconds = time.perf_counter() - start
            base = {"level": level, "slice": index, "split": split, **where}
            start_field = model.diffuse(image.shape[2:], level, [index])
            append_rows(
                path,
                {**base, "sampler": name, **measures(ddf), "passes": 2 * model.steps, "seconds": seconds},
                {**base, "sampler": f"{name}: start", **measures(start_field), "passes": 0, "seconds": None},
            )


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of means ± standard deviations over slices, and the ratios of ``fast`` to ``reference``."""
    lines = [
        "| level | sampler | n | passes | "
        + " | ".join(title for title, _, _ in COLUMNS.values())
        + " | corner folds p95 % |"
    ]
    lines.append("|" + "---|" * (5 + len(COLUMNS)))
    for level in sorted({row["level"] for row in rows}):
        for sampler in sorted({row["sampler"] for row in rows}):
            group = [row for row in rows if row["level"] == level and row["sampler"] == sampler]
            cells = [_spread([row[key] for row in group], scale, digits) for key, (_, scale, digits) in COLUMNS.items()]
            tail = 100 * np.quantile([row["folds_corner"] for row in group], 0.95)
            lines.append(
                f"| {level} | {sampler} | {len(group)} | {group[0]['passes']} | {' | '.join(cells)} | {tail:.4f} |"
            )
    for level in sorted({row["level"] for row in rows}):
        lines.append(
            f"\nlevel {level}, fast against reference: {_ratios([row for row in rows if row['level'] == level])}"
        )
    return "\n".join(lines)


def _spread(values: list[float | None], scale: float, digits: int) -> str:
    numbers = [v * scale for v in values if v is not None]
    return f"{np.mean(numbers):.{digits}f} ± {np.std(numbers):.{digits}f}" if numbers else "–"


def _ratios(rows: list[dict[str, Any]]) -> str:
    by = {name: {row["slice"]: row for row in rows if row["sampler"] == name} for name in SAMPLERS}
    both = sorted(set(by["fast"]) & set(by["reference"]))
    mean = {name: {key: np.mean([by[name][i][key] for i in both]) for key in COLUMNS} for name in SAMPLERS}
    fast, reference = mean["fast"], mean["reference"]
    speed = np.median([by["reference"][i]["seconds"] / by["fast"][i]["seconds"] for i in both])
    return (
        f"corner folds {fast['folds_corner'] / reference['folds_corner']:.5f}, displacement without affine "
        f"{fast['displacement_no_affine_px'] / reference['displacement_no_affine_px']:.3f}, speed-up (median of pairs) "
        f"{speed:.2f}, n = {len(both)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=tuple(PATIENTS), default="test")
    parser.add_argument("--slices", type=int, help="slices per level instead of 50 and 25")
    parser.add_argument("--results", type=Path, help="JSON-lines file (default: samplers_SPLIT.jsonl)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--threads", type=int, help="torch threads")
    args = parser.parse_args()
    path = args.results or Path(__file__).parent / f"samplers_{args.split}.jsonl"
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.table:
        run(path, args.split, {level: args.slices or count for level, count in PLAN.items()})
    print(table(read_rows(path)))


if __name__ == "__main__":
    main()
