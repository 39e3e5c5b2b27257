"""``BatchRandDRDMBankd``: fields that were drawn ahead of training, for batches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from monai.config import KeysCollection
from monai.data import MetaTensor
from typing_extensions import Unpack

from monai_drdm.bank.bank import DeformationBank
from monai_drdm.deformation import BankedParams, Deformation
from monai_drdm.deformation.options import with_options
from monai_drdm.deformation.record import check_record
from monai_drdm.transforms.banked import BankedDeformation, KnownImage
from monai_drdm.transforms.base import ValidData
from monai_drdm.transforms.batch import seed_values, values_of_samples
from monai_drdm.transforms.options import BatchBankedOptions
from monai_drdm.transforms.tracing import in_plain_mode


@with_options(BatchBankedOptions)
class BatchRandDRDMBankd(BankedDeformation):
    """``RandDRDMBankd`` for collated batches: every sample is moved by a field of its own image, on the batch's device.

    It can move data that exist only as a batch, such as labels that a network predicts for unlabelled images, and their
    confidence, together with the images::

        strong = BatchRandDRDMBankd(
            keys=["image", "pseudo", "confidence"], mode=["bilinear", "nearest", "bilinear"],
            bank=bank, id_key="name", prob=1.0, rotate_range=0.5, flip_prob=0.5,
        )
        for batch in unlabelled_loader:
            probabilities = teacher(batch["image"]).softmax(1)
            confidence, pseudo = probabilities.max(1, keepdim=True)
            moved = strong({**batch, "pseudo": pseudo.byte(), "confidence": confidence})

    Images must be as they were when the bank was built, so put random transforms after this one.

    Args:
        keys: keys of ``(B, C, *S)`` to deform. They must agree in batch size, spatial shape and affines.
        bank: the fields.
        id_key: key of the identities of the images, one value per sample; None: the file names in the metadata.
        prob: chance of every sample to be deformed.
        options: those of ``BatchBankedOptions``; ``image_key`` names the images that the fields were drawn on.

    Attributes:
        last: the latest deformations, one per sample, None where it did not fire.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: arguments out of range, or a number of modes that is neither 1 nor the number of keys.
    """

    batched = True

    def __init__(
        self,
        keys: KeysCollection,
        *,
        bank: DeformationBank,
        id_key: Hashable | None = None,
        prob: float = 0.1,
        **options: Unpack[BatchBankedOptions],
    ) -> None:
        super().__init__(keys, bank, id_key, prob, options)
        self.last: list[Deformation | None] = []

    @in_plain_mode
    def __call__(
        self,
        data: Mapping[Any, Any],
        randomize: bool = True,
        *,
        params: Sequence[BankedParams | None] | None = None,
    ) -> dict[Any, Any]:
        """Deform all keys of every sample that fires, by one field of its image each.

        Args:
            data: a collated dictionary with ``(B, C, *S)`` values at the keys, and points at theirs.
            randomize: False replays the last draw.
            params: one record per sample, or None for those to be left alone, to replay instead.

        Returns:
            A new dictionary; the input and its tensors are left as they are.

        Raises:
            KeyError: a key is missing (and not allowed to), or the bank does not know an image and draws nothing.
            TypeError: a value is not an array or tensor of a real numeric type.
            ValueError: anything that does not fit: an image other than the one the fields were drawn on, a damaged
                bank, a record of another one.
        """
        valid = self.validate(data)
        count = len(valid.images)
        if params is not None:
            if len(params) != count:
                raise ValueError(f"params must be one record or None per sample: {count}, got {len(params)}.")
            for one in (one for one in params if one is not None):
                check_record(one, BankedParams)
            found = [None if one is None else self._replay(self._sample(valid, i), one) for i, one in enumerate(params)]
        else:
            choices = self._chosen(seed_values(valid.data, self.seed_key, count), randomize)
            found = [self._deform(self._sample(valid, i), one) if one.fires else None for i, one in enumerate(choices)]
        self.last = found
        return self.apply(valid, found)

    def _sample(self, valid: ValidData, number: int) -> KnownImage:
        """One sample of a batch with its fields."""
        image, item = valid.spaces[number], dict[Hashable, object]()
        if self.id_key is not None and self.id_key in valid.data:
            item = {self.id_key: values_of_samples(valid.data[self.id_key], len(valid.images), "id_key")[number]}
        elif isinstance(image, MetaTensor):
            names = valid.data[self.image_key].meta.get("filename_or_obj")
            if names is not None:
                names = values_of_samples(names, len(valid.images), "filename_or_obj")
                image = MetaTensor(image, meta={"filename_or_obj": names[number]})
        return self._known(item, image, valid.images.device)


BatchRandDRDMBankD = BatchRandDRDMBankDict = BatchRandDRDMBankd
