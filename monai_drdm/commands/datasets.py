"""What ``augment`` and ``pairs`` have in common: both turn a data set on disk into another one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TYPE_CHECKING

from monai_drdm.commands.arguments import (
    add_cases,
    add_draw_options,
    add_parallel_work,
    draw_options,
    named_path,
    require_matplotlib,
    SKIPPED,
)

if TYPE_CHECKING:
    from monai_drdm.augment import AugmentReport
    from monai_drdm.augment.dataset_settings import DatasetSettings


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both commands."""
    add_cases(parser)
    parser.add_argument(
        "--labels", type=named_path, help="folder of label maps, named as the images are (default: none)"
    )
    add_draw_options(parser)
    parser.add_argument(
        "--label-mode",
        choices=("nearest", "label"),
        default="nearest",
        help="how labels are resampled: the nearest voxel, or each class linearly (default: nearest)",
    )
    add_parallel_work(parser)
    parser.add_argument("--figure", action="store_true", help="plot the first cases, one row each: overview.png")
    parser.add_argument("--force", action="store_true", help="draw everything again; replaces files of the same name")


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that ``AugmentSettings`` and ``PairSettings`` share."""
    return {**draw_options(options), "label_mode": options.label_mode}


def run_on_dataset(
    options: argparse.Namespace, function: Callable[..., AugmentReport], settings: DatasetSettings
) -> int:
    """Find the cases, run ``augment`` or ``make_pairs`` on them and print the report."""
    from monai_drdm.augment import plot_overview
    from monai_drdm.executors import worker_processes
    from monai_drdm.io import find_cases, read_cases

    if options.figure:
        require_matplotlib("--figure")
    if options.datalist is not None and options.labels is not None:
        raise ValueError("--labels goes with --images; a datalist names its labels itself.")
    cases = (
        read_cases(options.datalist, options.section, several_images=settings.several_images)
        if options.datalist
        else find_cases(options.images, options.labels)
    )
    with worker_processes(options.workers) as executor:
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
        print(plot_overview(report))
    return SKIPPED if report.failed else 0
