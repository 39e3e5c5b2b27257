"""Recovery networks, their cards and their weights.

The names below are imported when they are first used: a card or a name of the registry needs no torch.
"""

import importlib
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
    from monai_drdm.networks.base import RecoveryNetwork
    from monai_drdm.networks.card import NetworkCard
    from monai_drdm.networks.loading import load_network
    from monai_drdm.networks.recresacnet import RecResACNet
    from monai_drdm.networks.registry import auto_network, list_networks, network_card, weights_folder
    from monai_drdm.networks.release import convert_published, pull_network
    from monai_drdm.networks.velocity_unet import VelocityUNet
    from monai_drdm.networks.weights import network_sha256, save_network

_MODULE_OF = {
    "NetworkCard": "card",
    "RecResACNet": "recresacnet",
    "RecoveryNetwork": "base",
    "VelocityUNet": "velocity_unet",
    "auto_network": "registry",
    "convert_published": "release",
    "list_networks": "registry",
    "load_network": "loading",
    "network_card": "registry",
    "network_sha256": "weights",
    "pull_network": "release",
    "save_network": "weights",
    "weights_folder": "registry",
}

__all__ = [
    "NetworkCard",
    "RecResACNet",
    "RecoveryNetwork",
    "VelocityUNet",
    "auto_network",
    "convert_published",
    "list_networks",
    "load_network",
    "network_card",
    "network_sha256",
    "pull_network",
    "save_network",
    "weights_folder",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
