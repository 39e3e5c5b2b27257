"""``monai-drdm demo``: deform one scan and show the result."""

from __future__ import annotations

import argparse
from pathlib import Path

from monai_drdm.commands.arguments import add_network, add_seed, Commands, named_path, require_matplotlib


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("demo", help="deform one scan, a drawn one or your own, and show what happened")
    parser.add_argument(
        "--image", type=named_path, help="NIfTI image, 2D or 3D (default: a drawn slice through a chest)"
    )
    parser.add_argument("--label", type=named_path, help="NIfTI label map of the image (default: what is bright in it)")
    parser.add_argument(
        "--out", type=named_path, default=Path("demo_output"), help="new or empty folder (default: demo_output)"
    )
    add_network(parser)
    parser.add_argument("--level", type=float, default=0.4, help="deformation level in (0, 1] (default: 0.4)")
    add_seed(parser)
    parser.set_defaults(run=run, needs=("monai_drdm.transforms",))


def run(options: argparse.Namespace) -> int:
    """Run the demonstration, print the files that it wrote and say which one to look at."""
    from monai_drdm.demonstration import run_demo

    require_matplotlib("demo")
    written = run_demo(options.image, options.label, options.out, options.network, options.level, options.seed)
    for path in written:
        print(path)
    if options.image is None:
        print(
            "\nThis was a drawn scan. Your own: monai-drdm demo --image SCAN.nii.gz --label LABEL.nii.gz --out FOLDER"
        )
    print(f"\nOpen {written[-1]}")
    return 0
