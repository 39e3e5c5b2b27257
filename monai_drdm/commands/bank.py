"""``monai-drdm bank``: draw the fields of images ahead of training, and show what a bank holds."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from monai_drdm.commands.arguments import (
    add_cases,
    add_draw_options,
    add_parallel_work,
    Commands,
    draw_options,
    EXIT_CODES,
    LEVEL_RANGE,
    named_path,
    shown,
    SKIPPED,
)

_DESCRIPTION = (
    "Draw fields for every image ahead of training, as RandDRDMBankd takes them. Images are known by their file names "
    "without suffix or, where those repeat, by their paths below the common folder, joined by '_': put this name into "
    "each sample, and name that entry with id_key of RandDRDMBankd. Apply it to images as they are on disk, before "
    "anything changes their grid or their values. A volume of one slice is a 2D image here, unless --slice-axis is "
    "given: drop its axis in the pipeline too (SqueezeDimd). An interrupted build goes on when it is called again."
)


def add_parser(commands: Commands) -> None:
    """Add the command, its actions and their arguments."""
    parser = commands.add_parser("bank", help="draw fields ahead of training")
    actions = parser.add_subparsers(dest="action", required=True)
    build = actions.add_parser(
        "build", help="draw the fields of a folder or datalist", description=_DESCRIPTION, epilog=EXIT_CODES
    )
    add_cases(build)
    build.add_argument("--fields", type=int, default=16, help="fields for each image (default: 16)")
    build.add_argument(
        "--level",
        type=float,
        nargs=2,
        default=LEVEL_RANGE,
        metavar=("LOW", "HIGH"),
        help=f"range of deformation levels in (0, 1] (default: {shown(LEVEL_RANGE)})",
    )
    add_draw_options(build)
    build.add_argument("--max-bytes", type=int, help="stop before the bank grows larger (default: no limit)")
    add_parallel_work(build)
    build.set_defaults(run=run_build, needs=("monai_drdm.bank",))
    info = actions.add_parser("info", help="what a bank holds")
    info.add_argument("folder", type=named_path, help="folder of the bank")
    info.set_defaults(run=run_info, needs=("monai_drdm.bank",))


def run_build(options: argparse.Namespace) -> int:
    """Build the bank of the images that the options name."""
    from monai_drdm.bank import DeformationBank
    from monai_drdm.bank.files import CaseImages
    from monai_drdm.executors import worker_processes
    from monai_drdm.io import find_cases, read_cases
    from monai_drdm.progress import none_usable

    cases = read_cases(options.datalist, options.section) if options.datalist else find_cases(options.images)
    with worker_processes(options.workers) as executor:
        bank = DeformationBank.build(
            CaseImages(cases, keep_slice=options.slice_axis is not None),
            id_key="name",
            path=options.out,
            executor=executor,
            shard=options.shard,
            skip_failed=True,
            fields_per_image=options.fields,
            deformation_level=tuple(options.level),
            device=options.device,
            max_bytes=options.max_bytes,
            **draw_options(options),
        )
    if options.shard is None and len(bank.failed) == len(cases):
        raise ValueError(none_usable(bank.failed))
    for name, why in bank.failed.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    print(f"{len(bank)} images, {len(bank.failed)} skipped, {bank.nbytes / 1e6:.1f} MB in {options.out}")
    return SKIPPED if bank.failed else 0


def run_info(options: argparse.Namespace) -> int:
    """Print the size and the settings of a bank."""
    from monai_drdm.bank import DeformationBank

    bank = DeformationBank(options.folder)
    assert bank.settings is not None
    print(f"{len(bank)} images, {bank.nbytes / 1e6:.1f} MB")
    print("\n".join(f"{name}: {value}" for name, value in asdict(bank.settings).items()))
    return 0
