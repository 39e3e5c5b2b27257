"""Does the motion-separable structure keep apart what slides?

Two parts touch and slide past each other (``phantoms.py``: blocks, or an organ and the wall around it): the field
between both images is known, and jumps where they meet. Networks with about as many weights learn from such pairs,
drawn anew in every step, and are judged on pairs that none has seen: the residual aligner with the structures q = 0 (a
classical pyramid), 3 and 4, and VoxelMorph, which is quicker. They see the images and the forces of demons on the full
grid, and predict the field itself. They train for as many steps or, with ``--seconds``, for as much time of a core.

    python benchmarks/registration/sliding.py train              # about 20 minutes on one thread
    python benchmarks/registration/sliding.py train --phantom organs --seeds 0 1
    python benchmarks/registration/sliding.py train --phantom organs --seeds 0 1 --seconds 65
    python benchmarks/registration/sliding.py cost               # weights, seconds and memory of the networks in 3D
    python benchmarks/registration/sliding.py table
    python benchmarks/registration/sliding.py figure --out docs/images/sliding.png
    python benchmarks/registration/sliding.py figure --phantom organs --out docs/images/sliding_organs.png

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
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from monai_drdm.fields import fold_fraction
from monai_drdm.registration import motion_separability, RegistrationNetwork, SEPARABLE_STRUCTURES
from monai_drdm.registration.networks import Structure

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, read_rows
from phantoms import Pairs, PHANTOMS

PATH = Path(__file__).parent / "sliding.jsonl"
STEPS, BATCH, RATE, WARMUP, TICKS = 250, 2, 3e-3, 25, 1000
NEAR = 3
"""Half the width in voxels of the band around the interface in which errors are counted apart."""
DISTANCES = (1, 2, 3, 4, 6, 8, 12)
PROFILE = {"blocks": 12, "organs": 8}
"""Voxels on both sides of the interface; in the middle of an organ, the motions of both parts are alike."""
JUDGED = 32
SHOWN = {"blocks": 5, "organs": 2}
"""The seed of the pair in the figure."""
LONGER = "voxelmorph, 8 times the steps"
NETWORKS = ("voxelmorph", LONGER, "q = 0", "q = 3", "q = 4")


def build(name: str, dims: int = 2, channels: int = 8) -> RegistrationNetwork:
    """A network on the full grid; VoxelMorph gets about as many weights as the aligners have."""
    plain = {"diffeomorphic": False, "stride": 1, "forces": True}
    if name.startswith("voxelmorph"):
        return RegistrationNetwork(Structure("voxelmorph", dims, 24, 4, **plain))
    pools, dilations = SEPARABLE_STRUCTURES[int(name[-1])]
    return RegistrationNetwork(Structure("aligner", dims, channels, 3, pool_sizes=pools, dilations=dilations, **plain))


def train(
    phantom: str, name: str, seed: int, steps: int, seconds: float | None = None
) -> tuple[RegistrationNetwork, int]:
    """Learn the known fields of pairs that are drawn in every step: the same ones for all networks of a seed.

    Without ``seconds`` of a core, drawing not counted, which end the training whatever the number of steps, it takes
    ``steps``. Returns the network and the number of steps.
    """
    torch.manual_seed(seed)
    network = build(name).train()
    generator = torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    ticks, rise = (steps, WARMUP / steps) if seconds is None else (TICKS, WARMUP / STEPS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=ticks, pct_start=rise)
    spent, done, tick = 0.0, 0, 0
    while tick < ticks:
        pairs = PHANTOMS[phantom](BATCH, generator, turn=True)
        began = time.process_time()
        loss = (network(pairs.images) - pairs.ddf).norm(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        spent, done = spent + time.process_time() - began, done + 1
        tick = done if seconds is None else int(TICKS * spent / seconds)
        while schedule.last_epoch < min(tick, ticks - 1):
            schedule.step()
    return network.eval(), done


@torch.no_grad()
def judge(phantom: str, network: RegistrationNetwork) -> dict[str, Any]:
    """Errors, separability and the profile across the interface, on pairs that are always the same."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(JUDGED // BATCH):
        pairs = PHANTOMS[phantom](BATCH, generator)
        predicted = network(pairs.images)
        for i in range(BATCH):
            found.append(_judge_pair(predicted[i : i + 1], Pairs(*(one[i : i + 1] for one in pairs)), PROFILE[phantom]))
    return {key: np.mean([one[key] for one in found], axis=0).tolist() for key in found[0]}


