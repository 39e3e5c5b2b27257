"""Measure how fast rounding differences grow in the released recovery, so that two machines end in different fields.

Runs the released 80 steps on one recorded slice, alone and with the start perturbed by Gaussian noise of 1e-5 px, and
prints the mean distance between the two after each step and from the recorded result at the end. Needs the recorded
trajectory ``recovery_cmr_T48.npz`` in MONAI_DRDM_REFERENCE and the published weights.

    python benchmarks/robustness/recursion_chaos.py
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from monai_drdm.diffusion import recover_reference, RecoveryStep
from monai_drdm.fields import fractions_to_voxels
from monai_drdm.networks import load_network

sys.path.insert(0, str(Path(__file__).parents[1]))  # the parts that all benchmarks share
from common.rows import append_rows, machine


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    recorded = np.load(Path(os.environ["MONAI_DRDM_REFERENCE"]) / "recovery_cmr_T48.npz")
    image, start, end = (torch.from_numpy(recorded[key]) for key in ("image", "ddf_diffused", "ddf_recovered"))
    start, end = fractions_to_voxels(start), fractions_to_voxels(end)
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)) * 1e-5
    distances = []

    def measure(step: RecoveryStep) -> None:
        distances.append(float((step.ddf[0] - step.ddf[1]).norm(dim=0).mean()))

    pair = recover_reference(
        load_network("zheng2026-cmr-2d"),
        image.expand(2, -1, -1, -1),
        torch.cat([start, start + noise]),
        callback=measure,
        progress=True,
    )
    to_recorded = (pair - end).norm(dim=1).flatten(1).mean(dim=1).tolist()
    row = {"mean_distance_px_after_step": distances, "mean_distance_px_to_recorded": to_recorded, **machine()}
    append_rows(Path(__file__).parent / "recursion_chaos.jsonl", row)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
