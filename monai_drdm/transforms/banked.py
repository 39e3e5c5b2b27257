"""``RandDRDMBankd``: fields that were drawn ahead of training."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import RandAffineGrid, RandomizableTransform
from monai.utils import TransformBackends
from torch import Tensor
from typing_extensions import Unpack

from monai_drdm._version import __version__
from monai_drdm.bank.bank import DeformationBank
from monai_drdm.bank.building import item_identity
from monai_drdm.bank.entry import BankEntry, EntryFile
from monai_drdm.deformation import BankedParams, Deformation, DeformationParams, stable_hash, StoredField
from monai_drdm.deformation.options import choose, with_options
from monai_drdm.deformation.record import check_record
from monai_drdm.fields import shrink_to_fold_limit
from monai_drdm.samples import spacing_of
from monai_drdm.transforms.base import KeyedDeformation, ValidData
from monai_drdm.transforms.options import ApplyOptions, BankedOptions
from monai_drdm.transforms.randomness import check_replay, checked_prob
from monai_drdm.transforms.tracing import in_plain_mode


class _Choice(NamedTuple):
    """The random choices for one sample."""

    fires: bool
    which: float  # in [0, 1): the field
    scale: float
    pose: RandAffineGrid
    flips: tuple[bool, ...]  # of the first, second and third axis


class KnownImage(NamedTuple):
    """One sample: the identity of its image, the image, its fields, and the device of the image."""

    identity: str
    image: NdarrayOrTensor
    entry: BankEntry | EntryFile
    device: torch.device


class BankedDeformation(RandomizableTransform, KeyedDeformation):
    """The common part of the transforms that take their fields from a bank.

    Args:
        keys: keys to deform.
        bank: the fields.
        id_key: key of the identity of the image; None: the file name in its metadata.
        prob: chance of every sample to be deformed.
        options: those of ``BankedOptions``; without boxes for batches.
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it so

    def __init__(
        self,
        keys: KeysCollection,
        bank: DeformationBank,
        id_key: Hashable | None,
        prob: float,
        options: Mapping[str, Any],
    ) -> None:
        KeyedDeformation.__init__(self, keys, choose(ApplyOptions, options))
        if not isinstance(bank, DeformationBank):
            raise TypeError(f"bank must be a DeformationBank, got {type(bank).__name__}.")
        RandomizableTransform.__init__(self, checked_prob(prob))
        self.bank = bank
        self.id_key = id_key
        self.image_key = self.keys[0] if options["image_key"] is None else options["image_key"]
        self.seed_key = options["seed_key"]
        self.displacement_scale = _scale_range(options["displacement_scale"])
        self.flip_prob = checked_prob(options["flip_prob"], "flip_prob")
        ranges = [options[name] for name in ("rotate_range", "shear_range", "translate_range", "scale_range")]
        self.poses = self.flip_prob > 0 or any(one is not None for one in ranges)
        self._pose = RandAffineGrid(*ranges)  # MONAI checks them where it draws
        self._choices: list[_Choice] = []

    def randomize(self, data: object = None) -> None:
        """Draw whether to fire, the field, its factor, the affine map and the flips, even if it does not fire.

        Args:
            data: a value whose hash takes the place of the random state; None: the state alone.

        Raises:
            TypeError: a value that has no hash that is the same in every process.
        """
        choice = self._choose(self.R)
        self._choices = [choice if data is None else self._choose(np.random.RandomState(stable_hash(data)))]
        self._do_transform = self._choices[0].fires

    def _choose(self, state: np.random.RandomState) -> _Choice:
        fires, which = bool(state.rand() < self.prob), float(state.random_sample())
        low, high = self.displacement_scale
        scale = float(low + (high - low) * state.random_sample())
        pose = copy.copy(self._pose)
        pose.R = state
        pose.randomize()
        flips = tuple(state.random_sample(3) < self.flip_prob) if self.flip_prob else (False,) * 3
        return _Choice(fires, which, scale, pose, flips)

    def _chosen(self, values: Sequence[object], randomize: bool) -> list[_Choice]:
        """The random choices for every sample of this call. A value that is not None replaces the random state.

        Raises:
            ValueError: nothing to repeat, or choices of another number of samples.
        """
        if randomize:
            choices = []
            for value in values:
                self.randomize(value)
                # threads may share this transform, and with it ``_choices``
                choices.append(
                    self._choices[0] if value is None else self._choose(np.random.RandomState(stable_hash(value)))
                )
            self._choices = choices
            return choices
        check_replay(len(self._choices), len(values))
        return self._choices

    def _deform(self, known: KnownImage, choice: _Choice) -> Deformation:
        """A field of the image's own, with its factor and affine map."""
        index = int(choice.which * len(known.entry))
        scale, stored = self._scaled(known.entry.field(index), choice.scale, known.device)
        stored = replace(stored, matrix=self._matrix(choice, stored))
        entry = known.entry
        record = BankedParams(
            known.identity, index, scale, stored.matrix, entry.settings, entry.params[index], __version__
        )
        return self._banked(known, stored, record)

    def _replay(self, known: KnownImage, params: BankedParams) -> Deformation:
        """The field of a record, which must be of this image and of this bank."""
        identity, entry = known.identity, known.entry
        if params.bank != entry.settings or params.identity != identity or not 0 <= params.index < len(entry):
            raise ValueError(
                f"params were recorded for image {params.identity!r}, field {params.index} of bank "
                f"{params.bank[:12]}…; this is {identity!r}, {len(entry)} fields of bank {entry.settings[:12]}…."
            )
        stored = entry.field(params.index)
        stored = replace(stored, step=stored.step * params.scale, matrix=params.matrix)
        return self._banked(known, stored, params)

    def _known(self, item: Mapping[Any, Any], image: NdarrayOrTensor, device: torch.device) -> KnownImage:
        """One sample with its fields, given its image and the item that holds its identity."""
        identity = item_identity(item, image, self.image_key, self.id_key)
        return KnownImage(identity, image, self.bank.entry(identity, image), device)

    def _banked(self, known: KnownImage, stored: StoredField, params: BankedParams) -> Deformation:
        pixdim = None if self.bank.settings is None else self.bank.settings.pixdim
        spacing, record = spacing_of(known.image, pixdim, repr(self.image_key)), _parsed(params.field)
        return Deformation(stored.ddf(known.device), spacing, record, stored=stored, banked=params)

    def _scaled(self, stored: StoredField, scale: float, device: torch.device) -> tuple[float, StoredField]:
        """A field scaled down by a factor, and further if it would fold more than the bank allows."""
        if scale >= 1.0:
            return 1.0, stored
        settings = self.bank.settings
        scaled = replace(stored, step=stored.step * scale)
        if settings is not None and settings.on_fold != "keep" and scale > 0.0:
            factor = float(shrink_to_fold_limit(scaled.planar(device)[None], settings.max_fold_fraction)[1][0])
            scale *= factor
            scaled = replace(stored, step=stored.step * scale)
        return scale, scaled

    def _matrix(self, choice: _Choice, stored: StoredField) -> tuple[tuple[float, ...], ...] | None:
        if not self.poses:
            return None
        dims = len(stored.shape) - (stored.slice_axis is not None)
        choice.pose(spatial_size=(1,) * dims, randomize=False)
        matrix: Tensor = torch.as_tensor(choice.pose.get_transformation_matrix())
        signs = [-1.0 if flip else 1.0 for flip in choice.flips[:dims]]
        return tuple(tuple(float(v) for v in row) for row in matrix * torch.tensor([*signs, 1.0], dtype=matrix.dtype))

    def __getstate__(self) -> dict[str, object]:
        """Everything but the last field, which may be large."""
        state: dict[str, object] = super().__getstate__()  # type: ignore[no-untyped-call]  # MONAI leaves it without types
        return {**state, "last": [] if self.batched else None}


