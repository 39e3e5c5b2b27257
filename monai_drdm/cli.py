"""The command ``monai-drdm``, also ``python -m monai_drdm.cli``."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from monai_drdm._version import __version__
from monai_drdm.networks import convert_published, list_networks, network_card, pull_network, weights_folder
from monai_drdm.networks.weights import read_network


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 an error that is explained, 2 a wrong call."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
    except (OSError, TypeError, ValueError) as error:
        print(f"monai-drdm: {error}", file=sys.stderr)
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="monai-drdm", description="Plausible random anatomy by deformation recovery.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="deform one real scan and draw what happened")
    demo.add_argument("--image", type=Path, help="NIfTI image, 2D or 3D; default: the MR volume in nibabel's test data")
    demo.add_argument("--label", type=Path, help="NIfTI label map of the image; default: a threshold foreground")
    demo.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="new or empty folder (default: demo_output)"
    )
    demo.add_argument("--network", default="auto", help="network name or .safetensors file (default: auto)")
    demo.add_argument("--level", type=float, default=0.6, help="deformation level in (0, 1] (default: 0.6)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    demo.set_defaults(run=_demo)

    weights = commands.add_parser("weights", help="list, pull, convert and verify network weights")
    actions = weights.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="known networks and where their weights are").set_defaults(run=_list)
    pull = actions.add_parser("pull", help="download published weights at a pinned commit, hash checked")
    pull.add_argument("name", choices=list_networks())
    pull.add_argument("--folder", type=Path, help="where to write (default: MONAI_DRDM_WEIGHTS or the user cache)")
    pull.set_defaults(run=_pull)
    convert = actions.add_parser("convert", help="convert a published .pth, recognised by its hash")
    convert.add_argument("file", type=Path)
    convert.add_argument("--folder", type=Path, help="where to write (default: MONAI_DRDM_WEIGHTS or the user cache)")
    convert.set_defaults(run=_convert)
    verify = actions.add_parser("verify", help="check hash and content of weights")
    verify.add_argument("network", nargs="+", help="network name or .safetensors file")
    verify.set_defaults(run=_verify)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from monai_drdm.demo import run_demo  # matplotlib is an extra

    for path in run_demo(options.image, options.label, options.out, options.network, options.level, options.seed):
        print(path)
    return 0


def _list(_: argparse.Namespace) -> int:
    folder = weights_folder()
    print(f"weights folder: {folder}")
    for name in list_networks():
        card = network_card(name)
        path = folder / f"{name}.safetensors"
        state = "here" if path.is_file() else "not here"
        print(f"{name}  {card.spatial_dims}D  {card.kind}  working size {card.working_size}  {card.licence}  [{state}]")
    return 0


def _pull(options: argparse.Namespace) -> int:
    print(pull_network(options.name, options.folder))
    return 0


def _convert(options: argparse.Namespace) -> int:
    path = convert_published(options.file, options.folder)
    print(f"{path}  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    for name in options.network:
        known = name in list_networks()
        path = weights_folder() / f"{name}.safetensors" if known else Path(name)
        expected = network_card(name).sha256 if known else ""
        card = read_network(path, expected or None).card
        print(f"{name}  ok  {card.kind} {card.spatial_dims}D  sha256 {card.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
