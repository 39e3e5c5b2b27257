"""Which settings let a registration network learn most in equal time?

Every variant trains for as many minutes on the same images, one after the other on one thread, and registers validation
pairs from the same affine start, once and twice. What is best in minutes deserves hours: ``--variants`` and
``--minutes`` say what is trained for how long. Runs that were stopped go on.

    python benchmarks/registration/recipe_search.py --set hippocampus --work DIR --minutes 5
    python benchmarks/registration/recipe_search.py --table

Rows are in ``recipe_search.jsonl``; what is there is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from monai_drdm.registration import load_registration, register
from monai_drdm.registration.task import fit, RegistrationConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, read_rows
from judging import pairs_in, score_pair
from synthetic_pairs import prepare, SETS

PATH = Path(__file__).parent / "recipe_search.jsonl"
ROUNDS = (1, 2)
BASE: dict[str, Any] = {
    "network": "pyramid",
    "affine": True,
    "learning_rate": 2e-3,
    "similarity_window": 5,
    "similarity_scales": (1, 2, 4),
    "smoothness_weight": 1.0,
    "folding_weight": 0.1,
    "batch_size": 2,
    "epoch_length": 50,
    "ema_decay": 0.99,
    "warmup_steps": 20,
    "validation_share": 0.05,
}
"""Real pairs, which an affine map has brought near each other, without labels."""
_DRAWN = {"affine": False, "drawn_level": 1.0, "smoothness_weight": 0.1, "folding_weight": 0.0}
_ALIGNER = {"network": "aligner", "channels": 8, "diffeomorphic": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "pyramid": {},
    "voxelmorph": {"network": "voxelmorph"},
    "aligner q = 0": _ALIGNER | {"pool_sizes": (16, 8, 4, 2, 1), "dilations": (1, 1, 1, 1, 1)},
    "aligner q = 3": _ALIGNER,
    "pyramid, images only": {"forces": False},
    "voxelmorph, images only": {"network": "voxelmorph", "forces": False},
    "pyramid, known pairs": _DRAWN,
    "voxelmorph, known pairs": _DRAWN | {"network": "voxelmorph"},
    "pyramid, compared on one grid": {"similarity_scales": (1,), "similarity_window": 9},
    "pyramid, smoothness 0.5": {"smoothness_weight": 0.5},
    "pyramid, smoothness 2": {"smoothness_weight": 2.0},
    "pyramid, learning rate 1e-3": {"learning_rate": 1e-3},
    "pyramid, learning rate 4e-3": {"learning_rate": 4e-3},
    "pyramid, batch 1": {"batch_size": 1},
    "pyramid, 24 channels": {"channels": 24},
    "pyramid, depth 2": {"depth": 2},
    "pyramid, full grid": {"stride": 1},
}
"""What differs from ``BASE``."""
WITHOUT = {"no network: affine map": 0, "no network: affine map and 6 steps": 6}
"""What is not trained, and its steps of refinement."""


def train(name: str, work: Path, variant: str, minutes: float, seed: int) -> Path:
    """Train a variant, or go on with its run; the weights file."""
    folder = work / name
    out = folder / f"recipe-{variant.replace(' ', '_').replace(',', '')}-{minutes:g}-{seed}"
    images, settings = str(folder / "pool" / "images"), BASE | VARIANTS[variant]
    config = RegistrationConfig(images=images, seed=seed, max_minutes=minutes, **settings)
    weights = fit(config, out, resume=(out / "config.json").is_file())
    assert weights is not None
    return weights


def run(name: str, work: Path, variant: str, minutes: float, seed: int) -> None:
    """Train a variant and judge it on validation pairs, unless its rows are there."""
    minutes = 0.0 if variant in WITHOUT else minutes
    key = {"set": name, "variant": variant, "minutes": minutes, "seed": seed}
    if any(all(row[k] == v for k, v in key.items()) for row in read_rows(PATH)):
        return
    network = None if variant in WITHOUT else load_registration(train(name, work, variant, minutes, seed))
    for rounds in (1,) if network is None else ROUNDS:
        method = partial(register, network, affine=True, rounds=rounds, refine=WITHOUT.get(variant, 0))
        scores = [score_pair(method, pair, SETS[name].structures) for pair in pairs_in(work / name / "validation")]
        measures = [(float(np.nanmean(score.dice)), score.fold_fraction, score.seconds) for score in scores]
        dice, folds, seconds = np.mean(measures, axis=0)
        append_rows(PATH, key | {"rounds": rounds, "dice": dice, "fold_fraction": folds, "seconds": seconds})


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table, the best first."""
    lines = ["| set | minutes | variant | Dice %, once | Dice %, twice | folds % |", "|" + "---|" * 6]
    runs: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["set"], row["minutes"], row["variant"], row["seed"]), {})[row["rounds"]] = row
    for (name, minutes, variant, _), found in sorted(runs.items(), key=lambda one: (one[0][0], -one[1][1]["dice"])):
        once, twice = (f"{100 * found[n]['dice']:.1f}" if n in found else "" for n in ROUNDS)
        folds = 100 * found[1]["fold_fraction"]
        lines.append(f"| {name} | {minutes or '–'} | {variant} | {once} | {twice} | {folds:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=tuple(SETS), default="hippocampus")
    parser.add_argument(
        "--work", type=Path, default=Path("synthetic_registration"), help="folder of synthetic_pairs.py"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, for every variant")
    parser.add_argument("--variants", nargs="+", choices=(*VARIANTS, *WITHOUT), default=[*VARIANTS, *WITHOUT])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--table", action="store_true", help="print the rows that are there")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(PATH)))
        return
    torch.set_num_threads(1)
    prepare(args.set, args.work)
    for seed in args.seeds:
        for variant in args.variants:
            run(args.set, args.work, variant, args.minutes, seed)


if __name__ == "__main__":
    main()
