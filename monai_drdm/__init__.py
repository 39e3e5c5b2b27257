"""Deformation-Recovery Diffusion Models as a MONAI plugin.

``RandDRDMDeformd`` goes into ``monai.transforms.Compose`` and deforms image and label into another plausible anatomy of
the same patient. Method: Zheng et al., Medical Image Analysis 110, 2026, 103987.

The names below are imported when they are first used, so that ``monai_drdm.fields``, ``monai_drdm.deformation`` and
the like need neither MONAI nor the time it takes to import it.
"""

from typing import TYPE_CHECKING

from monai_drdm._version import __version__
from monai_drdm.lazy_names import lazy_names

if TYPE_CHECKING:
    from monai_drdm.bank import DeformationBank
    from monai_drdm.networks import list_networks, load_network
    from monai_drdm.transforms import (
        ApplyDDFd,
        BatchRandDRDMBankd,
        BatchRandDRDMDeformd,
        RandDRDMBankd,
        RandDRDMDeform,
        RandDRDMDeformD,
        RandDRDMDeformd,
        RandDRDMDeformDict,
        RandDRDMPaird,
    )

_FROM = {"DeformationBank": "bank", "list_networks": "networks", "load_network": "networks"}
"""The sub-package of each public name that is not a transform."""

__all__ = [
    "ApplyDDFd",
    "BatchRandDRDMBankd",
    "BatchRandDRDMDeformd",
    "DeformationBank",
    "RandDRDMBankd",
    "RandDRDMDeform",
    "RandDRDMDeformD",
    "RandDRDMDeformDict",
    "RandDRDMDeformd",
    "RandDRDMPaird",
    "__version__",
    "list_networks",
    "load_network",
]

__getattr__, __dir__ = lazy_names(
    __name__, {name: _FROM.get(name, "transforms") for name in __all__ if name != "__version__"}
)
