"""Applying one field to all keys of a sample (images, labels, landmarks, boxes), and inverting it.

Every transform takes three steps: it validates the data, finds the deformation of each sample, and applies them. A
sample is treated as a batch of one, so the code below is written for batches.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, TypeVar

import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.utils import ensure_tuple, TraceKeys
from torch import Tensor

from monai_drdm.deformation import Deformation, stable_hash, StoredField
from monai_drdm.deformation.warping import FieldWarper, is_interpolated, unmoved
from monai_drdm.fields.sampling import check_modes, Mode, PaddingMode
from monai_drdm.samples import (
    apply_pending,
    as_tensor,
    check_same_spaces,
    numeric_tensor,
    spacing_of,
    split_batch,
    world_affine,
    wrap_like,
)
from monai_drdm.transforms.notices import Notices
from monai_drdm.transforms.options import ApplyOptions
from monai_drdm.transforms.points import (
    check_boxes,
    check_points,
    check_spaces,
    inside,
    Motion,
    move_boxes,
    move_points,
    restore_boxes,
    restore_points,
    standard_mode,
    to_voxels,
)
from monai_drdm.transforms.tracing import in_plain_mode, put_back_crops, TracedTransform


@dataclass
class ValidData:
    """A sample, or a batch of samples, whose entries were checked. A sample is a batch of one."""

    data: dict[Any, Any]
    """A new dictionary of the data, in which no lazy operation is pending."""
    name: str
    """Name of the image in error messages."""
    image_keys: list[tuple[Hashable, Mode, PaddingMode]]
    """Keys of images and labels that the data hold, with their modes."""
    values: dict[Hashable, Tensor]
    """The values of images and labels as plain tensors ``(B, C, *S)``."""
    images: Tensor
    """What the network sees, ``(B, C, *S)``."""
    spaces: list[Any]
    """For each sample, an image ``(C, *S)`` whose affine the outputs get."""
    spacings: list[tuple[float, ...]]
    """For each sample, mm per voxel along each axis."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape ``S``."""
        return tuple(self.images.shape[2:])


