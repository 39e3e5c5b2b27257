"""``RandDRDMDeformd``: the dictionary form, one field for all keys."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from torch import Tensor

from monai_drdm.deformation.drawing import FieldDrawer
from monai_drdm.deformation.record import Deformation, DeformationParams
from monai_drdm.fields.warp import Mode, PaddingMode
from monai_drdm.networks import RecoveryNetwork
from monai_drdm.samples import checked_pixdim, spacing_of
from monai_drdm.transforms.array import DRDMRandomness
from monai_drdm.transforms.base import KeyedDeformation
from monai_drdm.transforms.points import PointSpace
from monai_drdm.transforms.tracing import in_plain_mode


class RandDRDMDeformd(DRDMRandomness, KeyedDeformation):
    """Dictionary form of ``RandDRDMDeform``: one field, drawn from the image key, moves every key.

    Args:
        keys: keys to deform. They must agree in spatial shape and affine; channels and dtypes may differ.
        network: as in ``RandDRDMDeform``.
        prob: as in ``RandDRDMDeform``.
        deformation_level: as in ``RandDRDMDeform``.
        sampler: as in ``RandDRDMDeform``.
        steps: as in ``RandDRDMDeform``.
        recovery: as in ``RandDRDMDeform``.
        mode: one, or one per key.
        padding_mode: one, or one per key.
        image_key: key of the image that the network sees; None: the first key. It is moved only if it is in ``keys``.
        image_channel: as in ``RandDRDMDeform``.
        max_displacement_mm: as in ``RandDRDMDeform``.
        on_fold: as in ``RandDRDMDeform``.
        max_fold_fraction: as in ``RandDRDMDeform``.
        point_keys: landmarks ``(C, N, D)``, which go where the image goes; ``<key>_valid`` ``(C, N)`` says which are
            inside the image before and after.
        point_space: ``voxel``, or ``world`` through the image's affine (MONAI's RAS mm).
        box_keys: boxes ``(N, 2D)`` in voxels, edges as in MONAI: the boxes that enclose what they become.
        box_mode: one of MONAI's corner modes; ``standard`` is ``xyxy`` or ``xyzxyz``.
        pixdim: as in ``RandDRDMDeform``.
        slice_axis: as in ``RandDRDMDeform``.
        seed_key: key whose value, hashed, replaces the random state: firing, level and field then depend on it alone,
            whatever the worker, the order or the epoch.
        device: as in ``RandDRDMDeform``. Outputs return to each key's own device.
        invertible: as in ``RandDRDMDeform``.
        allow_missing_keys: leave keys alone that the data lack. The image key must be there.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or a number of modes that is neither 1 nor the number of keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        network: str | os.PathLike[str] | RecoveryNetwork = "auto",
        prob: float = 0.1,
        deformation_level: float | Sequence[float] = (0.3, 0.8),
        sampler: str = "auto",
        steps: int | None = None,
        recovery: float = 1.0,
        mode: Mode | Sequence[Mode] = "bilinear",
        padding_mode: PaddingMode | Sequence[PaddingMode] = "border",
        image_key: Hashable | None = None,
        image_channel: int | None = None,
        max_displacement_mm: float | None = None,
        on_fold: str = "rescale",
        max_fold_fraction: float = 1e-4,
        point_keys: KeysCollection = (),
        point_space: PointSpace = "voxel",
        box_keys: KeysCollection = (),
        box_mode: str = "standard",
        pixdim: Sequence[float] | None = None,
        slice_axis: int | None = None,
        seed_key: Hashable | None = None,
        device: torch.device | str | None = None,
        invertible: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        KeyedDeformation.__init__(
            self,
            keys,
            mode,
            padding_mode,
            point_keys,
            point_space,
            box_keys,
            box_mode,
            invertible,
            allow_missing_keys,
        )
        drawer = FieldDrawer(
            network=network,
            deformation_level=deformation_level,
            sampler=sampler,
            steps=steps,
            recovery=recovery,
            image_channel=image_channel,
            max_displacement_mm=max_displacement_mm,
            on_fold=on_fold,
            max_fold_fraction=max_fold_fraction,
            slice_axis=slice_axis,
            device=device,
        )
        DRDMRandomness.__init__(self, prob, drawer)
        self.last: Deformation | None = None
        self.image_key = self.keys[0] if image_key is None else image_key
        self.pixdim = checked_pixdim(pixdim)
        self.seed_key = seed_key

    @in_plain_mode
    def __call__(
        self,
        data: Mapping[Any, NdarrayOrTensor],
        randomize: bool = True,
        *,
        params: DeformationParams | None = None,
        field: Tensor | None = None,
    ) -> dict[Any, NdarrayOrTensor]:
        """Deform all keys of a sample by one field.

        Args:
            data: a dictionary with ``(C, *S)`` values at the keys, and points and boxes at theirs.
            randomize: False replays the last draw.
            params: replays a record instead.
            field: applies this field ``(D, *S)`` in voxels instead.

        Returns:
            A new dictionary; the input and its tensors are left as they are.

        Raises:
            KeyError: a key is missing (and not allowed to), or the image key is.
            TypeError: a value is not an array or tensor of a real numeric type.
            ValueError: anything that does not fit; see the table of inputs and answers in the README.
        """
        result = self.received(data)
        image, name = result[self.image_key], repr(self.image_key)
        aligned = (result[key] for key in (self.image_key, *(key for key, *_ in self.present(result))))
        known = next((one for one in aligned if isinstance(one, MetaTensor)), image)  # outputs get its affine too
        spacing = spacing_of(known, self.pixdim, name)
        seed_value = None if self.seed_key is None else result[self.seed_key]
        self.last = deformation = self.deformation(image, spacing, name, randomize, params, field, seed_value)
        self.move(result, image, name, deformation)  # threads may share this transform, and with it ``last``
        return result


RandDRDMDeformD = RandDRDMDeformDict = RandDRDMDeformd
