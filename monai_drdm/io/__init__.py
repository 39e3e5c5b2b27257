"""Files: NIfTI images and displacement fields."""

from monai_drdm.io.nifti import save_ddf, save_image

__all__ = ["save_ddf", "save_image"]
