"""Networks by name or path: where their weights are, or where they come from."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from monai_drdm.networks.base import RecoveryNetwork
from monai_drdm.networks.card import NetworkCard
from monai_drdm.networks.published import pull_network
from monai_drdm.networks.registry import list_networks, network_card, shipped_file
from monai_drdm.networks.weights import read_network, weights_folder


def load_network(name: str | os.PathLike[str], device: torch.device | str | None = None) -> RecoveryNetwork:
    """Load a network for inference by registry name or from a safetensors file.

    A name is looked up in ``weights_folder()``, then in this package; a published one that is not there is pulled from
    the authors' repository, hash checked, and kept. Its hash must be the registry's. A file of one's own is checked for
    names, shapes, dtypes and finite values.

    Args:
        name: one of ``list_networks()`` or a path.
        device: where to put it; None is the CPU.

    Returns:
        The network in evaluation mode, without gradients, its card at ``.card``. Its hash identifies it in records: do
        not change its weights; save a changed network under a name of its own.

    Raises:
        ValueError: unknown name, or a file that is not intact weights of a known network.
        FileNotFoundError: the weights are neither here nor reachable; says what to do.
    """
    path = Path(name)
    if os.fspath(name) not in list_networks() and (path.suffix == ".safetensors" or path.is_file()):
        network = read_network(path)
    else:
        network = _load_known(network_card(os.fspath(name)))
    return network.to(device) if device is not None else network


def _load_known(card: NetworkCard) -> RecoveryNetwork:
    path = known_file(card.name)
    if not card.sha256:
        raise ValueError(
            f"load_network: no verified hash of {card.name!r} is known yet, so it cannot be loaded by name. Convert "
            "your copy with 'monai-drdm weights convert FILE.pth' and pass the path of the result."
        )
    if not path.is_file():
        path = pull_network(card.name)
    network = read_network(path, card.sha256)
    network.card = card
    return network


def known_file(name: str) -> Path:
    """Where the weights of a known network are, or would be: ``weights_folder()`` goes before this package.

    Raises:
        ValueError: unknown name.
    """
    path, shipped = weights_folder() / f"{name}.safetensors", shipped_file(name)
    return path if shipped is None or path.is_file() else shipped
