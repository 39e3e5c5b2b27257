"""The pairs that methods are judged on, every image of a folder registered to by the next, and how they are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from monai_drdm.registration import evaluate_registration, RegistrationScore
from monai_drdm.registration.data import load_images, RegistrationBatch


class Pair(NamedTuple):
    """A pair of images of different people, with their labels."""

    name: str
    """That of the fixed image."""
    images: RegistrationBatch
    moving_inside: Tensor
    """``(1, 1, *S)`` bool: false in the padding of the moving image."""


def pairs_in(folder: Path, count: int | None = None) -> Iterator[Pair]:
    """The pairs of a split's folder of images and labels, the first ``count`` or all."""
    bank = load_images(folder / "images", folder / "labels", spatial_dims=3)
    for i in range(min(count or len(bank), len(bank))):
        j = (i + 1) % len(bank)
        images = bank.pairs(torch.tensor([j]), torch.tensor([i])).to(torch.device("cpu"))
        yield Pair(bank.names[i], images, bank.inside[[j]])


def score_pair(
    method: Callable[[Tensor, Tensor], Tensor], pair: Pair, structures: Sequence[int], *, both_ways: bool = False
) -> RegistrationScore:
    """Register a pair, and compare the labels of these structures."""
    images = pair.images
    return evaluate_registration(
        method,
        images.moving,
        images.fixed,
        moving_label=images.moving_label,
        fixed_label=images.fixed_label,
        structures=structures,
        both_ways=both_ways,
    )
