"""How different are deformed hearts in shape, compared with hearts of different patients, after affine alignment?

Middle slices of the pool's ACDC patients at 96². One label is aligned with another by the affine map with the best
overlap. The Dice that is then missing from 1 is a difference of shape that no affine augmentation can make. Between
patients it is what a segmenter has to learn; between a label and its deformed copies it is what an augmentation shows.
Rows that exist are not measured again.

    python benchmarks/few_shot/shape_diversity.py --fields FOLDER
    python benchmarks/few_shot/shape_diversity.py --table
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from monai_drdm.fields import warp

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from arms import Setting
from common.rows import append_rows, machine, read_rows
from fields import Fields
from protocols import Case, Protocol, PROTOCOLS, subjects

PATH = Path(__file__).parent / "shape_diversity.jsonl"
PATIENTS, PAIRS, COPIES, STEPS = 20, 60, 3, 150
ARMS: dict[str, list[dict[str, float]]] = {
    "elastic": [{"high": 0.0}, {"high": 1.5}, {"high": 3.0}, {"high": 6.0}],
    "random": [{"low": 0.02, "high": 0.1}, {"low": 0.05, "high": 0.2}],
    "drdm": [
        {"low": 0.2, "high": 0.5},
        {"low": 0.3, "high": 0.8},
        {"low": 0.6, "high": 1.0},
        {"low": 0.3, "high": 0.8, "recovery": 0.48},
        {"low": 0.3, "high": 0.8, "recovery": 0.24},
    ],
}


def middle(case: Case) -> int:
    """Index of the middle slice among those that show all three structures, or -1."""
    whole = [i for i, label in enumerate(case.label) if set(label.unique().tolist()) >= {1, 2, 3}]
    return whole[len(whole) // 2] if whole else -1


def aligned_dice(moving: Tensor, fixed: Tensor) -> Tensor:
    """Mean Dice ``(B,)`` of labels ``(B, 1, H, W)`` over structures, after the best affine alignment."""
    a, b = (F.one_hot(label[:, 0].long(), 4).movedim(-1, 1)[:, 1:].float() for label in (moving, fixed))
    theta = _start(a, b).requires_grad_()
    optimiser = torch.optim.Adam([theta], 0.02)
    best = torch.zeros(len(a))
    for _ in range(STEPS):
        grid = F.affine_grid(theta, list(a.shape), align_corners=True)
        posed = F.grid_sample(a, grid, align_corners=True)
        dice = 2 * (posed * b).sum((2, 3)) / (posed.sum((2, 3)) + b.sum((2, 3)))
        with torch.no_grad():
            hard = (posed > 0.5).float()
            exact = (2 * (hard * b).sum((2, 3)) / (hard.sum((2, 3)) + b.sum((2, 3)))).mean(1)
            best = torch.maximum(best, exact)
        optimiser.zero_grad()
        (1 - dice.mean(1)).sum().backward()
        optimiser.step()
    return best


def _start(a: Tensor, b: Tensor) -> Tensor:
    """Similarity transform ``(B, 2, 3)`` that maps the ventricles of ``b`` to those of ``a``, to start from."""
    (left_a, right_a), (left_b, right_b) = ((_centre(x[:, 1:].sum(1)), _centre(x[:, 0])) for x in (a, b))
    u, v = right_a - left_a, right_b - left_b
    u, v = torch.complex(u[:, 0], u[:, 1]), torch.complex(v[:, 0], v[:, 1])
    size = (a[:, 1:].sum((1, 2, 3)) / b[:, 1:].sum((1, 2, 3))).sqrt()
    turn = size * torch.exp(1j * (u.angle() - v.angle()))
    matrix = torch.stack([turn.real, -turn.imag, turn.imag, turn.real], 1).view(-1, 2, 2)
    shift = left_a - torch.einsum("bij,bj->bi", matrix, left_b)
    return torch.cat([matrix, shift[..., None]], 2)


def _centre(mask: Tensor) -> Tensor:
    """Centre of mass in [-1, 1], x before y."""
    axis = torch.linspace(-1, 1, mask.shape[-1])
    total = mask.sum((1, 2)).clamp(min=1)
    return torch.stack([(mask.sum(1) * axis).sum(1) / total, (mask.sum(2) * axis).sum(1) / total], 1)


def run(fields: Fields) -> None:
    protocol = PROTOCOLS["acdc"]
    cases = [case for found in list(subjects(protocol, "pool").values())[:PATIENTS] for case in found[:1]]
    chosen = [(case, middle(case)) for case in cases if middle(case) >= 0]
    labels = torch.stack([case.label[i] for case, i in chosen])
    order = np.random.default_rng(0)
    pairs = np.array([order.choice(len(labels), 2, replace=False) for _ in range(PAIRS)])
    there = [(row["arm"], row["setting"]) for row in read_rows(PATH)]
    if ("another patient", {}) not in there:
        _write("another patient", {}, aligned_dice(labels[pairs[:, 0]], labels[pairs[:, 1]]))
    for arm, settings in ARMS.items():
        for values in settings:
            if (arm, values) not in there:
                _write(arm, values, _deformed(arm, Setting(prob=1.0, **values), protocol, chosen, fields))


def _deformed(arm: str, setting: Setting, protocol: Protocol, chosen: list[tuple[Case, int]], fields: Fields) -> Tensor:
    found = []
    few = replace(protocol, bank=COPIES)
    for case, i in tqdm(chosen, desc=arm, leave=False):
        slices = (tensor[i : i + 1] for tensor in (case.source, case.image, case.label))
        bank = fields.bank(arm, setting, few, Case(f"{case.name}-middle", *slices))
        assert bank is not None
        ddf = bank[0].float()
        label = case.label[i].expand(len(ddf), -1, -1, -1)
        found.append(aligned_dice(warp(label, ddf, "nearest"), label))
    return torch.cat(found)


def _write(arm: str, values: dict[str, float], dice: Tensor) -> None:
    missing = [round(100 * (1 - float(d)), 2) for d in dice]
    append_rows(PATH, {"arm": arm, "setting": values, "missing_points": missing} | machine())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the missing Dice, mean ± standard deviation."""
    lines = ["| between a heart and | n | Dice missing after the best affine map, points |", "|---|---|---|"]
    for row in rows:
        values = row["missing_points"]
        setting = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
        name = row["arm"] + (f" ({setting})" if setting else "")
        lines.append(f"| {name} | {len(values)} | {np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=Path, default=Path("few_shot_fields"), help="folder for fields drawn ahead")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        run(Fields(args.fields))
    print(table(read_rows(PATH)))


if __name__ == "__main__":
    main()
