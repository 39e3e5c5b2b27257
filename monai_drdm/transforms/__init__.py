"""MONAI transforms."""

from monai_drdm.deformation.record import (
    BankedParams,
    Deformation,
    DeformationParams,
    DeformationStatistics,
    PairParams,
)
from monai_drdm.transforms.apply import ApplyDDFD, ApplyDDFd, ApplyDDFDict
from monai_drdm.transforms.array import RandDRDMDeform
from monai_drdm.transforms.banked import RandDRDMBankD, RandDRDMBankd, RandDRDMBankDict
from monai_drdm.transforms.batch import BatchRandDRDMDeformD, BatchRandDRDMDeformd, BatchRandDRDMDeformDict
from monai_drdm.transforms.dictionary import RandDRDMDeformD, RandDRDMDeformd, RandDRDMDeformDict
from monai_drdm.transforms.pairs import DeformedPair, RandDRDMPairD, RandDRDMPaird, RandDRDMPairDict

__all__ = [
    "ApplyDDFD",
    "ApplyDDFDict",
    "ApplyDDFd",
    "BankedParams",
    "BatchRandDRDMDeformD",
    "BatchRandDRDMDeformDict",
    "BatchRandDRDMDeformd",
    "Deformation",
    "DeformationParams",
    "DeformationStatistics",
    "DeformedPair",
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
