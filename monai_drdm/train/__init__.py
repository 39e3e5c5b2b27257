"""Training recovery networks on one's own scans (``pip install monai-drdm[train]``: pytorch-ignite, PyYAML)."""

from monai_drdm.train.config import build_config, TrainConfig
from monai_drdm.train.trainer import fit

__all__ = ["TrainConfig", "build_config", "fit"]
