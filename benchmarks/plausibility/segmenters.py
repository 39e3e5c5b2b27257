"""Train segmenters on real images; they judge whether deformed images still look real.

One small U-Net a domain, trained on the pool with changes of pose and intensity only, so that it never saw a
deformation. Weights are kept in a folder; the same recipe gives the same file name.

    python benchmarks/plausibility/segmenters.py --cache FOLDER          # train and measure what is missing
    python benchmarks/plausibility/segmenters.py --cache FOLDER --table  # only print the table
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from safetensors.torch import load_file, save_file
from torch import nn, Tensor
from tqdm import tqdm

from monai_drdm.fields import resize_image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.labels import dice, margins, resize_nearest
from common.rows import append_rows, machine, read_rows
from common.scans import DOMAINS, Scan, scans

PATH = Path(__file__).parent / "segmenters.jsonl"
_LINEAR = {2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Recipe:
    """Architecture and training of a segmenter."""

    size: tuple[int, ...]
    """Grid of the segmenter."""
    resample: bool
    """Whether images are resampled to the grid; otherwise they are centred on it."""
    channels: tuple[int, ...]
    batch: int
    steps: int
    learning_rate: float = 2e-3
    rotation: float = 0.4
    """Largest rotation in radians."""
    scale: float = 0.25
    """Logarithm of the largest magnification; every axis is scaled independently."""
    shear: float = 0.15
    shift: float = 0.12
    """Largest shift as a fraction of the image."""
    seed: int = 0


RECIPES = {
    "acdc": Recipe((128, 128), True, (16, 32, 64, 96), 16, 1600),
    "ixi": Recipe((96, 96), False, (16, 32, 64, 96), 16, 1600),
    "cxr": Recipe((128, 128), True, (16, 32, 64, 96), 8, 1000),
    "nuclei": Recipe((256, 256), False, (16, 32, 64, 96), 4, 1000),
    "limbct": Recipe((240, 240), False, (16, 32, 64, 96), 8, 1000),
    "limbmr": Recipe((240, 240), False, (16, 32, 64, 96), 8, 1000),
    "ixi3d": Recipe((80, 96, 80), False, (8, 16, 32, 64), 1, 600, rotation=0.25),
    "hippocampus3d": Recipe((48, 64, 48), False, (16, 32, 64), 2, 1500, rotation=0.25),
}


def default_cache() -> Path:
    """The default folder for trained weights."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "monai_drdm" / "segmenters"