def _judge_pair(predicted: Tensor, pairs: Pairs, reach: int) -> dict[str, Any]:
    first = pairs.regions[0, 0].numpy() == 1
    beyond = np.where(first, 0.5 - distance_transform_edt(first), distance_transform_edt(~first) - 0.5)
    apart = (predicted - pairs.ddf).norm(dim=1)[0]
    true, made = (motion_separability(one, DISTANCES, regions=pairs.regions)[0] for one in (pairs.ddf, predicted))
    whole = pairs.second - pairs.first
    across = ((predicted - pairs.first) * whole).sum(dim=1) / whole.square().sum(dim=1)
    profile = [float(np.median(across[0].numpy()[np.floor(beyond) == k])) for k in range(-reach, reach)]
    return {
        "error_vox": float(apart.mean()),
        "error_near_vox": float(apart[torch.from_numpy(np.abs(beyond) < NEAR)].mean()),
        "error_of_doing_nothing_vox": float(pairs.ddf.norm(dim=1).mean()),
        "separability": (made / true).tolist(),
        "profile": profile,
        "fold_percent": 100 * float(fold_fraction(predicted)[0]),
    }


def run(phantom: str, steps: int, seconds: float | None, seeds: list[int], networks: Sequence[str]) -> None:
    """Train and judge every network with every seed, unless its row is there."""
    for seed in seeds:
        for name in networks if seconds is None else [one for one in networks if one != LONGER]:
            key = {"phantom": phantom, "network": name, "seed": seed}
            key |= {"steps": steps} if seconds is None else {"budget_s": seconds}
            if any(all(known.get(k) == v for k, v in key.items()) for known in map(_completed, read_rows(PATH))):
                continue
            began = time.process_time()
            network, done = train(phantom, name, seed, 8 * steps if name == LONGER else steps, seconds)
            weights = sum(one.numel() for one in network.parameters())
            row = {"steps": done} | key | {"weights": weights, "cpu_s": time.process_time() - began}
            append_rows(PATH, row | judge(phantom, network))


def _completed(row: dict[str, Any]) -> dict[str, Any]:
    """Rows that name no phantom are of blocks; with equal seconds, the number of steps is a result."""
    row = {"phantom": "blocks"} | row
    return row if "budget_s" not in row else {k: v for k, v in row.items() if k != "steps"} | {"taken": row["steps"]}


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
    judged, costs = [_completed(r) for r in rows if "network" in r], [r for r in rows if "cost" in r]
    lines = []
    for phantom in PHANTOMS:
        lines += [*_judged_table([r for r in judged if r["phantom"] == phantom], phantom), ""]
    lines += ["| network, 48³ | weights | seconds | memory, MB | a training step, s | MB |", "|" + "---|" * 6]
    for r in costs:
        lines.append(
            f"| {r['cost']} | {r['weights']:,} | {r['seconds']:.2f} | {r['memory_mb']:.0f} | {r['step_seconds']:.2f} | "
            f"{r['step_memory_mb']:.0f} |"
        )
    return "\n".join(lines)


def _judged_table(rows: list[dict[str, Any]], phantom: str) -> list[str]:
    """First the trainings of equally many steps, then those of equal time."""
    columns = (f"{phantom}: network", "steps", "weights", "s of a core", "seeds", "error, voxels")
    columns += ("within 3 voxels of the interface", "separability at 1 voxel", "at 4 voxels", "folds %")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    keys = {(r.get("budget_s", 0), r.get("steps", 0), r["network"]) for r in rows}
    for seconds, steps, name in sorted(keys, key=lambda k: (*k[:2], NETWORKS.index(k[2]))):
        mine = [r for r in rows if (r.get("budget_s", 0), r.get("steps", 0), r["network"]) == (seconds, steps, name)]

        def shown(values: list[float], digits: int = 2) -> str:
            spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
            return f"{np.mean(values):.{digits}f}{spread}"

        share = [[100 * r["separability"][DISTANCES.index(p)] for r in mine] for p in (1, 4)]
        cpu, folds = (np.mean([r[key] for r in mine]) for key in ("cpu_s", "fold_percent"))
        taken = np.mean([r["taken"] for r in mine]) if seconds else steps * (8 if name == LONGER else 1)
        errors = [shown([r[key] for r in mine]) for key in ("error_vox", "error_near_vox")]
        lines.append(
            f"| {name} | {taken:.0f} | {mine[0]['weights']:,} | {cpu:.0f} | {len(mine)} | {' | '.join(errors)} | "
            f"{shown(share[0], 0)} % | {shown(share[1], 0)} % | {folds:.2f} |"
        )
    return lines


