"""``monai-drdm pairs``: make registration pairs with known fields from a data set on disk."""

from __future__ import annotations

import argparse

from monai_drdm.commands.arguments import Commands, EXIT_CODES, LEVEL_RANGE, shown
from monai_drdm.commands.datasets import add_dataset_arguments, common_settings, run_on_dataset

_DESCRIPTION = (
    "Make synthetic registration pairs of every image (paper, Algorithm 4): a moving image, a fixed one, the exact "
    "field between them and its inverse as ITK displacement fields, labels, records and a MONAI datalist. An "
    "interrupted run goes on when it is called again."
)


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("pairs", help="make registration pairs", description=_DESCRIPTION, epilog=EXIT_CODES)
    add_dataset_arguments(parser)
    parser.add_argument("--pairs", type=int, default=1, help="pairs of every image (default: 1)")
    for name, text in (("augmentation", "that makes the moving image"), ("synthesis", "between the images")):
        parser.add_argument(
            f"--{name}-level",
            type=float,
            nargs=2,
            default=LEVEL_RANGE,
            metavar=("LOW", "HIGH"),
            help=f"range of levels of the field {text} in (0, 1] (default: {shown(LEVEL_RANGE)})",
        )
    parser.add_argument("--no-augmentation", action="store_true", help="the moving images are the given ones")
    parser.set_defaults(run=run, needs=("monai_drdm.augment",))


def run(options: argparse.Namespace) -> int:
    """Make pairs of the data set that the options name."""
    from monai_drdm.augment import make_pairs, PairSettings

    settings = PairSettings(
        augmentation_level=None if options.no_augmentation else tuple(options.augmentation_level),
        synthesis_level=tuple(options.synthesis_level),
        pairs=options.pairs,
        **common_settings(options),
    )
    return run_on_dataset(options, make_pairs, settings)