@with_options(BankedOptions)
class RandDRDMBankd(BankedDeformation):
    """Deform every key by one of the fields that a bank holds for the image. No network runs.

    The displacement can be scaled down at random, and a random affine map can be composed with the field, so that
    images and labels are still resampled only once. Put this transform before all random transforms, because the fields
    belong to the image as it was when the bank was built. Labels, landmarks, boxes, ``inverse`` and records work as in
    ``RandDRDMDeformd``.

    Args:
        keys: keys to deform. They must agree in spatial shape and affine; channels and dtypes may differ.
        bank: the fields.
        id_key: key of the identity of the image, as when the bank was built; None: the file name in its metadata.
        prob: chance that the transform fires.
        options: those of ``BankedOptions``; ``image_key`` names the image that the fields were drawn on.

    ``.last`` holds the latest deformation.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or a number of modes that is neither 1 nor the number of keys.
    """

    def __init__(
        self,
        keys: KeysCollection,
        *,
        bank: DeformationBank,
        id_key: Hashable | None = None,
        prob: float = 0.1,
        **options: Unpack[BankedOptions],
    ) -> None:
        super().__init__(keys, bank, id_key, prob, options)
        self.last: Deformation | None = None

    @in_plain_mode
    def __call__(
        self,
        data: Mapping[Any, NdarrayOrTensor],
        randomize: bool = True,
        *,
        params: BankedParams | None = None,
    ) -> dict[Any, NdarrayOrTensor]:
        """Deform all keys of a sample by one field of its image.

        Args:
            data: a dictionary with ``(C, *S)`` values at the keys, and points and boxes at theirs.
            randomize: False replays the last draw.
            params: replays a record instead.

        Returns:
            A new dictionary; the input and its tensors are left as they are.

        Raises:
            KeyError: a key is missing (and not allowed to), or the bank does not know the image and draws nothing.
            TypeError: a value is not an array or tensor of a real numeric type.
            ValueError: anything that does not fit: an image other than the one the fields were drawn on, a damaged
                bank, a record of another one.
        """
        valid = self.validate(data)
        deformation: Deformation | None = None
        if params is not None:
            check_record(params, BankedParams)
            deformation = self._replay(self._sample(valid), params)
        else:
            (choice,) = self._chosen([None if self.seed_key is None else valid.data[self.seed_key]], randomize)
            if choice.fires:
                deformation = self._deform(self._sample(valid), choice)
        self.last = deformation
        return self.apply(valid, [deformation])

    def _sample(self, valid: ValidData) -> KnownImage:
        return self._known(valid.data, valid.data[self.image_key], valid.images.device)


_parsed = lru_cache(maxsize=1024)(DeformationParams.from_json)  # a bank's fields are used again and again


def _scale_range(scale: float | Sequence[float]) -> tuple[float, float]:
    numbers = tuple(scale) if isinstance(scale, Sequence) else (scale, scale)
    if len(numbers) != 2 or not 0.0 <= numbers[0] <= numbers[1] <= 1.0:
        raise ValueError(f"displacement_scale must be a number in [0, 1] or a range of them, got {scale!r}.")
    return float(numbers[0]), float(numbers[1])


RandDRDMBankD = RandDRDMBankDict = RandDRDMBankd
