"""``monai-drdm augment``: deform a data set on disk."""

from __future__ import annotations

import argparse

from monai_drdm.commands.arguments import Commands, EXIT_CODES, shown
from monai_drdm.commands.datasets import add_dataset_arguments, common_settings, run_on_dataset

_DESCRIPTION = (
    "Draw fields for every case and level and write deformed images and labels, the fields, records that replay them, "
    "and a MONAI datalist. Affines, orientation and data types are kept. An interrupted run goes on when it is called "
    "again."
)
_LEVELS = (0.3, 0.5, 0.8)


def add_parser(commands: Commands) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "augment", help="deform a data set on disk", description=_DESCRIPTION, epilog=EXIT_CODES
    )
    add_dataset_arguments(parser)
    parser.add_argument(
        "--levels",
        type=float,
        nargs="+",
        default=_LEVELS,
        metavar="LEVEL",
        help="deformation levels in (0, 1], one or more; the larger, the further from the original "
        f"(default: {shown(_LEVELS)})",
    )
    parser.add_argument("--draws", type=int, default=1, help="fields per case and level (default: 1)")
    parser.add_argument(
        "--image-number",
        type=int,
        default=0,
        help="which of several images of a datalist's entry, counted from 0, the network sees (default: 0)",
    )
    parser.set_defaults(run=run, needs=("monai_drdm.augment",))


def run(options: argparse.Namespace) -> int:
    """Augment the data set that the options name."""
    from monai_drdm.augment import augment, AugmentSettings

    settings = AugmentSettings(
        levels=tuple(options.levels),
        draws=options.draws,
        image_number=options.image_number,
        **common_settings(options),
    )
    return run_on_dataset(options, augment, settings)
