"""Change one thing of an arm at a time and see whether the segmenter gains, on validation subjects only.

Each lever changes one thing of an arm and is trained with 1 or 5 labelled subjects and two draws of them; its gain is
the mean difference to the same arm without it. Every training is a row; those that exist are skipped.

    python benchmarks/few_shot/levers.py --levers affine drdm drdm-smooth
    python benchmarks/few_shot/levers.py --protocol hippocampus --levers drdm drdm-recovery-0.24 --subjects 5
    python benchmarks/few_shot/levers.py --table
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine, read_rows
from fields import Fields
from protocols import Protocol, PROTOCOLS, recipe
from segmentation import chosen_setting, has, SEARCH, train

PATH = Path(__file__).parent / "levers.jsonl"
SUBJECTS, SEEDS = (1, 5), (100, 101)


@dataclass(frozen=True)
class Lever:
    """An arm with one setting changed."""

    arm: str
    against: str
    """Name of the lever that this one is compared with."""
    setting: dict[str, Any] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)


_LOW = {"low": 0.2, "high": 0.5, "prob": 0.9}
_WIDE = _LOW | {"low": 0.3, "high": 0.8}
_LESS = _WIDE | {"recovery": 0.24}
_LONG = {"cap": 8000, "patience": 2000}
_VOLUME = {"low": 0.3, "high": 0.8, "prob": 0.5}
_ACDC = {
    "affine": Lever("affine", "affine"),
    "elastic": Lever("elastic", "affine", {"low": 0.0, "high": 3.0, "prob": 0.9}),
    "random": Lever("random", "affine", {"low": 0.02, "high": 0.1, "prob": 0.5}),
    "drdm": Lever("drdm", "affine", _LOW),
    "drdm-tuned": Lever("drdm-tuned", "drdm", _LOW),
    "drdm-half": Lever("drdm", "drdm", _LOW | {"prob": 0.5}),
    "drdm-amplitude": Lever("drdm", "drdm", _LOW | {"amplitude": 0.0}),
    "drdm-smooth": Lever("drdm", "drdm", _LOW | {"smooth": 2.0}),
    "drdm-guided": Lever("drdm", "drdm", _LOW | {"guided": 4}),
    "drdm-wide": Lever("drdm", "drdm", _WIDE),
    "drdm-wide-half": Lever("drdm", "drdm-wide", _WIDE | {"prob": 0.5}),
    "drdm-recovery-0.48": Lever("drdm", "drdm-wide", _WIDE | {"recovery": 0.48}),
    "drdm-recovery-0.24": Lever("drdm", "drdm-wide", _LESS),
    "drdm-recovery-0.12": Lever("drdm", "drdm-wide", _WIDE | {"recovery": 0.12}),
    "drdm-mild": Lever("drdm", "drdm-recovery-0.24", _LESS | {"low": 0.05, "high": 0.3}),
    "drdm-mixed": Lever("drdm", "drdm-recovery-0.24", _LESS | {"low": 0.05}),
    "drdm-second": Lever("drdm", "drdm-recovery-0.24", _LESS | {"second": 0.5}),
    "drdm-ramp": Lever("drdm", "drdm-recovery-0.24", _LESS | {"ramp": 2000}),
    "drdm-fresh": Lever("drdm", "drdm-recovery-0.24", _LESS, {"bank": 64}),
    "drdm-steps": Lever("drdm", "drdm-recovery-0.24", _LESS | {"steps": 24}),
    "drdm-recovery-0.24-half": Lever("drdm", "drdm-wide-half", _LESS | {"prob": 0.5}),
    "drdm-recovery-0.24-long": Lever("drdm", "affine-long", _LESS, _LONG),
    "affine-long": Lever("affine", "affine", {}, _LONG),
    "drdm-long": Lever("drdm", "affine-long", _LOW, _LONG),
}
_HIPPOCAMPUS = {
    "affine": Lever("affine", "affine"),
    "elastic": Lever("elastic", "affine", {"high": 500.0, "prob": 0.5}),
    "elastic-1000": Lever("elastic", "elastic", {"high": 1000.0, "prob": 0.5}),
    "drdm": Lever("drdm", "affine", _VOLUME),
    "drdm-recovery-0.48": Lever("drdm", "drdm", _VOLUME | {"recovery": 0.48}),
    "drdm-recovery-0.24": Lever("drdm", "drdm", _VOLUME | {"recovery": 0.24}),
}
LEVERS = {"acdc": _ACDC, "hippocampus": _HIPPOCAMPUS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", choices=tuple(LEVERS), default="acdc")
    parser.add_argument("--levers", nargs="+", choices=tuple(_ACDC | _HIPPOCAMPUS), default=[])
    parser.add_argument("--subjects", nargs="+", type=int, default=SUBJECTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--network", help="network of arm drdm-tuned: a .safetensors file")
    parser.add_argument("--fields", type=Path, default=Path("few_shot_fields"), help="folder for fields drawn ahead")
    parser.add_argument("--table", action="store_true", help="print the table")
    args = parser.parse_args()
    if unknown := set(args.levers) - set(LEVERS[args.protocol]):
        parser.error(f"{args.protocol} has no lever {', '.join(sorted(unknown))}")
    fields = Fields(args.fields, args.network)
    for count in args.subjects:
        for seed in args.seeds:
            for name in args.levers:
                pull(args.protocol, name, count, seed, fields)
    if args.table:
        print(table(args.protocol, read_rows(PATH)))


def pull(task: str, name: str, count: int, seed: int, fields: Fields) -> None:
    """Train once with a lever unless its row exists; a row of the search with the same setting is copied."""
    lever = LEVERS[task][name]
    protocol: Protocol = replace(PROTOCOLS[task], **lever.protocol)
    setting = replace(chosen_setting(PROTOCOLS[task], "affine", 5, fields), **lever.setting)
    key = {"lever": name, "protocol": protocol.name, "recipe": recipe(protocol), "setting": setting.row()}
    key |= {"subjects": count, "seed": seed, "network": fields.name_for(lever.arm, protocol)}
    if has(PATH, key):
        return
    key["arm"] = lever.arm
    searched = [row for row in read_rows(SEARCH) if all(row[k] == v for k, v in key.items() if k != "lever")]
    if searched:
        append_rows(PATH, key | searched[-1])
    else:
        _, story = train(protocol, lever.arm, setting, count, seed, fields)
        append_rows(PATH, key | story | machine())


def table(task: str, rows: list[dict[str, Any]]) -> str:
    """Markdown table of the validation Dice of every lever, and of its gain where both were trained."""
    recipes = {name: recipe(replace(PROTOCOLS[task], **lever.protocol)) for name, lever in LEVERS[task].items()}
    rows = [r for r in rows if (r["protocol"], r["recipe"]) == (task, recipes.get(r["lever"]))]
    found = {(r["lever"], r["subjects"], r["seed"]): 100 * r["validation"] for r in rows}
    counts = sorted({r["subjects"] for r in rows})
    lines = [f"| lever | against | {' | '.join(f'{n} subjects: Dice % | gain' for n in counts)} |"]
    lines.append("|---|---|" + "---|---|" * len(counts))
    for name, lever in LEVERS[task].items():
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
