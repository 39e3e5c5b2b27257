"""Draw what unlabelled scans add: test Dice of every draw, by number of labelled subjects and way of training.

python benchmarks/few_shot/figure.py docs/images/few_shot.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import read_rows
from common.scans import DOMAINS
from protocols import PROTOCOLS
from table import by_structure, COUNTS, split

HERE = Path(__file__).parent
Row = dict[str, Any]
WAYS = {
    ("affine", False): ("labelled scans alone, poses", "#9aa5b1"),
    ("drdm", False): ("labelled scans alone, DRDM", "#5b6b7d"),
    ("poses", True): ("with unlabelled scans", "#1f77b4"),
    ("elastic", True): ("with unlabelled scans, elastic", "#9467bd"),
    ("random", True): ("with unlabelled scans, random fields", "#8c564b"),
    ("drdm", True): ("with unlabelled scans, DRDM", "#d1495b"),
    ("drdm-tuned", True): ("the same, DRDM fine-tuned", "#e9a03b"),
}
"""Arm, and whether it has unlabelled scans: its name and colour."""
TITLES = {"acdc": "heart (ACDC)", "hippocampus": "hippocampus", "ixi": "brain (IXI)"}


def draw(path: Path) -> None:
    """Write the figure: a panel a data set, a group a number of labelled subjects, a dot a draw, a line their mean."""
    tested = [row for row in read_rows(HERE / "consistency.jsonl") if row["what"] == "test"]
    groups = {name: sorted({row["subjects"] for row in tested if row["protocol"] == name}) for name in TITLES}
    groups = {name: counts for name, counts in groups.items() if counts}
    widths = [len(counts) for counts in groups.values()]
    figure = plt.figure(figsize=(1.2 + 2.1 * sum(widths), 4.2), layout="constrained")
    axes = figure.subplots(1, len(groups), width_ratios=widths, squeeze=False, sharey=True)
    for (name, counts), panel in zip(groups.items(), axes[0]):
        draw_panel(panel, name, counts, [row for row in tested if row["protocol"] == name])
    axes[0, 0].set_ylabel("Dice of test subjects, %")
    shown = {name: mark for panel in axes[0] for mark, name in zip(*panel.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), frameon=False, fontsize=9, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=130)


def draw_panel(panel: Axes, name: str, counts: list[int], tested: list[Row]) -> None:
    """Draw what the rows of one data set say."""
    rows = read_rows(HERE / f"{name}.jsonl")
    alone, _ = split([row for row in rows if row["subjects"] in COUNTS])
    found = {True: tested, False: alone}
    for group, count in enumerate(counts):
        measured = {
            way: [dice_of(row) for row in found[way[1]] if (row["arm"], row["subjects"]) == (way[0], count)]
            for way in WAYS
        }
        there = [way for way in WAYS if measured[way]]
        for place, way in enumerate(there):
            at = group + (place - (len(there) - 1) / 2) * 0.8 / len(WAYS)
            label, colour = WAYS[way]
            panel.hlines(np.mean(measured[way]), at - 0.32 / len(WAYS), at + 0.32 / len(WAYS), colour, linewidth=4)
            dots = [at] * len(measured[way])
            panel.plot(dots, measured[way], "o", color=colour, markersize=5, alpha=0.6, label=label)
    pool = len(DOMAINS[PROTOCOLS[name].domain].splits["pool"])
    everyone = [dice_of(row) for row in rows if row["arm"] == "affine" and row["subjects"] == pool]
    if everyone:
        panel.axhline(np.mean(everyone), color="#9aa5b1", linestyle="--", label="all scans labelled")
    panel.set_xticks(range(len(counts)), [f"{count} labelled" for count in counts])
    panel.set_xlim(-0.5, len(counts) - 0.5)
    panel.set_title(TITLES[name])
    panel.grid(axis="y", color="#e3e6ea")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def dice_of(row: Row) -> float:
    """Dice of a training, in percent, over structures and test subjects."""
    return float(100 * by_structure(row, "dice").mean())


if __name__ == "__main__":
    mpl.use("agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="picture to write")
    draw(parser.parse_args().path)
