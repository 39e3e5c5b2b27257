"""Registration without a trained network, as people use it, on images that an affine map has brought near each other.

All take moving and fixed images ``(1, 1, *S)`` in [0, 1] and give the field ``(1, 3, *S)`` in voxels.
"""

from __future__ import annotations

import SimpleITK
import torch
from torch import Tensor

DEMONS_LEVELS = ((2, 60), (1, 60))
"""Shrinking and iterations, coarse to fine."""


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


def affine(moving: Tensor, fixed: Tensor) -> Tensor:
    """SimpleITK's affine registration by correlation, on three levels."""
    target, source = to_itk(fixed), to_itk(moving)
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 100)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2, 1])
    method.SetSmoothingSigmasPerLevel([2, 1, 0])
    middles = SimpleITK.CenteredTransformInitializerFilter.GEOMETRY
    start = SimpleITK.CenteredTransformInitializer(target, source, SimpleITK.AffineTransform(3), middles)
    method.SetInitialTransform(start)
    return field_of(method.Execute(target, source), target)


def demons(moving: Tensor, fixed: Tensor) -> Tensor:
    """Fast symmetric forces after histogram matching, on two levels."""
    target, source = to_itk(fixed), to_itk(moving)
    source = SimpleITK.HistogramMatching(source, target, 256, 15, True)
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


def bspline(moving: Tensor, fixed: Tensor) -> Tensor:
    """B-splines with a node every 8 voxels; correlation on a fifth of the voxels, L-BFGS-B, 50 iterations."""
    target, source = to_itk(fixed), to_itk(moving)
    method = SimpleITK.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(0.2, seed=1)
    method.SetInterpolator(SimpleITK.sitkLinear)
    method.SetOptimizerAsLBFGSB(numberOfIterations=50)
    initial = SimpleITK.BSplineTransformInitializer(target, [max(2, n // 8) for n in target.GetSize()])
    method.SetInitialTransform(initial, inPlace=True)
    return field_of(method.Execute(target, source), target)


def syn(moving: Tensor, fixed: Tensor) -> Tensor:
    """ANTs' symmetric normalisation by local cross-correlation; needs antspyx, which is no requirement."""
    import ants

    target, source = (ants.from_numpy(image[0, 0].numpy()) for image in (fixed, moving))
    found = ants.registration(
        target,
        source,
        "SyNOnly",
        initial_transform="Identity",
        syn_metric="CC",
        syn_sampling=2,
        reg_iterations=(40, 20, 10),
    )
    warp = next(path for path in found["fwdtransforms"] if path.endswith("Warp.nii.gz"))
    vectors = ants.image_read(warp).numpy()  # (*S, 3), of an image whose axes are those of the array
    return torch.from_numpy(vectors).movedim(-1, 0)[None].float()
