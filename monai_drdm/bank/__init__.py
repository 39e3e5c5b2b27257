"""Fields drawn ahead of training, so that no training step waits for a network."""

from monai_drdm.bank.bank import DeformationBank
from monai_drdm.bank.settings import BankSettings

__all__ = ["BankSettings", "DeformationBank"]
