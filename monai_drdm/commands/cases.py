"""What ``augment`` and ``pairs`` share: cases on disk in, files and a datalist out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TYPE_CHECKING

from monai_drdm.commands.arguments import (
    add_draw_arguments,
    add_source_arguments,
    add_split_arguments,
    draw_options,
    EXIT_CODES,
    EXIT_SKIPPED,
    require_matplotlib,
)

if TYPE_CHECKING:
    from monai_drdm.augment import AugmentReport


def add_case_arguments(parser: argparse.ArgumentParser, description: str) -> None:
    """The arguments of both commands."""
    parser.description, parser.epilog = description, EXIT_CODES
    add_source_arguments(parser)
    parser.add_argument("--labels", type=Path, help="folder of label maps with the file names of the images")
    add_draw_arguments(parser)
    parser.add_argument(
        "--label-mode", choices=("nearest", "label"), default="nearest", help="how labels are resampled"
    )
    add_split_arguments(parser)
    parser.add_argument("--figure", action="store_true", help="show the first cases before and after: overview.png")
    parser.add_argument("--force", action="store_true", help="draw everything again; replaces files of the same name")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that both commands have."""
    return {**draw_options(options), "label_mode": options.label_mode, "seed": options.seed}


def fill_folder(options: argparse.Namespace, function: Callable[..., AugmentReport], settings: object) -> int:
    """Do the work on all cases, and say what was done; the exit code."""
    from monai_drdm.augment import draw_overview
    from monai_drdm.executors import workers
    from monai_drdm.io import find_cases, read_cases

    if options.figure:
        require_matplotlib("--figure")
    if options.datalist is not None and options.labels is not None:
        raise ValueError("--labels goes with --images; a datalist names its labels itself.")
    cases = (
        read_cases(options.datalist, options.section)
        if options.datalist
        else find_cases(options.images, options.labels)
    )
    with workers(options.workers) as executor:
        report = function(
            cases,
            options.out,
            settings,
            force=options.force,
            device=options.device,
            progress=True,
            executor=executor,
            shard=options.shard,
        )
    print(f"{report.written} written, {report.kept} already there, {len(report.failed)} cases skipped")
    print(report.datalist)
    if options.figure and report.written + report.kept:
        print(draw_overview(report))
    return EXIT_SKIPPED if report.failed else 0
