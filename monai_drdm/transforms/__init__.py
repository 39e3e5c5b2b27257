"""MONAI transforms."""

from monai_drdm.transforms.apply import ApplyDDFD, ApplyDDFd, ApplyDDFDict
from monai_drdm.transforms.array import RandDRDMDeform
from monai_drdm.transforms.batch import BatchRandDRDMDeformD, BatchRandDRDMDeformd, BatchRandDRDMDeformDict
from monai_drdm.transforms.dictionary import RandDRDMDeformD, RandDRDMDeformd, RandDRDMDeformDict
from monai_drdm.transforms.record import BankedParams, Deformation, DeformationParams, DeformationStatistics

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
    "RandDRDMDeform",
    "RandDRDMDeformD",
    "RandDRDMDeformDict",
    "RandDRDMDeformd",
]
