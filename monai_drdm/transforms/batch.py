"""``BatchRandDRDMDeformd``: after collate, on the device of the batch."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.utils import convert_to_tensor
from torch import Tensor

from monai_drdm.deformation.drawing import FieldDrawer
from monai_drdm.deformation.record import check_record, Deformation, DeformationParams
from monai_drdm.deformation.seeds import stable_hash
from monai_drdm.fields.warp import check_modes, Mode, PaddingMode
from monai_drdm.networks import RecoveryNetwork
from monai_drdm.samples import (
    as_tensor,
    batch_samples,
    check_same_space,
    checked_pixdim,
    like,
    Mover,
    numeric_tensor,
    spacing_of,
    world_affine,
)
from monai_drdm.transforms.array import DRDMRandomness
from monai_drdm.transforms.base import field_info, KeyedDeformation, validity
from monai_drdm.transforms.points import check_points, inside, move_points, PointSpace, to_voxels
from monai_drdm.transforms.tracing import in_plain_mode


class BatchRandDRDMDeformd(DRDMRandomness, KeyedDeformation):
    """``RandDRDMDeformd`` for batches: after collate, where the batch is, all samples that fire in one go.

    Every sample has its own chance, level and seed. A record gives the field that ``RandDRDMDeformd`` gives it. Put it
    behind the loader, as a transform of collated dictionaries or, with plain tensors, inside a training step::

        deform = BatchRandDRDMDeformd(keys=["image", "label"], mode=["bilinear", "nearest"], prob=0.5)
        for batch in loader:
            batch = deform(batch)                          # a dictionary of (B, C, *S)
        image, label = deform.deform(image, label)         # or tensors, in the order of the keys

    Args:
        keys: keys of ``(B, C, *S)`` to deform. They must agree in batch size, spatial shape and affines.
        network: as in ``RandDRDMDeform``.
        prob: chance of every sample to be deformed.
        deformation_level: as in ``RandDRDMDeform``; drawn for every sample.
        sampler: as in ``RandDRDMDeform``.
        steps: as in ``RandDRDMDeform``.
        recovery: as in ``RandDRDMDeform``.
        mode: one, or one per key.
        padding_mode: one, or one per key.
        image_key: key of the images that the network sees; None: the first key.
        image_channel: as in ``RandDRDMDeform``.
        max_displacement_mm: as in ``RandDRDMDeform``.
        on_fold: as in ``RandDRDMDeform``.
        max_fold_fraction: as in ``RandDRDMDeform``.
        point_keys: landmarks ``(B, C, N, D)``; ``<key>_valid`` is ``(B, C, N)``.
        point_space: ``voxel``, or ``world`` through the images' affines.
        pixdim: as in ``RandDRDMDeform``.
        slice_axis: as in ``RandDRDMDeform``.
        seed_key: key of one value per sample whose hash replaces the random state.
        device: where the network runs; None: where the batch is.
        precision: ``bfloat16`` computes the network's convolutions in it, where the hardware does so fast; fields and
            coordinates stay float32. Records say which it was.
        compiled: let ``torch.compile`` make the network faster, with CUDA graphs on a GPU; the first batch of each
            shape then takes a minute.
        invertible: record on every sample what ``inverse`` needs; it takes decollated samples.
        allow_missing_keys: leave keys alone that the batch lacks.

    Attributes:
        last: the latest deformations, one per sample, None where it did not fire.

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
        pixdim: Sequence[float] | None = None,
        slice_axis: int | None = None,
        seed_key: Hashable | None = None,
        device: torch.device | str | None = None,
        precision: str = "float32",
        compiled: bool = False,
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
            precision=precision,
            compiled=compiled,
        )
        DRDMRandomness.__init__(self, prob, drawer)
        self.image_key = self.keys[0] if image_key is None else image_key
        self.pixdim = checked_pixdim(pixdim)
        self.seed_key = seed_key
        self.last: list[Deformation | None] = []
        self._drawn: list[tuple[bool, int]] = []

    def randomize_batch(self, values: Sequence[object]) -> None:
        """Draw for every sample whether to fire, then one integer seed.

        Args:
            values: one per sample; a hash of those that are not None takes the place of the random state.

        Raises:
            TypeError: a value that has no hash that is the same in every process.
        """
        self._drawn = []
        for value in values:
            self.randomize(value)
            assert self._seed is not None
            self._drawn.append((self._do_transform, self._seed))

    def deform(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Deform plain tensors inside a training step.

        Args:
            tensors: ``(B, C, *S)`` for every key, in their order.

        Returns:
            As many tensors; the inputs are left as they are.

        Raises:
            ValueError: another number of tensors than keys, or anything that does not fit.
        """
        if len(tensors) != len(self.keys):
            raise ValueError(f"deform takes one tensor for each of the keys {self.keys}, got {len(tensors)}.")
        out = self(dict(zip(self.keys, tensors)))
        return tuple(torch.as_tensor(out[key]).as_subclass(Tensor) for key in self.keys)

    @in_plain_mode
    def __call__(
        self,
        data: Mapping[Any, Any],
        randomize: bool = True,
        *,
        params: Sequence[DeformationParams | None] | None = None,
    ) -> dict[Any, Any]:
        """Deform all keys of every sample that fires, by one field each.

        Args:
            data: a collated dictionary with ``(B, C, *S)`` values at the keys, and points at theirs.
            randomize: False replays the last draw.
            params: one record per sample, or None for those to be left alone, to replay instead.

        Returns:
            A new dictionary; the input and its tensors are left as they are.

        Raises:
            KeyError: a key is missing (and not allowed to), or the image key is.
            TypeError: a value is not an array or tensor of a real numeric type; ``params`` that are no such records.
            ValueError: anything that does not fit.
        """
        result = dict(data)
        present = self.present(result)
        for key in (self.image_key, *(() if self.seed_key is None else (self.seed_key,))):
            if key not in result:
                raise KeyError(f"{type(self).__name__}: {key!r} is missing from the batch: {sorted(map(str, result))}.")
        image, name = result[self.image_key], repr(self.image_key)
        samples = batch_samples(image, name)
        for key, *_ in present:
            others = batch_samples(result[key], repr(key))
            if len(others) != len(samples):
                raise ValueError(f"{name} and {key!r} must have one batch size, got {len(samples)} and {len(others)}.")
            for one, other in zip(samples, others):
                check_same_space(one, other, name, repr(key))
        for _, mode, padding in present:
            check_modes(mode, padding, samples[0].ndim - 1, type(self).__name__)
        for key in (key for key in self.point_keys if key in result):
            points = numeric_tensor(result[key], repr(key))
            if points.ndim != 4 or len(points) != len(samples):
                raise ValueError(f"{key!r} must hold points ({len(samples)}, C, N, D), got {tuple(points.shape)}.")
            check_points(points[0], samples[0].ndim - 1, repr(key))
        with torch.no_grad():
            deformations = self._deformations(result, samples, name, randomize, params)
        self.last = deformations
        self._move(result, samples, present, deformations)  # threads may share this transform, and with it ``last``
        return result

    def _deformations(
        self,
        data: Mapping[Any, Any],
        samples: list[Tensor],
        name: str,
        randomize: bool,
        params: Sequence[DeformationParams | None] | None,
    ) -> list[Deformation | None]:
        count = len(samples)
        if params is not None:
            if not isinstance(params, Sequence):
                raise TypeError(f"params must be one record or None per sample, got {type(params).__name__}.")
            for record in (record for record in params if record is not None):
                check_record(record, DeformationParams)
            if len(params) != count:
                raise ValueError(f"params must be one record or None per sample: {count}, got {len(params)}.")
            chosen = [i for i, record in enumerate(params) if record is not None]
            seeds, records = None, [record for record in params if record is not None]
        else:
            if randomize:
                self.randomize_batch([None] * count if self.seed_key is None else _values(data[self.seed_key], count))
            if len(self._drawn) != count:
                raise ValueError(
                    f"randomize=False replays the last draw, of a batch of {len(self._drawn)}; this one is of {count}."
                )
            chosen = [i for i, (fires, _) in enumerate(self._drawn) if fires]
            seeds, records = [self._drawn[i][1] for i in chosen], None
        tensors = [as_tensor(samples[i], name) for i in chosen]
        spacings = [spacing_of(samples[i], self.pixdim, name) for i in chosen]
        found: list[Deformation | None] = [None] * count
        for i, deformation in zip(chosen, self.drawer.draw_batch(tensors, spacings, seeds=seeds, params=records)):
            found[i] = deformation
        return found

    def _move(
        self,
        data: dict[Any, Any],
        samples: list[Tensor],
        present: Sequence[tuple[Hashable, Mode, PaddingMode]],
        deformations: list[Deformation | None],
    ) -> None:
        shape = tuple(samples[0].shape[1:])
        moving = [i for i, one in enumerate(deformations) if one is not None and not one.skipped]
        fields = [one.ddf for one in deformations if one is not None and not one.skipped]
        mover = Mover(torch.stack(fields)) if fields else None
        infos = [field_info(one, shape) for one in deformations] if self.invertible else []
        for key, mode, padding in present:
            values = numeric_tensor(data[key], repr(key))
            interpolated = mode in ("bilinear", "bicubic") and not values.is_floating_point()
            out = values.to(torch.float32) if interpolated else values
            if mover is not None:
                warped = iter(mover.warp(torch.stack([values[i] for i in moving]), mode, padding).to(out.dtype))
                # one by one: PyTorch does not index unsigned integers
                out = torch.stack([next(warped) if i in moving else one for i, one in enumerate(out)])
            elif not interpolated:
                out = values.clone()
            info = {"kind": "image", "mode": mode, "padding_mode": padding}
            data[key] = self._recorded_batch(data[key], out, moving, [info | one for one in infos])
        for key in (key for key in self.point_keys if key in data):
            self._move_batch_of_points(data, key, samples, deformations, moving, infos)

    def _move_batch_of_points(
        self,
        data: dict[Any, Any],
        key: Hashable,
        samples: list[Tensor],
        deformations: list[Deformation | None],
        moving: list[int],
        infos: list[dict[str, Any]],
    ) -> None:
        values = numeric_tensor(data[key], repr(key))
        moved = values.clone() if values.is_floating_point() else values.float()
        valid, affines, name = [], [], f"{key}_valid"
        for i, sample in enumerate(samples):
            affine = world_affine(sample, repr(self.image_key)) if self.point_space == "world" else None
            on_device = None if affine is None else affine.to(values.device)
            deformation = deformations[i]
            if i in moving and deformation is not None:
                points, ok = move_points(moved[i], deformation.ddf.to(values.device), on_device)
                moved[i] = points.to(moved.dtype)
            else:
                ok = inside(to_voxels(moved[i].double(), on_device), tuple(sample.shape[1:]))
            if name in data:
                ok = ok & validity(data[name][i], ok, name)
            valid.append(ok)
            affines.append([] if affine is None else affine.tolist())
        records = [{"kind": "points", "affine": affine} | one for affine, one in zip(affines, infos)]
        data[key], data[name] = self._recorded_batch(data[key], moved, moving, records), torch.stack(valid)

    def _recorded_batch(self, before: Any, out: Tensor, moving: list[int], infos: list[dict[str, Any]]) -> Tensor:
        """A batch with one more record on each of its samples, where metadata is tracked."""
        result = like(before, out)
        if isinstance(result, MetaTensor):
            result.is_batch = True
            known = before.applied_operations if isinstance(before, MetaTensor) and before.is_batch else []
            records = [self.record(MetaTensor(one), i in moving, info) for i, (one, info) in enumerate(zip(out, infos))]
            result.applied_operations = [
                (operations or []) + record.applied_operations  # type: ignore[union-attr]  # a MetaTensor
                for operations, record in zip_longest(map(_operations, known), records)
            ]
        return result


def _operations(collated: Any) -> list[Any]:
    """Of one sample of a batch; MONAI collates none of them as a word."""
    return [] if isinstance(collated, str) else list(collated)


def _values(data: Any, count: int) -> list[object]:
    """One value per sample."""
    values = list(data) if isinstance(data, (Sequence, np.ndarray, Tensor)) and not isinstance(data, str) else [data]
    if len(values) != count:
        raise ValueError(f"seed_key must hold one value per sample: {count}, got {len(values)}.")
    for value in values:
        stable_hash(value)  # refuses None, which would mean the random state
    return [convert_to_tensor(v, track_meta=False) if isinstance(v, Tensor) else v for v in values]


BatchRandDRDMDeformD = BatchRandDRDMDeformDict = BatchRandDRDMDeformd
