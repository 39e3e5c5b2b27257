"""One network learns from labelled and unlabelled images: the steps of its training.

An average of the network's own weights over time, the teacher, predicts labels of unlabelled images. The network must
predict the same labels on a strong view of each image: moved by a random pose and, with a bank, by a plausible
deformation, with changed intensities, and with a part of another image pasted in (CutMix). Predicted labels and their
confidence move with the image; only confident voxels count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import monai.transforms as mt
import numpy as np
import torch
import torch.nn.functional as F
from monai.data import DataLoader, Dataset, decollate_batch, list_data_collate
from monai.utils import get_seed
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import RandomSampler

from monai_drdm import BatchRandDRDMBankd, DeformationBank

CONFIDENCE = 0.95
"""Smallest probability with which a predicted label counts."""
Sample = dict[str, Any]


def check_samples(samples: Sequence[Sample], size: Sequence[int], classes: int, factor: int = 8) -> None:
    """Refuse labelled samples that a network of so many classes, which shrinks images by a factor, cannot learn from.

    Raises:
        ValueError: a size that is not a multiple of the factor, a sample without label, or a label beyond the classes.
    """
    if len(size) not in (2, 3) or any(n % factor for n in size):
        raise ValueError(f"size must be two or three multiples of {factor}, got {list(size)}.")
    for one in samples:
        if "label" not in one:
            raise ValueError(f"{one['name']} has no label. Name one in the datalist, or take the scan out.")
        if int(one["label"].max()) >= classes:
            raise ValueError(
                f"{one['name']} has the label {int(one['label'].max())}, but with classes={classes} labels go from 0 "
                f"to {classes - 1}. Choose more classes, or change the label."
            )


def poses(
    keys: list[str],
    modes: list[str],
    size: Sequence[int],
    flips: Sequence[int] | None = None,
    rotate: float | None = None,
    scale: float = 0.3,
    shift: float = 0.1,
) -> list[Any]:
    """Random flips, rotations, scales and shifts. Take out what your images never do, such as flips of a brain.

    Args:
        keys: what is moved together.
        modes: how each of them is interpolated.
        size: of the images.
        flips: axes along which images may be flipped; None: all in 2D, none in 3D, where left and right are organs.
        rotate: largest angle in radians; None: any angle in 2D, 0.5 in 3D.
        scale: largest change of scale.
        shift: largest shift, as a share of the size.
    """
    flips = range(2 if len(size) == 2 else 0) if flips is None else flips
    rotate = (np.pi if len(size) == 2 else 0.5) if rotate is None else rotate
    ranges = {"rotate_range": rotate, "scale_range": scale, "translate_range": [shift * n for n in size]}
    return [
        *(mt.RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in flips),
        mt.RandAffined(keys, prob=1.0, mode=modes, padding_mode="border", **ranges),
    ]


def intensities(strength: float) -> list[Any]:
    """Random changes of contrast and brightness, blur and noise."""
    return [
        mt.RandAdjustContrastd("image", prob=0.8, gamma=(np.exp(-strength), np.exp(strength))),
        mt.RandScaleIntensityFixedMeand("image", prob=0.8, factors=0.7 * strength),
        mt.RandShiftIntensityd("image", prob=0.8, offsets=0.3 * strength),
        mt.RandGaussianSmoothd("image", prob=0.5, sigma_x=(0, 1.4 * strength), sigma_y=(0, 1.4 * strength)),
        mt.RandGaussianNoised("image", prob=0.8, std=0.07 * strength),
    ]


def light_view(size: Sequence[int], **pose: Any) -> mt.Compose:
    """Moves a labelled image and its label, and changes the image's intensities a little; ``pose`` as in ``poses``."""
    return mt.Compose([*poses(["image", "label"], ["bilinear", "nearest"], size, **pose), *intensities(0.25)])


