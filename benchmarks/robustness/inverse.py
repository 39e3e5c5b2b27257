"""Deform labels and images and invert the deformation; compare two ways to store a field in 16 bits.

ACDC validation patients 61-70, labelled slices at their 160². Every slice is deformed and inverted by the transform
(labels nearest both ways). Beside it, the field as the sampler made it is kept in 16 bits in both ways, half precision
and fixed point: the largest error, and the folds it makes. One JSON line per slice goes to inverse.jsonl; a
run that was interrupted goes on.

    python benchmarks/robustness/inverse.py --level 0.6 --slices 20
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor
from tqdm import tqdm

from monai_drdm import RandDRDMDeformd
from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.diffusion import DRDM
from monai_drdm.fields import fold_fraction, resize_ddf
from monai_drdm.networks import load_network

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows
from common.scans import data_folder

PATH = Path(__file__).parent / "inverse.jsonl"


def slices(count: int) -> list[tuple[int, Tensor, Tensor]]:
    """Labelled slices, evenly spread, as ``(index, image, label)`` with tensors ``(1, 160, 160)``."""
    archive = np.load(data_folder() / "acdc" / "acdc2d_160.npz")
    labelled = archive["label"].reshape(len(archive["label"]), -1).any(axis=1)
    indices = np.flatnonzero(labelled & (archive["patient"] > 60) & (archive["patient"] <= 70))
    chosen = indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]
    return [
        (int(i), torch.from_numpy(archive["image"][i])[None], torch.from_numpy(archive["label"][i])[None])
        for i in chosen
    ]


def dice_by_class(a: Tensor, b: Tensor) -> dict[int, float]:
    """Dice of every class that at least one of the labels contains."""
    classes = sorted({*a.unique().tolist(), *b.unique().tolist()} - {0})
    return {c: 2 * float(((a == c) & (b == c)).sum()) / float((a == c).sum() + (b == c).sum()) for c in classes}


def measure(index: int, image: Tensor, label: Tensor, level: float, size: int) -> dict[str, object]:
    """Dice, interpolation error and time of the inverse of one draw."""
    transform = RandDRDMDeformd(["image", "label"], prob=1, deformation_level=level, mode=["bilinear", "nearest"])
    transform.set_random_state(index)
    there = transform({"image": MetaTensor(image.float()), "label": MetaTensor(label)})
    last = transform.last
    start = time.perf_counter()
    back = transform.inverse(there)
    seconds = time.perf_counter() - start
    inner = (slice(None), slice(size // 8, -(size // 8)), slice(size // 8, -(size // 8)))
    spread = float(image.float()[inner].std())
    return {
        "dice": dice_by_class(back["label"].as_tensor(), label),
        "image_error_of_sd": float((back["image"].as_tensor() - image.float())[inner].abs().mean()) / spread,
        "inverse_seconds": seconds,
        "residual_vox": last.inverse_residual_vox,
        "folds": last.statistics.fold_fraction,
        "displacement_vox": last.statistics.mean_displacement_vox,
    }


def roundings(index: int, image: Tensor, level: float, model: DRDM, shape: tuple[int, int]) -> dict[str, float]:
    """Largest error and folds of a field that is stored in half precision and in fixed point, at ``shape``."""
    resized = torch.nn.functional.interpolate(image[None].float(), shape, mode="bilinear")
    drawn = model.sample(resized, level, [index], compact=True)
    exact = resize_ddf(drawn, shape)
    half = resize_ddf(drawn.half().float(), shape)
    fixed = StoredField.quantised(drawn[0], shape).ddf()[None]
    return {
        "half_error_vox": float((half - exact).abs().max()),
        "fixed_error_vox": float((fixed - exact).abs().max()),
        "exact_folds": float(fold_fraction(exact)),
        "half_folds": float(fold_fraction(half)),
        "fixed_folds": float(fold_fraction(fixed)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", type=float, default=0.6)
    parser.add_argument("--slices", type=int, default=20)
    args = parser.parse_args()
    model = DRDM(load_network("zheng2026-cmr-2d"))
    done = {(row["slice"], row["level"]) for row in read_rows(PATH)}
    for index, image, label in tqdm(slices(args.slices)):
        if (index, args.level) not in done:
            row = {"slice": index, "level": args.level, **measure(index, image, label, args.level, image.shape[-1])}
            append_rows(PATH, row | roundings(index, image, args.level, model, (512, 512)) | machine())
    rows = [row for row in read_rows(PATH) if row["level"] == args.level]
    print(f"{len(rows)} slices, level {args.level}: mean ± standard deviation (smallest to largest)")
    numbers = {"mean_dice": [np.mean(list(row["dice"].values())) for row in rows]}
    numbers |= {name: [row[name] for row in rows] for name, value in rows[0].items() if isinstance(value, float)}
    for name, values in numbers.items():
        print(f"{name}: {np.mean(values):.5f} ± {np.std(values):.5f} ({min(values):.5f} to {max(values):.5f})")
    print(json.dumps(machine()))


if __name__ == "__main__":
    main()
