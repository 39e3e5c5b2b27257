"""Loading a network by its name or from a file."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from monai_drdm.networks.base import RecoveryNetwork
from monai_drdm.networks.card import NetworkCard
from monai_drdm.networks.registry import known_file, list_networks, network_card
from monai_drdm.networks.release import pull_network
from monai_drdm.networks.weights import read_network


def load_network(name: str | os.PathLike[str], device: torch.device | str | None = None) -> RecoveryNetwork:
    """Load a network for inference by registry name or from a safetensors file.

    A name is looked up in ``weights_folder()``, then in this package. A network that the authors publish and that is in
    neither is downloaded from their repository and kept. The hash of a known network must be the one in the registry. A
    file of your own is checked for the names, shapes, dtypes and finite values of its tensors.

    Args:
        name: one of ``list_networks()`` or a path.
        device: where to put it; None is the CPU.

    Returns:
        The network in evaluation mode, without gradients, its card at ``.card``. Records identify the network by its
        hash, so do not change its weights; save a changed network under a name of its own.

    Raises:
        ValueError: unknown name, or a file that is not intact weights of a known network.
        FileNotFoundError: the weights are not here and cannot be downloaded; the message says what to do.
    """
    path = Path(name)
    if os.fspath(name) not in list_networks() and (path.suffix == ".safetensors" or path.is_file()):
        network = read_network(path)
    else:
        network = _load_known(network_card(os.fspath(name)))
    return network.to(device) if device is not None else network


def _load_known(card: NetworkCard) -> RecoveryNetwork:
    """Load a network of the registry; one that is published and not here is downloaded first."""
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
