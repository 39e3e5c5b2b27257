"""Measure time and memory of warping a 3D label map of many classes, beside one linear warp of the same size.

python benchmarks/speed/label_warp.py --size 192 --classes 100
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from monai_drdm.fields import warp

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    shape = (args.size,) * 3
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, args.classes, (1, 1, 24, 24, 24), generator=generator)
    label = F.interpolate(blocks.float(), shape, mode="nearest").to(torch.uint8)
    ddf = F.interpolate(torch.randn(1, 3, 6, 6, 6, generator=generator) * 4, shape, mode="trilinear")
    row: dict[str, object] = {"size": args.size, "classes": args.classes, "runs": args.runs, **machine()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data, mode in (
        ("label", label, "label"),
        ("nearest", label, "nearest"),
        ("linear", label.float(), "bilinear"),
    ):
        seconds = []
        for _ in range(args.runs):
            start = time.perf_counter()
            warp(data, ddf, mode)
            seconds.append(time.perf_counter() - start)
        row[f"{name}_seconds"] = sorted(round(s, 3) for s in seconds)
        if name == "label":
            row["label_peak_mib"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    append_rows(Path(__file__).parent / "label_warp.jsonl", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
