"""``RandDRDMDeformd``: the dictionary form, one field for all keys."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast, TypeVar

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform
from torch import Tensor

from monai_drdm.fields.warp import check_modes, Mode, PaddingMode
from monai_drdm.networks import RecResACNet
from monai_drdm.transforms.array import DRDMRandomness
from monai_drdm.transforms.draw import FieldDrawer
from monai_drdm.transforms.inputs import (
    as_tensor,
    check_keys_agree,
    checked_pixdim,
    flushed,
    idle,
    spacing_of,
    warp_like,
)
from monai_drdm.transforms.record import DeformationParams


class RandDRDMDeformd(DRDMRandomness, MapTransform):
    """Dictionary form of ``RandDRDMDeform``: one field, drawn from the image key, moves every key.

    Args:
        keys: keys to deform. They must agree in spatial shape and affine; channels and dtypes may differ.
        network: as in ``RandDRDMDeform``.
        prob: as in ``RandDRDMDeform``.
        deformation_level: as in ``RandDRDMDeform``.
        sampler: as in ``RandDRDMDeform``.
        steps: as in ``RandDRDMDeform``.
        mode: one, or one per key.
        padding_mode: one, or one per key.
        image_key: key of the image that the network sees; None: the first key. It is moved only if it is in ``keys``.
        image_channel: as in ``RandDRDMDeform``.
        max_displacement_mm: as in ``RandDRDMDeform``.
        on_fold: as in ``RandDRDMDeform``.
        max_fold_fraction: as in ``RandDRDMDeform``.
        pixdim: as in ``RandDRDMDeform``.
        device: as in ``RandDRDMDeform``. Outputs return to each key's own device.
        allow_missing_keys: leave keys alone that the data lack. The image key must be there.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or a number of modes that is neither 1 nor the number of keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        network: str | os.PathLike[str] | RecResACNet = "auto",
        prob: float = 0.1,
        deformation_level: float | Sequence[float] = (0.3, 0.8),
        sampler: str = "auto",
        steps: int | None = None,
        mode: Mode | Sequence[Mode] = "bilinear",
        padding_mode: PaddingMode | Sequence[PaddingMode] = "border",
        image_key: Hashable | None = None,
        image_channel: int | None = None,
        max_displacement_mm: float | None = None,
        on_fold: str = "rescale",
        max_fold_fraction: float = 1e-4,
        pixdim: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        drawer = FieldDrawer(
            network=network,
            deformation_level=deformation_level,
            sampler=sampler,
            steps=steps,
            image_channel=image_channel,
            max_displacement_mm=max_displacement_mm,
            on_fold=on_fold,
            max_fold_fraction=max_fold_fraction,
            device=device,
        )
        DRDMRandomness.__init__(self, prob, drawer)
        self.mode: tuple[Mode, ...] = _per_key(mode, len(self.keys), "mode")
        self.padding_mode: tuple[PaddingMode, ...] = _per_key(padding_mode, len(self.keys), "padding_mode")
        for one_mode, one_padding in zip(self.mode, self.padding_mode):
            check_modes(one_mode, one_padding, 2, "RandDRDMDeformd")
        self.image_key = self.keys[0] if image_key is None else image_key
        self.pixdim = checked_pixdim(pixdim)

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
            data: a dictionary with ``(C, *S)`` values at the keys.
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
        result = dict(data)
        present = list(self.key_iterator(result, self.mode, self.padding_mode))
        if self.image_key not in result:
            raise KeyError(
                f"RandDRDMDeformd: image_key {self.image_key!r} is missing from the data: {sorted(map(str, result))}."
            )
        for key in {self.image_key, *(key for key, *_ in present)}:
            result[key] = flushed(result[key])
        image = result[self.image_key]
        names = [key for key, *_ in present]
        for key in (self.image_key, *names):
            as_tensor(result[key], repr(key))
        check_keys_agree(result, self.image_key, names)
        spacing = spacing_of(image, self.pixdim, repr(self.image_key))
        self.last = self.deformation(image, spacing, repr(self.image_key), randomize, params, field)
        for key, mode, padding_mode in present:
            if self.last is None or self.last.skipped:
                result[key] = idle(result[key], mode)
            else:
                result[key] = warp_like(result[key], self.last.ddf, mode, padding_mode, repr(key))
        return result


RandDRDMDeformD = RandDRDMDeformDict = RandDRDMDeformd


_Option = TypeVar("_Option", bound=str)


def _per_key(value: _Option | Sequence[_Option], count: int, name: str) -> tuple[_Option, ...]:
    values = cast("tuple[_Option, ...]", (value,) * count if isinstance(value, str) else tuple(value))
    if len(values) != count:
        raise ValueError(f"{name} must be one or one per key: {count} keys, got {len(values)} of them {values}.")
    return values
