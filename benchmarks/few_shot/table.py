"""Make the tables of the few-shot benchmark from its rows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from arms import ARMS, CORE, PAPER
from protocols import PROTOCOLS, recipe
from scipy.stats import wilcoxon

Row = dict[str, Any]
PAPER_ARMS = tuple(dict.fromkeys(arm for ours, others in PAPER.items() for arm in (*others, ours)))
COUNTS, PAPER_COUNTS = (1, 5), (5, 20, 60)
"""Numbers of labelled subjects of the benchmark itself, and of the comparison after the paper's Table 2."""


def tables(search: list[Row], final: list[Row]) -> str:
    """Markdown tables of the searches, the final results, the tests between arms, and a summary."""
    parts, by_protocol = [], {}
    for name, protocol in PROTOCOLS.items():
        key = (name, recipe(protocol))
        found, runs = ([r for r in rows if (r["protocol"], r["recipe"]) == key] for rows in (search, final))
        if found:
            parts += [f"## {name}: search on validation subjects", search_table(found)]
        if runs:
            paper, _ = split([row for row in runs if row["arm"] in PAPER_ARMS and row["subjects"] in PAPER_COUNTS])
            chosen, earlier = split([row for row in runs if row["arm"] in CORE and row["subjects"] in COUNTS])
            if chosen:
                by_protocol[name] = chosen
                parts += [f"## {name}: test subjects", final_table(chosen), comparison_table(chosen)]
            if earlier:
                parts += [f"### {name}: test subjects, settings or networks given up", final_table(earlier)]
            if len({row["subjects"] for row in paper}) > 1:
                parts += [f"## {name}: the paper's comparison", paper_table(paper), paper_differences(paper)]
    if by_protocol:
        parts += ["## Summary of test subjects", summary_table(by_protocol)]
    return "\n\n".join(parts)


def summary_table(rows: dict[str, list[Row]]) -> str:
    """Dice of the core arms, mean over cases, then mean ± standard deviation over seeds."""
    lines = [f"| task | labelled | {' | '.join(CORE)} |", "|" + "---|" * (2 + len(CORE))]
    for name, chosen in rows.items():
        groups = _groups(chosen)
        for count in sorted({count for count, _ in groups}):
            runs = [groups.get((count, arm), []) for arm in CORE]
            cells = [spread([100 * by_structure(row, "dice").mean() for row in one]) if one else "–" for one in runs]
            lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paper_table(rows: list[Row]) -> str:
    """Dice of the arms of the paper's Table 2 and their controls, by number of labelled subjects."""
    groups = _groups(rows)
    counts = sorted({count for count, _ in groups})
    lines = [f"| arm | {' | '.join(f'{count} labelled' for count in counts)} |", "|" + "---|" * (1 + len(counts))]
    for arm in (arm for arm in PAPER_ARMS if any((count, arm) in groups for count in counts)):
        runs = [groups.get((count, arm), []) for count in counts]
        cells = [spread([100 * by_structure(row, "dice").mean() for row in one]) if one else "–" for one in runs]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def paper_differences(rows: list[Row]) -> str:
    """DRDM against the other arms of the paper's table, over the seeds that both have."""
    lines = ["| labelled | arm | minus | Dice points | by seed | p, patients |", "|" + "---|" * 6]
    groups = _groups(rows)
    for count in sorted({count for count, _ in groups}):
        for arm, other in ((arm, other) for arm, others in PAPER.items() for other in others):
            ours, theirs = groups.get((count, arm), []), groups.get((count, other), [])
            if seeds := {row["seed"] for row in ours} & {row["seed"] for row in theirs}:
                points, by_seed, _, p = difference(ours, theirs, seeds)
                lines.append(f"| {count} | {arm} | {other} | {points} | {by_seed} | {p} |")
    return "\n".join(lines)


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Split rows into those of each arm's latest setting and network, and earlier ones."""
    last = {(row["subjects"], row["arm"]): (row["setting"], row["network"]) for row in rows}
    chosen = [row for row in rows if (row["setting"], row["network"]) == last[row["subjects"], row["arm"]]]
    return chosen, [row for row in rows if row not in chosen]


def search_table(rows: list[Row]) -> str:
    """Validation Dice of every trial with each arm's best in bold, and the best mean of 5 successive validations."""
    heads = "subjects | arm | rotation ° | scale | shift | flip | strength | probability | iterations"
    lines = [f"| {heads} | Dice % | 5 in a row |", "|" + "---|" * 11]
    trials: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        trials[row["subjects"], row["arm"], json.dumps(row["setting"])].append(row)
    means = {trial: float(np.mean([row["validation"] for row in group])) for trial, group in trials.items()}
    in_order = sorted(trials.items(), key=lambda trial: (-trial[0][0], list(ARMS).index(trial[0][1])))
    for (count, arm, setting), group in in_order:
        s, mean = json.loads(setting), means[count, arm, setting]
        best = max(value for (n, other, _), value in means.items() if (n, other) == (count, arm))
        dice = " / ".join(f"{100 * row['validation']:.1f}" for row in group)
        dice += f": {100 * mean:.1f}" if len(group) > 1 else ""
        strength = f"{s['low']:g} to {s['high']:g}" if s["high"] else "–"
        strength += f", recovery {s['recovery']:g}" if "recovery" in s else ""
        steady = np.mean([max(np.convolve(row["curve"], np.full(5, 0.2), "valid")) for row in group])
        lines.append(
            f"| {count} | {arm} | {s['rotation_deg']:g} | {s['scale']:g} | {s['shift_frac']:g} | {s['flip']:g} "
            f"| {strength} | {s['prob']:g} | {np.mean([row['iterations'] for row in group]):.0f} "
            f"| {f'**{dice}**' if mean == best else dice} | {100 * steady:.1f} |"
        )
    return "\n".join(lines)


