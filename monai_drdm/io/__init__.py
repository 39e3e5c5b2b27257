"""Reading and writing files: images in their own format, displacement fields as NIfTI and ITK, datalists."""

from monai_drdm.io.datalists import Case, find_cases, read_cases
from monai_drdm.io.ddf import load_ddf, save_ddf
from monai_drdm.io.files import stem_of
from monai_drdm.io.images import IMAGE_SUFFIXES, ImageFile, load_image
from monai_drdm.io.nifti import save_image

__all__ = [
    "IMAGE_SUFFIXES",
    "Case",
    "ImageFile",
    "find_cases",
    "load_ddf",
    "load_image",
    "read_cases",
    "save_ddf",
    "save_image",
    "stem_of",
]
