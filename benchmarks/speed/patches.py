"""Time the field of a 3D patch beside that of the whole volume: the network's grid is the same for both.

python benchmarks/speed/patches.py
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from monai_drdm.deformation import FieldDrawer

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine

SIDES, TURNS = (32, 64, 128), 5


def main() -> None:
    drawer = FieldDrawer("anatomy-3d", deformation_level=0.5)
    images = {side: torch.rand(1, side, side, side, generator=torch.Generator().manual_seed(side)) for side in SIDES}
    seconds: dict[int, list[float]] = {side: [] for side in SIDES}
    drawer.draw(images[SIDES[0]], (1.0, 1.0, 1.0), 0)  # loads the network
    for turn in range(TURNS):
        for side, image in images.items():
            start = time.perf_counter()
            drawer.draw(image, (1.0, 1.0, 1.0), turn)
            seconds[side].append(time.perf_counter() - start)
    row = {**machine(), "seconds": {str(side): sorted(round(one, 3) for one in each) for side, each in seconds.items()}}
    append_rows(Path(__file__).parent / "patches.jsonl", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
