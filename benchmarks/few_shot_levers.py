"""Levers that might make DRDM teach a segmenter more, one at a time, on validation subjects only.

Each lever changes one thing of an arm and is trained with 1 and 5 labelled subjects and two draws of them; its gain is
the mean difference to the same arm without it. Every training is a JSON line; those that are there are skipped.

    python benchmarks/few_shot_levers.py --levers affine drdm drdm-smooth
    python benchmarks/few_shot_levers.py --table
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import append_rows, machine, read_rows, RESULTS
from few_shot_arms import Fields, Setting
from few_shot_protocols import Protocol, PROTOCOLS
from few_shot_segmentation import recipe, train

PATH = RESULTS / "few_shot_levers.jsonl"
SUBJECTS, SEEDS = (1, 5), (100, 101)
_POSE = Setting(rotation_deg=180.0, scale=0.3, shift_frac=0.1, flip=0.5)


@dataclass(frozen=True)
class Lever:
    """An arm with one thing changed."""

    arm: str
    against: str
    """The lever it is compared with."""
    setting: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)


_LOW = {"low": 0.2, "high": 0.5, "prob": 0.9}
LEVERS = {
    "affine": Lever("affine", "affine"),
    "elastic": Lever("elastic", "affine", {"low": 0.0, "high": 3.0, "prob": 0.9}),
    "random": Lever("random", "affine", {"low": 0.02, "high": 0.1, "prob": 0.5}),
    "drdm": Lever("drdm", "affine", _LOW),
    "drdm-tuned": Lever("drdm-tuned", "drdm", _LOW),
    "drdm-mild": Lever("drdm", "drdm", _LOW | {"low": 0.05, "high": 0.2}),
    "drdm-mixed": Lever("drdm", "drdm", _LOW | {"low": 0.05, "high": 0.8}),
    "drdm-half": Lever("drdm", "drdm", _LOW | {"prob": 0.5}),
    "drdm-amplitude": Lever("drdm", "drdm", _LOW | {"amplitude": 0.0}),
    "drdm-second": Lever("drdm", "drdm", _LOW | {"second": 0.5}),
    "drdm-smooth": Lever("drdm", "drdm", _LOW | {"smooth": 2.0}),
    "drdm-guided": Lever("drdm", "drdm", _LOW | {"guided": 4}),
    "drdm-ramp": Lever("drdm", "drdm", _LOW | {"ramp": 2000}),
    "drdm-fresh": Lever("drdm", "drdm", _LOW, {"bank": 64}),
    "drdm-recovery-0.48": Lever("drdm", "drdm", _LOW | {"low": 0.3, "high": 0.8, "recovery": 0.48}),
    "drdm-recovery-0.24": Lever("drdm", "drdm", _LOW | {"low": 0.3, "high": 0.8, "recovery": 0.24}),
    "drdm-recovery-0.24-half": Lever("drdm", "drdm", _LOW | {"low": 0.3, "high": 0.8, "recovery": 0.24, "prob": 0.5}),
    "drdm-recovery-0.24-long": Lever(
        "drdm", "affine-long", _LOW | {"low": 0.3, "high": 0.8, "recovery": 0.24}, {"cap": 8000, "patience": 2000}
    ),
    "affine-long": Lever("affine", "affine", {}, {"cap": 8000, "patience": 2000}),
    "drdm-long": Lever("drdm", "affine-long", _LOW, {"cap": 8000, "patience": 2000}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", nargs="+", choices=tuple(LEVERS), default=[])
    parser.add_argument("--subjects", nargs="+", type=int, default=SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--network", help="network of arm drdm-tuned: a .safetensors file")
    parser.add_argument("--fields", type=Path, default=Path("few_shot_fields"), help="folder for fields drawn ahead")
    parser.add_argument("--table", action="store_true", help="print the table")
    args = parser.parse_args()
    fields = Fields(args.fields, args.network)
    for count in args.subjects:
        for seed in args.seeds:
            for name in args.levers:
                pull(name, count, seed, fields)
    if args.table:
        print(table(read_rows(PATH)))


def pull(name: str, count: int, seed: int, fields: Fields) -> None:
    """One training with a lever, on validation subjects, unless its line is there."""
    lever = LEVERS[name]
    protocol: Protocol = replace(PROTOCOLS["acdc"], **lever.protocol)
    setting = replace(_POSE, **lever.setting)
    key = {"lever": name, "protocol": protocol.name, "recipe": recipe(protocol), "setting": setting.row()}
    key |= {"subjects": count, "seed": seed, "network": fields.name_for(lever.arm, protocol)}
    if not any(all(row.get(k) == v for k, v in key.items()) for row in read_rows(PATH)):
        _, story = train(protocol, lever.arm, setting, count, seed, fields)
        append_rows(PATH, key | {"arm": lever.arm} | story | machine())


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: validation Dice of every lever, and its gain where both were trained."""
    found = {(r["lever"], r["subjects"], r["seed"]): 100 * r["validation"] for r in rows}
    counts = sorted({r["subjects"] for r in rows})
    lines = [f"| lever | against | {' | '.join(f'{n} subjects: Dice % | gain' for n in counts)} |"]
    lines.append("|---|---|" + "---|---|" * len(counts))
    for name, lever in LEVERS.items():
        cells = []
        for count in counts:
            mine = {seed: v for (key, n, seed), v in found.items() if (key, n) == (name, count)}
            gains = [v - found[lever.against, count, s] for s, v in mine.items() if (lever.against, count, s) in found]
            cells.append(" / ".join(f"{v:.1f}" for v in mine.values()) or "–")
            cells.append(f"{np.mean(gains):+.1f}" if gains and name != lever.against else "–")
        if any((name, count, seed) in found for count in counts for seed in SEEDS):
            lines.append(f"| {name} | {lever.against} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
