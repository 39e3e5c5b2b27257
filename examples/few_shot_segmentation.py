"""Five labelled scans, one small U-Net, with and without deformed copies of them.

    python examples/few_shot_segmentation.py --out few_shot                  # hearts drawn by this script
    python examples/few_shot_segmentation.py --out few_shot --data scans/    # your own: scans/images, scans/labels

Trains the same network twice on five scans, once with flips and affine maps only and once with ``RandDRDMDeformd``
after them, and compares Dice on the scans it did not see: ``curves.png``, ``overlays.png`` and ``result.json``. Your
own scans are 2D NIfTI images or volumes, paired by sorted name; volumes are cut along their last axis. The first five
are learned from, the rest are judged.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.data import CacheDataset, DataLoader, Dataset, list_data_collate
from monai.inferers import SimpleInferer
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    Resized,
    ScaleIntensityRangePercentilesd,
)
from monai.utils import set_determinism
from tqdm import tqdm

from monai_drdm import RandDRDMDeformd
from monai_drdm.io import save_image

KEYS = ["image", "label"]
LABELLED = 5
ARMS = {"affine": 0.0, "affine + DRDM": 0.5}
"""Compared pipelines, and how often each deforms."""
Run = dict[str, Any]
"""Of one training: `steps`, `dice` at each, the `network`, and the images `judged`."""


def draw_heart(generator: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A short-axis slice as a child would draw it: 1 right ventricle, 2 wall, 3 left ventricle; every one differs."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1

    def blob(centre: Sequence[float], radius: Sequence[float], bumps: float) -> np.ndarray:
        dy, dx = (y - centre[0]) / radius[0], (x - centre[1]) / radius[1]
        angle = np.arctan2(dy, dx)
        outline = 1 + sum(
            bumps / k * generator.normal() * np.cos(k * angle + generator.uniform(0, 2 * np.pi)) for k in (2, 3, 4)
        )
        return np.hypot(dy, dx) < outline

    centre = generator.uniform(-0.12, 0.12, 2)
    cavity = generator.uniform(0.14, 0.26, 2)
    wall = cavity + generator.uniform(0.07, 0.14)
    beside = centre - [generator.uniform(-0.1, 0.1), wall[1] + generator.uniform(-0.02, 0.08)]
    inner, outer = blob(centre, cavity, 0.08), blob(centre, wall, 0.05)
    right = blob(beside, generator.uniform(0.16, 0.34, 2), 0.12)
    label = np.where(inner, 3, np.where(outer | inner, 2, np.where(right, 1, 0)))
    image = 0.12 + 0.3 * blob([0, 0], generator.uniform(0.75, 0.98, 2), 0.05)
    for _ in range(6):
        place, extent = generator.uniform(-0.8, 0.8, 2), generator.uniform(0.05, 0.25, 2)
        image = np.where(blob(place, extent, 0.2), generator.uniform(0.1, 0.9), image)
    blood, muscle = generator.uniform(0.7, 0.95), generator.uniform(0.3, 0.5)
    image = np.choose(label, [image, blood, muscle, blood]) + generator.normal(0, 0.03, image.shape)
    return image.clip(0, 1).astype(np.float32), label.astype(np.uint8)


def draw_data(folder: Path, count: int, size: int) -> None:
    """Write drawn scans and their labels as NIfTI."""
    generator = np.random.default_rng(0)
    for number in range(count):
        for key, array in zip(KEYS, draw_heart(generator, size)):
            (folder / f"{key}s").mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{key}s" / f"scan{number:05d}.nii.gz")


def cut_volumes(data: Path, folder: Path) -> None:
    """Write every slice of the volumes that shows a structure; 2D images as they are."""
    images, labels = (sorted((data / f"{key}s").glob("*.nii*")) for key in KEYS)
    if not images or len(images) != len(labels):
        raise SystemExit(f"{data}: need as many images/*.nii.gz as labels/*.nii.gz, got {len(images)}, {len(labels)}.")
    for number, paths in enumerate(zip(images, labels)):
        volumes = [np.atleast_3d(np.asanyarray(nib.load(path).dataobj)) for path in paths]
        for z in np.flatnonzero(volumes[1].any(axis=(0, 1))):
            for key, volume in zip(KEYS, volumes):
                (folder / f"{key}s").mkdir(parents=True, exist_ok=True)
                piece = torch.from_numpy(volume[:, :, z].astype(volume.dtype.newbyteorder("=")))
                save_image(piece, np.eye(4), folder / f"{key}s" / f"scan{number:05d}_{z:03d}.nii.gz")


def split(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Slices of the first scans, and of all others."""
    images, labels = (sorted((folder / f"{key}s").glob("*.nii.gz")) for key in KEYS)
    entries = [{"image": str(i), "label": str(la), "scan": i.name[:9]} for i, la in zip(images, labels, strict=True)]
    scans = sorted({entry["scan"] for entry in entries})
    if len(scans) <= LABELLED:
        raise SystemExit(f"{folder}: need more than {LABELLED} scans, to judge by those after the first {LABELLED}.")
    return (
        [entry for entry in entries if entry["scan"] in scans[:LABELLED]],
        [entry for entry in entries if entry["scan"] not in scans[:LABELLED]],
    )


def load(size: int) -> list[Any]:
    """From files to images of one size."""
    return [
        LoadImaged(keys=KEYS),
        EnsureChannelFirstd(keys=KEYS, channel_dim="no_channel"),
        ScaleIntensityRangePercentilesd(keys="image", lower=1, upper=99, b_min=0, b_max=1, clip=True),
        Resized(keys=KEYS, spatial_size=(size, size), mode=["bilinear", "nearest"]),
    ]


