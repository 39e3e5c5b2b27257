"""Recovery networks, their cards and their weights.

The names below are imported when they are first used: a card or a name of the registry needs no torch.
"""

from typing import TYPE_CHECKING

from monai_drdm.lazy_names import lazy_names

if TYPE_CHECKING:
    from monai_drdm.networks.base import RecoveryNetwork
    from monai_drdm.networks.card import NetworkCard
    from monai_drdm.networks.loading import load_network
    from monai_drdm.networks.recresacnet import RecResACNet
    from monai_drdm.networks.registry import auto_network, list_networks, network_card, weights_folder
    from monai_drdm.networks.release import convert_published, pull_network
    from monai_drdm.networks.velocity_unet import VelocityUNet
    from monai_drdm.networks.weights import network_sha256, save_network

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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
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
    },
)
