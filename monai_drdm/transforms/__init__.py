"""MONAI transforms."""

from monai_drdm.deformation import (
    BankedParams,
    Deformation,
    DeformationParams,
    DeformationStatistics,
    PairParams,
)
from monai_drdm.transforms.apply import ApplyDDFD, ApplyDDFd, ApplyDDFDict
from monai_drdm.transforms.banked import RandDRDMBankD, RandDRDMBankd, RandDRDMBankDict
from monai_drdm.transforms.batch import BatchRandDRDMDeformD, BatchRandDRDMDeformd, BatchRandDRDMDeformDict
from monai_drdm.transforms.batch_banked import BatchRandDRDMBankD, BatchRandDRDMBankd, BatchRandDRDMBankDict
from monai_drdm.transforms.deform import RandDRDMDeform, RandDRDMDeformD, RandDRDMDeformd, RandDRDMDeformDict
from monai_drdm.transforms.field_network import FieldNetwork
from monai_drdm.transforms.pairs import DeformedPair, RandDRDMPairD, RandDRDMPaird, RandDRDMPairDict

__all__ = [
    "ApplyDDFD",
    "ApplyDDFDict",
    "ApplyDDFd",
    "BankedParams",
    "BatchRandDRDMBankD",
    "BatchRandDRDMBankDict",
    "BatchRandDRDMBankd",
    "BatchRandDRDMDeformD",
    "BatchRandDRDMDeformDict",
    "BatchRandDRDMDeformd",
    "Deformation",
    "DeformationParams",
    "DeformationStatistics",
    "DeformedPair",
    "FieldNetwork",
    "PairParams",
    "RandDRDMBankD",
    "RandDRDMBankDict",
    "RandDRDMBankd",
    "RandDRDMDeform",
    "RandDRDMDeformD",
    "RandDRDMDeformDict",
    "RandDRDMDeformd",
    "RandDRDMPairD",
    "RandDRDMPairDict",
    "RandDRDMPaird",
]
