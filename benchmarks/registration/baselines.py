"""Registration without a trained network, as people use it.

All take moving and fixed images ``(1, 1, *S)`` in [0, 1], and if wanted their masks, and give the field ``(1, 3, *S)``
in voxels. Only voxels in both masks are compared.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import SimpleITK
import torch
from scipy.ndimage import binary_dilation, binary_fill_holes
from torch import Tensor

from monai_drdm.registration import find_affine

Masks: TypeAlias = tuple[Tensor, Tensor]
"""Of the moving and the fixed image, ``(1, 1, *S)`` bool."""

DEMONS_LEVELS = ((2, 60), (1, 60))
"""Shrinking and iterations, coarse to fine."""
_DARK, _MARGIN = 0.1, 3


def foreground(image: Tensor, inside: Tensor) -> Tensor:
    """What is bright, what that encloses, and a margin of three voxels around it; nothing of the padding.

    Args:
        image: ``(1, 1, *S)`` in [0, 1].
        inside: ``(1, 1, *S)`` bool, false in the padding of the image.
    """
    bright = binary_fill_holes(image[0, 0].numpy() > _DARK)
    return torch.from_numpy(binary_dilation(bright, iterations=_MARGIN))[None, None] & inside


def affine_start(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
    """The affine map between both images, or between the smallest boxes around their masks: ``(1, 3, 4)``."""
    if masks is None:
        return find_affine(moving, fixed)
    (there, moving), (here, fixed) = (_cut(one, mask) for one, mask in zip((moving, fixed), masks))
    between = torch.cat([torch.eye(3), (here - there)[:, None]], dim=1)[None]  # from one box to the other
    found = find_affine(moving, fixed, between)
    shift = found[:, :, -1] + here - found[:, :, :-1] @ here
    return torch.cat([found[:, :, :-1], shift[..., None]], dim=2)


def _cut(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The corner of the smallest box around a mask, and the image in it."""
    at = mask[0, 0].nonzero()
    low, high = at.amin(dim=0), at.amax(dim=0) + 1
    return low.float(), image[(..., *(slice(int(a), int(b)) for a, b in zip(low, high)))]


def nothing(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
    """No displacement."""
    return fixed.new_zeros(len(fixed), fixed.ndim - 2, *fixed.shape[2:])


def to_itk(image: Tensor) -> SimpleITK.Image:
    """Convert to ITK, which reverses the order of axes."""
    return SimpleITK.GetImageFromArray(image[0, 0].numpy())


def field_of(transform: SimpleITK.Transform, fixed: SimpleITK.Image) -> Tensor:
    """The displacement of a transform on a grid, in voxels."""
    field = SimpleITK.TransformToDisplacementField(
        transform,
        SimpleITK.sitkVectorFloat64,
        fixed.GetSize(),
        fixed.GetOrigin(),
        fixed.GetSpacing(),
        fixed.GetDirection(),
    )
    vectors = SimpleITK.GetArrayFromImage(field)[..., ::-1]
    return torch.from_numpy(vectors.copy()).movedim(-1, 0)[None].float()


def _by_correlation(masks: Masks | None) -> SimpleITK.ImageRegistrationMethod:
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(SimpleITK.sitkLinear)
    if masks is not None:
        method.SetMetricMovingMask(to_itk(masks[0].to(torch.uint8)))
        method.SetMetricFixedMask(to_itk(masks[1].to(torch.uint8)))
    return method


def affine(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
    """SimpleITK's affine registration by correlation, on three levels."""
    target, source = to_itk(fixed), to_itk(moving)
    method = _by_correlation(masks)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    middles = SimpleITK.CenteredTransformInitializerFilter.GEOMETRY
    start = SimpleITK.CenteredTransformInitializer(target, source, SimpleITK.AffineTransform(3), middles)
    method.SetInitialTransform(start)
    return field_of(method.Execute(target, source), target)


def demons(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
    """Fast symmetric forces after histogram matching, on two levels.

    SimpleITK's demons know no masks. Where a voxel is not in both, the fixed image is made equal to the moving one, so
    that nothing pushes there. Histograms are matched over the whole images, as SimpleITK offers it.
    """
    target, source = to_itk(fixed), to_itk(moving)
    source = SimpleITK.HistogramMatching(source, target, 256, 15, True)
    if masks is not None:
        seen = to_itk((masks[0] & masks[1]).to(torch.uint8))
        target = SimpleITK.Mask(target, seen) + SimpleITK.MaskNegated(source, seen)
    field = None
    for shrink, iterations in DEMONS_LEVELS:
        small, other = (
            (
                SimpleITK.Shrink(SimpleITK.SmoothingRecursiveGaussian(one, shrink / 2), [shrink] * 3)
                if shrink > 1
                else one
            )
            for one in (target, source)
        )
        method = SimpleITK.FastSymmetricForcesDemonsRegistrationFilter()
        method.SetNumberOfIterations(iterations)
        method.SetStandardDeviations(1.5)
        if field is None:
            field = method.Execute(small, other)
        else:
            field = method.Execute(small, other, SimpleITK.Resample(field, small))
    return field_of(SimpleITK.DisplacementFieldTransform(SimpleITK.Cast(field, SimpleITK.sitkVectorFloat64)), target)


def bspline(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
    """B-splines with a node every 8 voxels; correlation on a fifth of the voxels, L-BFGS-B, 50 iterations."""
    target, source = to_itk(fixed), to_itk(moving)
    method = _by_correlation(masks)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.2, seed=1)
    method.SetOptimizerAsLBFGSB(numberOfIterations=50)
    initial = SimpleITK.BSplineTransformInitializer(target, [max(2, n // 8) for n in target.GetSize()])
    method.SetInitialTransform(initial, inPlace=True)
    return field_of(method.Execute(target, source), target)


def syn(moving: Tensor, fixed: Tensor, masks: Masks | None = None) -> Tensor:
    """ANTs' symmetric normalisation by local cross-correlation; needs antspyx, which is no requirement."""
    import ants

    target, source = (ants.from_numpy(image[0, 0].numpy()) for image in (fixed, moving))
    shown = [None, None] if masks is None else [ants.from_numpy(one[0, 0].numpy().astype(np.float32)) for one in masks]
    found = ants.registration(
        target,
        source,
        "SyNOnly",
        initial_transform="Identity",
        syn_metric="CC",
        syn_sampling=2,
        reg_iterations=(40, 20, 10),
        moving_mask=shown[0],
        mask=shown[1],
    )
    warp = next(path for path in found["fwdtransforms"] if path.endswith("Warp.nii.gz"))
    vectors = ants.image_read(warp).numpy()  # (*S, 3), of an image whose axes are those of the array
    return torch.from_numpy(vectors).movedim(-1, 0)[None].float()
