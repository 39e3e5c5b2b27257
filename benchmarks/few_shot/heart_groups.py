"""How alike are the hearts of the patients to learn from, to choose on and to test on?

Prints, for patients in the order of their numbers, how much of the left ventricle's volume a heartbeat ejects, and how
thick the muscle is beside the cavity; both from the manual labels of the slices that the benchmarks use.

    python benchmarks/few_shot/heart_groups.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.scans import data_folder

GROUPS = {
    "pool, 1-20": (1, 20),
    "pool, 21-40": (21, 40),
    "pool, 41-60": (41, 60),
    "validation": (61, 70),
    "test": (71, 80),
}
MUSCLE, CAVITY = 2, 3


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    archive = np.load(data_folder() / "acdc" / "acdc2d_160.npz")
    patient, phase = archive["patient"], archive["phase"]
    volume = {one: (archive["label"] == one).sum(axis=(1, 2)) for one in (MUSCLE, CAVITY)}
    print("| patients | ejection fraction | muscle over cavity, diastole |\n|---|---|---|")
    for name, (first, last) in GROUPS.items():
        ejected, muscle = [], []
        for number in range(first, last + 1):
            full, empty = ((patient == number) & (phase == one) for one in (0, 1))
            ejected.append(1 - volume[CAVITY][empty].sum() / volume[CAVITY][full].sum())
            muscle.append(volume[MUSCLE][full].sum() / volume[CAVITY][full].sum())
        cells = [f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" for values in (ejected, muscle)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
