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

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import read_rows
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
}
"""Arm, and whether it has unlabelled scans: its name and colour."""
TITLES = {"acdc": "heart (ACDC)", "hippocampus": "hippocampus", "ixi": "brain (IXI)"}


def draw(path: Path) -> None:
    """Write the figure: a panel a data set, a group a number of labelled subjects, a dot a draw, a bar their mean."""
    tested = [row for row in read_rows(HERE / "consistency.jsonl") if row["what"] == "test"]
    names = [name for name in TITLES if any(row["protocol"] == name for row in tested)]
    figure, axes = plt.subplots(1, len(names), figsize=(1 + 5.2 * len(names), 3.8), squeeze=False, layout="constrained")
    for name, panel in zip(names, axes[0]):
        alone, _ = split([row for row in read_rows(HERE / f"{name}.jsonl") if row["subjects"] in COUNTS])
        found = {True: [row for row in tested if row["protocol"] == name], False: alone}
        counts = sorted({row["subjects"] for row in found[True]} | {row["subjects"] for row in alone})
        ways = [way for way in WAYS if any(row["arm"] == way[0] for row in found[way[1]])]
        for group, count in enumerate(counts):
            measured = {
                way: [row for row in found[way[1]] if (row["arm"], row["subjects"]) == (way[0], count)] for way in ways
            }
            there = [way for way in ways if measured[way]]
            for place, way in enumerate(there):
                values = [100 * by_structure(row, "dice").mean() for row in measured[way]]
                at = group + (place - (len(there) - 1) / 2) * 0.8 / len(ways)
                label, colour = WAYS[way]
                panel.bar(at, np.mean(values), 0.72 / len(ways), color=colour, label=label)
                panel.plot([at] * len(values), values, "o", color="black", markersize=3)
        panel.set_xticks(range(len(counts)), [f"{count} labelled" for count in counts])
        panel.set(title=TITLES[name], ylabel="Dice of test subjects, %")
        low = min(100 * by_structure(row, "dice").mean() for rows in found.values() for row in rows)
        panel.set_ylim(max(0, 5 * ((low - 5) // 5)), None)
        panel.spines[["top", "right"]].set_visible(False)
    shown = {name: bar for panel in axes[0] for bar, name in zip(*panel.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    mpl.use("agg")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="picture to write")
    draw(parser.parse_args().path)
