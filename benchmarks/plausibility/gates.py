"""Measure whether a network and its sampler pass the plausibility gates, on images that were not trained on.

For every image two fields are drawn. The first is measured: folds, displacement with and without its affine part,
unevenness of stretching. The second tells how different two draws are. Under both, a segmenter trained on real images
is tried, and under random fields with the same displacement after removing the affine part (the fields that recovery
starts from, scaled down).
Displacements are in pixels of the grid on which fields are made, and scaled to a longest side of 256.

50 images at level 0.6 and 25 at 0.8 in 2D, 20 and 10 volumes in 3D; smaller sets are repeated with other seeds.
Resumable: finished rows are skipped. ``--network random`` is the random field without any recovery.

    python benchmarks/plausibility/gates.py --network anatomy-2d --domain acdc ixi cxr --steps 4 8 16
    python benchmarks/plausibility/gates.py --network zheng2026-cmr-2d --sampler reference fast --domain acdc
    python benchmarks/plausibility/gates.py --network random --domain acdc
    python benchmarks/plausibility/gates.py --table                         # only print the tables
    python benchmarks/plausibility/gates.py --brief                         # print the tables in README and docs

For the published network on ACDC, the tables use the fields that ``samplers.py`` measured on 50 and 25 slices.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import fold_fraction, resize_ddf, resize_image, warp
from monai_drdm.metrics import log_jacobian, log_jacobian_std, mean_displacement, remove_affine
from monai_drdm.networks import load_network, network_sha256, VelocityUNet

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.labels import dice, resize_nearest
from common.rows import append_rows, read_rows
from common.scans import Domain, DOMAINS, Draw, draws, Scan
from gates_table import brief, tables
from segmenters import default_cache, load_segmenter, Segmenter

PLAN = {2: {0.6: 50, 0.8: 25}, 3: {0.6: 20, 0.8: 10}}
KEY = ("domain", "split", "level", "image", "seed", "network", "sha256", "sampler", "steps")


class Method(NamedTuple):
    """A way to draw fields: a network with a sampler, or only the random field."""

    network: str
    sha256: str
    model: DRDM | None

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of a row that identify the method."""
        sampler, steps = (self.model.sampler, self.model.steps) if self.model else ("random", 0)
        return {"network": self.network, "sha256": self.sha256, "sampler": sampler, "steps": steps}

    def draw(self, image: Tensor, level: float, seed: int) -> Tensor:
        """Draw a field ``(1, D, *S)`` in voxels of the image."""
        if self.model is None:
            return random_field(image, level, seed)
        return self.model.sample(image, level, [seed])


def random_field(image: Tensor, level: float, seed: int) -> Tensor:
    """The geometrically consistent random field before recovery; no network takes part."""
    return _untrained(image.ndim - 2).diffuse(image.shape[2:], level, [seed])


@cache
def _untrained(spatial_dims: int) -> DRDM:
    return DRDM(VelocityUNet(spatial_dims))


def methods(network: str, samplers: list[str], steps: list[int]) -> Iterator[Method]:
    """Every combination of the samplers and numbers of steps for a network."""
    if network == "random":
        yield Method("random", "", None)
        return
    loaded = load_network(network)
    for sampler in samplers:
        for count in (steps or [None]) if sampler != "reference" else [None]:
            yield Method(loaded.card.name, network_sha256(loaded), DRDM(loaded, sampler, count))


def measure_field(ddf: Tensor, other: Tensor, label: Tensor) -> dict[str, float | None]:
    """Measure one field; ``other`` is a second draw and ``label`` the deformed label, both on the same grid."""
    plain, rest = float(mean_displacement(ddf)), float(mean_displacement(remove_affine(ddf)))
    scale = 256 / max(ddf.shape[2:])
    inner = label[0, 0][tuple(slice(0, n - 1) for n in ddf.shape[2:])] > 0
    stretch = log_jacobian(ddf)[0][inner]
    typical = (plain + float(mean_displacement(other))) / 2
    return {
        "folds_corner": float(fold_fraction(ddf)),
        "folds_central": float(fold_fraction(ddf, "central")),
        "displacement_px": plain,
        "displacement_256": plain * scale,
        "displacement_no_affine_px": rest,
        "displacement_no_affine_256": rest * scale,
        "log_jacobian_std": float(log_jacobian_std(ddf)),
        "log_jacobian_std_foreground": float(stretch.std(correction=0)) if stretch.numel() else None,
        "diversity": float(mean_displacement(ddf - other)) / (math.sqrt(2) * max(typical, 1e-6)),
    }