def augment(prob: float) -> list[Any]:
    """Flips, affine maps and noise, then DRDM with probability ``prob``."""
    drdm = RandDRDMDeformd(keys=KEYS, mode=["bilinear", "nearest"], prob=prob, deformation_level=(0.2, 0.5))
    return [
        RandFlipd(keys=KEYS, prob=0.5, spatial_axis=0),
        RandFlipd(keys=KEYS, prob=0.5, spatial_axis=1),
        RandAffined(
            keys=KEYS,
            prob=0.9,
            rotate_range=0.5,
            scale_range=0.25,
            translate_range=8,
            mode=["bilinear", "nearest"],
            padding_mode="border",
        ),
        *([drdm] if prob else []),
        RandGaussianNoised(keys="image", prob=0.5, std=0.03),
    ]


def train(
    transforms: list[Any],
    labelled: list[Any],
    others: list[Any],
    *,
    name: str = "",
    size: int = 96,
    steps: int = 600,
    every: int = 50,
    seed: int = 0,
) -> Run:
    """One network learns from the labelled slices and is judged on the others every so many steps."""
    set_determinism(seed)
    training = CacheDataset(labelled, Compose(load(size) + transforms), progress=False)
    loader = DataLoader(training, batch_size=LABELLED, shuffle=True, collate_fn=list_data_collate)
    judged = Dataset([Compose(load(size))(entry) for entry in others])
    classes = count_classes(labelled + others)
    network = UNet(2, 1, classes, channels=(16, 32, 64, 96), strides=(2, 2, 2), num_res_units=1)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    at, dice = [], []
    with tqdm(total=steps, desc=name) as bar:
        while bar.n < steps:
            for batch in loader:
                network.train()
                optimiser.zero_grad()
                loss(network(batch["image"]), batch["label"]).backward()
                optimiser.step()
                bar.update()
                if bar.n % every == 0 or bar.n == steps:
                    at.append(bar.n)
                    dice.append(judge(network, judged, classes))
                    bar.set_postfix(dice=f"{dice[-1]:.3f}")
                if bar.n == steps:
                    break
    return {"steps": at, "dice": dice, "network": network, "judged": judged}


def count_classes(entries: list[Any]) -> int:
    """With the background."""
    return 1 + max(int(np.asanyarray(nib.load(entry["label"]).dataobj).max()) for entry in entries)


@torch.no_grad()
def judge(network: torch.nn.Module, judged: Dataset, classes: int) -> float:
    """Mean Dice over structures and images."""
    network.eval()
    metric = DiceMetric(include_background=False)
    for batch in DataLoader(judged, batch_size=16):
        predicted = SimpleInferer()(batch["image"], network).argmax(1, keepdim=True)
        metric(one_hot(predicted, classes), one_hot(batch["label"], classes))
    return float(metric.aggregate())


def draw_curves(found: dict[str, Run]) -> Figure:
    """Dice against steps."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, run in found.items():
        axes.plot(run["steps"], run["dice"], label=f"{name}: {run['dice'][-1]:.3f}")
    axes.set(xlabel="training step", ylabel="mean Dice, scans not seen", title=f"{LABELLED} labelled scans")
    axes.legend(loc="lower right")
    return figure


@torch.no_grad()
def draw_overlays(found: dict[str, Run], count: int = 4) -> Figure:
    """True outlines, and those of each network."""
    judged = next(iter(found.values()))["judged"]
    chosen = np.linspace(0, len(judged) - 1, min(count, len(judged))).round().astype(int)
    figure = Figure(figsize=(2.5 * len(chosen), 2.5 * (1 + len(found))), layout="constrained")
    rows = figure.subplots(1 + len(found), len(chosen), squeeze=False)
    for column, index in enumerate(chosen):
        image = judged[int(index)]["image"]
        maps = [judged[int(index)]["label"][0], *(run["network"](image[None]).argmax(1)[0] for run in found.values())]
        for axes, title, label in zip(rows[:, column], ["truth", *found], maps):
            show(axes, image, label, title)
    return figure


def show(axes: Axes, image: torch.Tensor, label: torch.Tensor, title: str = "") -> None:
    """A slice ``(1, H, W)`` and the outlines of its label ``(H, W)``."""
    axes.imshow(np.asarray(image[0]).T, cmap="gray", origin="lower")
    for value in np.unique(np.asarray(label))[1:]:
        axes.contour(value == np.asarray(label).T, levels=[0.5], colors=[f"C{int(value)}"], linewidths=1.2)
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--data", type=Path, help="folder with images/ and labels/; default: drawn hearts")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=50, help="steps between validations")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--scans", type=int, default=45, help="how many hearts are drawn")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; choose a new folder.")
    if args.data is None:
        draw_data(args.out / "data", args.scans, args.size)
    else:
        cut_volumes(args.data, args.out / "data")
    entries = split(args.out / "data")
    options = {"size": args.size, "steps": args.steps, "every": args.every, "seed": args.seed}
    found = {name: train(augment(prob), *entries, name=name, **options) for name, prob in ARMS.items()}
    draw_curves(found).savefig(args.out / "curves.png", dpi=120)
    draw_overlays(found).savefig(args.out / "overlays.png", dpi=120)
    result = {name: run["dice"][-1] for name, run in found.items()}
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(f"{name}: mean Dice {dice:.3f}" for name, dice in result.items()))
    return result


if __name__ == "__main__":
    main()