class StrongView:
    """Moves unlabelled images, predicted labels and confidence together, and changes the images' intensities.

    Args:
        size: of the images.
        batch: how many images come at a time.
        bank: fields of all images by their name, or None.
        deform: chance that a field moves an image.
        confidence: smallest probability with which a predicted label counts.
        pose: as in ``poses``.
    """

    def __init__(
        self,
        size: Sequence[int],
        batch: int,
        bank: DeformationBank | None,
        deform: float,
        confidence: float = CONFIDENCE,
        **pose: Any,
    ) -> None:
        keys, modes = ["image", "pseudo", "confidence"], ["bilinear", "nearest", "bilinear"]
        self.confidence = confidence
        self.deform = None
        if bank is not None:
            self.deform = BatchRandDRDMBankd(keys, bank=bank, id_key="name", prob=deform, mode=modes, invertible=False)
            seed = get_seed()  # alone, neither this nor CutMix would follow it
            self.deform.set_random_state(None if seed is None else seed + 1)
        self.each = mt.Compose([*poses(keys, modes, size, **pose), *intensities(0.7)])
        self.cutmix = mt.CutMix(batch).set_random_state(get_seed())

    def __call__(self, batch: Sample) -> tuple[Tensor, Tensor, Tensor]:
        """The views ``(B, 1, *S)``, their labels, and which voxels count."""
        if self.deform is not None:
            batch = self.deform(batch)
        moved = list_data_collate([self.each(one) for one in decollate_batch(batch)])
        return mix(self.cutmix, 0.5, moved["image"], moved["pseudo"], moved["confidence"] >= self.confidence)


def mix(cutmix: mt.CutMix, prob: float, *batches: Tensor) -> tuple[Tensor, ...]:
    """Into some images of a batch, their labels and what counts, a part of another image is pasted."""
    cutmix.randomize(batches[0])
    chosen = torch.from_numpy(cutmix.R.random_sample(len(batches[0])) < prob).to(batches[0].device)
    mixed = [cutmix(one.float(), randomize=False).to(one.dtype) for one in batches]
    return tuple(torch.where(chosen.view(-1, *(1,) * (one.ndim - 1)), m, one) for m, one in zip(mixed, batches))


@torch.no_grad()
def predict_labels(teacher: nn.Module, image: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable label and its probability, each ``(B, 1, *S)``."""
    confidence, label = teacher.eval()(image).softmax(1).max(1, keepdim=True)
    return label.to(torch.uint8), confidence


def unlabelled_loss(logits: Tensor, label: Tensor, counts: Tensor) -> Tensor:
    """Mean of cross-entropy and Dice loss over voxels that count; logits ``(B, K, *S)``, the others ``(B, 1, *S)``."""
    label, counts = label[:, 0].long(), counts.float()
    entropy = (F.cross_entropy(logits, label, reduction="none") * counts[:, 0]).mean()
    there = F.one_hot(label, logits.shape[1]).movedim(-1, 1) * counts
    guess = logits.softmax(1) * counts
    axes = (0, *range(2, logits.ndim))
    overlap = (2 * (guess * there).sum(axes) + 1e-5) / (guess.sum(axes) + there.sum(axes) + 1e-5)
    return (entropy + 1 - overlap.mean()) / 2


def batches(data: Dataset, size: int, iterations: int) -> Iterator[Sample]:
    """Batches of random samples."""
    sampler = RandomSampler(data, replacement=True, num_samples=size * iterations)
    yield from DataLoader(data, batch_size=size, sampler=sampler, collate_fn=list_data_collate)


class MeanTeacher:
    """The steps of a training; ``teacher`` is what it gives.

    Args:
        network: learns.
        optimizer: of its weights. The learning rate falls to nothing in the course of the training.
        loss: of labelled images.
        strong: the view of unlabelled images.
        iterations: how many steps there will be.
        weight: of the loss of unlabelled images, reached after 15 % of the steps.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor, Tensor], Tensor],
        strong: StrongView,
        iterations: int,
        weight: float = 1.0,
    ) -> None:
        self.network, self.optimizer, self.loss, self.strong = network, optimizer, loss, strong
        self.iterations, self.weight, self.done = iterations, weight, 0
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, iterations, power=0.9)

    @property
    def teacher(self) -> nn.Module:
        """The network with averaged weights."""
        module: nn.Module = self.average.module
        return module

    def __call__(self, known: Sample, unknown: Sample) -> dict[str, float]:
        """Learn from a labelled and an unlabelled batch; the labelled loss, and the share of voxels that counted."""
        self.done += 1
        device = next(self.network.parameters()).device
        unknown["image"] = unknown["image"].to(device)
        unknown["pseudo"], unknown["confidence"] = predict_labels(self.teacher, unknown["image"])
        view, pseudo, counts = self.strong(unknown)
        logits = self.network.train()(torch.cat([known["image"].to(device), view]))
        learned, guessed = logits.split([len(known["image"]), len(view)])
        loss = self.loss(learned, known["label"].to(device))
        weight = self.weight * min(1.0, self.done / (0.15 * self.iterations))
        self.optimizer.zero_grad(set_to_none=True)
        (loss + weight * unlabelled_loss(guessed, pseudo, counts)).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.network)
        return {"loss": loss.item(), "trusted": counts.float().mean().item()}
