"""One field for all keys of a sample – images, labels, landmarks, boxes – and the way back."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast, TypeVar

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor, ensure_tuple, TraceKeys
from torch import Tensor

from monai_drdm.deformation.record import Deformation
from monai_drdm.deformation.seeds import stable_hash
from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.fields.warp import check_modes, Mode, PaddingMode
from monai_drdm.samples import (
    as_tensor,
    check_keys_agree,
    flushed,
    idle,
    like,
    Mover,
    numeric_tensor,
    world_affine,
)
from monai_drdm.transforms.points import (
    check_boxes,
    check_points,
    check_spaces,
    inside,
    move_boxes,
    move_points,
    PointSpace,
    restore_boxes,
    restore_points,
    standard_mode,
    to_voxels,
)
from monai_drdm.transforms.tracing import in_plain_mode, TracedTransform


class KeyedDeformation(TracedTransform, MapTransform):
    """Applies one deformation to every key of a sample, and takes it back.

    Args:
        keys: images and labels ``(C, *S)``.
        mode: one, or one per key.
        padding_mode: one, or one per key.
        point_keys: landmarks ``(C, N, D)``.
        point_space: ``voxel`` or ``world``.
        box_keys: boxes ``(N, 2D)``.
        box_mode: one of MONAI's corner modes; ``standard`` is ``xyxy`` or ``xyzxyz``.
        invertible: record what the inverse needs.
        allow_missing_keys: leave keys alone that the data lack.
    """

    image_key: Hashable
    """What the network sees, or what a field was drawn on."""
    seed_key: Hashable | None

    def __init__(
        self,
        keys: KeysCollection,
        mode: Mode | Sequence[Mode],
        padding_mode: PaddingMode | Sequence[PaddingMode],
        point_keys: KeysCollection,
        point_space: PointSpace,
        box_keys: KeysCollection,
        box_mode: str,
        invertible: bool,
        allow_missing_keys: bool,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        TracedTransform.__init__(self)
        self.mode: tuple[Mode, ...] = _per_key(mode, len(self.keys), "mode")
        self.padding_mode: tuple[PaddingMode, ...] = _per_key(padding_mode, len(self.keys), "padding_mode")
        for one_mode, one_padding in zip(self.mode, self.padding_mode):
            check_modes(one_mode, one_padding, 2, type(self).__name__)
        check_spaces(point_space, box_mode)
        self.point_keys: tuple[Hashable, ...] = ensure_tuple(point_keys)
        self.point_space = point_space
        self.box_keys: tuple[Hashable, ...] = ensure_tuple(box_keys)
        self.box_mode = box_mode
        self.invertible = invertible
        named = [*self.keys, *self.point_keys, *self.box_keys]
        if len(set(named)) != len(named):
            raise ValueError(f"keys, point_keys and box_keys must name each entry once, got {named}.")

    def present(self, data: Mapping[Any, Any]) -> list[tuple[Hashable, Mode, PaddingMode]]:
        """Image and label keys that the data hold, with their modes.

        Raises:
            KeyError: a key is missing, also of points or boxes, and not allowed to.
        """
        for key in (*self.point_keys, *self.box_keys):
            if key not in data and not self.allow_missing_keys:
                raise KeyError(
                    f"Key `{key}` of transform `{type(self).__name__}` was missing in the data and "
                    "allow_missing_keys==False."
                )
        return list(self.key_iterator(data, self.mode, self.padding_mode))

    def received(self, data: Mapping[Any, NdarrayOrTensor]) -> dict[Any, Any]:
        """A copy of a sample in which nothing is pending, once all of it is there and fits together.

        Raises:
            KeyError: a key is missing (and not allowed to), or the image key or the seed key is.
            TypeError: a value is not an array or tensor of a real numeric type.
            ValueError: anything that does not fit.
        """
        result = dict(data)
        present = self.present(result)
        names = [key for key, *_ in present]
        for which in ("image_key", "seed_key"):
            key = getattr(self, which)
            if key not in result and not (which == "seed_key" and key is None):
                raise KeyError(
                    f"{type(self).__name__}: {which} {key!r} is missing from the data: {sorted(map(str, result))}."
                )
        for key in dict.fromkeys((self.image_key, *names)):
            result[key] = flushed(result[key])
            as_tensor(result[key], repr(key))
        check_keys_agree(result, self.image_key, names)
        for _, mode, padding in present:
            check_modes(mode, padding, result[self.image_key].ndim - 1, type(self).__name__)
        self.check_geometry(result, result[self.image_key].ndim - 1)
        if self.seed_key is not None:
            stable_hash(result[self.seed_key])  # refuses None, which would mean the random state
        return result

    def check_geometry(self, data: Mapping[Any, NdarrayOrTensor], dims: int) -> None:
        """Check points and boxes before anything is drawn or moved.

        Raises:
            TypeError: neither array nor tensor, or not of a real numeric type.
            ValueError: shapes or values that do not fit.
        """
        box_mode = standard_mode(self.box_mode, dims)
        for key in self.point_keys:
            if key in data:
                check_points(_values(data[key], repr(key)), dims, repr(key))
        for key in self.box_keys:
            if key in data:
                check_boxes(_values(data[key], repr(key)), dims, box_mode, repr(key))

    def move(self, data: dict[Any, Any], image: NdarrayOrTensor, name: str, deformation: Deformation | None) -> None:
        """Replace every key of ``data`` by what the deformation, or no deformation, makes of it.

        Args:
            data: a dictionary of this call's own.
            image: gives shape and affine.
            name: of the image.
            deformation: None where nothing moves.
        """
        shape = tuple(image.shape[1:])
        ddf = None if deformation is None or deformation.skipped else deformation.ddf
        fired, mover = ddf is not None, None if ddf is None else Mover(ddf[None])
        shared = field_info(deformation, shape) if self.invertible else {}
        present = self.present(data)
        known = [one.affine for one in (image, *(data[key] for key, *_ in present)) if isinstance(one, MetaTensor)]
        for key, mode, padding in present:
            out = idle(data[key], mode) if mover is None else mover.like(data[key], mode, padding, repr(key))
            if known and isinstance(out, MetaTensor) and not isinstance(data[key], MetaTensor):
                out.affine = known[0].clone()  # it lies on their grid, and must agree with them when it comes again
            data[key] = self._recorded(out, fired, {"kind": "image", "mode": mode, "padding_mode": padding, **shared})
        points = [key for key in self.point_keys if key in data]
        affine = world_affine(image, name) if self.point_space == "world" and points else None
        for key in points:
            self.move_points(data, key, ddf, shape, affine, {"kind": "points", **shared})
        for key in (key for key in self.box_keys if key in data):
            boxes, box_mode = _values(data[key], repr(key)), standard_mode(self.box_mode, len(shape))
            out = boxes if ddf is None else move_boxes(boxes, ddf.to(boxes.device), box_mode).to(boxes.dtype)
            info = {"kind": "boxes", "box_mode": box_mode, "before": boxes.clone(), "after": out.clone(), **shared}
            data[key] = self._recorded(like(data[key], out), fired, info)

    @in_plain_mode
    def inverse(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Take back what this transform did to the keys that the data hold.

        Images and labels are warped by the inverse field, in the recorded modes; landmarks return, and so do
        boxes that are as this transform left them; other boxes return as those that enclose what they hold, which are
        larger. ``<key>_valid`` of landmarks stays.

        Args:
            data: a dictionary with outputs of this transform, or what was computed from them, at the keys.

        Returns:
            A new dictionary without this transform's records; other records stay. The input is left as it is.

        Raises:
            KeyError: a key is missing and not allowed to.
            TypeError: data that carry no records.
            ValueError: no record of this transform, or data of another shape than it recorded.
        """
        result = dict(data)
        inverses: dict[int, Mover] = {}
        image_keys = [key for key, *_ in self.present(result)]
        for key in (*image_keys, *(key for key in (*self.point_keys, *self.box_keys) if key in result)):
            result[key] = take_back(self, result[key], repr(key), inverses)
        return result

    def move_points(
        self,
        data: dict[Any, Any],
        key: Hashable,
        ddf: Tensor | None,
        shape: tuple[int, ...],
        affine: Tensor | None,
        info: dict[str, Any],
    ) -> None:
        """Replace landmarks and their validity by what a field ``(D, *S)``, or none, makes of them."""
        points = _values(data[key], repr(key))
        on_device = None if affine is None else affine.to(points.device)
        if ddf is None:
            moved, valid = points, inside(to_voxels(points.double(), on_device), shape)
        else:
            moved, valid = move_points(points, ddf.to(points.device), on_device)
        name = f"{key}_valid"
        if name in data:
            valid = valid & validity(data[name], valid, name)
        info |= {"affine": [] if affine is None else affine.tolist()}
        out = like(data[key], moved.to(points.dtype))
        data[key], data[name] = self._recorded(out, ddf is not None, info), valid

    def _recorded(self, out: Tensor, fired: bool, info: Mapping[str, Any]) -> Tensor:
        return self.record(out, fired, info) if self.invertible else out


