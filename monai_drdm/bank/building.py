"""Drawing the fields of one image, in any process."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.utils import PostFix
from torch import Tensor

from monai_drdm.bank.entry import BankEntry, identity_of
from monai_drdm.bank.settings import BankSettings, field_seed
from monai_drdm.deformation.drawing import FieldDrawer
from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.networks import network_sha256

_VOXELS_AT_ONCE = 1 << 23


@dataclass(frozen=True)
class Maker:
    """How the fields of a bank are drawn."""

    drawer: FieldDrawer
    count: int
    pixdim: tuple[float, ...] | None
    seed: int

    def settings(self, image: Tensor) -> BankSettings:
        """The settings of a bank of images like this one ``(C, *S)``, whose dimensions decide the network."""
        drawer = self.drawer
        dims = image.ndim - 1 - (drawer.slice_axis is not None)
        model = drawer.model(drawer.source.load(dims, drawer.device or image.device))
        return BankSettings(
            network=model.network.card.name,
            network_sha256=network_sha256(model.network),
            fields_per_image=self.count,
            deformation_level=drawer.levels,
            sampler=model.sampler,
            steps=model.steps,
            recovery=model.recovery,
            symmetry=model.symmetry,
            image_channel=drawer.image_channel,
            max_displacement_mm=drawer.max_displacement_mm,
            on_fold=drawer.on_fold,
            max_fold_fraction=drawer.max_fold_fraction,
            slice_axis=drawer.slice_axis,
            pixdim=self.pixdim,
            seed=self.seed,
        )


class Job(NamedTuple):
    """One image whose fields are to be drawn."""

    drawer: FieldDrawer
    settings: BankSettings
    identity: str
    image: Tensor
    spacing: tuple[float, ...]


def draw_entry(
    drawer: FieldDrawer, settings: BankSettings, identity: str, image: Tensor, spacing: tuple[float, ...]
) -> BankEntry:
    """Draw all fields of one image."""
    count = settings.fields_per_image
    seeds = [field_seed(settings.seed, identity, k) for k in range(count)]
    at_once = max(1, _VOXELS_AT_ONCE // image[0].numel())  # the same for an image, whichever process draws it
    fields, records = list[StoredField](), list[str]()
    with torch.no_grad():
        for chunk in (seeds[k : k + at_once] for k in range(0, count, at_once)):
            for one in drawer.draw_batch([image] * len(chunk), [spacing] * len(chunk), chunk):
                assert isinstance(one.stored, StoredField)
                fields.append(one.stored)
                records.append("" if one.params is None else one.params.to_json())
    return BankEntry.of(identity, image, spacing, fields, records, settings.digest)


def item_identity(item: Mapping[Any, Any], image: NdarrayOrTensor, image_key: Hashable, id_key: Hashable | None) -> str:
    """The identity of an image: the value at a key, or the file name in its metadata.

    Raises:
        TypeError: not a string, path or whole number.
        ValueError: the key, or the file name, is missing.
    """
    if id_key is not None:
        if id_key not in item:
            raise ValueError(f"id_key {id_key!r} is missing from the sample: {sorted(map(str, item))}.")
        return identity_of(item[id_key])
    meta = image.meta if isinstance(image, MetaTensor) else item.get(PostFix.meta(str(image_key)))
    name = meta.get("filename_or_obj") if isinstance(meta, Mapping) else None
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ValueError(
            f"nothing says what the image at {image_key!r} is called. There are two ways: load it with MONAI's "
            "LoadImaged, which keeps its file name in the metadata (filename_or_obj), or name with id_key= the key of "
            f"its own name, a string or whole number; the sample has {sorted(map(str, item))}."
        )
    return identity_of(name)
