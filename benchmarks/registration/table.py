"""Make the tables and the figure of the registration benchmark from its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

BASELINES = ("identity", "demons", "bspline")
ARMS = ("smooth", "random", "drdm", "drdm-plain", "real", "drdm-real")
ARMS += ("smooth-pyramid", "random-pyramid", "drdm-pyramid")
COMPARED = (("drdm", "smooth"), ("drdm", "random"), ("drdm", "real"), ("drdm-real", "drdm"), ("drdm-real", "real"))
COMPARED += (("drdm-pyramid", "smooth-pyramid"), ("drdm-pyramid", "random-pyramid"))
Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """Markdown table of means over pairs ± standard deviation over seeds, or over pairs if there is one seed."""
    columns = ("set", "split", "arm", "rounds", "seeds", "pairs", "Dice %", "HD95 vox", "folds %", "consistency vox")
    lines = [f"| {' | '.join(columns)} | s a pair |", "|" + "---|" * 11]
    keys = dict.fromkeys((r["set"], r["split"], r["arm"], r["rounds"]) for r in rows)
    for key in sorted(keys, key=lambda k: (k[0], k[1], (*BASELINES, *ARMS).index(k[2]), k[3])):
        mine = [r for r in rows if (r["set"], r["split"], r["arm"], r["rounds"]) == key]
        seeds = sorted({r["seed"] for r in mine})
        by_pair = [[_dice(r) for r in mine if r["seed"] == seed] for seed in seeds]
        means = [float(np.mean(one)) for one in by_pair]
        spread = np.std(by_pair[0] if len(seeds) == 1 else means, ddof=1)
        hd95 = np.nanmean([np.nanmean(r["hd95"]) for r in mine])
        folds = 100 * np.mean([r["fold_fraction"] for r in mine])
        back = [r["inverse_consistency_vox"] for r in mine]
        consistency = "" if np.isnan(back).all() else f"{np.mean(back):.2f}"
        seconds = np.median([r["seconds"] for r in mine])
        lines.append(
            f"| {' | '.join(key[:3])} | {key[3] or ''} | {len(seeds)} | {len(by_pair[0])} "
            f"| {np.mean(means):.1f} ± {spread:.1f} | {hd95:.2f} | {folds:.3f} | {consistency} | {seconds:.2f} |"
        )
    return "\n".join(lines)


def by_structure(rows: list[Row]) -> str:
    """Markdown table of the mean test Dice in % of every structure, in the order of their ids."""
    tables = []
    for name, mine in _test_rows(rows).items():
        arms = _arms(mine)
        lines = [f"| {name}, structure | {' | '.join(arms)} |", "|" + "---|" * (1 + len(arms))]
        for k in range(len(mine[0]["dice"])):
            dice = [100 * float(np.nanmean([r["dice"][k] for r in mine if r["arm"] == arm])) for arm in arms]
            lines.append(f"| {k + 1} | {' | '.join(f'{value:.1f}' for value in dice)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def comparisons(rows: list[Row]) -> str:
    """Markdown table of differences between arms on the same test pairs, averaged over seeds."""
    lines = ["| set | arm | minus | pairs | Dice points | p (Wilcoxon) |", "|" + "---|" * 6]
    for name, mine in _test_rows(rows).items():
        found = {arm: _by_pair(mine, arm) for arm in _arms(mine)}
        for one, other in COMPARED:
            if one in found and other in found:
                apart = [found[one][pair] - found[other][pair] for pair in found[one]]
                p = wilcoxon(apart).pvalue
                lines.append(f"| {name} | {one} | {other} | {len(apart)} | {np.mean(apart):+.2f} | {p:.2g} |")
    return "\n".join(lines)


def _by_pair(rows: list[Row], arm: str) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["arm"] == arm:
            found.setdefault(row["pair"], []).append(_dice(row))
    return {pair: float(np.mean(dice)) for pair, dice in found.items()}


def figure(rows: list[Row]) -> Figure:
    """Plot the Dice of every test pair by arm, with a line at the mean."""
    sets = _test_rows(rows)
    drawn = Figure(figsize=(5.5 * len(sets), 3.8), layout="constrained")
    for axes, (name, mine) in zip(drawn.subplots(1, len(sets), squeeze=False)[0], sets.items()):
        arms = _arms(mine)
        for x, arm in enumerate(arms):
            dice = [_dice(r) for r in mine if r["arm"] == arm]
            color = "C1" if arm.startswith("drdm") else "C0" if arm in ARMS else "0.6"
            axes.plot(x + np.linspace(-0.25, 0.25, len(dice)), sorted(dice), ".", color=color, alpha=0.6, ms=4)
            axes.hlines(np.mean(dice), x - 0.35, x + 0.35, color=color, lw=2)
            axes.annotate(f"{np.mean(dice):.1f}", (x, 95), ha="center", fontsize=8)
        axes.set_xticks(range(len(arms)), arms, rotation=40, ha="right")
        axes.set(title=name, ylim=(20, 100), ylabel="Dice %")
    return drawn


def _dice(row: Row) -> float:
    return 100 * float(np.nanmean(row["dice"]))


def _test_rows(rows: list[Row]) -> dict[str, list[Row]]:
    test = [r for r in rows if r["split"] == "test"]
    return {name: [r for r in test if r["set"] == name] for name in dict.fromkeys(r["set"] for r in test)}


def _arms(rows: list[Row]) -> list[str]:
    return [arm for arm in (*BASELINES, *ARMS) if any(r["arm"] == arm for r in rows)]
