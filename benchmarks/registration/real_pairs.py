"""Why does training on real pairs harm a network that learned from synthetic ones, and what helps?

A trained network goes on learning from pairs of different people's images, without labels or known fields, with
settings that differ in one thing. All variants begin at the same network, take as many steps, and register the same
validation pairs, once and twice, from the grid as it is and from an affine start.

    python benchmarks/registration/real_pairs.py train --work DIR --network RUN/network.safetensors --runs DIR
    python benchmarks/registration/real_pairs.py table

``--work`` is the folder of ``synthetic_pairs.py``. Rows are in ``real_pairs.jsonl``; what is
there is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import wilcoxon

from monai_drdm.fields import identity_grid, sample
from monai_drdm.registration import apply_affine, find_affine, load_registration, register
from monai_drdm.registration.data import ImageBank, PairBank
from monai_drdm.registration.task import RegistrationConfig, RegistrationTask
from monai_drdm.training.loop import run_task
from monai_drdm.training.task import Batch, DataSummary

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, read_rows
from judging import pairs_in, score_pair
from synthetic_pairs import prepare, SETS

PATH = Path(__file__).parent / "real_pairs.jsonl"
STEPS = 400
ROUNDS = (1, 2)
ALIGNED_PAIRS = 250
START = "before real pairs"
COMMON: dict[str, Any] = {
    "batch_size": 2,
    "epoch_length": 100,
    "ema_decay": 0.99,
    "warmup_steps": 50,
    "learning_rate": 3e-4,
    "folding_weight": 0.0,
}


class WholeGrid(RegistrationTask):
    """Also the padding of images counts, which extends them by their border values to one common grid."""

    def batch(self, *args: Any, **options: Any) -> Batch:
        """As ever, but all is inside."""
        batch = super().batch(*args, **options)
        return batch._replace(target=replace(batch.target, inside=torch.ones_like(batch.target.inside)))


class Aligned(RegistrationTask):
    """Moving images are brought near the fixed ones by an affine map beforehand; these are a fixed number of pairs."""

    def prepare(self, progress: bool) -> DataSummary:
        """Align pairs of images of the pool."""
        found = super().prepare(progress)
        assert isinstance(self.bank, ImageBank)
        generator = torch.Generator().manual_seed(self.config.seed)
        pairs = self.bank.draw(ALIGNED_PAIRS, generator).to(torch.device("cpu"))
        grid = identity_grid(pairs.fixed.shape[2:])[None]
        moved = [
            sample(moving, apply_affine(find_affine(moving, fixed), grid))
            for moving, fixed in zip(pairs.moving.split(1), pairs.fixed.split(1))
        ]
        pairs = replace(pairs, moving=torch.cat(moved), moving_label=None, fixed_label=None)
        self.bank = PairBank(pairs, tuple(map(str, range(ALIGNED_PAIRS))))
        return found


VARIANTS: dict[str, tuple[type[RegistrationTask], dict[str, Any]]] = {
    "whole grid, smoothness 0.1": (WholeGrid, {}),
    "smoothness 0.1": (RegistrationTask, {}),
    "smoothness 0.5": (RegistrationTask, {"smoothness_weight": 0.5}),
    "smoothness 2": (RegistrationTask, {"smoothness_weight": 2.0}),
    "affine start, smoothness 0.1": (Aligned, {}),
    "affine start, smoothness 0.5": (Aligned, {"smoothness_weight": 0.5}),
    "affine start, smoothness 2": (Aligned, {"smoothness_weight": 2.0}),
}
"""The first is how networks of the arm ``drdm-real`` in ``synthetic_pairs.py`` were trained."""


def run(name: str, variant: str, seed: int, steps: int, work: Path, network: Path, runs: Path) -> None:
    """Train a variant and judge it, unless its rows are there."""
    key = {"set": name, "variant": variant, "seed": seed, "steps": steps}
    if any(all(row[k] == v for k, v in key.items()) for row in read_rows(PATH)):
        return
    weights = network
    if variant != START:
        task, settings = VARIANTS[variant]
        out = runs / f"{name}-{variant.replace(' ', '_').replace(',', '')}-{steps}-{seed}"
        settings = COMMON | {"max_epochs": steps // COMMON["epoch_length"]} | settings
        images = str(work / name / "pool" / "images")
        config = RegistrationConfig(images=images, init=str(network), seed=seed, **settings)
        trained = run_task(task(config), out, resume=(out / "config.json").is_file())
        assert trained is not None
        weights = trained
    judge(name, key, work, weights)


def judge(name: str, key: dict[str, Any], work: Path, weights: Path) -> None:
    """Register the next validation image to every one."""
    network, rows = load_registration(weights), []
    for pair in pairs_in(work / name / "validation"):
        for affine in (False, True):
            for rounds in ROUNDS:
                method = partial(register, network, affine=affine, rounds=rounds)
                score = score_pair(method, pair, SETS[name].structures)
                row = key | {"affine": affine, "rounds": rounds, "pair": pair.name}
                rows.append(row | {"dice": score.dice, "hd95": score.hd95, "fold_fraction": score.fold_fraction})
    append_rows(PATH, *rows)


def _dice(rows: list[dict[str, Any]], variant: str, affine: bool, rounds: int) -> dict[int, dict[str, float]]:
    """Dice in % by seed and pair."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if (row["variant"], row["affine"], row["rounds"]) == (variant, affine, rounds):
            found.setdefault(row["seed"], {})[row["pair"]] = 100 * float(np.nanmean(row["dice"]))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of means over pairs and seeds, and what every variant adds to the network before it."""
    lines = ["| set | steps | trained on real pairs with | start | rounds | seeds | Dice % | "]
    lines[0] += "added | p (Wilcoxon) | folds % |"
    lines.append("|" + "---|" * 10)
    for name in dict.fromkeys(row["set"] for row in rows):
        ours = [row for row in rows if row["set"] == name]
        for affine in (False, True):
            for rounds in ROUNDS:
                before = _dice(ours, START, affine, rounds)
                for variant, steps in sorted({(r["variant"], r["steps"]) for r in ours}, key=_order):
                    mine = [row for row in ours if (row["variant"], row["steps"]) == (variant, steps)]
                    found = _dice(mine, variant, affine, rounds)
                    means = [float(np.mean(list(one.values()))) for one in found.values()]
                    by_pair = {pair: float(np.mean([one[pair] for one in found.values()])) for pair in before[0]}
                    apart = [value - before[0][pair] for pair, value in by_pair.items()]
                    p = "" if variant == START else f"{wilcoxon(apart).pvalue:.2g}"
                    added = "" if variant == START else f"{np.mean(apart):+.1f}"
                    same = [r for r in mine if (r["affine"], r["rounds"]) == (affine, rounds)]
                    folds = 100 * float(np.mean([r["fold_fraction"] for r in same]))
                    spread = f" ± {np.std(means, ddof=1):.1f}" if len(means) > 1 else ""
                    lines.append(
                        f"| {name} | {steps or ''} | {variant} | {'affine' if affine else 'as it is'} | {rounds} "
                        f"| {len(means)} | {np.mean(means):.1f}{spread} | {added} | {p} | {folds:.3f} |"
                    )
    return "\n".join(lines)


def _order(key: tuple[str, int]) -> tuple[int, int]:
    return key[1], [START, *VARIANTS].index(key[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "table"))
    parser.add_argument("--set", choices=tuple(SETS), default="hippocampus")
    parser.add_argument("--work", type=Path, default=Path("synthetic_registration"), help="folder of the images")
    parser.add_argument("--network", type=Path, help="network.safetensors to begin with")
    parser.add_argument("--runs", type=Path, default=Path("real_pairs"), help="folder for the runs")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    if args.what == "table":
        print(table(read_rows(PATH)))
        return
    if args.network is None:
        parser.error("train needs --network.")
    torch.set_num_threads(1)
    prepare(args.set, args.work)
    run(args.set, START, 0, 0, args.work, args.network, args.runs)
    for seed in args.seeds:
        for variant in args.variants:
            run(args.set, variant, seed, args.steps, args.work, args.network, args.runs)


if __name__ == "__main__":
    main()
