"""What do an affine start and refinement on the pair add, to a network and to methods without one?

Pairs of scans as in ``synthetic_pairs.py``, whose folders this script shares. All methods get the same images; with
``affine`` they begin from the same affine map. With ``masks``, they compare only what is in the foreground of the
images, as the same masks say, and all begin from the affine map between what the masks enclose.

    python benchmarks/registration/stages.py --set hippocampus --work DIR --network registration-3d
    python benchmarks/registration/stages.py --table
    python benchmarks/registration/stages.py --figure docs/images/registration_time.png

Rows are in ``stages.jsonl``; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import wilcoxon
from torch import nn, Tensor

from monai_drdm.fields import identity_grid, sample
from monai_drdm.registration import (
    alignment,
    apply_affine,
    load_registration,
    refinement,
    register,
)
from monai_drdm.registration.registry import registration_file
from monai_drdm.registration.similarity import LocalCorrelation

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from baselines import affine, affine_start, bspline, demons, foreground, Masks, nothing, syn
from common.rows import append_rows, read_rows
from judging import pairs_in, score_pair
from synthetic_pairs import prepare, SETS

PATH = Path(__file__).parent / "stages.jsonl"
Method = Callable[..., Tensor]
"""Takes the moving and the fixed image, and their ``masks`` or None."""
MASKED = ", masks"
STEPS = (6, 12, 30, 60)
BY_OTHERS: dict[str, Method] = {"demons": demons, "B-splines": bspline, "SyN": syn}
ORDER = ("nothing", "affine", f"affine{MASKED}", "SimpleITK's affine", f"SimpleITK's affine{MASKED}", "demons")
ORDER += tuple(f"affine, {name}{end}" for name in BY_OTHERS for end in ("", MASKED))
ORDER += (
    "affine, refine 6",
    "affine, refine 12",
    "affine, refine 30, one grid",
    "affine, refine 30",
    f"affine{MASKED}, refine 30",
    f"affine, refine 30{MASKED}",
    "affine, refine 60",
    "network",
    "affine, network",
)
ORDER += tuple(f"affine, network, refine {n}" for n in STEPS)
MEASURES = ("dice", "hd95", "fold_fraction", "seconds")
_OTHERS = ("demons", "affine, demons", "affine, SyN")
COMPARED: dict[str, tuple[str, ...]] = {
    "affine, refine 6": _OTHERS,
    "affine, refine 12": _OTHERS,
    "affine, refine 30": (*_OTHERS, "affine, refine 30, one grid"),
    "affine, network": ("demons", "affine, refine 6"),
    **{f"affine, network, refine {n}": (f"affine, refine {n}",) for n in STEPS},
}
"""What is compared with what, pair by pair."""
TITLES = {"ixi": "brains at 4 mm", "hippocampus": "hippocampi at 1 mm", "ixi-2mm": "brains at 2 mm"}
FIGURE: dict[str, tuple[str, tuple[str, ...]]] = {
    "affine map, then refinement in 6, 12, 30, 60 steps": (
        "o-",
        ("affine", *(f"affine, refine {n}" for n in STEPS)),
    ),
    "affine map and network, then 6, 12, 30, 60 steps": (
        "^-",
        ("affine, network", *(f"affine, network, refine {n}" for n in STEPS)),
    ),
    "SimpleITK's demons": ("s", ("demons",)),
    "affine map and demons": ("D", ("affine, demons",)),
    "affine map and ANTs' SyN": ("v", ("affine, SyN",)),
}
"""What the figure shows, and how."""


def after_affine(method: Method) -> Method:
    """A method that gets the moving image as the affine map shows it; its field and the map become one field."""

    def run(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
        grid, matrix = identity_grid(fixed.shape[2:])[None], affine_start(moving, fixed, masks)
        at = apply_affine(matrix, grid)
        if masks is not None:
            masks = (sample(masks[0].float(), at, padding_mode="zeros") > 0.5, masks[1])
        ddf = method(sample(moving, at), fixed, masks)
        return apply_affine(matrix, grid + ddf) - grid

    return run


def by_network(network: nn.Module | None, **stages: Any) -> Method:
    return lambda moving, fixed, masks=None: register(network, moving, fixed, **stages)


class WithinMask(LocalCorrelation):
    """The mean over a mask."""

    def __init__(self, mask: Tensor, fixed: Tensor, window: int) -> None:
        super().__init__(fixed, window)
        self.mask = mask.float()

    def mean(self, moved: Tensor, seen: Tensor) -> Tensor:
        """Whatever is seen."""
        return (self(moved) * self.mask).sum() / self.mask.sum()


def refined_on_one_grid(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
    """Affine map and refinement on the finest grid alone, with the wider window that suits it better."""
    with patch.object(refinement, "_grids", lambda _: [2]), patch.object(refinement, "_WINDOW", 7):
        return register(None, moving, fixed, affine=True, refine=30)


def refined_with_masks(similarity: bool) -> Method:
    """Affine map and refinement as if the package knew masks: for the affine map and, if asked, for the refinement."""

    def run(moving: Tensor, fixed: Tensor, masks: Masks) -> Tensor:
        likeness = partial(WithinMask, masks[1]) if similarity else LocalCorrelation
        with (
            patch.object(alignment, "find_affine", lambda *_: affine_start(moving, fixed, masks)),
            patch.object(refinement, "LocalCorrelation", likeness),
        ):
            return register(None, moving, fixed, affine=True, refine=30)

    return run


def methods(weights: str | None) -> dict[str, Method]:
    """All that are compared, by name."""
    found = {
        "nothing": nothing,
        "affine": by_network(None, affine=True),
        "SimpleITK's affine": affine,
        "demons": demons,
        **{f"affine, {name}": after_affine(method) for name, method in BY_OTHERS.items()},
        "affine, refine 30, one grid": refined_on_one_grid,
        **{f"affine, refine {n}": by_network(None, affine=True, refine=n) for n in STEPS},
    }
    if weights is not None:
        network = load_registration(weights)
        found |= {
            "network": by_network(network),
            "affine, network": by_network(network, affine=True),
            **{f"affine, network, refine {n}": by_network(network, affine=True, refine=n) for n in STEPS},
        }
    masked = ("SimpleITK's affine", *(f"affine, {name}" for name in BY_OTHERS))
    found |= {f"{key}{MASKED}": found[key] for key in masked}
    found[f"affine{MASKED}"] = after_affine(nothing)
    found[f"affine{MASKED}, refine 30"] = refined_with_masks(similarity=False)
    return found | {f"affine, refine 30{MASKED}": refined_with_masks(similarity=True)}


def measure(name: str, split: str, work: Path, weights: str | None, chosen: list[str], count: int) -> None:
    """Register the next image of a split to every one, by each method whose rows are not there."""
    there = {(row["set"], row["split"], row["method"], row["pair"]) for row in read_rows(PATH)}
    digest = "" if weights is None else hashlib.sha256(registration_file(weights).read_bytes()).hexdigest()
    known = methods(weights)
    for pair in pairs_in(work / name / split, count):
        images = pair.images
        masks = foreground(images.moving, pair.moving_inside), foreground(images.fixed, images.inside)
        for key, method in known.items():
            if (chosen and key not in chosen) or (name, split, key, pair.name) in there:
                continue
            began = time.process_time()
            method = partial(method, masks=masks if MASKED in key else None)
            score = score_pair(method, pair, SETS[name].structures)
            row = {
                "set": name,
                "split": split,
                "method": key,
                "pair": pair.name,
                "cpu_s": time.process_time() - began,
            } | ({"network": digest} if "network" in key else {})
            append_rows(PATH, row | {measure: getattr(score, measure) for measure in MEASURES})


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of means over pairs."""
    lines = ["| set | split | method | pairs | Dice % | HD95 vox | folds % | seconds of a core |", "|" + "---|" * 8]
    for name, split in dict.fromkeys((row["set"], row["split"]) for row in rows):
        for key in sorted({row["method"] for row in rows}, key=ORDER.index):
            mine = [row for row in rows if (row["set"], row["split"], row["method"]) == (name, split, key)]
            if mine:
                dice = [100 * np.nanmean(row["dice"]) for row in mine]
                hd95 = np.nanmean([np.nanmean(row["hd95"]) for row in mine])
                folds = 100 * np.mean([row["fold_fraction"] for row in mine])
                seconds = np.median([row["cpu_s"] for row in mine])
                lines.append(
                    f"| {name} | {split} | {key} | {len(mine)} | {np.mean(dice):.1f} ± {np.std(dice, ddof=1):.1f} "
                    f"| {hd95:.2f} | {folds:.3f} | {seconds:.1f} |"
                )
    return "\n".join(lines)


