"""Arguments that several commands have, and what is made of them."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

EXIT_SKIPPED = 3
EXIT_CODES = (
    "Exit codes: 0 all written, 1 an error that is explained, 2 a wrong call, 3 some cases skipped, 130 interrupted."
)
_DRAW = ("network", "sampler", "steps", "recovery", "slice_axis", "max_displacement_mm")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Where images come from, and where results go."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of images (NIfTI, .mha, .nrrd, .png)")
    source.add_argument("--datalist", type=Path, help="MONAI datalist (JSON) instead of folders")
    parser.add_argument("--section", default="training", help="section of the datalist (default: training)")
    parser.add_argument("--out", type=Path, required=True, help="new folder, or one to go on in")


def add_draw_arguments(parser: argparse.ArgumentParser) -> None:
    """How fields are drawn; what is left out is as in ``monai_drdm.deformation.options``."""
    parser.add_argument("--network", default="auto", help="network name or .safetensors file (default: auto)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--sampler", default="auto", help="sampler (default: the network's)")
    parser.add_argument("--steps", type=int, help="recovery steps (default: the network's)")
    parser.add_argument("--recovery", type=float, default=1.0, help="factor on recovery steps in [0, 1] (default: 1)")
    parser.add_argument(
        "--slice-axis", type=int, help="deform volumes by one in-plane field across this axis (0, 1, 2)"
    )
    parser.add_argument("--max-displacement-mm", type=float, help="scale fields down to this")
    parser.add_argument("--device", help="where the network runs (default: cpu)")


def draw_options(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a draw that were given."""
    return {name: getattr(options, name) for name in _DRAW}


def add_split_arguments(parser: argparse.ArgumentParser) -> None:
    """How the work is shared by processes and machines."""
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work (default: 1)")
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only part I of N, counted from 0: for array jobs into one folder"
    )


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N, such as 0/4")
    return int(part), int(parts)


def require_matplotlib(what: str) -> None:
    """Raise ``ValueError`` unless figures can be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"{what} needs matplotlib: pip install 'monai-drdm[viz]'.")
