"""Are deformed brains as symmetric as those of real people?

Two measures of every brain. *Mirror Dice*: how well its label map agrees with its own mirror image after the affine map
that brings both images closest, as a mean over structures; an affine map takes out pose and shear, but it cannot make
unequal halves equal. *Larger half*: the volume of the larger half over that of the smaller, where the halves are those
of the original, carried along by the field. The yardstick is the spread of the originals themselves.

    python benchmarks/plausibility/symmetry.py --split test
    python benchmarks/plausibility/symmetry.py --table
    python benchmarks/plausibility/symmetry.py --images    # which images count as symmetric, and what that costs

Fields at several levels: of the network in this package; of the same without keeping symmetry (``symmetry=0``); and the
random fields that it starts from, made as strong as the network's by scaling. At one level also of the network with
half the recovery, with and without keeping symmetry. Rows are in ``symmetry.jsonl``; what is there is not measured
again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion import DRDM
from monai_drdm.diffusion.symmetry import find_mirror
from monai_drdm.fields import fold_fraction, identity_grid, resize_image, sample, warp
from monai_drdm.metrics import mean_displacement, remove_affine
from monai_drdm.networks import auto_network, load_network, network_sha256
from monai_drdm.registration import apply_affine, find_affine, unit_range

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.labels import dice
from common.rows import append_rows, machine, read_rows
from common.scans import DOMAINS, draws, Scan, scans
from front_picture import larger_half

PATH = Path(__file__).parent / "symmetry.jsonl"
KEY = ("split", "scan", "network", "kind", "level", "seed")
LEVELS = (0.3, 0.6, 0.8)
HALF, LEVEL_OF_HALF = 0.5, 0.6
"""Recovery below 1, and the level at which it is measured."""
STRUCTURES = 12
LEFT_TO_RIGHT = 0
"""Axis of the scans."""


def mirror_dice(image: Tensor, label: Tensor) -> float:
    """Mean Dice over structures of a label map ``(1, 1, *S)`` and its mirror image, brought onto it."""
    here = unit_range(image[0])[None]
    there, marks = (one.flip(LEFT_TO_RIGHT + 2) for one in (here, label))
    where = apply_affine(find_affine(there, here), identity_grid(image.shape[2:])[None])
    found = dice(sample(marks, where, "nearest", "zeros"), label, STRUCTURES)
    return float(np.mean([one for one in found if one is not None]))


def fields(model: DRDM, scan: Scan, draws: int) -> Iterator[tuple[str, float, int, Callable[[], Tensor]]]:
    """Kind, level, seed and field, not drawn yet, of everything that is compared on one scan."""
    models = {"network": model, "network, symmetry=0": DRDM(model.network, symmetry=0.0)}
    halves = {
        f"{kind}, recovery={HALF}": DRDM(model.network, recovery=HALF, symmetry=one.symmetry)
        for kind, one in models.items()
    }

    def random(level: float, seed: int) -> Tensor:
        ours, ddf = model.sample(scan.image, level, [seed]), model.diffuse(scan.image.shape[2:], [level], [seed])
        return ddf * float(mean_displacement(remove_affine(ours)) / mean_displacement(remove_affine(ddf)))

    for level in LEVELS:
        for seed in range(draws):
            for kind, one in (models | halves if level == LEVEL_OF_HALF else models).items():
                yield kind, level, seed, partial(one.sample, scan.image, level, [seed])
            yield "random", level, seed, partial(random, level, seed)


def measure(split: str, network: str, draws: int) -> None:
    """Write the rows of every scan that are not there."""
    model = DRDM(load_network(network))
    weights = network_sha256(model.network)[:8]
    there = {tuple(row[name] for name in KEY) for row in read_rows(PATH)}
    for scan in tqdm(scans("ixi3d", split)):
        key: dict[str, Any] = {"split": split, "scan": scan.name, "network": weights}
        if (*key.values(), "original", 0.0, 0) not in there:
            still = mirror_dice(scan.image, scan.label), larger_half(scan.label, None, LEFT_TO_RIGHT)
            row = key | {"kind": "original", "level": 0.0, "seed": 0} | dict(zip(("mirror", "half"), still))
            append_rows(PATH, row | machine())
        for kind, level, seed, draw in fields(model, scan, draws):
            if (*key.values(), kind, level, seed) in there:
                continue
            ddf = draw()
            found = {
                "mirror": mirror_dice(warp(scan.image, ddf), warp(scan.label, ddf, "nearest")),
                "half": larger_half(scan.label, ddf, LEFT_TO_RIGHT),
                "displacement_vox": float(mean_displacement(remove_affine(ddf))),
                "folds": float(fold_fraction(ddf)),
            }
            append_rows(PATH, key | {"kind": kind, "level": level, "seed": seed} | found | machine())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of means over brains and draws."""
    lines = ["| network | split | fields | level | n | mirror Dice % | larger half | largest | voxels without affine |"]
    lines.append("|" + "---|" * 9)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["split"], row["kind"], row["level"]), []).append(row)
    for (weights, split, kind, level), found in groups.items():
        mirror, half = (np.array([row[name] for row in found]) for name in ("mirror", "half"))
        cells = [weights, split, kind, f"{level:g}" if level else "–", str(len(found)), _spread(100 * mirror, 1)]
        cells += [_spread(half, 3), f"{half.max():.3f}"]
        cells.append(f"{np.mean([row['displacement_vox'] for row in found]):.2f}" if level else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\nmean ± standard deviation over brains and draws"


def _spread(values: np.ndarray, digits: int) -> str:
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def kinds_of_images() -> str:
    """Markdown: how many test images of every kind count as symmetric, and how much longer a draw takes."""
    lines = ["| images | n | wholly symmetric | in part | time of a draw, beside `symmetry=0` |", "|" + "---|" * 5]
    for domain in DOMAINS.values():
        images = {one.scan.name: one.scan.image for one in draws(domain.name, "test", 50)}
        model = DRDM(load_network(auto_network(domain.spatial_dims)))
        found = []
        for image in images.values():
            shape = (domain.field_size,) * domain.spatial_dims if domain.field_size else image.shape[2:]
            found.append(float(find_mirror(unit_range(resize_image(image, shape)[0])[None]).weight))
        some = list(images.values())[:3]
        ratio = np.median([_seconds(model, one) / _seconds(DRDM(model.network, symmetry=0.0), one) for one in some * 3])
        partly = sum(0 < one < 1 for one in found)
        lines.append(f"| {domain.name} | {len(found)} | {found.count(1.0)} | {partly} | {ratio:.2f} |")
    return "\n".join(lines)


def _seconds(model: DRDM, image: Tensor) -> float:
    start = time.process_time()
    model.sample(image, 0.6, [0])
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--network", default="anatomy-3d", help="name or safetensors file of a 3D network")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the rows that are there")
    parser.add_argument("--images", action="store_true", help="print which kinds of images count as symmetric")
    args = parser.parse_args()
    if args.images:
        torch.set_num_threads(1)
        print(kinds_of_images())
        return
    if args.table:
        print(table(read_rows(PATH)))
        return
    torch.set_num_threads(1)
    measure(args.split, args.network, args.draws)


if __name__ == "__main__":
    main()
