"""``monai-drdm demo``: deform one scan and show the result."""

from __future__ import annotations

import argparse
from pathlib import Path

from monai_drdm.commands.arguments import add_network, add_seed, Commands, named_path, require_matplotlib


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("demo", help="deform one real scan and show what happened")
    parser.add_argument(
        "--image", type=named_path, help="NIfTI image, 2D or 3D; default: the MR volume in nibabel's test data"
    )
    parser.add_argument(
        "--label", type=named_path, help="NIfTI label map of the image; default: a threshold foreground"
    )
    parser.add_argument(
        "--out", type=named_path, default=Path("demo_output"), help="new or empty folder (default: demo_output)"
    )
    add_network(parser)
    parser.add_argument("--level", type=float, default=0.6, help="deformation level in (0, 1] (default: 0.6)")
    add_seed(parser)
    parser.set_defaults(run=run, needs=("monai_drdm.transforms",))


def run(options: argparse.Namespace) -> int:
    """Run the demonstration and print the files that it wrote."""
    from monai_drdm.demonstration import run_demo

    require_matplotlib("demo")
    for path in run_demo(options.image, options.label, options.out, options.network, options.level, options.seed):
        print(path)
    return 0
