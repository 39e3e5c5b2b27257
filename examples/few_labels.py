"""A few labelled scans and many unlabelled ones: one network learns from both.

    python examples/few_labels.py train --out run                       # on hearts that this script draws
    python examples/few_labels.py train --out run --labelled datalist.json --unlabelled scans/ --size 96 96
    python examples/few_labels.py predict run scans/ --out predicted/

``datalist.json`` is a MONAI datalist: ``{"training": [{"image": …, "label": …}], "validation": [the same, optional]}``.
With two sizes the network sees slices (along the last axis of volumes), with three it sees volumes.
``few_labels.ipynb`` goes the same way step by step. How it works is in ``mean_teacher.py``, which also the MONAI bundle
``few_label_segmentation`` trains with.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import drawn_hearts
import numpy as np
import torch
from mean_teacher import batches, check_samples, CONFIDENCE, light_view, MeanTeacher, predict_labels, Sample, StrongView
from monai.data import Dataset, get_track_meta, set_track_meta
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.utils import set_determinism
from pictures import draw_curves, draw_overlays
from safetensors.torch import load_file, save_file
from scans import find_groups, label_folder, load_cases
from torch import nn
from tqdm import tqdm

from monai_drdm import DeformationBank
from monai_drdm.io.datalists import find_cases


def build_network(dims: int, classes: int) -> nn.Module:
    """Any network of MONAI will do."""
    channels = (16, 32, 64, 96) if dims == 2 else (16, 32, 64)
    return UNet(dims, 1, classes, channels, strides=(2,) * (len(channels) - 1), num_res_units=1)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Without MONAI's metadata: nothing in a training is inverted or written."""
    tracks = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(tracks)


@plain_tensors()
def train(
    labelled: list[Sample], unlabelled: list[Sample], validation: list[Sample], **settings: Any
) -> tuple[nn.Module, list[dict[str, float]]]:
    """The teacher after so many iterations, and how the training went."""
    size, iterations, classes = settings["size"], settings["iterations"], settings["classes"]
    confidence, pose = settings.get("confidence", CONFIDENCE), settings.get("pose", {})
    check_samples([*labelled, *validation], size, classes)
    set_determinism(settings["seed"])
    network = build_network(len(size), classes).to(settings["device"])
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-3)
    supervised = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    strong = StrongView(size, settings["batch"][1], settings["bank"], settings["deform"], confidence, **pose)
    learn = MeanTeacher(network, optimiser, supervised, strong, iterations, settings["weight"])
    few = batches(Dataset(labelled, light_view(size, **pose)), settings["batch"][0], iterations)
    many = batches(Dataset(unlabelled), settings["batch"][1], iterations)
    story: list[dict[str, float]] = []
    bar = tqdm(zip(few, many), total=iterations, desc="training")
    for step, (known, unknown) in enumerate(bar, 1):
        found = learn(known, unknown)
        if step % max(1, iterations // 20) == 0 or step == iterations:
            dice = mean_dice(learn.teacher, validation, classes) if validation else float("nan")
            story.append({"step": step, **found, "dice": dice})
            bar.set_postfix({key: f"{value:.3f}" for key, value in story[-1].items() if key != "step"})
    return learn.teacher, story


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
        groups = (cases[:3], [case._replace(label=None) for case in cases[3:43]], cases[43:])
    else:
        groups = find_groups(args.labelled, args.unlabelled)
    loaded = [load_cases(group, args.size) for group in groups]
    print(f"{len(loaded[0])} labelled, {len(loaded[1])} unlabelled and {len(loaded[2])} validation images")
    return loaded[0], loaded[1], loaded[2]


def run_training(args: argparse.Namespace) -> dict[str, float]:
    if args.out.exists() and any(args.out.iterdir()):
        raise SystemExit(f"{args.out} is not empty; choose a new folder.")
    if args.labelled is not None and args.unlabelled is None:
        raise SystemExit("--labelled needs --unlabelled, a folder of images.")
    if any(n % 8 for n in args.size):
        raise SystemExit(f"--size must be multiples of 8, which the network halves three times; got {args.size}.")
    if args.flips and not set(args.flips) <= set(range(len(args.size))):
        raise SystemExit(f"--flips must be axes from 0 to {len(args.size) - 1}, got {args.flips}.")
    if args.network != "auto" and args.deform == 0:
        raise SystemExit("--network says which network deforms, so it needs --deform above 0.")
    flat = len(args.size) == 2
    args.iterations = (4000 if flat else 2000) if args.iterations is None else args.iterations
    args.batch = args.batch or ([8, 12] if flat else [2, 3])
    args.out.mkdir(parents=True, exist_ok=True)
    labelled, unlabelled, validation = collect(args)
    settings = {
        "size": args.size,
        "classes": 1 + max((int(one["label"].max()) for one in labelled if "label" in one), default=0),
    }
    bank = None
    if args.deform > 0:
        options = {"fields_per_image": 4, "deformation_level": tuple(args.level), "device": args.device}
        options["network"] = args.network
        bank = DeformationBank.build(unlabelled, id_key="name", **options)
    names = ("iterations", "batch", "confidence", "deform", "weight", "device", "seed")
    options = {name: getattr(args, name) for name in names}
    options["pose"] = {"flips": args.flips, "rotate": None if args.rotate is None else math.radians(args.rotate)}
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
    one = commands.add_parser("train")
    one.add_argument("--out", type=Path, required=True, help="new folder")
    one.add_argument("--labelled", type=Path, help="datalist; without one, hearts are drawn")
    one.add_argument("--unlabelled", type=Path, help="folder of images")
    one.add_argument(
        "--size", type=int, nargs="+", default=[96, 96], help="two: slices, three: volumes; default: 96 96"
    )
    one.add_argument("--iterations", type=int, help="default: 4000 for slices, 2000 for volumes")
    one.add_argument("--batch", type=int, nargs=2, help="labelled and unlabelled images; default: 8 12, in 3D 2 3")
    one.add_argument("--weight", type=float, default=1.0, help="of the unlabelled loss, default: %(default)s")
    one.add_argument(
        "--confidence", type=float, default=CONFIDENCE, help="with which a predicted label counts, default: %(default)s"
    )
    one.add_argument(
        "--deform", type=float, default=0.0, help="chance that DRDM deforms a strong view, default: %(default)s"
    )
    one.add_argument(
        "--level",
        type=float,
        nargs=2,
        default=[0.2, 0.5],
        help="deformation level, lowest and highest; default: 0.2 0.5",
    )
    one.add_argument("--network", default="auto", help="name or .safetensors file of the network that deforms")
    one.add_argument("--flips", type=int, nargs="*", help="axes of flips, or nothing; default: all in 2D, none in 3D")
    one.add_argument("--rotate", type=float, help="largest rotation in degrees; default: 180 in 2D, 29 in 3D")
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