def figure(rows: list[dict[str, Any]], phantom: str) -> Figure:
    """A pair, the motion across the interface, and the separability beside the true one, after ``STEPS``.

    Where there are trainings of equal time, they are shown in a row below.
    """
    judged = [r for r in map(_completed, rows) if r["phantom"] == phantom and "network" in r]
    shown = {f"after {STEPS} steps": [r for r in judged if r.get("steps") == STEPS]}
    for seconds in sorted({r["budget_s"] for r in judged if "budget_s" in r}):
        shown[f"after {seconds:g} s of a core"] = [r for r in judged if r.get("budget_s") == seconds]
    drawn = Figure(figsize=(12.0, 3.7 * len(shown)), layout="constrained", facecolor="white")
    axes = drawn.subplots(len(shown), 3, width_ratios=(1.0, 1.4, 1.4), squeeze=False)
    pairs = PHANTOMS[phantom](1, torch.Generator().manual_seed(SHOWN[phantom]))
    for row, (title, mine) in enumerate(shown.items()):
        image, profile, separable = axes[row]
        _show_pair(image, pairs, f"{phantom} that slide" if row == 0 else "length of the true field", row > 0)
        _show_motion(profile, separable, mine, PROFILE[phantom])
        profile.set_title(f"motion across the interface, {title}")
        separable.set_title(f"motion separability, {title}")
    drawn.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return drawn


def _show_pair(axes: Axes, pairs: Pairs, title: str, length: bool) -> None:
    """The fixed image, or the length of its field, with the interface and some arrows."""
    shown = pairs.ddf[0].norm(dim=0) if length else pairs.images[0, 1]
    axes.imshow(shown, cmap="viridis" if length else "gray", origin="lower")
    axes.contour(pairs.regions[0, 0], [1.5], colors="C3", linewidths=1)
    at = np.arange(4, pairs.ddf.shape[-1], 6)
    up, right = (one[np.ix_(at, at)] for one in -pairs.ddf[0].numpy())  # the way that tissue goes
    axes.quiver(at, at, right, up, angles="xy", scale_units="xy", scale=1, color="w" if length else "C1", width=0.008)
    axes.set(title=title, xticks=[], yticks=[])


def _show_motion(profile: Axes, separable: Axes, rows: list[dict[str, Any]], reach: int) -> None:
    where = np.arange(-reach, reach) + 0.5
    profile.step(where, where > 0, where="mid", color="0.2", lw=1.5, label="true")
    for name, color in zip(NETWORKS, ("0.65", "0.45", "C0", "C1", "C3")):
        mine = [r for r in rows if r["network"] == name]
        if not mine:
            continue
        profile.plot(where, np.mean([r["profile"] for r in mine], axis=0), color=color, label=name, marker=".", ms=4)
        shares = 100 * np.array([r["separability"] for r in mine])
        separable.plot(DISTANCES, shares.mean(axis=0), color=color, marker=".", label=name)
        separable.fill_between(DISTANCES, shares.min(axis=0), shares.max(axis=0), color=color, alpha=0.15, lw=0)
    profile.set(xlabel="voxels from the interface", ylabel="motion, from one part's to the other's")
    separable.axhline(100, color="0.2", lw=1)
    separable.set(xlabel="distance of points, at most (voxels)", ylabel="% of the true difference", ylim=(0, None))
    for axis in (profile, separable):
        axis.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "cost", "table", "figure"))
    parser.add_argument("--phantom", choices=tuple(PHANTOMS), default="blocks")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float, help="of a core for every network, instead of steps")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("sliding.png"), help="the figure")
    args = parser.parse_args()
    if args.what == "train":
        torch.set_num_threads(1)
        run(args.phantom, args.steps, args.seconds, args.seeds, args.networks)
    elif args.what == "cost":
        cost()
    elif args.what == "table":
        print(table(read_rows(PATH)))
    else:
        figure(read_rows(PATH), args.phantom).savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
