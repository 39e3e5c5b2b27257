"""Recovery networks, their cards and their weights."""

from monai_drdm.networks.base import RecoveryNetwork
from monai_drdm.networks.card import NetworkCard
from monai_drdm.networks.published import convert_published, pull_network
from monai_drdm.networks.recresacnet import RecResACNet
from monai_drdm.networks.registry import auto_network, list_networks, network_card
from monai_drdm.networks.velocity_unet import VelocityUNet
from monai_drdm.networks.weights import load_network, network_sha256, save_network, weights_folder

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