def measure_dice(
    scan: Scan, fields: list[Tensor], starts: list[Tensor], segmenter: Segmenter, classes: int
) -> dict[str, Any]:
    """Dice of the segmenter on the real image, and under every field and a random field of equal displacement."""

    def under(ddf: Tensor) -> list[float | None]:
        ddf = resize_ddf(ddf, scan.image.shape[2:])
        return dice(segmenter(warp(scan.image, ddf)), warp(scan.label, ddf, "nearest"), classes)

    rest = [[float(mean_displacement(remove_affine(one))) for one in several] for several in (fields, starts)]
    factors = [wanted / start for wanted, start in zip(*rest)]
    return {
        "dice_real": dice(segmenter(scan.image), scan.label, classes),
        "dice_deformed": [under(ddf) for ddf in fields],
        "dice_random": [under(factor * start) for factor, start in zip(factors, starts)],
    }


def measure(method: Method, domain: Domain, draw: Draw, level: float, segmenter: Segmenter) -> dict[str, Any]:
    """Measure everything for one image."""
    scan, seeds = draw.scan, (draw.seed, draw.partner)
    shape = (domain.field_size,) * domain.spatial_dims if domain.field_size else tuple(scan.image.shape[2:])
    image = resize_image(scan.image, shape)
    start = time.perf_counter()
    fields = [method.draw(image, level, seed) for seed in seeds]
    seconds = (time.perf_counter() - start) / len(seeds)
    label = warp(resize_nearest(scan.label, shape), fields[0], "nearest")
    starts = [random_field(image, level, seed) for seed in seeds]
    return {
        **measure_field(*fields, label),
        **measure_dice(scan, fields, starts, segmenter, domain.classes),
        "seconds": seconds,
    }


def run(path: Path, args: argparse.Namespace, domain: Domain) -> None:
    """Measure what ``path`` does not contain yet; every image goes through all methods before the next."""
    done = {tuple(row[key] for key in KEY) for row in read_rows(path)}
    every = [m for network in args.network for m in methods(network, args.sampler, args.steps)]
    if wrong := [m.network for m in every if m.model and m.model.network.spatial_dims != domain.spatial_dims]:
        raise SystemExit(f"{domain.name} is {domain.spatial_dims}D, these networks are not: {', '.join(wrong)}.")
    segmenter = load_segmenter(domain.name, args.cache)
    plan = {level: count for level, count in PLAN[domain.spatial_dims].items() if level in args.level}
    jobs = [
        (level, draw) for level, count in plan.items() for draw in _subset(draws(domain.name, args.split, count), args)
    ]
    for level, draw in tqdm(jobs, desc=domain.name, unit="image"):
        for method in every:
            base = {"domain": domain.name, "split": args.split, "level": level, "image": draw.scan.name}
            base |= {"seed": draw.seed, **method.columns}
            if tuple(base[key] for key in KEY) not in done:
                append_rows(path, base | measure(method, domain, draw, level, segmenter))


def _subset(every: list[Draw], args: argparse.Namespace) -> list[Draw]:
    """All images, or fewer that are evenly spread if ``--images`` is given."""
    count = min(args.images or len(every), len(every))
    return [every[round(k * (len(every) - 1) / max(count - 1, 1))] for k in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=[], help="registry names, .safetensors files, or random")
    parser.add_argument("--domain", nargs="+", choices=tuple(DOMAINS), default=[])
    parser.add_argument("--sampler", nargs="+", default=["auto"])
    parser.add_argument("--steps", nargs="+", type=int, default=[], help="recovery steps; default: the card's")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--level", nargs="+", type=float, default=[0.6, 0.8])
    parser.add_argument("--images", type=int, help="fewer images per level than the plan's")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of trained segmenters")
    parser.add_argument("--results", type=Path, help="JSON-lines file (default: gates_SPLIT.jsonl)")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--brief", action="store_true", help="only print the tables of README and docs")
    parser.add_argument("--threads", type=int, help="torch threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = args.results or Path(__file__).parent / f"gates_{args.split}.jsonl"
    if not args.table and not args.brief:
        if not args.network or not args.domain:
            parser.error("--network and --domain are needed, or --table")
        for name in args.domain:
            run(path, args, DOMAINS[name])
    published = read_rows(Path(__file__).parent / f"samplers_{args.split}.jsonl")
    if args.brief:
        print(brief(read_rows(path), published, read_rows(Path(__file__).parent / "rigid_control.jsonl")))
    else:
        print(tables(read_rows(path), published))


if __name__ == "__main__":
    main()
