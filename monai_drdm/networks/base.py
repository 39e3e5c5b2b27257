"""The base class of recovery networks."""

from __future__ import annotations

from torch import nn

from monai_drdm.networks.card import NetworkCard


class RecoveryNetwork(nn.Module):
    """A network that predicts from a deformed image the displacement that makes it realistic again.

    Args:
        card: describes the network and the images that it expects.

    Raises:
        ValueError: a card with invalid entries.
    """

    def __init__(self, card: NetworkCard) -> None:
        super().__init__()
        card.check()
        self.card = card
        self.spatial_dims = card.spatial_dims
        self.in_channels = card.in_channels