def final_table(rows: list[Row]) -> str:
    """Mean over cases, then mean ± standard deviation over seeds; training seconds are those of the median run.

    Seconds of fields are those of the slowest run: others found some of theirs on disk.
    """
    structures = PROTOCOLS[rows[0]["protocol"]].structures
    heads = f"subjects | arm | seeds | Dice % | {' | '.join(structures)} | HD95 vox | Dice 0 | iterations"
    lines = [f"| {heads} | precision | training s | fields s |", "|" + "---|" * (11 + len(structures))]
    for (count, arm), group in sorted(_groups(rows).items()):
        dice = np.array([by_structure(row, "dice") for row in group])
        hd95 = [float(np.nanmean(by_structure(row, "hd95"))) for row in group]
        missing = [np.mean([d == 0 for case in row["dice"].values() for d in case if d is not None]) for row in group]
        cells = [spread(100 * dice.mean(axis=1)), *(spread(100 * column) for column in dice.T), spread(hd95)]
        cells += [f"{100 * np.mean(missing):.1f} %", f"{np.mean([row['iterations'] for row in group]):.0f}"]
        precisions = Counter(row.get("precision", "bfloat16") for row in group)
        cells.append(", ".join(f"{name} × {n}" if len(precisions) > 1 else name for name, n in precisions.items()))
        cells.append(f"{np.median([row['seconds'] for row in group]):.0f}")
        cells.append(f"{max(row['fields_seconds'] for row in group):.0f}" if ARMS[arm].fields else "–")
        lines.append(f"| {count} | {arm} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison_table(rows: list[Row]) -> str:
    """DRDM against every other arm: differences of cases averaged over the seeds that both have, Wilcoxon's test.

    A second test takes both phases of a patient for one. One seed is not tested.
    """
    lines = ["| subjects | arm | minus | Dice points | by seed | p, cases | p, patients |", "|" + "---|" * 7]
    groups = _groups(rows)
    for (count, arm), ours in sorted(groups.items()):
        if not arm.startswith("drdm"):
            continue
        for (other_count, other), theirs in sorted(groups.items()):
            if other_count != count or other.startswith("drdm"):
                continue
            seeds = {row["seed"] for row in ours} & {row["seed"] for row in theirs}
            if seeds:
                lines.append(f"| {count} | {arm} | {other} | {' | '.join(difference(ours, theirs, seeds))} |")
    return "\n".join(lines)


def difference(ours: list[Row], theirs: list[Row], seeds: set[int]) -> tuple[str, str, str, str]:
    """Dice points between two arms: mean, by seed, and Wilcoxon's p over cases and over patients."""
    a, b = (case_means(group, seeds) for group in (ours, theirs))
    apart_by_case = {case: a[case] - b[case] for case in a}
    patients: dict[str, list[float]] = defaultdict(list)
    for case, value in apart_by_case.items():
        patients[case.split("-")[0]].append(value)
    points = f"{100 * np.mean(list(apart_by_case.values())):+.2f}"
    by_seed = " / ".join(f"{100 * apart(ours, theirs, seed):+.1f}" for seed in sorted(seeds))
    if len(seeds) == 1:
        return points, by_seed, "–", "–"
    by_patient = [float(np.mean(values)) for values in patients.values()]
    return points, by_seed, p_value(list(apart_by_case.values())), p_value(by_patient)


def apart(ours: list[Row], theirs: list[Row], seed: int) -> float:
    means = [np.mean(list(case_means(group, {seed}).values())) for group in (ours, theirs)]
    return float(means[0] - means[1])


def p_value(differences: list[float]) -> str:
    p = float(wilcoxon(differences).pvalue) if np.any(differences) else 1.0
    return f"{p:.2g} ({len(differences)})"


def _groups(rows: list[Row]) -> dict[tuple[int, str], list[Row]]:
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["subjects"], row["arm"]].append(row)
    return groups


def by_structure(row: Row, key: str) -> np.ndarray:
    """Mean over cases of every structure, ``(structures,)``."""
    return np.nanmean(np.array(list(row[key].values()), dtype=float), axis=0)


def case_means(rows: list[Row], seeds: set[int]) -> dict[str, float]:
    chosen = [row for row in rows if row["seed"] in seeds]
    cases = chosen[0]["dice"]
    return {
        case: float(np.mean([np.nanmean(np.array(row["dice"][case], dtype=float)) for row in chosen])) for case in cases
    }


def spread(values: Any) -> str:
    """Mean ± sample standard deviation; only the mean if there is one value."""
    mean = f"{np.mean(values):.1f}"
    return f"{mean} ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else mean
