"""``monai-drdm weights``: list, pull, convert and verify network weights."""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from pathlib import Path

from monai_drdm.commands.arguments import Commands, named_path
from monai_drdm.documents import NO_BETTER
from monai_drdm.networks.registry import known_file, list_networks, list_published, network_card, weights_folder
from monai_drdm.registration.registry import list_registrations, registration_card, registration_file


def add_parser(commands: Commands) -> None:
    """Add the command, its actions and their arguments."""
    parser = commands.add_parser("weights", help="list, pull, convert and verify network weights")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="known networks and where their weights are").set_defaults(run=run_list)
    pull = actions.add_parser("pull", help="download published weights at a pinned commit, hash checked")
    pull.add_argument("name", choices=list_published(), help="name of the network")
    pull.set_defaults(run=run_pull, needs=("monai_drdm.networks.release",))
    convert = actions.add_parser("convert", help="convert a published .pth, recognised by its hash")
    convert.add_argument("file", type=named_path, help="the .pth file, as the authors published it")
    convert.set_defaults(run=run_convert, needs=("monai_drdm.networks.release",))
    for action in (pull, convert):
        action.add_argument(
            "--folder", type=named_path, help="where to write (default: MONAI_DRDM_WEIGHTS or the user cache)"
        )
    verify = actions.add_parser("verify", help="check hash and content of weights, and draw a field")
    verify.add_argument("network", nargs="+", help="network name or .safetensors file")
    verify.set_defaults(run=run_verify, needs=("monai_drdm.networks.weights",))


def run_list(_: argparse.Namespace) -> int:
    """Print every known network and where its weights are."""
    folder = weights_folder()
    print(f"weights folder: {folder}")
    for name in list_networks():
        card = network_card(name)
        path = known_file(name)
        state = "not here" if not path.is_file() else "here" if path.parent == folder else "in the package"
        print(f"{name}  {card.spatial_dims}D  {card.kind}  working size {card.working_size}  {card.licence}  [{state}]")
    for name in list_registrations():
        shipped = registration_card(name)
        print(f"{name}  {shipped.spatial_dims}D  registration  {shipped.licence}  [in the package]")
    return 0


def run_pull(options: argparse.Namespace) -> int:
    """Download and convert a published network."""
    from monai_drdm.networks import pull_network

    print(pull_network(options.name, options.folder))
    return 0


def run_convert(options: argparse.Namespace) -> int:
    """Convert a published file that is on disk."""
    from monai_drdm.networks import convert_published

    path = convert_published(options.file, options.folder)
    print(f"{path}  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Read networks completely, compare the hashes of known ones with the registry, and draw a field if they deform."""
    from monai_drdm.diffusion.trial import check_draws
    from monai_drdm.networks.weights import read_network
    from monai_drdm.registration import load_registration
    from monai_drdm.registration.networks import is_registration

    for name in options.network:
        if name in list_registrations() or (name not in list_networks() and is_registration(name)):
            dims = load_registration(name).structure.spatial_dims
            sha256 = hashlib.sha256(registration_file(name).read_bytes()).hexdigest()
            print(f"{name}  ok  registration {dims}D  sha256 {sha256}")
            continue
        known = name in list_networks()
        path = known_file(name) if known else Path(name)
        expected = network_card(name).sha256 if known else ""
        network = read_network(path, expected or None)
        card = network.card
        try:
            check_draws(network)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        print(f"{name}  ok  {card.kind} {card.spatial_dims}D  sha256 {card.sha256}")
        if NO_BETTER in card.source:
            loss = card.gates.get("validation_loss", math.nan)
            print(f"{name}: warning: its card says that it is {NO_BETTER} (loss {loss:.3g}).", file=sys.stderr)
    return 0
