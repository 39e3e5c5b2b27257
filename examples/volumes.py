"""Labelled volumes, a bank of fields for them, and a segmenter that learns from their deformed forms.

    python examples/volumes.py --out run                        # on small volumes that this script draws
    python examples/volumes.py --out run --data hippocampus/    # images/ and labels/ of the same names

``run/`` gets the bank, ``recovery.gif`` (how one field came about), ``samples.png`` (what the segmenter saw),
``found.png`` (what it finds in the last volumes, which it did not see), ``result.json`` and the network.
``volumes.ipynb`` goes the same way step by step.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai.transforms as mt
import nibabel as nib
import numpy as np
import torch
from matplotlib.figure import Figure
from monai.data import DataLoader, Dataset
from monai.losses import DiceCELoss
from monai.metrics import DiceMetric
from monai.networks.nets import UNet
from monai.utils import set_determinism
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import RandomSampler
from tqdm import tqdm

from monai_drdm import DeformationBank, RandDRDMBankd, RandDRDMDeformd
from monai_drdm.io import find_cases
from monai_drdm.viz import animate_recovery, case_rows, CaseRow, Panel, Plane, recovery_steps

KEYS = ["image", "label"]
MODES = ["bilinear", "nearest"]
Sample = dict[str, Any]


def draw_volumes(folder: Path, count: int, size: int) -> None:
    """Write volumes that show a bent body with a thick front part (1) and a thin back part (2) among other tissue."""
    generator = np.random.default_rng(0)
    x, y, z = np.mgrid[:size, :size, :size] / (size - 1) * 2 - 1
    for number in range(count):
        bend, lift, wide = generator.uniform((0.2, -0.3, 0.22), (0.6, 0.3, 0.3))
        radius = wide * (1 + 0.5 * y) * (np.abs(y) < 0.8)
        inside = np.hypot(x - bend * y**2 + 0.1, z - lift * y) < radius
        label = np.where(inside, np.where(y > generator.uniform(-0.1, 0.2), 1, 2), 0)
        image = 0.5 + 0.1 * np.sin(4 * x + generator.uniform(0, 6)) * np.cos(5 * z + generator.uniform(0, 6))
        for _ in range(5):
            centre, extent = generator.uniform(-1, 1, 3), generator.uniform(0.15, 0.5, 3)
            place = sum(((a - c) / e) ** 2 for a, c, e in zip((x, y, z), centre, extent)) < 1
            image = np.where(place, generator.uniform(0.2, 1), image)
        image = np.where(inside, 0.35, image) + generator.normal(0, 0.03, image.shape)
        for key, array in zip(KEYS, (image.astype(np.float32), label.astype(np.uint8))):
            (folder / f"{key}s").mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{key}s" / f"volume{number:03}.nii.gz")


def load_volumes(data: Path, count: int) -> list[Sample]:
    """The first volumes of a folder with their labels, as a training pipeline has them before anything random."""
    load = mt.Compose(
        [
            mt.LoadImaged(KEYS),
            mt.EnsureChannelFirstd(KEYS),
            mt.ScaleIntensityRangePercentilesd("image", 1, 99, 0, 1, clip=True),
        ]
    )
    cases = find_cases(data / "images", data / "labels")
    if len(cases) < count:
        raise SystemExit(f"{data}/images: need {count} volumes, got {len(cases)}.")
    return [{"name": one.name, **load({"image": one.image, "label": one.label})} for one in tqdm(cases[:count], "load")]


def common_size(samples: Sequence[Sample]) -> list[int]:
    """A size that holds every volume, and that a network can halve twice."""
    return [-(-max(one["image"].shape[axis] for one in samples) // 4) * 4 for axis in (1, 2, 3)]


def build_bank(samples: Sequence[Sample], path: Path | None, **options: Any) -> DeformationBank:
    """Some fields for every volume, drawn once; a folder of them can be used by any number of trainings."""
    return DeformationBank.build(samples, id_key="name", path=path, **options)


def training_pipeline(bank: DeformationBank, size: Sequence[int]) -> mt.Compose:
    """A field of the bank and a small pose in one resampling, then one size, then changes of intensity."""
    return mt.Compose(
        [
            RandDRDMBankd(KEYS, bank=bank, id_key="name", prob=0.8, mode=MODES, rotate_range=0.3, scale_range=0.15),
            mt.ResizeWithPadOrCropd(KEYS, size),
            mt.RandAdjustContrastd("image", prob=0.5, gamma=(0.7, 1.5)),
            mt.RandGaussianNoised("image", prob=0.3, std=0.05),
        ]
    )


def train(
    samples: Sequence[Sample], pipeline: mt.Compose, classes: int, iterations: int, device: str = "cpu"
) -> tuple[nn.Module, list[float]]:
    """A small U-Net after so many batches of two, and its losses."""
    set_determinism(0)
    pipeline.set_random_state(0)
    network = UNet(3, 1, classes, channels=(12, 24, 48), strides=(2, 2), num_res_units=1).to(device)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    optimiser = torch.optim.AdamW(network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, iterations, power=0.9)
    data = Dataset(samples, pipeline)
    loader = DataLoader(data, batch_size=2, sampler=RandomSampler(data, replacement=True, num_samples=2 * iterations))
    losses = []
    for batch in tqdm(loader, "training"):
        loss = loss_function(network(batch["image"].to(device)), batch["label"].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    return network, losses


@torch.no_grad()
def judge(
    network: nn.Module, samples: Sequence[Sample], size: Sequence[int], classes: int
) -> tuple[list[torch.Tensor], list[float]]:
    """What a network finds in volumes, and the mean Dice overlap of every structure."""
    metric = DiceMetric(include_background=False, reduction="mean_batch", num_classes=classes)
    fit, found = mt.ResizeWithPadOrCrop(size), []
    device = next(network.parameters()).device
    for one in samples:
        label = network.eval()(fit(one["image"])[None].to(device)).argmax(1, keepdim=True).cpu()
        found.append(mt.ResizeWithPadOrCrop(one["image"].shape[1:])(label[0]))
        metric(found[-1][None], one["label"][None])
    return found, metric.aggregate().tolist()


def row(name: str, samples: dict[str, Sample]) -> CaseRow:
    """A row of volumes and their labels; the slice and its place are those of the first."""
    first = next(iter(samples.values()))
    plane = Plane.of(first["image"], label=first["label"])
    panels = [Panel(title, plane.cut(one["image"]), plane.cut(one["label"])) for title, one in samples.items()]
    return CaseRow(name, panels, plane.spacing)


def draw_samples(samples: Sequence[Sample], bank: DeformationBank, rows: int = 3) -> Figure:
    """Some volumes, and four forms of each that the segmenter may see, before their intensities change."""
    deform = RandDRDMBankd(KEYS, bank=bank, id_key="name", prob=1.0, mode=MODES, rotate_range=0.3, scale_range=0.15)
    deform.set_random_state(0)
    shown = [
        row(one["name"], {"original": one} | {f"epoch {k}": deform(one) for k in range(1, 5)}) for one in samples[:rows]
    ]
    return case_rows(shown)


def draw_found(samples: Sequence[Sample], found: Sequence[torch.Tensor], rows: int = 3) -> Figure:
    """What was found beside the truth."""
    pairs = list(zip(samples, found))[:rows]
    return case_rows([row(one["name"], {"truth": one, "found": {**one, "label": label}}) for one, label in pairs])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--data", type=Path, help="folder with images/ and labels/; without one, volumes are drawn")
    parser.add_argument("--learned", type=int, default=10, help="how many volumes are learned from")
    parser.add_argument("--judged", type=int, default=20, help="how many of the next ones are judged by")
    parser.add_argument("--fields", type=int, default=4, help="of every volume in the bank")
    parser.add_argument(
        "--level", type=float, nargs=2, default=[0.3, 0.7], help="deformation level, lowest and highest"
    )
    parser.add_argument("--network", default="auto", help="that draws the fields")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; choose a new folder.")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data is None:
        draw_volumes(args.out / "data", args.learned + args.judged, 40)
    volumes = load_volumes(args.data or args.out / "data", args.learned + args.judged)
    learned, judged = volumes[: args.learned], volumes[args.learned :]
    size, classes = common_size(volumes), 1 + max(int(one["label"].max()) for one in learned)
    deform = RandDRDMDeformd(KEYS, mode=MODES, prob=1.0, deformation_level=args.level[1], network=args.network)
    deform.set_random_state(0)(learned[0])
    steps = recovery_steps(learned[0]["image"], deform.last.params, learned[0]["label"], network=args.network)
    animate_recovery(steps).save(args.out / "recovery.gif", writer="pillow")
    options = {"fields_per_image": args.fields, "deformation_level": tuple(args.level), "device": args.device}
    bank = build_bank(learned, args.out / "bank", network=args.network, **options)
    draw_samples(learned, bank).savefig(args.out / "samples.png")
    network, losses = train(learned, training_pipeline(bank, size), classes, args.iterations, args.device)
    found, dice = judge(network, judged, size, classes)
    draw_found(judged, found).savefig(args.out / "found.png")
    save_file(network.state_dict(), args.out / "segmenter.safetensors")
    result = {"dice": dice, "loss": float(np.mean(losses[-20:]))}
    (args.out / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    print("Dice of every structure:", *(f"{one:.3f}" for one in dice))
    return result


if __name__ == "__main__":
    main()