class KeyedDeformation(TracedTransform, MapTransform):
    """Applies one deformation to every key of a sample, and takes it back.

    Args:
        keys: images and labels ``(C, *S)``.
        options: how they are moved.
    """

    image_key: Hashable
    """Key of the image that the network sees, or that the fields were drawn on."""
    seed_key: Hashable | None = None
    pixdim: tuple[float, ...] | None = None
    batched = False
    """Whether values at the keys are batches ``(B, C, *S)``."""
    draws = False
    """Whether a network draws the fields."""
    for_tensors = "RandDRDMDeform deforms one image without keys"
    """Advice in the error message if the transform is called with tensors."""

    def __init__(self, keys: KeysCollection, options: ApplyOptions) -> None:
        MapTransform.__init__(self, keys, options["allow_missing_keys"])
        TracedTransform.__init__(self)
        self.mode: tuple[Mode, ...] = _per_key(options["mode"], len(self.keys), "mode")
        self.padding_mode: tuple[PaddingMode, ...] = _per_key(options["padding_mode"], len(self.keys), "padding_mode")
        for mode, padding in zip(self.mode, self.padding_mode):
            check_modes(mode, padding, 2, type(self).__name__)
        self.point_keys: tuple[Hashable, ...] = ensure_tuple(options["point_keys"])
        self.point_space = options["point_space"]
        self.box_keys: tuple[Hashable, ...] = ensure_tuple(options.get("box_keys", ()))
        self.box_mode = options.get("box_mode", "standard")
        check_spaces(self.point_space, self.box_mode)
        self.invertible = options["invertible"]
        self.notices = Notices(type(self).__name__)
        named = [*self.keys, *self.point_keys, *self.box_keys]
        if len(set(named)) != len(named):
            raise ValueError(f"keys, point_keys and box_keys must name each entry once, got {named}.")

    # ------------------------------------------------------------------------------------------ validate

    def validate(self, data: Mapping[Any, Any], image_key: Hashable | None = None) -> ValidData:
        """Check that a sample or batch is complete and its entries fit together, before anything is drawn or moved.

        Args:
            data: the input of the transform, which is not changed.
            image_key: the key whose shape and affine the others must have; None: the transform's image key.

        Raises:
            KeyError: a key is missing (and not allowed to), or the image key or the seed key is.
            TypeError: a value is not an array or tensor of a real numeric type.
            ValueError: anything that does not fit.
        """
        result = self.entries(data)
        present = self._present(result)
        image_key = self._check_named(result) if image_key is None else image_key
        values, samples = dict[Hashable, Tensor](), dict[Hashable, list[Any]]()
        for key in dict.fromkeys((image_key, *(key for key, *_ in present))):
            result[key] = apply_pending(result[key])
            values[key], samples[key] = self._read(result[key], repr(key))
            check_same_spaces(samples[image_key], samples[key], repr(image_key), repr(key))
        dims = values[image_key].ndim - 2
        for _, mode, padding in present:
            check_modes(mode, padding, dims, type(self).__name__)
        self._check_points_and_boxes(result, dims, len(values[image_key]))
        spaces = [_known(list(several)) for several in zip(*samples.values())]
        spacings = [spacing_of(one, self.pixdim, repr(image_key)) for one in spaces]
        valid = ValidData(result, repr(image_key), present, values, values[image_key], spaces, spacings)
        if self.notices.begin():
            self._notice(valid, image_key)
        return valid

    def _notice(self, valid: ValidData, image_key: Hashable) -> None:
        """Warn about data that look like a mistake."""
        image, shape = valid.data[image_key], tuple(valid.images.shape[1:])
        self.notices.look_at_layout(image, shape, valid.name, batched=self.batched)
        if self.draws:
            self.notices.look_at_patches(image, shape[1:], valid.name)
        for key, mode, _ in valid.image_keys:
            if key != image_key:
                self.notices.look_at_label(valid.data[key], valid.values[key], key, mode)

    def entries(self, data: object) -> dict[Any, Any]:
        """The entries of the input in a new dictionary.

        Raises:
            TypeError: something else, such as tensors.
        """
        if not isinstance(data, Mapping):
            raise TypeError(
                f"{type(self).__name__} takes a dictionary with the keys {self.keys}, got {type(data).__name__}; "
                f"{self.for_tensors}."
            )
        return dict(data)

    def _present(self, data: Mapping[Any, Any]) -> list[tuple[Hashable, Mode, PaddingMode]]:
        """Keys of images and labels that the data hold, with their modes.

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

    def _check_named(self, data: Mapping[Any, Any]) -> Hashable:
        """Check that the data hold the image key and the seed key. Returns the image key."""
        for which, key in (("image_key", self.image_key), ("seed_key", self.seed_key)):
            if key not in data and not (which == "seed_key" and key is None):
                raise KeyError(
                    f"{type(self).__name__}: {which} {key!r} is missing from the data: {sorted(map(str, data))}."
                )
        if self.seed_key is not None and not self.batched:
            stable_hash(data[self.seed_key])  # refuses None, which would mean the random state
        return self.image_key

    def _read(self, data: Any, name: str) -> tuple[Tensor, list[Any]]:
        """Values ``(B, C, *S)``, and for each sample the data that know its affine."""
        return split_batch(data, name) if self.batched else (as_tensor(data, name)[None], [data])

    def _check_points_and_boxes(self, data: Mapping[Any, Any], dims: int, count: int) -> None:
        box_mode = standard_mode(self.box_mode, dims)
        for key in (key for key in self.point_keys if key in data):
            points = _floating(data[key], repr(key))
            if self.batched and (points.ndim != 4 or len(points) != count):
                raise ValueError(f"{key!r} must hold points ({count}, C, N, D), got {tuple(points.shape)}.")
            check_points(points[0] if self.batched else points, dims, repr(key))
        for key in (key for key in self.box_keys if key in data):
            check_boxes(_floating(data[key], repr(key)), dims, box_mode, repr(key))

    # --------------------------------------------------------------------------------------------- apply

    def apply(self, valid: ValidData, deformations: Sequence[Deformation | None]) -> dict[Any, Any]:
        """Deform the value at every key, each sample by its own deformation.

        Args:
            valid: the data; their dictionary is changed.
            deformations: one for each sample; None where nothing moves.

        Returns:
            The dictionary of the data.
        """
        applied = [None if one is None or one.skipped else one for one in deformations]
        infos = [field_info(one, valid.shape) for one in deformations] if self.invertible else []
        self._move_images(valid, applied, infos)
        for key in (key for key in self.point_keys if key in valid.data):
            self.move_points(valid, key, applied, infos)
        for key in (key for key in self.box_keys if key in valid.data):
            self._move_boxes(valid.data, key, applied[0], infos)
        return valid.data

    def _move_images(
        self, valid: ValidData, deformations: Sequence[Deformation | None], infos: list[dict[str, Any]]
    ) -> None:
        moving = [i for i, one in enumerate(deformations) if one is not None]
        warper = _warper([one for one in deformations if one is not None])
        known = [one.affine for one in valid.spaces if isinstance(one, MetaTensor)]
        affine = None if not known else torch.stack(known) if self.batched else known[0]
        for key, mode, padding in valid.image_keys:
            before, out = valid.data[key], _warp_some(valid.values[key], moving, warper, mode, padding)
            info = {"kind": "image", "mode": mode, "padding_mode": padding}
            result = self._wrapped(before, out, moving, [info | one for one in infos])
            if affine is not None and isinstance(result, MetaTensor) and not isinstance(before, MetaTensor):
                result.affine = (
                    affine.clone()
                )  # it lies on the same grid, so it must keep the same affine for later calls
            valid.data[key] = result

    def move_points(
        self,
        valid: ValidData,
        key: Hashable,
        deformations: Sequence[Deformation | None],
        infos: list[dict[str, Any]],
    ) -> None:
        """Move landmarks, and update which of them are valid."""
        values, name = _floating(valid.data[key], repr(key)), f"{key}_valid"
        points = values if self.batched else values[None]
        world = self.point_space == "world"
        affines = [world_affine(one, valid.name).to(values.device) if world else None for one in valid.spaces]
        moved, validity = [], []
        for one, affine, deformation in zip(points, affines, deformations):
            if deformation is None:
                moved.append(one)
                validity.append(inside(to_voxels(one.double(), affine), valid.shape))
            else:
                there, ok = move_points(one, Motion(*deformation.parts(values.device)), affine)
                moved.append(there.to(values.dtype))
                validity.append(ok)
        is_valid = torch.stack(validity) if self.batched else validity[0]
        if name in valid.data:
            is_valid = is_valid & _validity_before(valid.data[name], is_valid, name)
        records = [
            {"kind": "points", "affine": [] if affine is None else affine.tolist()} | info
            for affine, info in zip(affines, infos)
        ]
        moving = [i for i, one in enumerate(deformations) if one is not None]
        valid.data[key] = self._wrapped(valid.data[key], torch.stack(moved), moving, records)
        valid.data[name] = is_valid

    def _move_boxes(
        self, data: dict[Any, Any], key: Hashable, deformation: Deformation | None, infos: list[dict[str, Any]]
    ) -> None:
        boxes = _floating(data[key], repr(key))
        mode, out, moving = standard_mode(self.box_mode, boxes.shape[-1] // 2), boxes, list[int]()
        if deformation is not None:
            out, moving = move_boxes(boxes, Motion(*deformation.parts(boxes.device)), mode).to(boxes.dtype), [0]
        info = {"kind": "boxes", "box_mode": mode, "before": boxes.clone(), "after": out.clone()}
        data[key] = self._wrapped(data[key], out[None], moving, [info | one for one in infos])

    def _wrapped(self, before: Any, out: Tensor, moving: Sequence[int], infos: list[dict[str, Any]]) -> Tensor:
        """The results in MONAI's form, each with one more record if metadata is tracked."""
        if not self.batched:
            result = wrap_like(before, out[0])
            return self.record(result, bool(moving), infos[0]) if infos else result
        result = wrap_like(before, out)
        if isinstance(result, MetaTensor):
            result.is_batch = True
            if result.affine.ndim == 2:  # MONAI takes row i of the affine of a batch for that of sample i
                result.affine = result.affine.expand(len(out), -1, -1).clone()
            result.applied_operations = [
                known + self._records_of(one, i in moving, infos[i : i + 1])
                for i, (known, one) in enumerate(zip(_operations(before, len(out)), out))
            ]
        return result

    def _records_of(self, sample: Tensor, moved: bool, infos: Sequence[dict[str, Any]]) -> list[Any]:
        """The records that are added to one sample of a batch: one for each description."""
        carrier = MetaTensor(sample)
        for info in infos:
            self.record(carrier, moved, info)
        return list(carrier.applied_operations)

    # ------------------------------------------------------------------------------------------- inverse

    @in_plain_mode
    def inverse(self, data: Mapping[Any, Any]) -> dict[Any, Any]:
        """Take back what this transform did to the keys that the data hold.

        Images and labels are warped by the inverse field, in the recorded modes. Landmarks are moved back exactly.
        Boxes are restored if they are as this transform left them. Other boxes become the boxes that enclose what they
        held, which are larger. ``<key>_valid`` of landmarks stays.

        Args:
            data: a dictionary with outputs of this transform, or what was computed from them, at the keys.

        Returns:
            A new dictionary without this transform's records; other records stay. The input is left as it is.

        Raises:
            KeyError: a key is missing and not allowed to.
            TypeError: data that carry no records.
            ValueError: no record of this transform, or data of another shape than it recorded.
        """
        result = self.entries(data)
        warpers: dict[int, FieldWarper] = {}
        keys = [key for key, *_ in self._present(result)]
        for key in (*keys, *(key for key in (*self.point_keys, *self.box_keys) if key in result)):
            result[key] = take_back(self, result[key], repr(key), warpers)
        return result


