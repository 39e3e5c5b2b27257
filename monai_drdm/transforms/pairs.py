"""``RandDRDMPaird``: makes a moving and a fixed image of one image, and the field between them (paper, Algorithm 4)."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.utils import TraceKeys
from torch import Tensor
from typing_extensions import Unpack

from monai_drdm.deformation import ComposedField, Deformation, DeformationParams, FieldDrawer, PairParams, StoredField
from monai_drdm.deformation.options import choose, NetworkLike, SharedDrawOptions, with_options
from monai_drdm.deformation.record import check_record
from monai_drdm.deformation.warping import FieldWarper
from monai_drdm.fields import compose
from monai_drdm.samples import as_tensor, checked_pixdim
from monai_drdm.transforms.base import field_info, KeyedDeformation, take_back, ValidData
from monai_drdm.transforms.options import ApplyOptions, PairOptions
from monai_drdm.transforms.randomness import DRDMRandomness
from monai_drdm.transforms.tracing import in_plain_mode

SIDES = ("moving", "fixed")
DDF, INVERSE_DDF, INVERSE_RESIDUAL = "ddf", "inverse_ddf", "inverse_residual"
_MOVED_TWICE = "onwards"  # the name that records have on disk

Plan = int | DeformationParams | None
"""How a field is made: from a seed, from a record to replay, or not at all."""


@dataclass(frozen=True)
class DeformedPair:
    """The result of one call."""

    augmentation: Deformation | None
    """Makes the moving image from the given one; None: they are the same."""
    synthesis: Deformation
    """Makes the fixed image from the moving one. Its field is the answer of the registration."""
    fixed: Deformation
    """Both composed; makes the fixed image from the given one."""

    @property
    def params(self) -> PairParams:
        """The record that replays the pair."""
        first, second = None if self.augmentation is None else self.augmentation.params, self.synthesis.params
        assert second is not None
        return PairParams(first, second)


@with_options(PairOptions)
class RandDRDMPaird(DRDMRandomness, KeyedDeformation):
    """Make a synthetic registration pair of every sample: two plausible anatomies and the exact field between them.

    One field, drawn on the image, makes the moving image; another one, drawn on the moving image, is the answer that
    a registration network should give: ``fixed(x) = moving(x + ddf(x))`` wherever ``x + ddf(x)`` is inside the image.
    Both images are resampled once from the given one, so neither is blurred more than the other, and where the field
    points beyond the moving image the fixed one shows what the given image holds there.

    The results are added to the sample: ``moving`` and ``fixed`` for the image key, ``moving_<key>`` and
    ``fixed_<key>`` for the other keys, ``ddf`` ``(D, *S)`` in voxels, and ``inverse_ddf`` with ``inverse_residual``,
    the largest distance in voxels between a point and where the field and its inverse take it. Landmarks obey
    ``moving_p = fixed_p + ddf(fixed_p)``.

    Args:
        keys: image and labels ``(C, *S)``. They must agree in spatial shape and affine; channels and dtypes may differ.
        network: as in ``RandDRDMDeform``.
        prob: chance that the transform fires. If it does not, both images are the given one and the field is zero.
        augmentation_level: level of the field that makes the moving image, a number in (0, 1] or a range drawn
            uniformly; None: the moving image is the given one.
        synthesis_level: level of the field between the images.
        inverse: also compute ``inverse_ddf`` and ``inverse_residual``, which takes time.
        options: those of ``PairOptions``. Limits and fold policy apply to each of the two fields. ``image_key`` must be
            one of ``keys``.

    ``.last`` holds the latest pair of deformations.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or an image key that is not among the keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        network: NetworkLike = "auto",
        *,
        prob: float = 1.0,
        augmentation_level: float | Sequence[float] | None = (0.3, 0.8),
        synthesis_level: float | Sequence[float] = (0.3, 0.8),
        inverse: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        KeyedDeformation.__init__(self, keys, choose(ApplyOptions, options))
        if options["on_fold"] == "skip":
            raise ValueError("on_fold='skip' would leave a pair without a field. Use rescale, resample, keep or raise.")
        shared = choose(SharedDrawOptions, options)

        def drawer(level: float | Sequence[float]) -> FieldDrawer:
            return FieldDrawer(network, deformation_level=level, **shared)

        DRDMRandomness.__init__(self, prob, drawer(synthesis_level))
        self.augmentation_drawer = None if augmentation_level is None else drawer(augmentation_level)
        self.image_key = self.keys[0] if options["image_key"] is None else options["image_key"]
        if self.image_key not in self.keys:
            raise ValueError(f"image_key must be one of keys {self.keys}, got {self.image_key!r}.")
        self.pixdim = checked_pixdim(options["pixdim"])
        self.seed_key = options["seed_key"]
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
        valid = self.validate(data)
        result = dict(data)
        self._check_names_are_free(result)
        given, spacing = self._movable(valid), valid.spacings[0]
        first_plan, second_plan = self._plans(randomize, result.get(self.seed_key), params)
        first = _draw(self.augmentation_drawer or self.drawer, given.images[0], spacing, first_plan)
        moving = self.apply(_copied(given), [first])
        second = _draw(self.drawer, as_tensor(moving[self.image_key], valid.name), spacing, second_plan)
        both = _composed(first, second, spacing)
        fixed = self.apply(_copied(given), [both])
        if first is not None and second is not None:
            fixed |= self._points_of_fixed(replace(given, data=dict(moving)), second)
        for side, made, field in zip(SIDES, (moving, fixed), (first, both)):
            # without a field these are the given values, and later transforms may change them in place
            own = {key: copy.deepcopy(value) for key, value in made.items()} if field is None or field.skipped else made
            result |= {self._named(side, key): value for key, value in own.items()}
        result |= self._answer(second, valid.images[0])
        self.last = None if second is None or both is None else DeformedPair(first, second, both)
        return result

    def _check_names_are_free(self, data: Mapping[Any, Any]) -> None:
        taken = sorted({str(name) for name in self._outputs(data)} & {str(key) for key in data})
        if taken:
            raise ValueError(f"RandDRDMPaird writes {taken}, which the data hold already. Rename or remove them first.")

    def _movable(self, valid: ValidData) -> ValidData:
        """Only the entries that are moved."""
        names = (*self.keys, *(name for key in self.point_keys for name in (key, f"{key}_valid")))
        return replace(valid, data={name: valid.data[name] for name in names if name in valid.data})

    def _plans(self, randomize: bool, seed_value: object, params: PairParams | None) -> tuple[Plan, Plan]:
        """How the two fields are made: from seeds, from the records to replay, or not at all."""
        if params is not None:
            return params.augmentation, params.synthesis
        (seed,) = self.decide([seed_value], randomize)
        if seed is None:
            return None, None
        state = np.random.RandomState([seed, 1])  # not the chain of seeds by which fields are drawn again
        second = int(state.randint(0, 2**32, dtype=np.uint64))
        return (None if self.augmentation_drawer is None else seed), second

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
        result, warpers = self.entries(data), dict[int, FieldWarper]()
        for side in SIDES:
            for name in (self._named(side, key) for key in (*self.keys, *self.point_keys)):
                if name in result:
                    for _ in range(2 if self._moved_twice(result[name]) else 1):
                        result[name] = take_back(self, result[name], repr(name), warpers)
        return result

    def _points_of_fixed(self, moving: ValidData, synthesis: Deformation) -> dict[Any, Any]:
        """Landmarks of the moving image where the field between the images takes them.

        That is exact. The composed field, which warps the images, is interpolated.
        """
        keys = [key for key in self.point_keys if key in moving.data]
        infos = [{_MOVED_TWICE: True, **field_info(synthesis, moving.shape)}] if self.invertible else []
        for key in keys:
            self.move_points(moving, key, [synthesis], infos)
        return {name: moving.data[name] for key in keys for name in (key, f"{key}_valid")}

    def _moved_twice(self, data: Any) -> bool:
        """Whether these are landmarks of the fixed image, which have a record of each of the two fields."""
        record = self.latest_record(data)
        return record is not None and bool(record[TraceKeys.EXTRA_INFO].get(_MOVED_TWICE, False))

    def _answer(self, synthesis: Deformation | None, image: Tensor) -> dict[str, Tensor]:
        """The field between the images, and its inverse."""
        if synthesis is None:
            ddf = torch.zeros((image.ndim - 1, *image.shape[1:]), dtype=torch.float32, device=image.device)
            found = {DDF: ddf, INVERSE_DDF: ddf.clone(), INVERSE_RESIDUAL: ddf.new_zeros(())}
        else:
            found = {DDF: synthesis.ddf.clone()}
            if self.with_inverse:
                found[INVERSE_DDF] = synthesis.inverse_ddf.clone()
                found[INVERSE_RESIDUAL] = synthesis.ddf.new_tensor(synthesis.inverse_residual_vox)
        return found if self.with_inverse else {DDF: found[DDF]}

    def _named(self, side: str, key: Hashable) -> str:
        return side if key == self.image_key else f"{side}_{key}"

    def _outputs(self, data: Mapping[Any, Any]) -> Iterator[str]:
        points = [key for key in self.point_keys if key in data]
        keys = [key for key in self.keys if key in data]
        for side in SIDES:
            yield from (self._named(side, key) for key in (*keys, *points, *(f"{key}_valid" for key in points)))
        yield from (DDF, INVERSE_DDF, INVERSE_RESIDUAL) if self.with_inverse else (DDF,)


def _draw(drawer: FieldDrawer, image: Tensor, spacing: Sequence[float], plan: Plan) -> Deformation | None:
    """Make the field of a plan for an image ``(C, *S)``."""
    if plan is None:
        return None
    return drawer.draw(image, spacing, plan) if isinstance(plan, int) else drawer.replay(image, spacing, plan)


def _copied(valid: ValidData) -> ValidData:
    """The same data in a dictionary of their own."""
    return replace(valid, data=dict(valid.data))


def _composed(first: Deformation | None, second: Deformation | None, spacing: Sequence[float]) -> Deformation | None:
    """The deformation that makes the fixed image from the given one."""
    if first is None or second is None:
        return second
    assert isinstance(first.stored, StoredField)
    assert isinstance(second.stored, StoredField)
    ddf = compose(first.ddf[None], second.ddf[None])[0]
    return Deformation(ddf, spacing, stored=ComposedField(first.stored, second.stored))


RandDRDMPairD = RandDRDMPairDict = RandDRDMPaird
