"""The tables of the few-shot benchmark, made from its JSON lines."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import numpy as np
from few_shot_protocols import PROTOCOLS
from scipy.stats import wilcoxon

Row = dict[str, Any]


def tables(search: list[Row], final: list[Row]) -> str:
    """Markdown: what the searches found, the final figures, and the tests between arms."""
    parts = []
    for name in PROTOCOLS:
        found, runs = ([row for row in rows if row["protocol"] == name] for rows in (search, final))
        if found:
            parts += [f"## {name}: search on validation subjects", search_table(found)]
        if runs:
            chosen, earlier = split(runs)
            parts += [f"## {name}: test subjects", final_table(chosen), comparison_table(chosen)]
            if earlier:
                parts += [f"### {name}: test subjects, settings or networks given up", final_table(earlier)]
    return "\n\n".join(parts)


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Rows of the setting and network that each arm had last, and those of others it had before."""
    last = {(row["subjects"], row["arm"]): (row["setting"], row["network"]) for row in rows}
    chosen = [row for row in rows if (row["setting"], row["network"]) == last[row["subjects"], row["arm"]]]
    return chosen, [row for row in rows if row not in chosen]


def search_table(rows: list[Row]) -> str:
    """Validation Dice of every trial, mean over draws; the best of each arm in bold."""
    lines = ["| subjects | arm | rotation ° | scale | shift | flip | strength | probability | iterations | Dice % |"]
    lines.append("|" + "---|" * 10)
    trials: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        trials[row["subjects"], row["arm"], json.dumps(row["setting"])].append(row)
    means = {trial: float(np.mean([row["validation"] for row in group])) for trial, group in trials.items()}
    for (count, arm, setting), group in trials.items():
        s, mean = json.loads(setting), means[count, arm, setting]
        best = max(value for (n, other, _), value in means.items() if (n, other) == (count, arm))
        dice = " / ".join(f"{100 * row['validation']:.1f}" for row in group)
        dice += f": {100 * mean:.1f}" if len(group) > 1 else ""
        strength = f"{s['low']:g} to {s['high']:g}" if s["high"] else "–"
        strength += f", recovery {s['recovery']:g}" if "recovery" in s else ""
        lines.append(
            f"| {count} | {arm} | {s['rotation_deg']:g} | {s['scale']:g} | {s['shift_frac']:g} | {s['flip']:g} "
            f"| {strength} | {s['prob']:g} | {np.mean([row['iterations'] for row in group]):.0f} "
            f"| {f'**{dice}**' if mean == best else dice} |"
        )
    return "\n".join(lines)


def final_table(rows: list[Row]) -> str:
    """Mean over cases, then mean ± standard deviation over seeds; seconds are those of the median run."""
    structures = PROTOCOLS[rows[0]["protocol"]].structures
    lines = [
        f"| subjects | arm | seeds | Dice % | {' | '.join(structures)} | HD95 vox | not found | iterations | s |",
        "|" + "---|" * (8 + len(structures)),
    ]
    for (count, arm), group in sorted(_groups(rows).items()):
        dice = np.array([_by_structure(row, "dice") for row in group])
        hd95 = [float(np.nanmean(_by_structure(row, "hd95"))) for row in group]
        missing = [np.mean([d == 0 for case in row["dice"].values() for d in case if d is not None]) for row in group]
        cells = [_spread(100 * dice.mean(axis=1)), *(_spread(100 * column) for column in dice.T), _spread(hd95)]
        cells += [f"{100 * np.mean(missing):.1f} %", f"{np.mean([row['iterations'] for row in group]):.0f}"]
        cells.append(f"{np.median([row['seconds'] for row in group]):.0f}")
        lines.append(f"| {count} | {arm} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(rows: list[Row]) -> str:
    """DRDM against every other arm: differences of cases averaged over the seeds that both have, Wilcoxon's test."""
    lines = ["| subjects | arm | minus | seeds | cases | Dice points | p (Wilcoxon) |", "|---|---|---|---|---|---|---|"]
    groups = _groups(rows)
    for (count, arm), ours in sorted(groups.items()):
        if not arm.startswith("drdm"):
            continue
        for (other_count, other), theirs in sorted(groups.items()):
            if other_count != count or other.startswith("drdm"):
                continue
            seeds = {row["seed"] for row in ours} & {row["seed"] for row in theirs}
            if seeds:
                a, b = (_case_means(group, seeds) for group in (ours, theirs))
                difference = np.array([a[case] - b[case] for case in a])
                p = float(wilcoxon(difference).pvalue) if np.any(difference) else 1.0
                points = f"{100 * difference.mean():+.2f}"
                lines.append(f"| {count} | {arm} | {other} | {len(seeds)} | {len(a)} | {points} | {p:.2g} |")
    return "\n".join(lines)


def _groups(rows: list[Row]) -> dict[tuple[int, str], list[Row]]:
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["subjects"], row["arm"]].append(row)
    return groups


def _by_structure(row: Row, key: str) -> np.ndarray:
    """Mean over cases, ``(structures,)``."""
    return np.nanmean(np.array(list(row[key].values()), dtype=float), axis=0)


def _case_means(rows: list[Row], seeds: set[int]) -> dict[str, float]:
    chosen = [row for row in rows if row["seed"] in seeds]
    cases = chosen[0]["dice"]
    return {
        case: float(np.mean([np.nanmean(np.array(row["dice"][case], dtype=float)) for row in chosen])) for case in cases
    }


def _spread(values: Any) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"