def field_info(deformation: Deformation | None, shape: tuple[int, ...]) -> dict[str, Any]:
    """The entries that all records of one call share: the field, and its parameters as JSON (or an empty text)."""
    if deformation is None or deformation.skipped:
        return {"field": StoredField.identity(shape), "params": ""}
    record = deformation.banked or deformation.params
    return {"field": deformation.stored, "params": "" if record is None else record.to_json()}


def apply_to_image(
    image: Tensor, deformation: Deformation | None, mode: Mode, padding_mode: PaddingMode
) -> tuple[Tensor, bool]:
    """Apply a deformation, or none, to one image ``(C, *S)``. Returns the image and whether it was moved."""
    if deformation is None or deformation.skipped:
        return unmoved(image, mode), False
    return deformation.warp(image, mode, padding_mode), True


def take_back(transform: TracedTransform, data: NdarrayOrTensor, name: str, warpers: dict[int, FieldWarper]) -> Tensor:
    """Undo what ``transform`` did to ``data``, by its latest record on them; see ``KeyedDeformation.inverse``.

    Args:
        transform: the transform that left the record.
        data: the data that carry the record.
        name: name of the data in error messages.
        warpers: warpers by inverse fields, for each ``id`` of a field, so that the entries of one call share them.
    """
    rest, record, later = transform.take_record(data, name)
    info = record[TraceKeys.EXTRA_INFO]
    field: StoredField = info["field"]
    if info["kind"] == "image" and tuple(rest.shape[1:]) != field.shape:
        rest = put_back_crops(rest, later)
    if not record[TraceKeys.DO_TRANSFORM]:
        return rest
    values = rest.as_tensor()
    if info["kind"] == "points":
        affine = torch.tensor(info["affine"], dtype=torch.float64, device=values.device) if info["affine"] else None
        return wrap_like(rest, restore_points(values, Motion(*field.parts(values.device)), affine).to(values.dtype))
    if info["kind"] == "boxes":
        before, after = info["before"].to(values.device), info["after"].to(values.device)
        boxes = restore_boxes(values, before, after, Motion(*field.parts(values.device)), info["box_mode"])
        return wrap_like(rest, boxes.to(values.dtype))
    _check_shape(transform, rest, name, field.shape, later)
    if id(field) not in warpers:
        with torch.no_grad():
            warpers[id(field)] = FieldWarper(field.inverse(values.device).ddf)
    image = as_tensor(rest, name)[None]
    return wrap_like(rest, warpers[id(field)](image, info["mode"], info["padding_mode"])[0])


