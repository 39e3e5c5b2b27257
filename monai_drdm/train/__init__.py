"""Training recovery networks on one's own scans (``pip install monai-drdm[train]``: pytorch-ignite, PyYAML)."""

from typing import TYPE_CHECKING

from monai_drdm.lazy_names import lazy_names

if TYPE_CHECKING:
    from monai_drdm.train.config import build_config, TrainConfig
    from monai_drdm.train.trainer import fit

__all__ = ["TrainConfig", "build_config", "fit"]

__getattr__, __dir__ = lazy_names(__name__, {"TrainConfig": "config", "build_config": "config", "fit": "trainer"})
