"""``RandDRDMPaird``: from one image a moving and a fixed one, and the field between them (paper, Algorithm 4)."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.utils import TraceKeys
from torch import Tensor

from monai_drdm.deformation.drawing import FieldDrawer
from monai_drdm.deformation.record import check_record, Deformation, DeformationParams, PairParams
from monai_drdm.deformation.stored_field import ComposedField, StoredField
from monai_drdm.fields import compose
from monai_drdm.fields.warp import Mode, PaddingMode
from monai_drdm.networks import RecoveryNetwork
from monai_drdm.samples import as_tensor, checked_pixdim, spacing_of, world_affine
from monai_drdm.transforms.array import DRDMRandomness
from monai_drdm.transforms.base import field_info, KeyedDeformation, take_back
from monai_drdm.transforms.points import PointSpace
from monai_drdm.transforms.tracing import in_plain_mode

SIDES = ("moving", "fixed")
DDF, INVERSE_DDF, INVERSE_RESIDUAL = "ddf", "inverse_ddf", "inverse_residual"
_ONWARDS = "onwards"


@dataclass(frozen=True)
class DeformedPair:
    """What one call did."""

    augmentation: Deformation | None
    """Makes the moving image of the given one; None: they are the same."""
    synthesis: Deformation
    """Makes the fixed image of the moving one: its field is the answer."""
    fixed: Deformation
    """Both composed: makes the fixed image of the given one."""

    @property
    def params(self) -> PairParams:
        """The record that replays the pair."""
        first, second = None if self.augmentation is None else self.augmentation.params, self.synthesis.params
        assert second is not None
        return PairParams(first, second)


class RandDRDMPaird(DRDMRandomness, KeyedDeformation):
    """Make a synthetic registration pair of every sample: two plausible anatomies and the exact field between them.

    One field, drawn on the image, makes the moving image; another one, drawn on the moving image, is the answer that
    a registration network should give: ``fixed(x) = moving(x + ddf(x))`` wherever ``x + ddf(x)`` is inside the image.
    Both images are resampled once from the given one, so neither is blurred more than the other, and where the field
    points beyond the moving image the fixed one shows what the given image holds there.

    The results stand beside what the sample holds: ``moving`` and ``fixed`` of the image key, ``moving_<key>`` and
    ``fixed_<key>`` of the others, ``ddf`` ``(D, *S)`` voxels, and ``inverse_ddf`` with ``inverse_residual``, the
    largest distance in voxels by which going there and back misses. Landmarks obey
    ``moving_p = fixed_p + ddf(fixed_p)``.

    Args:
        keys: image and labels ``(C, *S)``. They must agree in spatial shape and affine; channels and dtypes may differ.
        network: as in ``RandDRDMDeform``.
        prob: chance that there is something to register; else both images are the given one and the field is zero.
        augmentation_level: level of the field that makes the moving image, a number in (0, 1] or a range drawn
            uniformly; None: the moving image is the given one.
        synthesis_level: level of the field between the images.
        sampler: as in ``RandDRDMDeform``.
        steps: as in ``RandDRDMDeform``.
        recovery: as in ``RandDRDMDeform``.
        inverse: make ``inverse_ddf`` and ``inverse_residual``; without them a pair costs less.
        mode: one, or one per key.
        padding_mode: one, or one per key.
        image_key: the image among ``keys``; None: the first one.
        image_channel: as in ``RandDRDMDeform``.
        max_displacement_mm: of each of the two fields, as in ``RandDRDMDeform``.
        on_fold: of each of the two fields, as in ``RandDRDMDeform``.
        max_fold_fraction: as in ``RandDRDMDeform``.
        point_keys: landmarks ``(C, N, D)``, as in ``RandDRDMDeformd``.
        point_space: as in ``RandDRDMDeformd``.
        pixdim: as in ``RandDRDMDeform``.
        slice_axis: as in ``RandDRDMDeform``.
        seed_key: as in ``RandDRDMDeformd``.
        device: as in ``RandDRDMDeform``.
        invertible: record on the images, labels and landmarks what ``inverse`` needs.
        allow_missing_keys: leave keys alone that the data lack. The image key must be there.

    ``.last`` holds the latest pair of deformations.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or an image key that is not among the keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        network: str | os.PathLike[str] | RecoveryNetwork = "auto",
        *,
        prob: float = 1.0,
        augmentation_level: float | Sequence[float] | None = (0.3, 0.8),
        synthesis_level: float | Sequence[float] = (0.3, 0.8),
        sampler: str = "auto",
        steps: int | None = None,
        recovery: float = 1.0,
        inverse: bool = True,
        mode: Mode | Sequence[Mode] = "bilinear",
        padding_mode: PaddingMode | Sequence[PaddingMode] = "border",
        image_key: Hashable | None = None,
        image_channel: int | None = None,
        max_displacement_mm: float | None = None,
        on_fold: str = "rescale",
        max_fold_fraction: float = 1e-4,
        point_keys: KeysCollection = (),
        point_space: PointSpace = "voxel",
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
            (),
            "standard",
            invertible,
            allow_missing_keys,
        )

        def drawer(level: float | Sequence[float]) -> FieldDrawer:
            return FieldDrawer(
                network=network,
                deformation_level=level,
                sampler=sampler,
                steps=steps,
                recovery=recovery,
                image_channel=image_channel,
                max_displacement_mm=max_displacement_mm,
                on_fold="rescale" if on_fold == "skip" else on_fold,
                max_fold_fraction=max_fold_fraction,
                slice_axis=slice_axis,
                device=device,
            )

        if on_fold == "skip":
            raise ValueError("on_fold='skip' would leave a pair without a field. Use rescale, resample, keep or raise.")
        DRDMRandomness.__init__(self, prob, drawer(synthesis_level))
        self.augmentation_drawer = None if augmentation_level is None else drawer(augmentation_level)
        self.image_key = self.keys[0] if image_key is None else image_key
        if self.image_key not in self.keys:
            raise ValueError(f"image_key must be one of keys {self.keys}, got {self.image_key!r}.")
        self.pixdim = checked_pixdim(pixdim)
        self.seed_key = seed_key
        self.with_inverse = inverse
        self.last: DeformedPair | None = None

    @in_plain_mode
    def __call__(
        self,
        data: Mapping[Any, NdarrayOrTensor],
        randomize: bool = True,
        *,
        params: PairParams | None = None,
    ) -> dict[Any, Any]:
        """Make the pair of a sample.

        Args:
            data: a dictionary with ``(C, *S)`` values at the keys, and points at theirs.
            randomize: False replays the last draw.
            params: replays a record instead.

        Returns:
            A new dictionary with what the sample held and the pair; the input and its tensors are left as they are.

        Raises:
            KeyError: a key is missing (and not allowed to), or the image key is.
            TypeError: a value is not an array or tensor of a real numeric type; ``params`` that are no pair's.
            ValueError: anything that does not fit, or a name of the pair that the sample holds already.
        """
        if params is not None:
            check_record(params, PairParams)
        received, result = self.received(data), dict(data)
        taken = sorted({str(name) for name in self._outputs(result)} & {str(key) for key in result})
        if taken:
            raise ValueError(f"RandDRDMPaird writes {taken}, which the data hold already. Rename or remove them first.")
        moved = (*self.keys, *(name for key in self.point_keys for name in (key, f"{key}_valid")))
        source = {key: received[key] for key in moved if key in received}
        image, name = source[self.image_key], repr(self.image_key)
        spacing = spacing_of(image, self.pixdim, name)
        seed_value = None if self.seed_key is None else result[self.seed_key]
        seeds = None if params is not None else self._seeds(randomize, seed_value)
        fires = params is not None or seeds is not None
        first = self._augmentation(image, spacing, name, seeds, params) if fires else None
        moving = dict(source)
        self.move(moving, image, name, first)
        second = None
        if fires:
            record, seed = (params.synthesis, None) if params is not None else (None, seeds[1])  # type: ignore[index]
            seen = as_tensor(moving[self.image_key], name)
            second = self.drawer.draw(seen, spacing, seed=seed, params=record)
        both = _composed(first, second, spacing)
        fixed = dict(source)
        self.move(fixed, image, name, both)
        if second is not None and first is not None:
            fixed |= self._points_onwards(moving, image, name, second)
        result |= {
            self._named(side, key): value for side, made in zip(SIDES, (moving, fixed)) for key, value in made.items()
        }
        result |= self._answer(second, image)
        self.last = None if second is None or both is None else DeformedPair(first, second, both)
        return result

    @in_plain_mode
    def inverse(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Bring moving and fixed images, labels and landmarks back to where they were in the given image.

        Args:
            data: a dictionary with outputs of this transform, or what was computed from them.

        Returns:
            A new dictionary, in which those that are there lie on the given image; all else is left as it is.

        Raises:
            TypeError: data that carry no records.
            ValueError: no record of this transform, or data of another shape than it recorded.
        """
        result, inverses = dict(data), dict[int, Any]()
        for side in SIDES:
            for name in (self._named(side, key) for key in (*self.keys, *self.point_keys)):
                if name in result:
                    records = 2 if self._came_onwards(result[name]) else 1
                    for _ in range(records):
                        result[name] = take_back(self, result[name], repr(name), inverses)
        return result

    def _points_onwards(
        self, moving: Mapping[Any, Any], image: NdarrayOrTensor, name: str, synthesis: Deformation
    ) -> dict[Any, Any]:
        """Landmarks of the moving image where the field between the images takes them: exact, as composing is not."""
        found: dict[Any, Any] = {}
        points, shape = [key for key in self.point_keys if key in moving], tuple(image.shape[1:])
        affine = world_affine(image, name) if self.point_space == "world" and points else None
        shared = field_info(synthesis, shape) if self.invertible else {}
        for key in points:
            found |= {one: moving[one] for one in (key, f"{key}_valid")}
            self.move_points(found, key, synthesis.ddf, shape, affine, {"kind": "points", _ONWARDS: True, **shared})
        return found

    def _came_onwards(self, data: Any) -> bool:
        """Whether these are landmarks of the fixed image, which came by the moving one and have a record of each."""
        record = self.latest_record(data)
        return record is not None and bool(record[TraceKeys.EXTRA_INFO].get(_ONWARDS, False))

    def _seeds(self, randomize: bool, seed_value: object) -> tuple[int, int] | None:
        """Seeds of the two fields, or None if the transform does not fire."""
        if randomize:
            self.randomize(seed_value)
        fires, seed = self._do_transform, self._seed
        if randomize and seed_value is not None:
            fires, seed = self._decided_by(seed_value)
        if seed is None:
            raise ValueError("randomize=False replays the last draw, and there is none yet.")
        state = np.random.RandomState([seed, 1])  # not the chain of seeds by which fields are drawn again
        return (seed, int(state.randint(0, 2**32, dtype=np.uint64))) if fires else None

    def _augmentation(
        self,
        image: NdarrayOrTensor,
        spacing: Sequence[float],
        name: str,
        seeds: tuple[int, int] | None,
        params: PairParams | None,
    ) -> Deformation | None:
        record: DeformationParams | None = None
        if params is not None:
            record = params.augmentation
            return None if record is None else self.drawer.draw(as_tensor(image, name), spacing, params=record)
        if self.augmentation_drawer is None or seeds is None:
            return None
        return self.augmentation_drawer.draw(as_tensor(image, name), spacing, seed=seeds[0])

    def _answer(self, synthesis: Deformation | None, image: NdarrayOrTensor) -> dict[str, Tensor]:
        """The field between the images, and its inverse."""
        if synthesis is None:
            device = as_tensor(image, "image").device
            ddf = torch.zeros((image.ndim - 1, *image.shape[1:]), dtype=torch.float32, device=device)
            found = {DDF: ddf, INVERSE_DDF: ddf.clone(), INVERSE_RESIDUAL: ddf.new_zeros(())}
        else:
            found = {DDF: synthesis.ddf.clone()}
            if self.with_inverse:
                found[INVERSE_DDF] = synthesis.inverse_ddf.clone()
                found[INVERSE_RESIDUAL] = torch.tensor(synthesis.inverse_residual_vox, dtype=torch.float32)
        return found if self.with_inverse else {DDF: found[DDF]}

    def _named(self, side: str, key: Hashable) -> str:
        return side if key == self.image_key else f"{side}_{key}"

    def _outputs(self, data: Mapping[Any, Any]) -> Iterator[str]:
        points = [key for key in self.point_keys if key in data]
        keys = [key for key in self.keys if key in data]
        for side in SIDES:
            yield from (self._named(side, key) for key in (*keys, *points, *(f"{key}_valid" for key in points)))
        yield from (DDF, INVERSE_DDF, INVERSE_RESIDUAL) if self.with_inverse else (DDF,)


def _composed(first: Deformation | None, second: Deformation | None, spacing: Sequence[float]) -> Deformation | None:
    """What makes the fixed image of the given one."""
    if first is None or second is None:
        return second
    assert isinstance(first.stored, StoredField)
    assert isinstance(second.stored, StoredField)
    ddf = compose(first.ddf[None], second.ddf[None])[0]
    return Deformation(ddf, spacing, stored=ComposedField(first.stored, second.stored))


RandDRDMPairD = RandDRDMPairDict = RandDRDMPaird
