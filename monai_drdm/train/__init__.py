"""Training recovery networks on one's own scans (``pip install monai-drdm[train]``: pytorch-ignite, PyYAML)."""

from importlib.util import find_spec

if _missing := [name for name in ("ignite", "matplotlib", "tensorboard", "yaml") if find_spec(name) is None]:
    raise ImportError(f"monai_drdm.train needs {', '.join(_missing)}: pip install 'monai-drdm[train]'.")

from monai_drdm.train.config import build_config, TrainConfig
from monai_drdm.train.trainer import fit

__all__ = ["TrainConfig", "build_config", "fit"]
