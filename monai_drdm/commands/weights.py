"""``monai-drdm weights``: list, pull, convert and verify network weights."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from monai_drdm.networks import convert_published, list_networks, network_card, pull_network, weights_folder
from monai_drdm.networks.loading import known_file
from monai_drdm.networks.registry import list_published
from monai_drdm.networks.weights import read_network


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="known networks and where their weights are").set_defaults(run=_list)
    pull = actions.add_parser("pull", help="download published weights at a pinned commit, hash checked")
    pull.add_argument("name", choices=list_published())
    pull.add_argument("--folder", type=Path, help="where to write (default: MONAI_DRDM_WEIGHTS or the user cache)")
    pull.set_defaults(run=_pull)
    convert = actions.add_parser("convert", help="convert a published .pth, recognised by its hash")
    convert.add_argument("file", type=Path)
    convert.add_argument("--folder", type=Path, help="where to write (default: MONAI_DRDM_WEIGHTS or the user cache)")
    convert.set_defaults(run=_convert)
    verify = actions.add_parser("verify", help="check hash and content of weights")
    verify.add_argument("network", nargs="+", help="network name or .safetensors file")
    verify.set_defaults(run=_verify)


def _list(_: argparse.Namespace) -> int:
    folder = weights_folder()
    print(f"weights folder: {folder}")
    for name in list_networks():
        card = network_card(name)
        path = known_file(name)
        state = "not here" if not path.is_file() else "here" if path.parent == folder else "in the package"
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
        path = known_file(name) if known else Path(name)
        expected = network_card(name).sha256 if known else ""
        card = read_network(path, expected or None).card
        print(f"{name}  ok  {card.kind} {card.spatial_dims}D  sha256 {card.sha256}")
    return 0
