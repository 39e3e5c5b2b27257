"""Find the integration times of ``monai_drdm.diffusion.schedule`` that give the published mean displacements.

For levels 0.1 to 1.0 the released process is drawn (256² in 2D, 128³ in 3D) and its mean displacement, as a fraction of
the image size, is averaged over draws. A bisection then finds the time for which the consistent process has the same
mean on the same number of draws. Prints one JSON line per dimension.

    python tools/calibrate_levels.py --dims 2 --draws 200
    python tools/calibrate_levels.py --dims 3 --draws 12
"""

from __future__ import annotations

import argparse
import json

import torch
from tqdm import tqdm

from monai_drdm.diffusion.diffuse import diffuse_published
from monai_drdm.diffusion.schedule import time_step
from monai_drdm.fields import exp_svf, isotropic_velocity

LEVELS = [k / 10 for k in range(1, 11)]
PUBLISHED_SIZE = {2: 256, 3: 128}
CONSISTENT_SIZE = {2: 256, 3: 64}  # fractions of the image size do not depend on the grid, and a small grid saves time


def mean_fraction(ddf: torch.Tensor, size: float) -> list[float]:
    """Mean displacement of each sample as a fraction of ``size``."""
    return (ddf.norm(dim=1).flatten(1).mean(dim=1) / size).tolist()


def published(dims: int, level: float, draws: int) -> torch.Tensor:
    """Mean displacement of each released draw, as a fraction of the image size."""
    values = []
    for seed in range(draws):
        ddf, _ = diffuse_published([torch.Generator().manual_seed(seed)], PUBLISHED_SIZE[dims], dims, time_step(level))
        values += mean_fraction(ddf, 1.0)
    return torch.tensor(values)


def consistent(velocities: list[torch.Tensor], time: float) -> torch.Tensor:
    """Mean displacement of each consistent draw, as a fraction of the image size."""
    return torch.tensor([mean_fraction(exp_svf(v * time), v.shape[-1])[0] for v in velocities])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, choices=(2, 3), required=True)
    parser.add_argument("--draws", type=int, required=True)
    args = parser.parse_args()
    shape = (CONSISTENT_SIZE[args.dims],) * args.dims
    velocities = [isotropic_velocity([torch.Generator().manual_seed(10_000 + s)], shape) for s in range(args.draws)]
    times, targets, errors = [], [], []
    for level in tqdm(LEVELS, desc=f"{args.dims}D"):
        target = published(args.dims, level, args.draws)
        low, high = 0.0, 100.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if consistent(velocities, middle).mean() < target.mean() else (low, middle)
        times.append(round((low + high) / 2, 2))
        targets.append(round(float(target.mean()), 5))
        errors.append(round(float(target.std() / args.draws**0.5), 5))
    print(
        json.dumps(
            {
                "dims": args.dims,
                "draws": args.draws,
                "integration_time": times,
                "published_mean_fraction": targets,
                "standard_error": errors,
            }
        )
    )


if __name__ == "__main__":
    main()
