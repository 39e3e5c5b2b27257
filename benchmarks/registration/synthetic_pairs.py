"""How well do registration networks register that were trained on synthetic pairs, depending on how pairs are made?

| arm | trained on |
|---|---|
| `smooth` | pairs by smooth random fields of one scale |
| `random` | pairs by consistent multi-scale random fields, without a network to recover them |
| `drdm` | pairs by DRDM |
| `drdm-plain` | the same, but the network sees the images only, not the forces of demons between them |
| `real` | real pairs, unsupervised: local cross-correlation |
| `drdm-real` | pairs by DRDM, then real ones unsupervised |
| `smooth-pyramid` and so on | the same pairs; a pyramid, which registers what an affine map has aligned |
| `identity`, `demons`, `bspline` | nothing: SimpleITK's symmetric-forces demons and B-spline registration |

Demons and B-splines are those of ``baselines.py``. Their rows that are there were measured with plainer
ones: demons on one level, without matching histograms, and B-splines by mean squares.

All fields between synthetic pairs of one image have the same mean displacement, that of DRDM's. All networks but the
pyramids are the same, and all train for as many steps; `drdm-real` takes as many again. The averaged weights of the
last step are judged. Settings are chosen on validation images, among them how often each network registers, once to six
times; test images are registered once, each to the next, with what was chosen.

    python benchmarks/registration/synthetic_pairs.py pairs --set hippocampus --work DIR
    python benchmarks/registration/synthetic_pairs.py train --set hippocampus --work DIR
    python benchmarks/registration/synthetic_pairs.py judge --set hippocampus --work DIR --split validation
    python benchmarks/registration/synthetic_pairs.py judge --set hippocampus --work DIR --split test
    python benchmarks/registration/synthetic_pairs.py table
    python benchmarks/registration/synthetic_pairs.py figure --out docs/images/registration.png

Pairs that are written and runs that are finished are skipped, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.augment import make_pairs, PairSettings
from monai_drdm.diffusion import DRDM
from monai_drdm.executors import worker_processes
from monai_drdm.fields import compose, crop, exp_svf, gaussian_smooth, warp
from monai_drdm.io import find_cases, load_ddf, load_image, save_ddf
from monai_drdm.networks import load_network
from monai_drdm.registration import load_registration, register
from monai_drdm.registration.task import fit, RegistrationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from baselines import bspline, demons, nothing
from common.rows import append_rows, read_rows
from common.scans import data_folder, DOMAINS
from judging import pairs_in, score_pair
from table import ARMS, BASELINES, by_structure, comparisons, figure, table

PATH = Path(__file__).parent / "synthetic_pairs.jsonl"
MEASURES = ("dice", "hd95", "fold_fraction", "inverse_consistency_vox", "seconds")
PAIR_ARMS = ("drdm", "random", "smooth")
PYRAMID = "pyramid"
Register = Callable[[Tensor, Tensor], Tensor]
ROUNDS = (1, 2, 3, 4, 6)
_EPOCH = 100


@dataclass(frozen=True)
class Set:
    """Images to register, and how networks are trained on them."""

    domain: str
    structures: tuple[int, ...]
    coarser: int
    """Factor by which images are made coarser."""
    pairs: int
    """Number of pairs made from every image of the pool."""
    level: tuple[float, float]
    smooth_vox: float
    """Standard deviation in voxels of the smoothing in arm ``smooth``."""
    steps: int = 700
    batch: int = 2


SETS = {
    "hippocampus": Set("hippocampus3d", (1, 2), 1, 1, (0.6, 1.0), 6.0, 600),
    "ixi": Set("ixi3d", tuple(range(1, 13)), 2, 4, (0.6, 1.0), 5.0),
    "ixi-2mm": Set("ixi3d", tuple(range(1, 13)), 1, 4, (0.6, 1.0), 10.0),
}


def prepare(name: str, work: Path) -> None:
    """Make folders with the images and labels of every split, as links or as coarser copies."""
    one = SETS[name]
    source = data_folder() / {"hippocampus3d": "hippocampus", "ixi3d": "ixi"}[one.domain]
    files = sorted((source / "images").iterdir())
    for split, members in DOMAINS[one.domain].splits.items():
        for kind in ("images", "labels"):
            folder = work / name / split / kind
            folder.mkdir(parents=True, exist_ok=True)
            for number in members:
                there, new = source / kind / files[number - 1].name, folder / files[number - 1].name
                if not new.exists():
                    new.symlink_to(there) if one.coarser == 1 else _coarser(there, new, one.coarser, kind)


def _coarser(there: Path, new: Path, factor: int, kind: str) -> None:
    """Write a volume that keeps every ``factor``-th voxel; images are smoothed before."""
    volume = nib.load(there)
    values = torch.from_numpy(np.asarray(volume.dataobj, dtype=np.float32))
    if kind == "images":
        values = gaussian_smooth(values[None, None], (factor - 1) / 2)[0, 0]
    array = values[(slice(None, None, factor),) * 3].numpy()
    array = array.astype(np.uint8) if kind == "labels" else array
    nib.save(nib.Nifti1Image(array, volume.affine @ np.diag([factor] * 3 + [1])), new)


def write_pairs(name: str, work: Path, processes: int) -> None:
    """Make the pairs of the pool: by DRDM, and by other fields with the same mean displacements."""
    one, folder = SETS[name], work / name
    cases = find_cases(folder / "pool" / "images", folder / "pool" / "labels")
    settings = PairSettings(augmentation_level=one.level, synthesis_level=one.level, pairs=one.pairs, symmetry=0.0)
    with worker_processes(processes) as executor:
        make_pairs(cases, folder / "pairs-drdm", settings, progress=True, executor=executor)
    entries = json.loads((folder / "pairs-drdm" / "datalist.json").read_text(encoding="utf-8"))["training"]
    model = DRDM(load_network("anatomy-3d"), symmetry=0.0)  # both as the rows were measured
    for arm in ("random", "smooth"):
        draw = partial(_random, model, one) if arm == "random" else partial(_smooth, one)
        for entry in tqdm(entries, desc=arm, unit="pair"):
            _like(folder, arm, entry, draw)
        text = (folder / "pairs-drdm" / "datalist.json").read_text(encoding="utf-8")
        (folder / f"pairs-{arm}" / "datalist.json").write_text(text, encoding="utf-8")


def _like(folder: Path, arm: str, entry: dict[str, str], draw: Callable[[Tensor, int], Tensor]) -> None:
    """Make a pair of the same image as a DRDM pair; both fields have the mean displacement of DRDM's field."""
    out = {key: folder / f"pairs-{arm}" / path for key, path in entry.items()}
    if out["ddf"].is_file():
        return
    stem = Path(entry["fixed"]).name.removesuffix(".nii.gz")
    record = json.loads((folder / "pairs-drdm" / "records" / f"{stem}.json").read_text(encoding="utf-8"))
    image, label = load_image(record["source"]["image"]), load_image(record["source"]["label"])
    synthesis = load_ddf(folder / "pairs-drdm" / entry["ddf"]).as_tensor()[None]
    mean = synthesis.norm(dim=1).mean()
    seeds = (record["params"]["augmentation"]["seed"], record["params"]["synthesis"]["seed"])
    fields = [draw(image.data.as_tensor()[None], seed) for seed in seeds]
    first, second = (field * (mean / field.norm(dim=1).mean()) for field in fields)
    for path in out.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    for side, field in (("moving", first), ("fixed", compose(first, second))):
        image.save_like(warp(image.data.as_tensor()[None].float(), field)[0], out[side])
        label.save_like(warp(label.data.as_tensor()[None], field, "nearest")[0], out[f"{side}_label"])
    save_ddf(second[0], image.data.affine.numpy(), out["ddf"], convention="itk")