def comparison(rows: list[dict[str, Any]]) -> str:
    """Markdown table of differences on the same test pairs, and Wilcoxon's test of them."""
    lines = ["| set | method | minus | pairs | Dice points | p (Wilcoxon) |", "|" + "---|" * 6]
    for name in dict.fromkeys(row["set"] for row in rows if row["split"] == "test"):
        found: dict[str, dict[str, float]] = {}
        for row in rows:
            if (row["set"], row["split"]) == (name, "test"):
                found.setdefault(row["method"], {})[row["pair"]] = 100 * float(np.nanmean(row["dice"]))
        for method, others in COMPARED.items():
            for other in others:
                ours, theirs = found.get(method, {}), found.get(other, {})
                points = [value - theirs[pair] for pair, value in ours.items() if pair in theirs]
                if points:
                    p = float(wilcoxon(points).pvalue)
                    lines.append(f"| {name} | {method} | {other} | {len(points)} | {np.mean(points):+.2f} | {p:.2g} |")
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Mean Dice of test pairs against the time of a core, a panel a set; bars are standard errors over pairs."""
    tested = [row for row in rows if row["split"] == "test"]
    names = list(dict.fromkeys(row["set"] for row in tested))
    drawn = Figure(figsize=(4.3 * len(names), 3.9), layout="constrained")
    for name, axes in zip(names, drawn.subplots(1, len(names), squeeze=False)[0]):
        for number, (label, (style, shown)) in enumerate(FIGURE.items()):
            points = [
                (np.median([row["cpu_s"] for row in mine]), np.mean(dice), np.std(dice, ddof=1) / len(dice) ** 0.5)
                for method in shown
                if (mine := [row for row in tested if (row["set"], row["method"]) == (name, method)])
                and (dice := [100 * float(np.nanmean(row["dice"])) for row in mine])
            ]
            if points:
                seconds, means, errors = zip(*points)
                axes.errorbar(
                    seconds, means, errors, fmt=style, color=f"C{number}", label=label, ms=6, lw=1.2, capsize=2
                )
        axes.set(
            xscale="log", title=TITLES[name], xlabel="seconds of a core for a pair", ylabel="Dice of test pairs, %"
        )
        low, high = axes.get_xlim()
        axes.set_xticks(ticks := [t for t in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if low < t < high])
        axes.set_xticklabels([f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = drawn.axes[0].get_legend_handles_labels()
    drawn.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=tuple(SETS), default="hippocampus")
    parser.add_argument(
        "--work", type=Path, default=Path("synthetic_registration"), help="folder of synthetic_pairs.py"
    )
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--network", help="name of a network, or network.safetensors")
    parser.add_argument("--methods", nargs="+", default=[], help="default: all")
    parser.add_argument("--pairs", type=int, default=1000, help="of the split, at most")
    parser.add_argument("--table", action="store_true", help="print the rows that are there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rows that are there and stop")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(PATH)), comparison(read_rows(PATH)), sep="\n\n")
        return
    if args.figure:
        figure(read_rows(PATH)).savefig(args.figure, dpi=130)
        return
    torch.set_num_threads(1)
    prepare(args.set, args.work)
    measure(args.set, args.split, args.work, args.network, args.methods, args.pairs)


if __name__ == "__main__":
    main()
