"""``monai-drdm augment``: a data set on disk, deformed."""

from __future__ import annotations

import argparse

from monai_drdm.commands.cases import add_case_arguments, fill_folder, settings_of

_DESCRIPTION = (
    "Draw fields for every case and level and write deformed images and labels, the fields, records that replay them, "
    "and a MONAI datalist. Affines, orientation and data types are kept. An interrupted run goes on when it is called "
    "again."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_case_arguments(parser, _DESCRIPTION)
    parser.add_argument("--levels", type=float, nargs="+", default=[0.3, 0.5, 0.8], help="deformation levels in (0, 1]")
    parser.add_argument("--draws", type=int, default=1, help="fields per case and level (default: 1)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from monai_drdm.augment import augment, AugmentSettings

    settings = AugmentSettings(levels=tuple(options.levels), draws=options.draws, **settings_of(options))
    return fill_folder(options, augment, settings)
