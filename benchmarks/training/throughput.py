"""Measure the samples per second of our training step and of the published recipe.

Ours is a whole step of ``VelocityUNet`` with default settings: images from memory, posed, deformed, half of the steps
rolled out, restyled; convolutions in bfloat16, loss, gradients, Muon, average of weights. The published one is that of
``RecResACNet`` as released: fields by up to 200 compositions one after the other, float32, two recursions, the three
terms of the loss, Adam; images are neither posed nor restyled. Its time grows with the time step; every repeat takes
the same five, spread evenly over 1 to 79, one for a whole batch, and ours takes as many batches of random levels. The
two take turns in one process.

2D: 160² against our 161² (sizes are odd). 3D: 80 x 96 x 80 against 81 x 97 x 81; the published process makes cubes
only, so its fields are made at 96³ and their centre is used. Images are random anatomy, made once.

    python benchmarks/training/throughput.py --dims 2 3 --repeats 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from monai_drdm.diffusion import diffuse_published
from monai_drdm.diffusion.recover import image_mode
from monai_drdm.fields import crop, fractions_to_voxels, warp
from monai_drdm.networks import RecResACNet
from monai_drdm.train import build_config
from monai_drdm.train.data import ScanBank
from monai_drdm.train.published import published_loss, PublishedTarget
from monai_drdm.train.synthetic import synthetic_images
from monai_drdm.train.trainer import choose_task
from monai_drdm.training.muon import Muon
from monai_drdm.training.precision import Bfloat16Inferer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine

PATH = Path(__file__).parent / "throughput.jsonl"
SHAPES = {2: (160, 160), 3: (80, 96, 80)}
TIMES = (8, 24, 40, 56, 72)
BATCH = {2: 8, 3: 2}

Step = Callable[[int], None]


def bank(shape: tuple[int, ...]) -> ScanBank:
    """Sixteen images of random anatomy."""
    generator = torch.Generator().manual_seed(0)
    images = torch.cat([synthetic_images(generator, 2, shape) for _ in range(8)])
    return ScanBank((images * 255).to(torch.uint8), torch.arange(len(images)), torch.ones(len(images)), ())


def our_step(dims: int, batch: int, device: str) -> Step:
    """Make a function that trains a ``VelocityUNet`` for one step."""
    shape = tuple(n + 1 for n in SHAPES[dims])
    settings = [f"spatial_dims={dims}", f"working_size={max(shape)}", f"batch_size={batch}"]
    task = choose_task(build_config(settings=settings))
    config, task.bank = task.config, bank(shape)
    network = task.build_network().to(device)
    optimizer = Muon(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    averaged = AveragedModel(network, avg_fn=lambda mean, new, _: mean + (1 - config.ema_decay) * (new - mean))
    predict = Bfloat16Inferer(config.bfloat16).predictor(network)

    def step(number: int) -> None:
        images, target, conditions = task.batch(predict, torch.Generator(device).manual_seed(number))
        optimizer.zero_grad()
        task.loss(predict(images, *conditions), target).backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        averaged.update_parameters(network)

    return step


def published_step(dims: int, batch: int, device: str) -> Step:
    """Make a function that trains a ``RecResACNet`` for one step, as published."""
    shape = SHAPES[dims]
    config = build_config(settings=["network=recresacnet", f"spatial_dims={dims}"])
    network, scans = RecResACNet(dims).to(device), bank(shape)
    optimizer = torch.optim.Adam((p for p in network.parameters() if p.requires_grad), 1e-4)

    def draw(number: int, t: int) -> tuple[Tensor, PublishedTarget]:
        generators = [torch.Generator().manual_seed(batch * number + b) for b in range(batch)]
        images = scans.images[torch.randint(len(scans), (batch,), generator=generators[0])].to(device) / 255
        fields = diffuse_published(generators, max(shape), dims, t, device=torch.device(device))
        total, last = (crop(field, shape, centre=True) for field in fields)
        total = fractions_to_voxels(total)
        return warp(images, total, image_mode(images), "zeros"), PublishedTarget(total, last)

    def step(number: int) -> None:
        t = TIMES[number % len(TIMES)]
        image, target = draw(number, t)
        optimizer.zero_grad()
        predicted = network(image, torch.full((batch,), t, device=device))
        published_loss(config, predicted, target).backward()
        optimizer.step()

    return step


def rate(step: Step, first: int, batch: int, device: str) -> float:
    """Samples per second over one batch of every time step."""
    start = time.perf_counter()
    for number in range(first, first + len(TIMES)):
        step(number)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return batch * len(TIMES) / (time.perf_counter() - start)


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", choices=(2, 3), default=[2, 3])
    parser.add_argument("--batch", type=int, help="images in a batch; 8 in 2D and 2 in 3D if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    for dims in args.dims:
        batch = args.batch or BATCH[dims]
        steps = {"ours": our_step(dims, batch, args.device), "published": published_step(dims, batch, args.device)}
        for step in steps.values():
            step(0)
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in tqdm(range(args.repeats), desc=f"{dims}D"):
            for name, step in steps.items():
                rates[name].append(rate(step, (repeat + 1) * len(TIMES), batch, args.device))
        row = {
            "shape": SHAPES[dims],
            "batch": batch,
            "repeats": args.repeats,
            "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
            "samples_per_second": {name: spread(values) for name, values in rates.items()},
            "times_faster": spread([a / b for a, b in zip(rates["ours"], rates["published"])]),
            **machine(),
        }
        append_rows(PATH, row)
        print(json.dumps(row))


if __name__ == "__main__":
    main()
