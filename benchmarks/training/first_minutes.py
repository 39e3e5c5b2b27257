"""Train for a few minutes on random anatomy, and measure recovery on images that the network has not seen.

Runs ``python -m monai_drdm.train --data synthetic`` for some minutes, then measures recovery on held-out random
anatomy, on cardiac MR slices (ACDC, patients 61-70) and on brain MR slices (IXI, subjects 27-30):

- one shot: the training loss of one prediction; 1 is doing nothing;
- displacement left: mean squared displacement after eight steps of recovery, relative to the random field's;
- image error left: mean squared error against the undeformed image, relative to that under the random field.

The random field counts as it is after its folds are mended, as they are after recovery. Recovery also smooths the field
where the image is flat, so a network that predicts nothing leaves less than 1; ``--max-minutes 0`` measures how much.

    python benchmarks/training/first_minutes.py --out RUN --max-minutes 5
    python benchmarks/training/first_minutes.py --out NOTHING --max-minutes 0
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_drdm.diffusion.recover_velocity import recover_velocity
from monai_drdm.fields import mend_folds, resize_ddf, warp
from monai_drdm.networks import load_network, VelocityUNet
from monai_drdm.train.augmentation import deform_images
from monai_drdm.train.data import load_bank, Scan
from monai_drdm.train.synthetic import synthetic_images
from monai_drdm.train.velocity import recovery_loss, Target

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows
from common.scans import acdc_slices, data_folder

BATCH = 8
LEVELS = (0.3, 0.6, 0.8)
STEPS = 8
MEASURES = {"one_shot": "one shot", "displacement_left": "displacement left", "image_error_left": "image error left"}


def held_out(count: int, size: int) -> Tensor:
    """Random anatomy with a seed that no training run uses."""
    return synthetic_images(torch.Generator().manual_seed(2**40), count, (size, size))


def cardiac(count: int, size: int) -> Tensor:
    return torch.cat([image for _, image in acdc_slices(range(61, 71), count, size)]) / 255


def brain(count: int, size: int) -> Tensor:
    scans = [Scan(path) for path in sorted((data_folder() / "ixi" / "images").iterdir())[26:30]]
    bank = load_bank(scans, spatial_dims=2, working_size=size)
    return bank.images[np.linspace(0, len(bank) - 1, count).round().astype(int)].float() / 255


SETS: dict[str, Callable[[int, int], Tensor]] = {"random anatomy": held_out, "ACDC": cardiac, "IXI": brain}


@torch.no_grad()
def measure(network: VelocityUNet, images: Tensor, level: float, seed: int) -> dict[str, float]:
    """Means over a batch, each relative to the value without recovery."""
    deformed = deform_images(images, torch.Generator().manual_seed(seed), levels=(level, level + 1e-6))
    dims = tuple(range(1, deformed.ddf.ndim))
    target = Target(deformed.level, deformed.velocity, deformed.ddf, deformed.ddf, False)
    start = mend_folds(deformed.ddf)  # recovery mends its result too; mending alone shortens strong fields
    left = recover_velocity(network, images, deformed.ddf, deformed.level.tolist(), steps=STEPS, symmetry=0.0)
    error, before = (
        (warp(images, resize_ddf(ddf, images.shape[2:]), "bilinear", "border") - images).square().mean()
        for ddf in (left, start)
    )
    return {
        "one_shot": float(recovery_loss(network(deformed.image, deformed.level), target)),
        "displacement_left": float((left.square().mean(dim=dims) / start.square().mean(dim=dims)).mean()),
        "image_error_left": float(error / before),
    }


def evaluate(path: Path, count: int) -> list[dict[str, Any]]:
    network = load_network(path)
    assert isinstance(network, VelocityUNet)
    rows = []
    for name, make in SETS.items():
        images = make(count, network.card.working_size)
        for level in LEVELS:
            parts = [measure(network, part, level, seed) for seed, part in enumerate(images.split(BATCH))]
            means = {key: float(np.mean([part[key] for part in parts])) for key in MEASURES}
            rows.append({"images": name, "n": len(images), "level": level, **means})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| images | n | level | {' | '.join(MEASURES.values())} |", "|---" * (3 + len(MEASURES)) + "|"]
    lines += [
        f"| {row['images']} | {row['n']} | {row['level']} | " + " | ".join(f"{row[key]:.3f}" for key in MEASURES) + " |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for the run, or a finished run")
    parser.add_argument("--max-minutes", type=float, default=5)
    parser.add_argument("--images", type=int, default=32, help="images of each kind, a multiple of 8")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the run")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "first_minutes.jsonl")
    args = parser.parse_args()
    weights = args.out / "network.safetensors"
    if not weights.is_file():
        settings = [part for one in args.set for part in ("--set", one)]
        command = [sys.executable, "-m", "monai_drdm.train", "--data", "synthetic", "--out", str(args.out), *settings]
        subprocess.run([*command, "--max-minutes", str(args.max_minutes)], check=True)  # noqa: S603 # our own
    rows = evaluate(weights, args.images)
    steps = max(row["step"] for row in read_rows(args.out / "metrics.jsonl"))
    trained = {"max_minutes": args.max_minutes, "settings": args.set, "steps": steps, **machine()}
    append_rows(args.results, *({**row, **trained} for row in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
