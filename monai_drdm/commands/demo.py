"""``monai-drdm demo``: one scan, deformed and shown."""

from __future__ import annotations

import argparse
from pathlib import Path

from monai_drdm.commands.arguments import require_matplotlib


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument(
        "--image", type=Path, help="NIfTI image, 2D or 3D; default: the MR volume in nibabel's test data"
    )
    parser.add_argument("--label", type=Path, help="NIfTI label map of the image; default: a threshold foreground")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="new or empty folder (default: demo_output)"
    )
    parser.add_argument("--network", default="auto", help="network name or .safetensors file (default: auto)")
    parser.add_argument("--level", type=float, default=0.6, help="deformation level in (0, 1] (default: 0.6)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from monai_drdm.demo import run_demo

    require_matplotlib("demo")

    for path in run_demo(options.image, options.label, options.out, options.network, options.level, options.seed):
        print(path)
    return 0
