"""The settings of transforms that say what is moved, and how. They are defined here once for all transforms.

The settings of the draw of a field are in ``monai_drdm.deformation.options``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Annotated, TypedDict

from monai.config import KeysCollection

from monai_drdm.deformation.options import (
    DrawOptions,
    Option,
    PixdimOptions,
    PrecisionOptions,
    SharedDrawOptions,
)
from monai_drdm.fields.sampling import Mode, PaddingMode
from monai_drdm.transforms.points import PointSpace

Range = float | Sequence[float] | Sequence[Sequence[float]]
"""A range of MONAI's affine transforms."""


class MoveOptions(TypedDict, total=False):
    """How the keys of a sample are moved."""

    mode: Annotated[
        Mode | Sequence[Mode],
        Option(
            "bilinear",
            "interpolation, one or one per key: ``bilinear``, ``nearest``, ``bicubic`` (2D) or ``label``, which "
            "interpolates each class and keeps the most probable one.",
        ),
    ]
    padding_mode: Annotated[
        PaddingMode | Sequence[PaddingMode],
        Option("border", "what lies beyond the border, one or one per key: ``border``, ``zeros`` or ``reflection``."),
    ]
    point_keys: Annotated[
        KeysCollection,
        Option(
            (),
            "keys of landmarks ``(C, N, D)``, or ``(B, C, N, D)`` for a batch, which move with the image. "
            "``<key>_valid``, of the shape without ``D``, says which are inside the image before and after.",
        ),
    ]
    point_space: Annotated[
        PointSpace, Option("voxel", "``voxel``, or ``world`` for millimetres by the image's affine (RAS, as in MONAI).")
    ]
    invertible: Annotated[
        bool,
        Option(
            True,
            "put records on the outputs, which ``inverse`` needs. It takes samples, so decollate batches first.",
        ),
    ]
    allow_missing_keys: Annotated[
        bool, Option(False, "skip keys that the data do not have. The image key must be there.")
    ]


class BoxOptions(TypedDict, total=False):
    """Boxes of a sample."""

    box_keys: Annotated[
        KeysCollection,
        Option(
            (), "keys of boxes ``(N, 2D)`` in voxels, as in MONAI; they become the boxes that enclose what they held."
        ),
    ]
    box_mode: Annotated[str, Option("standard", "one of MONAI's corner modes; ``standard`` is ``xyxy`` or ``xyzxyz``.")]


class SourceOptions(TypedDict, total=False):
    """What a field is drawn from."""

    image_key: Annotated[
        Hashable | None,
        Option(
            None,
            "key of the image that the network sees; None: the first key. It is moved only if it is one of the keys.",
        ),
    ]
    seed_key: Annotated[
        Hashable | None,
        Option(
            None,
            "key whose value replaces the random state, by its hash. Whether the transform fires, the level and the "
            "field then depend on this value alone, not on the worker, the order or the epoch. A batch holds one "
            "value per sample.",
        ),
    ]


class DeformOptions(DrawOptions, MoveOptions, BoxOptions, SourceOptions, PixdimOptions, total=False):
    """Settings of ``RandDRDMDeformd``."""


class BatchOptions(DrawOptions, PrecisionOptions, MoveOptions, SourceOptions, PixdimOptions, total=False):
    """Settings of ``BatchRandDRDMDeformd``."""


class PairOptions(SharedDrawOptions, MoveOptions, SourceOptions, PixdimOptions, total=False):
    """Settings of ``RandDRDMPaird``, whose two fields have a level each."""


class PoseOptions(TypedDict, total=False):
    """A random affine map that is composed with a field, so that data are resampled once."""

    displacement_scale: Annotated[
        float | Sequence[float],
        Option(
            (1.0, 1.0),
            "range in [0, 1] of a random factor on the displacement. Below 1, folds are counted again, and the "
            "factor is lowered until they are within the limit of the bank.",
        ),
    ]
    rotate_range: Annotated[Range | None, Option(None, "radians, as in MONAI's ``RandAffine``.")]
    shear_range: Annotated[Range | None, Option(None, "as in MONAI's ``RandAffine``.")]
    translate_range: Annotated[Range | None, Option(None, "voxels, as in MONAI's ``RandAffine``.")]
    scale_range: Annotated[
        Range | None,
        Option(
            None,
            "as in MONAI's ``RandAffine``. For a bank with ``slice_axis``, all ranges and flips are in the plane.",
        ),
    ]
    flip_prob: Annotated[float, Option(0.0, "chance of a flip along each spatial axis.")]


class BankedOptions(PoseOptions, MoveOptions, BoxOptions, SourceOptions, total=False):
    """Settings of ``RandDRDMBankd``, whose fields are drawn already."""


class BatchBankedOptions(PoseOptions, MoveOptions, SourceOptions, total=False):
    """Settings of ``BatchRandDRDMBankd``."""


class ApplyOptions(MoveOptions, BoxOptions, total=False):
    """Settings of ``ApplyDDFd``, whose field is given."""


class ArrayOptions(DrawOptions, PixdimOptions, total=False):
    """Settings of ``RandDRDMDeform``."""
