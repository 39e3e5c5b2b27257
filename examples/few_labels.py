"""A few labelled scans and many unlabelled ones: one network learns from both.

    python examples/few_labels.py train --out run                       # on hearts that this script draws
    python examples/few_labels.py train --out run --labelled datalist.json --unlabelled scans/ --size 96 96
    python examples/few_labels.py predict run scans/ --out predicted/

``datalist.json`` is a MONAI datalist: ``{"training": [{"image": …, "label": …}], "validation": [the same, optional]}``.
With two sizes the network sees slices (along the last axis of volumes), with three it sees volumes.
``few_labels.ipynb`` goes the same way step by step.

How it works. An average of the network's own weights over time, the teacher, predicts labels of unlabelled images.
The network must predict the same labels on a strong view of each image: moved by a random pose and, with ``--deform``,
by a plausible deformation, with changed intensities, and with a part of another image pasted in (CutMix). Predicted
labels and their confidence move with the image; only confident voxels count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import drawn_hearts
import monai.transforms as mt
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset, decollate_batch, list_data_collate, set_track_meta
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.utils import set_determinism
from pictures import draw_curves, draw_overlays
from safetensors.torch import load_file, save_file
from scans import label_folder, load_case
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import RandomSampler
from tqdm import tqdm

from monai_drdm import BatchRandDRDMBankd, DeformationBank
from monai_drdm.io.datalists import find_cases, read_cases

CONFIDENCE = 0.95
"""Smallest probability with which a predicted label counts."""
Sample = dict[str, Any]


def build_network(dims: int, classes: int) -> nn.Module:
    """Any network of MONAI will do."""
    channels = (16, 32, 64, 96) if dims == 2 else (16, 32, 64)
    return UNet(dims, 1, classes, channels, strides=(2,) * (len(channels) - 1), num_res_units=1)


def poses(keys: list[str], modes: list[str], size: Sequence[int]) -> list[Any]:
    """Random flips, rotations, scales and shifts. Take out what your images never do, such as flips of a brain."""
    ranges = {"rotate_range": np.pi if len(size) == 2 else 0.5, "scale_range": 0.3}
    ranges["translate_range"] = [0.1 * n for n in size]
    return [
        *(mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(len(size))),
        mt.RandAffined(keys, prob=1.0, mode=modes, padding_mode="border", **ranges),
    ]


def intensities(strength: float) -> list[Any]:
    """Random changes of contrast and brightness, blur and noise."""
    return [
        mt.RandAdjustContrastd("image", prob=0.8, gamma=(np.exp(-strength), np.exp(strength))),
        mt.RandScaleIntensityFixedMeand("image", prob=0.8, factors=0.7 * strength),
        mt.RandShiftIntensityd("image", prob=0.8, offsets=0.3 * strength),
        mt.RandGaussianSmoothd("image", prob=0.5, sigma_x=(0, 1.4 * strength), sigma_y=(0, 1.4 * strength)),
        mt.RandGaussianNoised("image", prob=0.8, std=0.07 * strength),
    ]


class StrongView:
    """Moves unlabelled images, predicted labels and confidence together, and changes the images' intensities."""

    def __init__(self, size: Sequence[int], batch: int, bank: DeformationBank | None, deform: float) -> None:
        keys, modes = ["image", "pseudo", "confidence"], ["bilinear", "nearest", "bilinear"]
        self.deform = None
        if bank is not None:
            self.deform = BatchRandDRDMBankd(keys, bank=bank, id_key="name", prob=deform, mode=modes, invertible=False)
        self.each = mt.Compose([*poses(keys, modes, size), *intensities(0.7)])
        self.cutmix = mt.CutMix(batch)

    def __call__(self, batch: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """The views ``(B, 1, *S)``, their labels, and which voxels count."""
        if self.deform is not None:
            batch = self.deform(batch)
        moved = list_data_collate([self.each(one) for one in decollate_batch(batch)])
        return mix(self.cutmix, 0.5, moved["image"], moved["pseudo"], moved["confidence"] >= CONFIDENCE)


def mix(cutmix: mt.CutMix, prob: float, *batches: Tensor) -> tuple[Tensor, ...]:
    """Into some images of a batch, their labels and what counts, a part of another image is pasted."""
    cutmix.randomize(batches[0])
    chosen = torch.from_numpy(cutmix.R.random_sample(len(batches[0])) < prob).to(batches[0].device)
    mixed = [cutmix(one.float(), randomize=False).to(one.dtype) for one in batches]
    return tuple(torch.where(chosen.view(-1, *(1,) * (one.ndim - 1)), m, one) for m, one in zip(mixed, batches))


@torch.no_grad()
def predict_labels(teacher: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable label and its probability, each ``(B, 1, *S)``."""
    confidence, label = teacher.eval()(image).softmax(1).max(1, keepdim=True)
    return label.to(torch.uint8), confidence


def unlabelled_loss(logits: Tensor, label: Tensor, counts: Tensor) -> Tensor:
    """Mean of cross-entropy and Dice loss over voxels that count; logits ``(B, K, *S)``, the others ``(B, 1, *S)``."""
    label, counts = label[:, 0].long(), counts.float()
    entropy = (F.cross_entropy(logits, label, reduction="none") * counts[:, 0]).mean()
    there = F.one_hot(label, logits.shape[1]).movedim(-1, 1) * counts
    guess = logits.softmax(1) * counts
    axes = (0, *range(2, logits.ndim))
    overlap = (2 * (guess * there).sum(axes) + 1e-5) / (guess.sum(axes) + there.sum(axes) + 1e-5)
    return (entropy + 1 - overlap.mean()) / 2


def batches(samples: list[Sample], transform: Any, size: int, iterations: int) -> Iterator[Sample]:
    """Batches of random samples."""
    data = Dataset(samples, transform)
    sampler = RandomSampler(data, replacement=True, num_samples=size * iterations)
    yield from DataLoader(data, batch_size=size, sampler=sampler, collate_fn=list_data_collate)


def train(
    labelled: list[Sample], unlabelled: list[Sample], validation: list[Sample], **settings: Any
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The teacher after so many iterations, and how the training went."""
    size, iterations, device = settings["size"], settings["iterations"], settings["device"]
    set_determinism(settings["seed"])
    set_track_meta(False)  # plain tensors: nothing here is inverted or written
    network = build_network(len(size), settings["classes"]).to(device)
    teacher = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, iterations, power=0.9)
    supervised = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    strong = StrongView(size, settings["batch"][1], settings["bank"], settings["deform"])
    light = mt.Compose([*poses(["image", "label"], ["bilinear", "nearest"], size), *intensities(0.25)])
    few = batches(labelled, light, settings["batch"][0], iterations)
    many = batches(unlabelled, None, settings["batch"][1], iterations)
    story: list[dict[str, float]] = []
    bar = tqdm(zip(few, many), total=iterations, desc="training")
    for step, (known, unknown) in enumerate(bar, 1):
        unknown["image"] = unknown["image"].to(device)
        unknown["pseudo"], unknown["confidence"] = predict_labels(teacher, unknown["image"])
        view, pseudo, counts = strong(unknown)
        logits = network.train()(torch.cat([known["image"].to(device), view]))
        learned, guessed = logits.split([len(known["image"]), len(view)])
        loss = supervised(learned, known["label"].to(device))
        weight = settings["weight"] * min(1.0, step / (0.15 * iterations))
        optimiser.zero_grad(set_to_none=True)
        (loss + weight * unlabelled_loss(guessed, pseudo, counts)).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        teacher.update_parameters(network)
        if step % max(1, iterations // 20) == 0 or step == iterations:
            dice = mean_dice(teacher.module, validation, settings["classes"]) if validation else float("nan")
            story.append({"step": step, "loss": loss.item(), "trusted": counts.float().mean().item(), "dice": dice})
            bar.set_postfix({key: f"{value:.3f}" for key, value in story[-1].items() if key != "step"})
    return teacher.module, story


def mean_dice(network: nn.Module, samples: list[Sample], classes: int) -> float:
    """Mean over structures of the Dice overlap, all samples taken as one volume."""
    device = next(network.parameters()).device
    found = torch.cat([predict_labels(network, one["image"][None].to(device))[0].cpu() for one in samples])
    label = torch.stack([one["label"] for one in samples])
    pairs = [(found == value, label == value) for value in range(1, classes)]
    return float(np.mean([2 * (a & b).sum().item() / max(1, (a.sum() + b.sum()).item()) for a, b in pairs]))


def collect(args: argparse.Namespace) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Labelled, unlabelled and validation samples."""
    if args.labelled is None:
        drawn_hearts.draw_data(args.out / "data", 63, max(args.size))
        cases = find_cases(args.out / "data" / "images", args.out / "data" / "labels")
        groups = [cases[:3], [case._replace(label=None) for case in cases[3:43]], cases[43:]]
    else:
        sections = json.loads(args.labelled.read_text(encoding="utf-8"))
        validation = read_cases(args.labelled, "validation") if "validation" in sections else []
        groups = [read_cases(args.labelled), find_cases(args.unlabelled), validation]
    loaded = [[one for case in group for one in load_case(case, args.size)] for group in groups]
    print(f"{len(loaded[0])} labelled, {len(loaded[1])} unlabelled and {len(loaded[2])} validation images")
    return loaded[0], loaded[1], loaded[2]


def run_training(args: argparse.Namespace) -> dict[str, float]:
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; choose a new folder.")
    if args.labelled is not None and args.unlabelled is None:
        raise SystemExit("--labelled needs --unlabelled, a folder of images.")
    if any(n % 8 for n in args.size):
        raise SystemExit(f"--size must be multiples of 8, which the network halves three times; got {args.size}.")
    args.out.mkdir(parents=True, exist_ok=True)
    labelled, unlabelled, validation = collect(args)
    settings = {"size": args.size, "classes": 1 + max(int(one["label"].max()) for one in labelled)}
    bank = None
    if args.deform > 0:
        options = {"fields_per_image": 4, "deformation_level": tuple(args.level), "device": args.device}
        bank = DeformationBank.build(unlabelled, id_key="name", **options)
    options = {name: getattr(args, name) for name in ("iterations", "batch", "deform", "weight", "device", "seed")}
    network, story = train(labelled, unlabelled, validation, bank=bank, **settings, **options)
    save_file(network.state_dict(), args.out / "network.safetensors")
    (args.out / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (args.out / "story.json").write_text(json.dumps(story), encoding="utf-8")
    titles = {"loss": "loss, labelled", "trusted": "share of voxels that count", "dice": "Dice, validation"}
    draw_curves(story, titles).savefig(args.out / "curves.png", dpi=120)
    shown = validation or unlabelled
    found = [predict_labels(network, one["image"][None].to(args.device))[0][0].cpu() for one in shown]
    draw_overlays(shown, found).savefig(args.out / "overlays.png", dpi=120)
    return story[-1]


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one.add_argument("--out", type=Path, required=True, help="new folder")
    one.add_argument("--labelled", type=Path, help="datalist; without one, hearts are drawn")
    one.add_argument("--unlabelled", type=Path, help="folder of images")
    one.add_argument("--size", type=int, nargs="+", default=[96, 96], help="two: slices, three: volumes")
    one.add_argument("--iterations", type=int, default=4000)
    one.add_argument("--batch", type=int, nargs=2, default=[8, 12], help="labelled and unlabelled images an iteration")
    one.add_argument("--weight", type=float, default=1.0, help="of the unlabelled loss")
    one.add_argument("--deform", type=float, default=0.0, help="chance that a strong view is deformed by DRDM")
    one.add_argument("--level", type=float, nargs=2, default=[0.2, 0.5], help="deformation level, lowest and highest")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--seed", type=int, default=0)
    other = commands.add_parser("predict")
    for name in ("run", "images"):
        other.add_argument(name, type=Path)
    other.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    if args.command == "train":
        return run_training(args)
    settings = json.loads((args.run / "settings.json").read_text(encoding="utf-8"))
    network = build_network(len(settings["size"]), settings["classes"])
    network.load_state_dict(load_file(args.run / "network.safetensors"))
    label_folder(network, settings["size"], args.images, args.out)
    return {}


if __name__ == "__main__":
    main()