def _check_shape(transform: TracedTransform, data: MetaTensor, name: str, shape: tuple[int, ...], later: int) -> None:
    """Raise ``ValueError`` unless data have the spatial shape that was deformed."""
    if tuple(data.shape[1:]) == shape:
        return
    count = len(data.applied_operations)
    classes = [str(one.get(TraceKeys.CLASS_NAME)) for one in data.applied_operations[max(0, count - later) :]]
    if "PadListDataCollate" in classes:
        advice = "Take back the padding of the batch first (monai.transforms.PadListDataCollate.inverse)."
    elif classes:
        advice = f"Take back {', '.join(classes)} first, which came later."
    else:
        advice = (
            "Take back first what changed it. If it was padded to the batch (TestTimeAugmentation after crops of "
            "varying size, pad_list_data_collate), MONAI leaves that padding on predictions: use batch_size=1."
        )
    raise ValueError(
        f"{type(transform).__name__}.inverse: {name} must have the spatial shape {shape} that was deformed, got "
        f"{tuple(data.shape[1:])}. {advice}"
    )


def _known(samples: list[Any]) -> Any:
    """The first image that has an affine, which all outputs get. If none has one, the first image."""
    return next((one for one in samples if isinstance(one, MetaTensor)), samples[0])


def _warper(deformations: Sequence[Deformation]) -> FieldWarper | None:
    """A warper for a batch, with one field for each sample; None if there are no fields."""
    if not deformations:
        return None
    alone = len(deformations) == 1  # stacking would copy the field
    return FieldWarper(deformations[0].ddf[None] if alone else torch.stack([one.ddf for one in deformations]))


