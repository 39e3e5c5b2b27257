"""Deformation-Recovery Diffusion Models as a MONAI plugin.

``RandDRDMDeformd`` goes into ``monai.transforms.Compose`` and deforms image and label into another plausible anatomy of
the same patient. Method: Zheng et al., Medical Image Analysis 110, 2026, 103987.
"""

from monai_drdm._version import __version__
from monai_drdm.bank import DeformationBank, RandDRDMBankd
from monai_drdm.networks import list_networks, load_network
from monai_drdm.transforms import (
    ApplyDDFd,
    BatchRandDRDMDeformd,
    RandDRDMDeform,
    RandDRDMDeformD,
    RandDRDMDeformd,
    RandDRDMDeformDict,
    RandDRDMPaird,
)

__all__ = [
    "ApplyDDFd",
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
