"""Compare fields, warps and training steps on a device with the limits of its arithmetic and memory.

Four numbers, each beside its limit on this device, computed from what the work takes and from two measurements made
first: multiplications of large matrices, and copies in memory.

| what | work | limit |
|---|---|---|
| 2D fields of 256² images, a batch | convolutions of all predictions | multiply-adds a second |
| 3D fields of 128³ volumes, a batch | convolutions of all predictions | multiply-adds a second |
| warp of a 128³ image and label | read field, image, label; write image, label | bytes a second |
| overhead of a step of a U-Net | the transform's share of the time of both | none |

    python benchmarks/speed/device_limits.py --device cuda --precision bfloat16 --compiled
    python benchmarks/speed/device_limits.py --device cpu --turns 3
    python benchmarks/speed/device_limits.py --table
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from monai_drdm import BatchRandDRDMDeformd
from monai_drdm.diffusion import DRDM
from monai_drdm.fields import gaussian_smooth
from monai_drdm.fields.grid import sampling_grid
from monai_drdm.fields.sampling import sample_on_grid
from monai_drdm.networks import load_network

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows

PATH = Path(__file__).parent / "device_limits.jsonl"
BATCH = {2: 32, 3: 2}
SHAPE = {2: (256, 256), 3: (128, 128, 128)}
_ANCHOR_EVERY = 4


def timed(device: torch.device, turns: int, call: Callable[[], object]) -> list[float]:
    """Time ``call`` in every turn, after two calls that warm up."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    for turn in range(-2, turns):
        wait()
        start = time.perf_counter()
        call()
        wait()
        if turn >= 0:
            found.append(time.perf_counter() - start)
    return found


def images(dims: int, device: torch.device) -> torch.Tensor:
    noise = torch.rand(BATCH[dims], 1, *SHAPE[dims], generator=torch.Generator().manual_seed(0))
    return gaussian_smooth(noise, 4.0).to(device)


def capacity(device: torch.device, precision: str, turns: int) -> dict[str, float]:
    """Measure the multiply-adds and bytes per second that this device reaches."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.rand(size, size, device=device, dtype=getattr(torch, precision))
    source = torch.rand(1 << (28 if device.type == "cuda" else 25), device=device)
    target = torch.empty_like(source)
    products, copies = timed(device, turns, lambda: a @ a), timed(device, turns, lambda: target.copy_(source))
    return {"madds": size**3 / min(products), "bytes": 2 * source.nbytes / min(copies)}


def madds_of(dims: int, batch: int) -> float:
    """Count the multiply-adds of all convolutions in one draw of a batch."""
    network = load_network({2: "anatomy-2d", 3: "anatomy-3d"}[dims])
    size, steps = network.card.working_size, network.card.steps
    with FlopCounterMode(display=False) as counter:
        network(torch.rand(1, 1, *(size,) * dims), torch.tensor([0.5]))
    return counter.get_total_flops() / 2 * (steps + -(-steps // _ANCHOR_EVERY)) * batch


@torch.no_grad()
def fields(dims: int, device: torch.device, turns: int, precision: str, compiled: bool) -> list[float]:
    network = load_network({2: "anatomy-2d", 3: "anatomy-3d"}[dims], device)
    model, batch = DRDM(network, precision=precision, compiled=compiled), images(dims, device)
    return timed(device, turns, lambda: model.sample(batch, 0.5, range(len(batch))))


@torch.no_grad()
def warps(device: torch.device, turns: int) -> tuple[list[float], float]:
    """Time warps of a 128³ image and label; also returns the fewest bytes that must move."""
    image = images(3, device)[:1]
    label = (4 * image).to(torch.uint8)
    ddf = gaussian_smooth(torch.randn(1, 3, *SHAPE[3], generator=torch.Generator().manual_seed(1)), 4.0).to(device) * 9

    def both() -> None:
        grid = sampling_grid(ddf)
        sample_on_grid(image, grid, "bilinear", "border")
        sample_on_grid(label, grid, "nearest", "border")

    return timed(device, turns, both), float(ddf.nbytes + 2 * image.nbytes + 2 * label.nbytes)


def steps(device: torch.device, turns: int, precision: str, compiled: bool) -> dict[str, list[float]]:
    """Time training steps of a U-Net on 2D batches, with and without the transform before them."""
    image = images(2, device)
    label = (3.99 * (image - image.min()) / (image.max() - image.min())).to(torch.uint8)
    network = UNet(2, 1, 4, (32, 64, 128, 256), (2, 2, 2), num_res_units=2).to(device)
    optimiser, loss = torch.optim.AdamW(network.parameters()), DiceCELoss(to_onehot_y=True, softmax=True)
    deform = BatchRandDRDMDeformd(
        ["image", "label"],
        mode=["bilinear", "nearest"],
        prob=0.1,
        precision=precision,
        compiled=compiled,
        invertible=False,
    ).set_random_state(0)

    def step(moved: bool) -> None:
        x, y = deform.deform(image, label) if moved else (image, label)
        optimiser.zero_grad(set_to_none=True)
        loss(network(x), y).backward()
        optimiser.step()

    return {name: timed(device, turns, lambda on=on: step(on)) for name, on in (("without", False), ("with", True))}


def run(device: torch.device, turns: int, precision: str, compiled: bool) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = machine() | {"device": name, "precision": precision, "compiled": compiled}
    where |= {"run": datetime.now(timezone.utc).isoformat(timespec="seconds"), "load_average": os.getloadavg()[0]}
    can = capacity(device, precision, turns)
    with tqdm(total=4, unit="measurement") as bar:
        for dims in (2, 3):
            seconds = fields(dims, device, turns, precision, compiled)
            limit = madds_of(dims, BATCH[dims]) / can["madds"]
            what = f"{dims}D fields, batch of {BATCH[dims]}"
            append_rows(PATH, {"what": what, "batch": BATCH[dims], "seconds": seconds, "limit": limit} | can | where)
            bar.update()
        seconds, moved = warps(device, turns)
        row = {"what": "warp of a 128³ image and label", "batch": 1, "seconds": seconds, "limit": moved / can["bytes"]}
        append_rows(PATH, row | can | where)
        bar.update()
        for which, found in steps(device, turns, precision, compiled).items():
            row = {"what": f"training step {which} the transform", "batch": BATCH[2], "seconds": found, "limit": None}
            append_rows(PATH, row | can | where)
        bar.update()


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the latest run on every device."""
    lines = ["| device | what | ms (smallest to largest) | samples a second | limit ms | of the limit |"]
    lines.append("|" + "---|" * 6)
    for device in dict.fromkeys((r["device"], r["precision"], r["compiled"]) for r in rows):
        mine = [r for r in rows if (r["device"], r["precision"], r["compiled"]) == device]
        latest = [r for r in mine if r["run"] == max(one["run"] for one in mine)]
        named = f"{latest[0]['processor'] if device[0] == 'CPU' else device[0]}, {device[1]}"
        named += ", compiled" if device[2] else ""
        for row in latest:
            ms = 1e3 * np.array(row["seconds"])
            limit = "–" if row["limit"] is None else f"{1e3 * row['limit']:.2f}"
            share = "–" if row["limit"] is None else f"{100 * 1e3 * row['limit'] / np.median(ms):.0f} %"
            lines.append(
                f"| {named} | {row['what']} | {np.median(ms):.1f} ({ms.min():.1f} to {ms.max():.1f}) "
                f"| {1e3 * row['batch'] / np.median(ms):.1f} | {limit} | {share} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        run(torch.device(args.device), args.turns, args.precision, args.compiled)
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