def _warp_some(
    values: Tensor, moving: Sequence[int], warper: FieldWarper | None, mode: Mode, padding_mode: PaddingMode
) -> Tensor:
    """A batch ``(B, C, *S)`` of which some samples are warped and the others stay as they are."""
    if warper is None:
        return unmoved(values, mode)
    if len(moving) == len(values):
        return warper(values, mode, padding_mode)
    warped = iter(warper(torch.stack([values[i] for i in moving]), mode, padding_mode))
    others = values.to(torch.float32) if is_interpolated(values, mode) else values
    # one by one: PyTorch does not index unsigned integers
    return torch.stack([next(warped).to(others.dtype) if i in moving else one for i, one in enumerate(others)])


def _floating(data: NdarrayOrTensor, name: str) -> Tensor:
    """Points or boxes as a floating tensor without metadata."""
    tensor = numeric_tensor(data, name)
    return tensor if tensor.is_floating_point() else tensor.to(torch.float32)


def _validity_before(data: NdarrayOrTensor, valid: Tensor, name: str) -> Tensor:
    """The validity of points that earlier transforms have recorded, whose shape is checked."""
    before = numeric_tensor(data, repr(name))
    if before.shape != valid.shape or before.dtype != torch.bool:
        raise ValueError(
            f"{name!r} is where the validity of points goes; what is there must be bool of shape {tuple(valid.shape)}, "
            f"got {before.dtype} of {tuple(before.shape)}. Rename it."
        )
    return before.to(valid.device)


def _operations(batch: Any, count: int) -> list[list[Any]]:
    """The records that each sample of a batch carries already. If there are none, MONAI collates a string instead."""
    known = batch.applied_operations if isinstance(batch, MetaTensor) and batch.is_batch else []
    each = [[] if isinstance(one, str) else list(one) for one in known]
    return each + [[] for _ in range(count - len(each))]


_Option = TypeVar("_Option", bound=str)


def _per_key(value: _Option | Sequence[_Option], count: int, name: str) -> tuple[_Option, ...]:
    values = cast("tuple[_Option, ...]", (value,) * count if isinstance(value, str) else tuple(value))
    if len(values) != count:
        raise ValueError(f"{name} must be one or one per key: {count} keys, got {len(values)} of them {values}.")
    return values
