"""``BatchRandDRDMDeformd``: deforms collated batches, on the device of the batch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.utils import convert_to_tensor
from torch import Tensor
from typing_extensions import Unpack

from monai_drdm.deformation import Deformation, DeformationParams, FieldDrawer, stable_hash
from monai_drdm.deformation.options import AllDrawOptions, choose, NetworkLike, with_options
from monai_drdm.samples import checked_pixdim
from monai_drdm.transforms.base import KeyedDeformation, ValidData
from monai_drdm.transforms.options import ApplyOptions, BatchOptions
from monai_drdm.transforms.randomness import DRDMRandomness
from monai_drdm.transforms.tracing import in_plain_mode


@with_options(BatchOptions)
class BatchRandDRDMDeformd(DRDMRandomness, KeyedDeformation):
    """``RandDRDMDeformd`` for collated batches, on the device of the batch.

    Every sample has its own chance, level and seed. Those that are deformed go through the network together. A record
    gives the same field as with ``RandDRDMDeformd``. Use it after the loader, on collated dictionaries or, with plain
    tensors, inside a training step::

        deform = BatchRandDRDMDeformd(keys=["image", "label"], mode=["bilinear", "nearest"], prob=0.5)
        for batch in loader:
            batch = deform(batch)                          # a dictionary of (B, C, *S)
        image, label = deform.deform(image, label)         # or tensors, in the order of the keys

    Args:
        keys: keys of ``(B, C, *S)`` to deform. They must agree in batch size, spatial shape and affines.
        network: as in ``RandDRDMDeform``.
        prob: chance of every sample to be deformed.
        options: those of ``BatchOptions``.

    Attributes:
        last: the latest deformations, one per sample, None where it did not fire.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or a number of modes that is neither 1 nor the number of keys.
    """

    batched = True
    for_tensors = "its method deform takes plain tensors (transform.deform(image, label), in the order of the keys)"

    def __init__(
        self,
        keys: KeysCollection,
        *,
        network: NetworkLike = "auto",
        prob: float = 0.1,
        **options: Unpack[BatchOptions],
    ) -> None:
        KeyedDeformation.__init__(self, keys, choose(ApplyOptions, options))
        DRDMRandomness.__init__(self, prob, FieldDrawer(network, **choose(AllDrawOptions, options)))
        self.image_key = self.keys[0] if options["image_key"] is None else options["image_key"]
        self.pixdim = checked_pixdim(options["pixdim"])
        self.seed_key = options["seed_key"]
        self.last: list[Deformation | None] = []

    def __getstate__(self) -> dict[str, object]:
        """The state without the last fields."""
        return {**super().__getstate__(), "last": []}

    def randomize_batch(self, values: Sequence[object]) -> None:
        """Draw for every sample whether to fire, then one integer seed.

        Args:
            values: one per sample; a hash of those that are not None takes the place of the random state.

        Raises:
            TypeError: a value that has no hash that is the same in every process.
        """
        self.decide(values, randomize=True)

    def deform(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Deform plain tensors inside a training step.

        Args:
            tensors: ``(B, C, *S)`` for every key, in their order.

        Returns:
            As many tensors; the inputs are left as they are.

        Raises:
            ValueError: another number of tensors than keys, a transform that needs more than its keys, or anything
                that does not fit.
        """
        needed = {"point_keys": self.point_keys, "image_key": () if self.image_key in self.keys else (self.image_key,)}
        needed["seed_key"] = () if self.seed_key is None else (self.seed_key,)
        others = {name: keys for name, keys in needed.items() if keys}
        if others:
            raise ValueError(
                f"deform takes the values of keys={self.keys} and nothing else, but this transform also needs "
                f"{others}. Call it with a dictionary of the batch, or build it without these."
            )
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
            params: records to replay instead, one per sample; None for samples that are left alone.

        Returns:
            A new dictionary; the input and its tensors are left as they are.

        Raises:
            KeyError: a key is missing (and not allowed to), or the image key is.
            TypeError: a value is not an array or tensor of a real numeric type, or ``params`` are not such records.
            ValueError: anything that does not fit.
        """
        valid = self.validate(data)
        with torch.no_grad():
            deformations = self._deformations(valid, randomize, params)
        self.last = deformations
        return self.apply(valid, deformations)

    def _deformations(
        self, valid: ValidData, randomize: bool, params: Sequence[DeformationParams | None] | None
    ) -> list[Deformation | None]:
        images, spacings, count = list(valid.images), valid.spacings, len(valid.images)
        if params is None:
            values = (
                [None] * count
                if self.seed_key is None
                else values_of_samples(valid.data[self.seed_key], count, "seed_key")
            )
            return self.draw_deformations(images, spacings, self.decide(values, randomize))
        if not isinstance(params, Sequence):
            raise TypeError(f"params must be one record or None per sample, got {type(params).__name__}.")
        if len(params) != count:
            raise ValueError(f"params must be one record or None per sample: {count}, got {len(params)}.")
        return self.replay_deformations(images, spacings, params)


def seed_values(data: Mapping[Any, Any], key: Hashable | None, count: int) -> Sequence[object]:
    """For each sample of a batch the value that replaces the random state; None if there is no seed key."""
    return [None] * count if key is None else values_of_samples(data[key], count, "seed_key")


def values_of_samples(data: Any, count: int, name: str) -> list[object]:
    """One value per sample, of a collated entry.

    Args:
        data: the entry.
        count: how many samples there are.
        name: the argument that names the entry, for errors.

    Raises:
        TypeError: a value that has no hash that is the same in every process.
        ValueError: another number of values.
    """
    several = isinstance(data, (Sequence, np.ndarray, Tensor)) and not isinstance(data, str)
    values = list(data) if several and getattr(data, "ndim", 1) > 0 else [data]
    if len(values) != count:
        raise ValueError(f"{name} must hold one value per sample: {count}, got {len(values)}.")
    for value in values:
        stable_hash(value)  # refuses None, which would mean the random state
    return [convert_to_tensor(v, track_meta=False) if isinstance(v, Tensor) else v for v in values]


BatchRandDRDMDeformD = BatchRandDRDMDeformDict = BatchRandDRDMDeformd
