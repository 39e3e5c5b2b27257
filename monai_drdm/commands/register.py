"""``monai-drdm register``: register two images or, without images, train a registration network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from monai_drdm.commands.arguments import Commands, named_path, require_matplotlib

_DESCRIPTION = (
    "Bring a moving image, and its labels, onto a fixed one: warped image, field for ITK and ANTs, labels, record and "
    "figure. Affine, orientation, voxel size and data type are kept. Images may lie on different grids. The headers "
    "give the starting position, and images are resampled once. Without --network, --affine and --refine they are "
    "registered by an affine map and 40 steps of refinement."
)
_TRAINING = (
    "Without images the command trains a network: monai-drdm register --pairs FOLDER --out RUN. "
    "python -m monai_drdm.registration.train --help lists its arguments."
)

_OF_TRAINING = ("--pairs", "--images", "--config", "--set", "--init", "--max-minutes", "--resume")


def trains(arguments: Sequence[str]) -> bool:
    """Whether a command line, after the word ``register``, is one of the training command."""
    if not arguments:
        return True
    return arguments[0].startswith("-") and any(word.partition("=")[0] in _OF_TRAINING for word in arguments)


def train(arguments: Sequence[str]) -> int:
    """Run the training command and return its exit code."""
    from monai_drdm.registration.train import main

    return main(arguments, "monai-drdm register")


def add_parser(commands: Commands) -> None:
    """Add the command that registers two images, and its arguments."""
    parser = commands.add_parser(
        "register",
        help="register two images, or train a registration network",
        description=_DESCRIPTION,
        epilog=_TRAINING,
    )
    parser.add_argument("moving", type=named_path, help="image to move (NIfTI, .mha, .nrrd, .png)")
    parser.add_argument("fixed", type=named_path, help="image that it is brought onto, and whose grid results have")
    parser.add_argument(
        "--network",
        help="registration-3d, or network.safetensors of a run that trained a registration network (default: none)",
    )
    parser.add_argument("--labels", type=named_path, help="label map of the moving image (default: none)")
    parser.add_argument(
        "--affine", action="store_true", help="first look for the best affine map, as different people need it"
    )
    parser.add_argument(
        "--refine",
        type=int,
        metavar="STEPS",
        help="at last optimise the field for this pair, for STEPS steps and without folds; 30 to 50 are enough "
        "(default: none; 40, and an affine map, if no stage is chosen)",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="how often --network registers, each time what is left (default: 1)"
    )
    parser.add_argument("--device", default="cpu", help="where it runs: cpu, cuda, cuda:1 and so on (default: cpu)")
    parser.add_argument("--out", type=named_path, required=True, help="new or empty folder")
    parser.set_defaults(run=run, needs=("monai_drdm.registration.pair_files",))


def run(options: argparse.Namespace) -> int:
    """Register the images that the options name, and print the files written."""
    from monai_drdm.registration import PairSettings, register_files
    from monai_drdm.registration.pair_files import USUAL_STEPS

    require_matplotlib("register")
    stages = (options.affine, options.refine or 0)
    if options.network is None and not options.affine and options.refine is None:
        stages = (True, USUAL_STEPS)
    settings = PairSettings(*stages, options.rounds, options.device)
    written = register_files(options.moving, options.fixed, options.network, options.out, options.labels, settings)
    for path in written:
        print(path)
    return 0
