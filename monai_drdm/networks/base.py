"""What every recovery network has in common."""

from __future__ import annotations

from torch import nn

from monai_drdm.networks.card import NetworkCard


class RecoveryNetwork(nn.Module):
    """A network that sees a deformed image and says how to make it realistic again.

    Args:
        card: what it is and expects.

    Raises:
        ValueError: a card that makes no sense.
    """

    def __init__(self, card: NetworkCard) -> None:
        super().__init__()
        card.check()
        self.card = card
        self.spatial_dims = card.spatial_dims
        self.in_channels = card.in_channels
