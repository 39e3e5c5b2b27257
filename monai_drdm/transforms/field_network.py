"""``FieldNetwork``: a recovery network together with its sampler, as one torch module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn, Tensor

from monai_drdm.networks import RecoveryNetwork
from monai_drdm.transforms.batch import BatchRandDRDMDeformd


class FieldNetwork(nn.Module):
    """Takes a batch of images and returns a random, plausible displacement field for each.

    For programs that only know torch modules, such as the engines and bundles of MONAI. ``ApplyDDFd`` with
    ``ddf_key="pred"`` applies the fields to images and labels.

    Args:
        recovery: the recovery network. Its weights are those of the module, so that a checkpoint can be loaded into it.
        seed: the fields depend on it, on the images, and on how many images came before.
        options: settings of ``BatchRandDRDMDeformd``, such as ``deformation_level``.

    Raises:
        TypeError: options that ``BatchRandDRDMDeformd`` does not have.
        ValueError: options out of range.
    """

    def __init__(self, recovery: RecoveryNetwork, seed: int = 0, **options: Any) -> None:
        super().__init__()
        self.recovery = recovery
        self._deform = BatchRandDRDMDeformd("image", network=recovery, prob=1.0, invertible=False, **options)
        self._deform.set_random_state(seed)

    def forward(self, images: Tensor) -> Tensor:
        """The fields ``(B, D, *S)`` in voxels of images ``(B, C, *S)``; a ``MetaTensor`` also brings its voxel size."""
        self._deform({"image": images})
        return torch.stack([one.ddf for one in self._deform.last if one is not None])