def field_info(deformation: Deformation | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """What every record of one call shares: the field, and the parameters as JSON (empty without)."""
    if deformation is None or deformation.skipped:
        return {"field": StoredField.identity(shape), "params": ""}
    record = deformation.banked or deformation.params
    return {"field": deformation.stored, "params": "" if record is None else record.to_json()}


def take_back(transform: TracedTransform, data: NdarrayOrTensor, name: str, inverses: dict[int, Mover]) -> Tensor:
    """What ``data`` were before ``transform``, by its latest record on them; see ``KeyedDeformation.inverse``.

    Args:
        transform: the transform that left the record.
        data: what carries it.
        name: of the data, for errors.
        inverses: what warps by inverse fields, by the ``id`` of the field, for the entries of one call to share.
    """
    rest, record = transform.take_record(data, name)
    info = record[TraceKeys.EXTRA_INFO]
    if not record[TraceKeys.DO_TRANSFORM]:
        return rest
    field: StoredField = info["field"]
    values = rest.as_tensor()
    if info["kind"] == "points":
        affine = torch.tensor(info["affine"], dtype=torch.float64, device=values.device) if info["affine"] else None
        return like(rest, restore_points(values, field.ddf(values.device), affine).to(values.dtype))
    if info["kind"] == "boxes":
        before, after = info["before"].to(values.device), info["after"].to(values.device)
        boxes = restore_boxes(values, before, after, field.ddf(values.device), info["box_mode"])
        return like(rest, boxes.to(values.dtype))
    if tuple(values.shape[1:]) != field.shape:
        raise ValueError(
            f"{type(transform).__name__}.inverse: {name} must have the spatial shape {field.shape} that was deformed, "
            f"got {tuple(values.shape[1:])}. Invert what changed the shape first."
        )
    if id(field) not in inverses:
        with torch.no_grad():
            inverses[id(field)] = Mover(field.inverse(values.device).ddf)
    return inverses[id(field)].like(rest, info["mode"], info["padding_mode"], name)


def _values(data: NdarrayOrTensor, name: str) -> Tensor:
    """Points or boxes as a floating tensor without metadata."""
    tensor = numeric_tensor(data, name)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)


def validity(data: NdarrayOrTensor, valid: Tensor, name: str) -> Tensor:
    """What data say of the validity of points so far, checked to be of the shape of what is said now."""
    before: Tensor = convert_to_tensor(data, track_meta=False)
    if before.shape != valid.shape or before.dtype != torch.bool:
        raise ValueError(
            f"{name!r} is where the validity of points goes; what is there must be bool of shape {tuple(valid.shape)}, "
            f"got {before.dtype} of {tuple(before.shape)}. Rename it."
        )
    return before.to(valid.device)


_Option = TypeVar("_Option", bound=str)


def _per_key(value: _Option | Sequence[_Option], count: int, name: str) -> tuple[_Option, ...]:
    values = cast("tuple[_Option, ...]", (value,) * count if isinstance(value, str) else tuple(value))
    if len(values) != count:
        raise ValueError(f"{name} must be one or one per key: {count} keys, got {len(values)} of them {values}.")
    return values
