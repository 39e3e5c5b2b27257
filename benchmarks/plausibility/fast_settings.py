"""Measure on validation slices how steps, repeats, smoothing, start time and mending of the fast sampler matter.

ACDC patients 61-70, the middle slice of each at end diastole. "LV round" is 4πA/P² of the deformed left ventricle. One
JSON line per setting goes to fast_settings.jsonl.

    python benchmarks/plausibility/fast_settings.py --level 0.6 --slices 8
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import diffuse, WorkingGrid
from monai_drdm.diffusion.recover import predict_step
from monai_drdm.fields import compose, fold_fraction, gaussian_smooth, mend_folds, power, resize_image, warp
from monai_drdm.metrics import log_jacobian_std, mean_displacement, remove_affine
from monai_drdm.networks import load_network, RecResACNet

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine
from common.scans import data_folder

SIZE = 256
SETTINGS = (
    {"steps": 20, "repeats": 4, "sigma": 1.5, "start": 79, "mode": "bilinear", "mend": False},
    {"steps": 20, "repeats": 4, "sigma": 1.5, "start": 79, "mode": "bilinear", "mend": True},
    {"steps": 16, "repeats": 5, "sigma": 1.5, "start": 79, "mode": "bicubic", "mend": True},
    {"steps": 12, "repeats": 5, "sigma": 1.5, "start": 48, "mode": "bicubic", "mend": True},
    {"steps": 12, "repeats": 5, "sigma": 1.5, "start": 30, "mode": "bicubic", "mend": True},
)


def slices(count: int) -> list[tuple[int, Tensor, Tensor]]:
    """Slices as ``(index, image, left ventricle)``; image and mask are ``(1, 1, 160, 160)``."""
    archive = np.load(data_folder() / "acdc" / "acdc2d_160.npz")
    middle = (archive["phase"] == 0) & (archive["slice"] == archive["nslices"] // 2)
    chosen = [int(np.flatnonzero((archive["patient"] == p) & middle)[0]) for p in range(61, 61 + count)]
    image, ventricle = torch.from_numpy(archive["image"]).float(), torch.from_numpy(archive["label"] == 3).float()
    return [(i, image[i][None, None], ventricle[i][None, None]) for i in chosen]


def recover(network: RecResACNet, image: Tensor, ddf: Tensor, setting: dict) -> Tensor:
    ddf = mend_folds(ddf) if setting["mend"] else ddf
    for k in range(setting["steps"]):
        time = round(setting["start"] * (1 - k / (setting["steps"] - 1)))
        step = predict_step(network, warp(image, ddf, setting["mode"], "zeros"), time)
        ddf = compose(ddf, power(gaussian_smooth(step, setting["sigma"]), setting["repeats"]))
    return mend_folds(ddf) if setting["mend"] else ddf


def roundness(ventricle: Tensor, ddf: Tensor) -> float:
    mask = warp(resize_image(ventricle, (SIZE, SIZE)), ddf)[0, 0]
    rows, columns = torch.gradient(mask)
    return float(4 * math.pi * mask.sum() / (rows**2 + columns**2).sqrt().sum() ** 2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--level", type=float, default=0.6)
    parser.add_argument("--slices", type=int, default=8)
    args = parser.parse_args()
    network = load_network("zheng2026-cmr-2d")
    grid = WorkingGrid.of((160, 160), (1.0, 1.0), SIZE)
    for setting in SETTINGS:
        rows = []
        for index, image, ventricle in tqdm(slices(args.slices), desc=json.dumps(setting)):
            start = diffuse([torch.Generator().manual_seed(index)], grid.shape, args.level)
            ddf = recover(network, grid.image_to_working(image, (0.0, 1.0)), start, setting)
            rows.append([
                float(fold_fraction(ddf)), float(mean_displacement(ddf)), float(mean_displacement(remove_affine(ddf))),
                float(log_jacobian_std(ddf)), roundness(ventricle, ddf), roundness(ventricle, torch.zeros_like(ddf)),
            ])  # fmt: skip
        names = (
            "folds_corner",
            "displacement_px",
            "displacement_no_affine_px",
            "log_jacobian_std",
            "lv_round",
            "lv_round_original",
        )
        mean, std = np.mean(rows, axis=0).round(5).tolist(), np.std(rows, axis=0).round(5).tolist()
        row = {
            "level": args.level,
            "slices": args.slices,
            **setting,
            "mean": dict(zip(names, mean)),
            "std": dict(zip(names, std)),
            **machine(),
        }
        append_rows(Path(__file__).parent / "fast_settings.jsonl", row)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