def _random(model: DRDM, one: Set, image: Tensor, seed: int) -> Tensor:
    level = float(np.random.RandomState(seed % 2**32).uniform(*one.level))
    return model.diffuse(image.shape[2:], level, [seed])


def _smooth(one: Set, image: Tensor, seed: int) -> Tensor:
    """Integrate smoothed noise; smoothing on a larger grid makes it equally strong at the border and inside."""
    larger = [n + 2 * math.ceil(4 * one.smooth_vox) for n in image.shape[2:]]
    noise = torch.randn(1, 3, *larger, generator=torch.Generator().manual_seed(seed))
    velocity = crop(gaussian_smooth(noise, one.smooth_vox), image.shape[2:], centre=True)
    return exp_svf(velocity * (2.0 / velocity.norm(dim=1).mean()))


def train(name: str, work: Path, arm: str, seed: int) -> Path:
    """Train the network of an arm unless it exists; returns its weights file."""
    one, folder = SETS[name], work / name
    run = folder / f"run-{arm}-{seed}"
    weights = run / "network.safetensors"
    if weights.is_file():
        return weights
    settings: dict[str, Any] = {
        "network": "voxelmorph",
        "batch_size": one.batch,
        "max_epochs": one.steps // _EPOCH,
        "epoch_length": _EPOCH,
        "ema_decay": 0.99,  # because runs are short
        "warmup_steps": 50,
        "folding_weight": 0.0,  # the same for all arms; the table says how much they fold
    }
    source, _, kind = arm.partition("-")
    if source in PAIR_ARMS and kind != "real":
        settings |= {"pairs": str(folder / f"pairs-{source}"), "forces": kind != "plain"}
        settings |= {"network": PYRAMID} if kind == PYRAMID else {}
    else:
        settings |= {"images": str(folder / "pool" / "images"), "labels": str(folder / "pool" / "labels")}
    if arm == "drdm-real":
        settings |= {"init": str(train(name, work, "drdm", seed)), "learning_rate": 3e-4}
    config = RegistrationConfig(seed=seed, **settings)
    found = fit(config, run, resume=(run / "config.json").is_file(), progress=True)
    assert found is not None
    return found


