"""Arguments and exit codes that several commands share."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

SKIPPED = 3
"""Exit code of a run that left out some cases and finished all others."""
EXIT_CODES = (
    "Exit codes: 0 all written, 1 an error that is explained, 2 a wrong call, 3 some cases skipped, 130 interrupted."
)

LEVEL_RANGE = (0.3, 0.8)
"""The range of deformation levels, unless another is given."""
_DRAW_OPTIONS = ("network", "seed", "sampler", "steps", "recovery", "symmetry", "slice_axis", "max_displacement_mm")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add ``--network``."""
    parser.add_argument(
        "--network",
        default="auto",
        help="network name, as monai-drdm weights list shows them, or .safetensors file (default: auto, the network in "
        "this package for the image's dimensions)",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add ``--seed``."""
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def add_draw_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of a draw that ``draw_options`` collects, and the device that it is computed on."""
    add_network(parser)
    add_seed(parser)
    parser.add_argument(
        "--sampler",
        default="auto",
        help="velocity, for our networks and your own; fast or reference, as released, for published ones; or auto "
        "(default: auto, the network's own)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="recovery steps, 1 or more; reference always takes 80 (default: the network's own, 12 for all in this "
        "package)",
    )
    parser.add_argument(
        "--recovery",
        type=float,
        default=1.0,
        help="factor on every recovery step in [0, 1], for sampler velocity: less leaves more of the random field "
        "(default: 1)",
    )
    parser.add_argument(
        "--symmetry",
        type=float,
        default=1.0,
        help="how far the halves of a symmetric anatomy are kept alike, in [0, 1]; 0 is not at all (default: 1)",
    )
    parser.add_argument(
        "--slice-axis",
        type=int,
        metavar="AXIS",
        help="deform volumes with a 2D network, by one in-plane field across axis 0, 1 or 2 (default: none)",
    )
    parser.add_argument("--max-displacement-mm", type=float, help="scale fields down to this (default: no limit)")
    parser.add_argument("--device", help="where the network runs: cpu, cuda, cuda:1 and so on (default: cpu)")


def draw_options(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a draw by name; the device is not one of them, because it does not change the result."""
    return {name: getattr(options, name) for name in _DRAW_OPTIONS}


def add_cases(parser: argparse.ArgumentParser) -> None:
    """Add where images come from and where results go."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=named_path, help="folder of images (NIfTI, .mha, .nrrd, .png)")
    source.add_argument("--datalist", type=named_path, help="MONAI datalist (JSON) instead of folders")
    parser.add_argument("--section", default="training", help="section of the datalist (default: training)")
    parser.add_argument(
        "--out", type=named_path, required=True, help="new folder, or one of an earlier run to go on with"
    )


def named_path(text: str) -> Path:
    """A path of the command line. An empty one, as of a shell variable that is not set, is not the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def add_parallel_work(parser: argparse.ArgumentParser) -> None:
    """Add how the work is shared among processes and jobs."""
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work (default: 1)")
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only part I of N, counted from 0: for array jobs into one folder (default: all)",
    )


def shown(numbers: Sequence[float]) -> str:
    """Numbers as a user types them."""
    return " ".join(f"{number:g}" for number in numbers)


def require_matplotlib(what: str) -> None:
    """Raise ``ValueError`` if matplotlib, which ``what`` needs, is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{what} needs matplotlib: pip install 'monai-drdm[viz]'.")


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return int(part), int(parts)
