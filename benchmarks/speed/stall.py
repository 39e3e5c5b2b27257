"""Measure how much a transform slows a training step of a U-Net behind a DataLoader, compared with an identity.

The loader's workers share the processor with the training, as they do when people train on a CPU, so a transform takes
processor time from the training step. Transforms are timed in turns, each over a number of steps after the loader has
warmed up; rows hold seconds per step.

    python benchmarks/speed/stall.py --shapes 256x256 96x96x96 --workers 2 --turns 5
    python benchmarks/speed/stall.py --table
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import Identityd, Rand2DElasticd, Rand3DElasticd
from tqdm import tqdm

from monai_drdm import DeformationBank, RandDRDMBankd, RandDRDMDeformd

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows
from peers import KEYS, make_sample, MODES, MONAI

PATH = Path(__file__).parent / "stall.jsonl"
BATCH = {2: 8, 3: 2}
ITEMS, WARM_UP = 16, 2


class Endless(Dataset):
    """A dataset that repeats its samples, so that no epoch ends while steps are timed."""

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Any:
        return self._transform(index % len(self.data))


def _loaded(sample: dict[str, Any]) -> dict[str, Any]:
    """Make MetaTensors as ``LoadImaged`` does, for the identity too, because operations on them cost a little more."""
    return {key: MetaTensor(sample[key]) for key in KEYS}


def transforms_of(samples: list[dict[str, Any]]) -> dict[str, Any]:
    dims = samples[0]["image"].ndim - 1
    bank = DeformationBank.build(samples, id_key="name", fields_per_image=4, progress=False)
    ours: dict[str, Any] = {"keys": KEYS, "mode": MODES}
    if dims == 2:
        elastic: Any = Rand2DElasticd(spacing=(32, 32), magnitude_range=(1, 3), **MONAI)
    else:
        elastic = Rand3DElasticd(sigma_range=(5, 7), magnitude_range=(50, 150), **MONAI)
    return {
        "identity": Identityd(KEYS),
        "RandDRDMBankd, prob 0.5": RandDRDMBankd(bank=bank, id_key="name", prob=0.5, **ours),
        "RandDRDMBankd, prob 1": RandDRDMBankd(bank=bank, id_key="name", prob=1.0, **ours),
        "MONAI elastic, prob 1": elastic,
        "RandDRDMDeformd, prob 0.1": RandDRDMDeformd(prob=0.1, **ours),
    }


def steps(transform: Any, samples: list[dict[str, Any]], workers: int) -> Iterator[float]:
    """Run training steps and yield the seconds of each."""
    dims = samples[0]["image"].ndim - 1
    loader = DataLoader(Endless(samples, transform), batch_size=BATCH[dims], num_workers=workers)
    network = UNet(dims, 1, 4, (16, 32, 64, 128), (2, 2, 2), num_res_units=2)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    batches = iter(loader)
    while True:
        start = time.perf_counter()
        batch = next(batches)
        optimiser.zero_grad()
        loss(network(batch["image"]), batch["label"]).backward()
        optimiser.step()
        yield time.perf_counter() - start


def run(shape: tuple[int, ...], workers: int, turns: int, count: int, without: list[str]) -> None:
    samples = [_loaded(make_sample(shape)) | {"name": f"sample{i}"} for i in range(ITEMS if len(shape) == 2 else 2)]
    transforms = {name: one for name, one in transforms_of(samples).items() if name not in without}
    where = machine() | {"run": datetime.now(timezone.utc).isoformat(timespec="seconds"), "shape": list(shape)}
    for turn in tqdm(range(turns), desc=str(shape), unit="turn"):
        for name, transform in transforms.items():
            timed = steps(transform, samples, workers)
            for _ in range(WARM_UP):
                next(timed)
            seconds = [next(timed) for _ in range(count)]
            timed.close()
            row = {"transform": name, "workers": workers, "turn": turn, "seconds": float(np.mean(seconds))}
            append_rows(PATH, row | where | {"load_average": os.getloadavg()[0]})


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the latest run of every shape, with the overhead over the identity within a turn."""
    lines = ["| images | workers | transform | ms a step | overhead (smallest to largest) |", "|---|---|---|---|---|"]
    for shape in sorted({tuple(r["shape"]) for r in rows}, key=lambda s: (len(s), s)):
        mine = [r for r in rows if tuple(r["shape"]) == shape]
        latest = [r for r in mine if r["run"] == max(one["run"] for one in mine)]
        identity = {r["turn"]: r["seconds"] for r in latest if r["transform"] == "identity"}
        for name in dict.fromkeys(r["transform"] for r in latest):
            group = [r for r in latest if r["transform"] == name]
            over = 100 * (np.array([r["seconds"] / identity[r["turn"]] for r in group]) - 1)
            ms = 1e3 * np.median([r["seconds"] for r in group])
            lines.append(
                f"| {BATCH[len(shape)]} × {'×'.join(map(str, shape))} | {group[0]['workers']} | {name} | {ms:.0f} "
                f"| {np.median(over):+.1f} % ({over.min():+.1f} to {over.max():+.1f}) |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["256x256", "96x96x96"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of every transform and turn")
    parser.add_argument("--without", nargs="*", default=[], help="transforms to leave out")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        for shape in args.shapes:
            run(tuple(int(n) for n in shape.split("x")), args.workers, args.turns, args.steps, args.without)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
