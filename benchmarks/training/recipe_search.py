"""What a unit of computing buys: short trainings of equal cost that differ in one thing, judged on validation images.

Every variant trains for as many steps as cost what ``--minutes`` of the base recipe cost on one core. What a step costs
is measured beside the base recipe, in turn, so that other work on the machine does not decide; rows say what a
training really took, reading the scans and validations included. Judged on images that no variant was trained on and
that no test uses: random anatomy and validation images of every kind, with the measures of ``first_minutes.py``. Every
training is a row; those with a row are skipped.

    python benchmarks/training/recipe_search.py run --dims 2 --work FOLDER --variants base wide
    python benchmarks/training/recipe_search.py table
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from first_minutes import measure, MEASURES
from torch import Tensor

from monai_drdm.fields import resize_image
from monai_drdm.networks import load_network, VelocityUNet
from monai_drdm.train import build_config, fit
from monai_drdm.train.data import load_bank, Scan
from monai_drdm.train.synthetic import synthetic_images
from monai_drdm.train.trainer import choose_task

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from common.rows import append_rows, machine, read_rows
from common.scans import data_folder, DOMAINS, scans
from training_data import datalist

ROWS = Path(__file__).parent / "recipe_search.jsonl"
LEVELS = (0.3, 0.6, 0.8)
BASE: dict[int, dict[str, Any]] = {
    2: {
        "mix_dimensions": True,
        "permute": 0.5,
        "synthetic_share": 0.4,
        "channels": [16, 32, 64, 96],
        "working_size": 161,
        "epoch_length": 200,
        "optimizer": "adamw",
    },
    3: {
        "spatial_dims": 3,
        "permute": 0.5,
        "synthetic_share": 0.5,
        "channels": [16, 32, 48, 64],
        "working_size": 81,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "epoch_length": 100,
        "optimizer": "adamw",
    },
}
"""Recipes like those of the networks that come with the package, on more kinds of scans."""
HALF_SIZE = {2: 81, 3: 41}
"""Half the working size, as odd as it must be."""
STEPS_A_MINUTE = {2: 150, 3: 50}
"""Of the base recipe on one core beside other work, for choosing the number of steps."""
VARIANTS: dict[str, dict[str, Any]] = {
    "untrained": {"untrained": True},
    "base": {},
    "deep": {"channels": [16, 32, 64, 96, 128]},
    "deep-slim": {"channels": [16, 24, 48, 64, 96]},
    "wide": {"channels": [24, 48, 80, 96]},
    "slim": {"channels": [12, 24, 64, 128]},
    "thin-top": {"channels": [8, 32, 64, 96]},
    "thin-top-wide": {"channels": [8, 32, 96, 128]},
    "batch-8": {"batch_size": 8},
    "batch-32": {"batch_size": 32},
    "muon": {"optimizer": "muon"},
    "muon-5e-3": {"optimizer": "muon", "learning_rate": 5e-3},
    "muon-1e-2": {"optimizer": "muon", "learning_rate": 1e-2},
    "rate-1e-3": {"learning_rate": 1e-3},
    "rate-4e-3": {"learning_rate": 4e-3},
    "roll-out-0.25": {"roll_out": 0.25},
    "roll-out-0.75": {"roll_out": 0.75},
    "gradient-0.25": {"gradient_share": 0.25},
    "gradient-0.75": {"gradient_share": 0.75},
    "synthetic-0.2": {"synthetic_share": 0.2},
    "synthetic-0.7": {"synthetic_share": 0.7},
    "levels-0.2": {"level_low": 0.2},
    "upright": {"permute": 0.0, "rotation_deg": 10.0},
    "float32": {"bfloat16": False},
    "decay-0.9995": {"ema_decay": 0.9995},
    "coarse-first": {"coarse_first": 0.4},
    "fewer-kinds": {"scans": "anatomy"},
}
"""What each changes of the base recipe; ``coarse_first`` is the share of steps at half the working size, ``scans`` the
list of ``training_data.py`` instead of ``wide``: that of the networks in the package, and ``untrained`` a network that
predicts nothing, with which the sampler only smooths the field in flat regions."""
NO_SETTINGS = ("coarse_first", "scans", "untrained")
FOLDERS = {
    "ixi": "ixi/images",
    "hippocampus3d": "hippocampus/images",
    "cxr": "cxr/images",
    "limbct": "limbs/ct/images",
    "limbmr": "limbs/mr/images",
    "nuclei": "nuclei/images",
}
"""Where the images of a domain lie, of which ``load_bank`` takes slices across all axes."""


def validation_images(dims: int, size: int, count: int) -> dict[str, Tensor]:
    """Images ``(N, 1, *S)`` in [0, 1] of every kind."""
    found = {"random anatomy": synthetic_images(torch.Generator().manual_seed(2**40), count, (size,) * dims)}
    for domain, folder in FOLDERS.items():
        if dims == 3 and domain in ("cxr", "nuclei"):
            continue
        members = DOMAINS[domain].splits["validation"]
        paths = sorted((data_folder() / folder).iterdir())[members.start - 1 : members.stop - 1]
        bank = load_bank([Scan(path) for path in paths], spatial_dims=dims, working_size=size, mix_dimensions=True)
        chosen = np.linspace(0, len(bank) - 1, min(count, len(bank))).round().astype(int)
        found[domain.removesuffix("3d")] = bank.images[chosen].float() / 255
    if dims == 2:
        slices = scans("acdc", "validation")
        chosen = np.linspace(0, len(slices) - 1, count).round().astype(int)
        found["acdc"] = torch.cat([resize_image(slices[int(i)].image, (size, size)) for i in chosen]) / 255
    return found


def configure(dims: int, variant: str, work: Path, steps: int, **more: Any) -> Any:
    """Settings of a training of so many steps."""
    settings: dict[str, Any] = BASE[dims] | {k: v for k, v in VARIANTS[variant].items() if k not in NO_SETTINGS} | more
    epochs = max(1, round(steps / settings["epoch_length"]))
    settings["epoch_length"] = round(steps / epochs)  # as many steps as asked for
    name = f"{VARIANTS[variant].get('scans', 'wide')}-{dims}d"
    data = work / f"{name}.json"
    if not data.is_file():
        data.write_text(json.dumps(datalist(name)))
    return build_config(data=str(data), max_epochs=epochs, validation_share=0.05, **settings)


def seconds_a_step(configs: list[Any], turns: int = 8) -> list[float]:
    """Median seconds of a training step of each recipe, taken in turn."""
    tasks = []
    for config in configs:
        task = choose_task(config)
        network = task.new_network()
        task.bank = load_bank(
            [Scan(Path(one["image"])) for one in json.loads(Path(config.data).read_text())["training"][:3]],
            spatial_dims=config.spatial_dims,
            working_size=config.working_size,
            mix_dimensions=True,
        )
        tasks.append((task, network, config))
    found: list[list[float]] = [[] for _ in tasks]
    for turn in range(turns):
        for (task, network, config), times in zip(tasks, found):
            generator = torch.Generator().manual_seed(turn)
            started = time.process_time()
            batch = task.batch(network, generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
                predicted = network(batch.images, *batch.conditions)
            task.loss(predicted, batch.target).backward()
            times.append(time.process_time() - started)
    return [float(np.median(times[1:])) for times in found]


def run(dims: int, variant: str, minutes: float, seed: int, work: Path, count: int) -> None:
    """Train one variant, and judge it on every kind of image."""
    key = {"dims": dims, "variant": variant, "minutes": minutes, "seed": seed}
    if any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(ROWS)):
        return
    if VARIANTS[variant].get("untrained"):
        network = VelocityUNet(dims, channels=BASE[dims]["channels"]).eval()
        judge(network, key | {"cost": 0.0, "steps": 0, "cpu_seconds": 0.0}, BASE[dims]["working_size"], count)
        return
    base_steps = round(minutes * STEPS_A_MINUTE[dims])
    cost = 1.0
    if variant != "base":
        base, mine = seconds_a_step([configure(dims, one, work, base_steps) for one in ("base", variant)])
        cost = mine / base
    share = VARIANTS[variant].get("coarse_first", 0.0)
    started = time.process_time()
    with tempfile.TemporaryDirectory(dir=work) as folder:
        more: dict[str, Any] = {"seed": seed}
        if share:
            steps, half = round(base_steps * share * 2**dims), HALF_SIZE[dims]
            coarse = configure(dims, variant, work, steps, working_size=half, **more)
            more["init"] = str(fit(coarse, Path(folder) / "coarse", progress=True))
        config = configure(dims, variant, work, round(base_steps * (1 - share) / cost), **more)
        network = load_network(str(fit(config, Path(folder) / "run", progress=True)))
        seconds = time.process_time() - started
    assert isinstance(network, VelocityUNet)
    steps = config.max_epochs * config.epoch_length
    judge(network, key | {"cost": cost, "steps": steps, "cpu_seconds": seconds}, network.card.working_size, count)


def judge(network: VelocityUNet, row: dict[str, Any], size: int, count: int) -> None:
    """Complete a row by what the network recovers on every kind of image, and append it to the file."""
    row["weights"] = sum(one.numel() for one in network.parameters())
    for kind, images in validation_images(network.spatial_dims, size, count).items():
        for level in LEVELS:
            parts = [measure(network, part, level, number) for number, part in enumerate(images.split(8))]
            row[f"{kind} {level}"] = {name: float(np.mean([part[name] for part in parts])) for name in MEASURES}
    append_rows(ROWS, row | machine())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: what is left of displacement and image error, means over kinds of images and levels."""
    names = " | ".join(MEASURES.values())
    lines = [
        f"| dims | minutes | variant | seed | steps | cost of a step | CPU s | weights | {names} |",
        "|---" * 11 + "|",
    ]
    for row in sorted(rows, key=lambda row: (row["dims"], row["minutes"], row["variant"], row["seed"])):
        means = [np.mean([v[name] for v in row.values() if isinstance(v, dict)]) for name in MEASURES]
        cells = [*(row[name] for name in ("dims", "minutes", "variant", "seed", "steps")), f"{row['cost']:.2f}"]
        cells += [round(row["cpu_seconds"]), row["weights"]]
        lines.append("| " + " | ".join(str(cell) for cell in [*cells, *(f"{mean:.3f}" for mean in means)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--dims", type=int, choices=(2, 3), default=2)
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=32, help="of each kind")
    parser.add_argument("--work", type=Path, help="folder for what is temporary")
    args = parser.parse_args()
    if args.what == "run":
        if args.work is None:
            parser.error("run needs --work")
        args.work.mkdir(parents=True, exist_ok=True)
        for seed in args.seeds:
            for variant in args.variants:
                run(args.dims, variant, args.minutes, seed, args.work, args.images)
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