class Segmenter:
    """A trained network that turns an image into a label map of the same size."""

    def __init__(self, domain: str, network: nn.Module) -> None:
        self.recipe, self.network = RECIPES[domain], network.eval()

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """Segment an image ``(1, 1, *S)``; returns uint8 labels of the same shape."""
        shape = image.shape[2:]
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.network(_to_grid(image, self.recipe)).float()
        if self.recipe.resample:
            logits = F.interpolate(logits, shape, mode=_LINEAR[len(shape)], align_corners=True)
        else:
            for axis, (n, grid) in enumerate(zip(shape, self.recipe.size)):
                logits = logits.narrow(axis + 2, (grid - n) // 2, n)
        return logits.argmax(1, keepdim=True).byte()


def load_segmenter(domain: str, cache: Path) -> Segmenter:
    """Load the segmenter of a domain; train it first if the folder does not contain it."""
    digest = hashlib.sha256(repr(RECIPES[domain]).encode()).hexdigest()[:8]
    path = cache / f"{domain}-{digest}.safetensors"
    network = _build(domain)
    if path.is_file():
        network.load_state_dict(load_file(path))
    else:
        start = time.perf_counter()
        train(domain, network)
        print(f"{domain}: {time.perf_counter() - start:.0f} s of training")
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({key: value.contiguous() for key, value in network.state_dict().items()}, partial)
        partial.replace(path)
    return Segmenter(domain, network)


def _build(domain: str) -> nn.Module:
    recipe = RECIPES[domain]
    torch.manual_seed(recipe.seed)
    strides = (2,) * (len(recipe.channels) - 1)
    return UNet(len(recipe.size), 1, DOMAINS[domain].classes + 1, recipe.channels, strides, num_res_units=2)


def train(domain: str, network: nn.Module) -> None:
    """Train on the pool: Dice plus cross-entropy, AdamW, cosine decay, convolutions in bfloat16."""
    recipe = RECIPES[domain]
    pool = scans(domain, "pool")
    images = torch.cat([_to_grid(scan.image, recipe) for scan in pool])
    labels = torch.cat([_label_to_grid(scan, recipe) for scan in pool])
    generator = torch.Generator().manual_seed(recipe.seed)
    optimiser = torch.optim.AdamW(network.parameters(), recipe.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, recipe.steps, pct_start=0.05)
    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    network.train()
    for _ in tqdm(range(recipe.steps), desc=f"segmenter of {domain}", unit="step", mininterval=10):
        chosen = torch.randint(len(pool), (recipe.batch,), generator=generator)
        image, label = _vary(images[chosen], labels[chosen], recipe, generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image)
        optimiser.zero_grad(set_to_none=True)
        loss(logits.float(), label).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        schedule.step()


def _to_grid(image: Tensor, recipe: Recipe) -> Tensor:
    """Standardise an image and bring it to the segmenter's grid; margins get the minimum of the image."""
    image = (image - image.mean()) / image.std().clamp(min=1e-6)
    if recipe.resample:
        return resize_image(image, recipe.size)
    return F.pad(image, margins(image, recipe.size), value=float(image.min()))


def _label_to_grid(scan: Scan, recipe: Recipe) -> Tensor:
    """Bring a label to the segmenter's grid, as float ``(1, 1, *size)`` for ``grid_sample``."""
    label = scan.label.float()
    if recipe.resample:
        return resize_nearest(label, recipe.size)
    return F.pad(label, margins(label, recipe.size))


def _vary(image: Tensor, label: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random affine, then contrast, brightness, gamma and noise."""
    batch, dims = image.shape[0], image.ndim - 2

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator) * 2 - 1

    turn = torch.zeros(batch, dims, dims)
    upper = torch.triu_indices(dims, dims, 1)
    turn[:, upper[0], upper[1]] = uniform(upper.shape[1]) * recipe.rotation
    matrix = torch.matrix_exp(turn - turn.mT) @ (torch.eye(dims) + recipe.shear * uniform(dims, dims).triu(1))
    matrix = matrix * torch.exp(recipe.scale * (0.7 * uniform(1, 1) + 0.3 * uniform(1, dims)))
    theta = torch.cat((matrix, 2 * recipe.shift * uniform(dims, 1)), dim=2)
    grid = F.affine_grid(theta, list(image.shape), align_corners=True)
    image = F.grid_sample(image, grid, padding_mode="border", align_corners=True)
    label = F.grid_sample(label, grid, mode="nearest", padding_mode="border", align_corners=True)
    form = (1,) * (dims + 1)
    low, high = (
        image.amin(dim=tuple(range(1, dims + 2)), keepdim=True),
        image.amax(dim=tuple(range(1, dims + 2)), keepdim=True),
    )
    unit = (image - low) / (high - low).clamp(min=1e-6)
    image = unit ** torch.exp(0.3 * uniform(*form)) * (high - low) + low
    image = image * (1 + 0.2 * uniform(*form)) + 0.2 * uniform(*form)
    noise = torch.randn(image.shape, generator=generator) * 0.1 * uniform(*form).abs()
    return image + noise, label


def measure(domain: str, split: str, segmenter: Segmenter) -> dict[str, object]:
    """Mean Dice on the real images of a split."""
    classes = DOMAINS[domain].classes
    every = [dice(segmenter(scan.image), scan.label, classes) for scan in scans(domain, split)]
    means = [float(np.mean([d for d in row if d is not None])) for row in every if any(d is not None for d in row)]
    known = [[value for value in column if value is not None] for column in zip(*every)]
    by_class = [round(float(np.mean(column)), 4) if column else None for column in known]
    return {"images": len(means), "dice": means, "dice_by_class": by_class}


def table(rows: list[dict[str, object]]) -> str:
    """Markdown: mean ± standard deviation of Dice over real images."""
    lines = ["| domain | split | n | Dice % | by class |", "|---|---|---|---|---|"]
    for row in rows:
        values = 100 * np.array(row["dice"])
        by_class = " / ".join("–" if one is None else f"{100 * one:.1f}" for one in row["dice_by_class"])
        lines.append(
            f"| {row['domain']} | {row['split']} | {row['images']} | {values.mean():.1f} ± {values.std():.1f} "
            f"| {by_class} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", choices=tuple(DOMAINS), nargs="+", default=list(DOMAINS))
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of trained segmenters")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    for domain in [] if args.table else args.domain:
        segmenter = load_segmenter(domain, args.cache)
        recipe = asdict(RECIPES[domain])
        for split in ("validation", "test"):
            known = {(r["domain"], r["split"], str(r["recipe"])) for r in read_rows(PATH)}
            recipe_read = {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.items()}
            if (domain, split, str(recipe_read)) not in known:
                row = {"domain": domain, "split": split, **measure(domain, split, segmenter), "recipe": recipe_read}
                append_rows(PATH, row | machine())
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