def judge(name: str, work: Path, arm: str, seed: int, split: str) -> None:
    """Register the next image of a split to every image, and write the scores."""
    pairs = list(pairs_in(work / name / split))
    rounds = (0,) if arm in BASELINES else ROUNDS if split == "validation" else (chosen_rounds(name, arm),)
    rows = []
    for number in rounds:
        method = _method(name, work, arm, seed, number)
        for pair in tqdm(pairs, desc=f"{name} {arm} {number or ''}", unit="pair"):
            both_ways = arm in ARMS and split == "test"
            score = score_pair(method, pair, SETS[name].structures, both_ways=both_ways)
            row = {"set": name, "arm": arm, "seed": seed, "split": split, "rounds": number, "pair": pair.name}
            rows.append(row | {key: getattr(score, key) for key in MEASURES})
    append_rows(PATH, *rows)


def chosen_rounds(name: str, arm: str) -> int:
    """The number of registration rounds with the best Dice of an arm on validation images."""
    dice: dict[int, list[float]] = {}
    for row in read_rows(PATH):
        if (row["set"], row["arm"], row["split"]) == (name, arm, "validation"):
            dice.setdefault(row["rounds"], []).append(float(np.nanmean(row["dice"])))
    if not dice:
        raise SystemExit(f"{name}: no validation of {arm!r} yet; judge --split validation first.")
    return max(dice, key=lambda rounds: float(np.mean(dice[rounds])))


def _method(name: str, work: Path, arm: str, seed: int, rounds: int) -> Register:
    if arm in ARMS:
        network = load_registration(train(name, work, arm, seed))
        return lambda moving, fixed: register(network, moving, fixed, rounds=rounds, affine=arm.endswith(PYRAMID))
    return {"identity": nothing, "demons": demons, "bspline": bspline}[arm]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pairs", "train", "judge", "table", "figure"))
    parser.add_argument("--set", choices=tuple(SETS), default="hippocampus")
    parser.add_argument("--work", type=Path, default=Path("synthetic_registration"), help="folder for pairs and runs")
    parser.add_argument("--arms", nargs="+", choices=(*BASELINES, *ARMS), default=[*BASELINES, *ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--workers", type=int, default=1, help="processes that make pairs")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--out", type=Path, default=Path("registration.png"), help="the figure")
    args = parser.parse_args()
    if args.what not in ("table", "figure"):
        prepare(args.set, args.work)
    if args.what == "pairs":
        write_pairs(args.set, args.work, args.workers)
    for seed in args.seeds:
        for arm in args.arms:
            if args.what == "train" and arm in ARMS:
                train(args.set, args.work, arm, seed)
            there = {(r["set"], r["arm"], r["seed"], r["split"]) for r in read_rows(PATH)}
            if args.what == "judge" and (args.set, arm, seed, args.split) not in there:
                judge(args.set, args.work, arm, seed, args.split)
    if args.what == "table":
        rows = read_rows(PATH)
        print(table(rows), comparisons(rows), by_structure(rows), sep="\n\n")
    if args.what == "figure":
        figure(read_rows(PATH)).savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
