"""What it costs to move a batch of unlabelled images, predicted labels and confidence by fields of a bank.

Timed in turn with the training step of ``examples/few_labels.py`` that follows it, and with the fresh fields of
``BatchRandDRDMDeformd``: 12 images of 96², 8 labelled ones beside them in the step, all samples deformed.

    python benchmarks/speed/batch_bank.py          # measure
    python benchmarks/speed/batch_bank.py --table
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from monai_drdm import BatchRandDRDMBankd, BatchRandDRDMDeformd, DeformationBank
from monai_drdm.train.synthetic import synthetic_images

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from common.rows import append_rows, machine, read_rows
from few_labels import build_network
from mean_teacher import unlabelled_loss

ROWS = Path(__file__).parent / "batch_bank.jsonl"
SIZE, UNLABELLED, LABELLED, FIELDS = 96, 12, 8, 2
KEYS, MODES = ["image", "pseudo", "confidence"], ["bilinear", "nearest", "bilinear"]


def things() -> dict[str, Callable[[], object]]:
    """What is timed."""
    images = synthetic_images(torch.Generator().manual_seed(0), UNLABELLED, (SIZE, SIZE))
    samples = [{"image": image, "name": str(number)} for number, image in enumerate(images)]
    bank = DeformationBank.build(samples, id_key="name", fields_per_image=FIELDS, progress=False)
    pseudo = (images * 4).byte().clamp(max=3)
    batch = {"image": images, "pseudo": pseudo, "confidence": images.clone(), "name": [one["name"] for one in samples]}
    options: dict[str, Any] = {"mode": MODES, "prob": 1.0, "invertible": False}
    poses = {"rotate_range": 3.14, "scale_range": 0.3, "translate_range": 10.0, "flip_prob": 0.5}
    banked = BatchRandDRDMBankd(KEYS, bank=bank, id_key="name", **options)
    posed = BatchRandDRDMBankd(KEYS, bank=bank, id_key="name", **options, **poses)
    fresh = BatchRandDRDMDeformd(KEYS, **options)
    network = build_network(2, 4)
    many = torch.cat([images, images[:LABELLED]])
    labels = torch.cat([pseudo, pseudo[:LABELLED]])

    def step() -> None:
        unlabelled_loss(network(many), labels, torch.ones_like(many)).backward()

    return {
        "training step": step,
        "bank": lambda: banked(batch),
        "bank, with poses and flips": lambda: posed(batch),
        "fresh fields": lambda: fresh(batch),
    }


def measure(turns: int) -> dict[str, list[float]]:
    """Seconds of each thing in every turn but the first."""
    timed = things()
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(turns + 1):
        for name, call in timed.items():
            started = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in found.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: medians, smallest and largest, and the share of a training step."""
    lines = ["| moved by | turns | ms a batch | of a training step |", "|---|---|---|---|"]
    for row in rows:
        step = statistics.median(row["seconds"]["training step"])
        for name, seconds in row["seconds"].items():
            middle = statistics.median(seconds)
            spread = f"{1e3 * middle:.0f} ({1e3 * min(seconds):.0f} to {1e3 * max(seconds):.0f})"
            lines.append(f"| {name} | {len(seconds)} | {spread} | {100 * middle / step:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--table", action="store_true", help="print the table")
    args = parser.parse_args()
    if not args.table:
        append_rows(ROWS, {"seconds": measure(args.turns), **machine()})
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
