"""Does the motion-separable structure keep apart what slides?

Two blocks touch and slide past each other: the field between both images is known, and jumps where the blocks meet.
Networks with about as many weights learn from such pairs, drawn anew in every step, and are judged on pairs that none
has seen: the residual aligner with the structures q = 0 (a classical pyramid), 3 and 4, and VoxelMorph, which is
quicker and so also gets eight times the steps. They see the images and the forces of demons on the full grid, and
predict the field itself.

    python benchmarks/registration/sliding.py train              # about 20 minutes on one thread
    python benchmarks/registration/sliding.py cost               # weights, seconds and memory of the networks in 3D
    python benchmarks/registration/sliding.py table
    python benchmarks/registration/sliding.py figure --out docs/images/sliding.png

Rows are in ``sliding.jsonl``; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from monai_drdm.fields import fold_fraction, gaussian_smooth, warp
from monai_drdm.registration import motion_separability, RegistrationNetwork, SEPARABLE_STRUCTURES
from monai_drdm.registration.networks import Structure

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, read_rows

PATH = Path(__file__).parent / "sliding.jsonl"
SIZE = 48
STEPS, BATCH, RATE, WARMUP = 250, 2, 3e-3, 25
COMMON, APART = 2.0, (1.5, 4.0)
"""Voxels: both blocks move by up to the first together, and by this much each in opposite directions."""
NEAR = 3
"""Half the width in voxels of the band around the interface in which errors are counted apart."""
DISTANCES = (1, 2, 3, 4, 6, 8, 12)
PROFILE = 12
JUDGED = 32
LONGER = "voxelmorph, 8 times the steps"
NETWORKS = ("voxelmorph", LONGER, "q = 0", "q = 3", "q = 4")


class Pairs(NamedTuple):
    """Pairs of images of two blocks."""

    images: Tensor
    """``(B, 2, H, W)``: moving and fixed."""
    ddf: Tensor
    """``(B, 2, H, W)`` voxels."""
    regions: Tensor
    """``(B, 1, H, W)``: 1 left of the interface, 2 right of it."""


def draw(count: int, generator: torch.Generator, turn: bool = False) -> Pairs:
    """Blocks with texture of their own, which slide along the line between them; ``turn``: half the time turned."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator).view(-1, 1, 1, 1)

    def texture(width: float) -> Tensor:
        values = gaussian_smooth(torch.randn(count, 1, SIZE, SIZE, generator=generator), width)
        return values / values.flatten(1).std(dim=1).view(-1, 1, 1, 1)

    at = uniform(0.35 * SIZE, 0.65 * SIZE).round()
    right = (torch.arange(SIZE).view(1, 1, 1, -1) >= at).expand(-1, -1, SIZE, -1)
    together, apart = uniform(-COMMON, COMMON), uniform(*APART) * uniform(-1, 1).sign()
    ddf = torch.zeros(count, 2, SIZE, SIZE)
    ddf[:, :1] = torch.where(right, together - apart, together + apart)
    blocks = [uniform(0.25, 0.75) + 0.1 * texture(1.5) + 0.05 * texture(4.0) for _ in range(2)]
    moving, fixed = (torch.where(right, *sides) for sides in (blocks, [warp(one, ddf) for one in blocks]))
    pairs = Pairs(torch.cat([moving, fixed], dim=1).clamp(0, 1), ddf, 1 + right.to(torch.uint8))
    if turn and torch.rand(1, generator=generator) < 0.5:
        return Pairs(pairs.images.mT, ddf.flip(1).mT, pairs.regions.mT)
    return pairs


def build(name: str, dims: int = 2, channels: int = 8) -> RegistrationNetwork:
    """A network on the full grid; VoxelMorph gets about as many weights as the aligners have."""
    plain = {"diffeomorphic": False, "stride": 1, "forces": True}
    if name.startswith("voxelmorph"):
        return RegistrationNetwork(Structure("voxelmorph", dims, 24, 4, **plain))
    pools, dilations = SEPARABLE_STRUCTURES[int(name[-1])]
    return RegistrationNetwork(Structure("aligner", dims, channels, 3, pool_sizes=pools, dilations=dilations, **plain))


def train(name: str, seed: int, steps: int) -> RegistrationNetwork:
    """Learn the known fields of pairs that are drawn in every step: the same ones for all networks of a seed."""
    torch.manual_seed(seed)
    network = build(name).train()
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=WARMUP / steps)
    for _ in range(steps):
        pairs = draw(BATCH, generator, turn=True)
        loss = (network(pairs.images) - pairs.ddf).norm(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def judge(network: RegistrationNetwork) -> dict[str, Any]:
    """Errors, separability and the profile across the interface, on pairs that are always the same."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(JUDGED // BATCH):
        pairs = draw(BATCH, generator)
        predicted = network(pairs.images)
        found += [_judge_pair(predicted[i : i + 1], Pairs(*(one[i : i + 1] for one in pairs))) for i in range(BATCH)]
    return {key: np.mean([one[key] for one in found], axis=0).tolist() for key in found[0]}


def _judge_pair(predicted: Tensor, pairs: Pairs) -> dict[str, Any]:
    at = int((pairs.regions[0, 0, 0] == 1).sum())
    apart = (predicted - pairs.ddf).norm(dim=1)[0]
    true, made = (motion_separability(one, DISTANCES, regions=pairs.regions)[0] for one in (pairs.ddf, predicted))
    left, right = float(pairs.ddf[0, 0, 0, 0]), float(pairs.ddf[0, 0, 0, -1])
    across = (predicted[0, 0, :, at - PROFILE : at + PROFILE].median(dim=0).values - left) / (right - left)
    return {
        "error_vox": float(apart.mean()),
        "error_near_vox": float(apart[:, at - NEAR : at + NEAR].mean()),
        "error_of_doing_nothing_vox": float(pairs.ddf.norm(dim=1).mean()),
        "separability": (made / true).tolist(),
        "profile": across.tolist(),
        "fold_percent": 100 * float(fold_fraction(predicted)[0]),
    }


def run(steps: int, seeds: list[int], networks: Sequence[str]) -> None:
    """Train and judge every network with every seed, unless its row is there."""
    for seed in seeds:
        for name in networks:
            if any((r.get("network"), r.get("seed"), r.get("steps")) == (name, seed, steps) for r in read_rows(PATH)):
                continue
            began = time.process_time()
            network = train(name, seed, 8 * steps if name == LONGER else steps)
            weights = sum(one.numel() for one in network.parameters())
            row = {"network": name, "seed": seed, "steps": steps, "weights": weights}
            append_rows(PATH, row | {"cpu_s": time.process_time() - began} | judge(network))


def cost(size: int = 48) -> None:
    """Weights, seconds and memory of the networks in 3D, each in a process of its own."""
    for name in (one for one in NETWORKS if one != LONGER):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            append_rows(PATH, pool.apply(_cost, (name, size)))


def _cost(name: str, size: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    network, images = build(name, 3).train(), torch.rand(1, 2, size, size, size)
    before = _peak_mb()
    with torch.no_grad():
        seconds = min(_seconds(lambda: network(images)) for _ in range(3))
    used = _peak_mb() - before
    step = _seconds(lambda: network(images).square().mean().backward())
    return {
        "cost": name,
        "size": size,
        "weights": sum(one.numel() for one in network.parameters()),
        "seconds": seconds,
        "memory_mb": used,
        "step_seconds": step,
        "step_memory_mb": _peak_mb() - before,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _seconds(call: Any) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of what was judged, as means over seeds ± standard deviation, and of costs."""
    columns = (
        "network",
        "steps",
        "weights",
        "s of a core",
        "seeds",
        "error, voxels",
        "within 3 voxels of the interface",
    )
    columns = (*columns, "separability at 1 voxel", "at 4 voxels", "folds %")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    judged, costs = [r for r in rows if "network" in r], [r for r in rows if "cost" in r]
    for name, steps in sorted({(r["network"], r["steps"]) for r in judged}, key=lambda k: (k[1], NETWORKS.index(k[0]))):
        mine = [r for r in judged if (r["network"], r["steps"]) == (name, steps)]

        def shown(values: list[float], digits: int = 2) -> str:
            return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"

        share = [[100 * r["separability"][DISTANCES.index(p)] for r in mine] for p in (1, 4)]
        seconds, folds = (np.mean([r[key] for r in mine]) for key in ("cpu_s", "fold_percent"))
        taken, weights = steps * (8 if name == LONGER else 1), mine[0]["weights"]
        errors = [shown([r[key] for r in mine]) for key in ("error_vox", "error_near_vox")]
        lines.append(
            f"| {name} | {taken} | {weights:,} | {seconds:.0f} | {len(mine)} | {' | '.join(errors)} | "
            f"{shown(share[0], 0)} % | {shown(share[1], 0)} % | {folds:.2f} |"
        )
    lines += ["", "| network, 48³ | weights | seconds | memory, MB | a training step, s | MB |", "|" + "---|" * 6]
    for r in costs:
        lines.append(
            f"| {r['cost']} | {r['weights']:,} | {r['seconds']:.2f} | {r['memory_mb']:.0f} | {r['step_seconds']:.2f} | "
            f"{r['step_memory_mb']:.0f} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict[str, Any]]) -> Figure:
    """A pair, the motion across the interface, and the separability beside the true one, after ``STEPS``."""
    rows = [r for r in rows if r.get("steps") == STEPS]
    drawn = Figure(figsize=(12.0, 4.0), layout="constrained", facecolor="white")
    image, profile, separable = drawn.subplots(1, 3, width_ratios=(1.0, 1.4, 1.4))
    pairs = draw(1, torch.Generator().manual_seed(5))
    at = int((pairs.regions[0, 0, 0] == 1).sum())
    image.imshow(pairs.images[0, 1], cmap="gray", origin="lower")
    image.axvline(at - 0.5, color="C3", lw=1)
    for x, sign in ((at - 10, 1), (at + 10, -1)):
        image.annotate(
            "", (x, 24 + 8 * sign), (x, 24 - 8 * sign), arrowprops={"arrowstyle": "->", "color": "C1", "lw": 2}
        )
    image.set(title="two blocks that slide", xticks=[], yticks=[])
    where = np.arange(-PROFILE, PROFILE) + 0.5
    profile.step(where, where > 0, where="mid", color="0.2", lw=1.5, label="true")
    for number, name in enumerate(NETWORKS):
        mine = [r for r in rows if r.get("network") == name]
        if not mine:
            continue
        color = ("0.65", "0.45", "C0", "C1", "C3")[number]
        profile.plot(where, np.mean([r["profile"] for r in mine], axis=0), color=color, label=name, marker=".", ms=4)
        shares = 100 * np.array([r["separability"] for r in mine])
        separable.plot(DISTANCES, shares.mean(axis=0), color=color, marker=".", label=name)
        separable.fill_between(DISTANCES, shares.min(axis=0), shares.max(axis=0), color=color, alpha=0.15, lw=0)
    profile.set(xlabel="voxels from the interface", ylabel="motion, from one block's to the other's")
    profile.set_title("predicted motion across the interface")
    separable.axhline(100, color="0.2", lw=1)
    separable.set(xlabel="distance of points, at most (voxels)", ylabel="% of the true difference", ylim=(0, None))
    separable.set_title("motion separability between the blocks")
    for axis in (profile, separable):
        axis.grid(alpha=0.3)
    drawn.legend(*profile.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "cost", "table", "figure"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("sliding.png"), help="the figure")
    args = parser.parse_args()
    if args.what == "train":
        torch.set_num_threads(1)
        run(args.steps, args.seeds, args.networks)
    elif args.what == "cost":
        cost()
    elif args.what == "table":
        print(table(read_rows(PATH)))
    else:
        figure(read_rows(PATH)).savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
