"""How a registration network is trained: on pairs with known fields, or on images that it makes resemble each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, DiffusionLoss
from monai.metrics import compute_dice
from torch import nn, Tensor

from monai_drdm.fields import warp
from monai_drdm.io.files import atomically
from monai_drdm.registration.augmentation import drawn_pairs, intensity_jitter, random_affine, random_flip
from monai_drdm.registration.config import RegistrationConfig
from monai_drdm.registration.data import ImageBank, load_images, load_pairs, PairBank, RegistrationBatch
from monai_drdm.registration.networks import load_registration, RegistrationNetwork, save_registration, Structure
from monai_drdm.registration.similarity import LocalCorrelation
from monai_drdm.training.folding import folding_loss
from monai_drdm.training.loop import run_task
from monai_drdm.training.run_folder import tensor_digest
from monai_drdm.training.task import Batch, DataSummary, Predict, Validation
from monai_drdm.viz import contact_sheet, Figure, middle_plane, SheetEntry

_SHEET_PAIRS = 6
_SHORTEST_VOX = 0.1
_FEWEST = 3
"""Voxels along an axis that MONAI's smoothness loss needs."""


class RegistrationTask:
    """The training of a registration network, for ``training.loop``.

    Args:
        config: the settings; with ``init``, the structure of the network is taken from there.
    """

    def __init__(self, config: RegistrationConfig) -> None:
        self.start = load_registration(config.init) if config.init else None
        if self.start is not None:  # complete the settings, which are saved with the run
            structure = asdict(self.start.structure)
            if structure.pop("spatial_dims") != config.spatial_dims:
                raise ValueError(
                    f"init must be a {config.spatial_dims}D network, got {self.start.structure.spatial_dims}D."
                )
            config = replace(config, network=structure.pop("kind"), **structure)
        self.config = config
        self.bank: PairBank | ImageBank | None = None
        self.validation_bank: PairBank | ImageBank | None = None
        self.smoothness = DiffusionLoss()
        self.dice = DiceLoss()

    def prepare(self, progress: bool) -> DataSummary:
        """Read the pairs or images, and split them into those to train and to validate on."""
        config = self.config
        bank: PairBank | ImageBank
        if config.pairs:
            bank = load_pairs(config.pairs, spatial_dims=config.spatial_dims, section=config.section, progress=progress)
        else:
            bank = load_images(
                config.images,
                config.labels or None,
                spatial_dims=config.spatial_dims,
                section=config.section,
                progress=progress,
            )
        labelled = bank.labels is not None if isinstance(bank, ImageBank) else bank.pairs.fixed_label is not None
        if config.label_weight > 0 and not labelled:
            raise ValueError("label_weight needs labels of all images, got none; give labels or set it to 0.")
        self._check_shape((bank.images if isinstance(bank, ImageBank) else bank.pairs.moving).shape[2:])
        self.bank, self.validation_bank = bank.split(config.validation_share)
        summary = DataSummary(_digest(self.bank, self.validation_bank))
        if config.affine:
            assert isinstance(self.bank, ImageBank)
            assert isinstance(self.validation_bank, ImageBank)
            self.bank, self.validation_bank = self.bank.aligned(progress), self.validation_bank.aligned(progress)
        return summary

    def _check_shape(self, shape: Sequence[int]) -> None:
        """Raise ``ValueError`` for images that are too small to learn from."""
        if min(shape) < _FEWEST:
            raise ValueError(
                f"images must have {_FEWEST} voxels or more along each axis to learn smooth fields from, got "
                f"{tuple(shape)}. For single slices use spatial_dims=2."
            )
        coarsest = max(self.config.similarity_scales)
        if self.config.images and -(-max(shape) // coarsest) < _FEWEST:
            raise ValueError(
                f"similarity_scales must leave {_FEWEST} voxels or more along the longest side of the images, got "
                f"{coarsest} for images of {tuple(shape)}. Leave that scale out."
            )

    def build_network(self) -> nn.Module:
        """A new network, or the one in ``init``."""
        config, network = self.config, self.start
        if network is None:
            network = RegistrationNetwork(
                Structure(
                    config.network,
                    config.spatial_dims,
                    config.channels,
                    config.depth,
                    config.diffeomorphic,
                    config.stride,
                    config.forces,
                    config.pool_sizes,
                    config.dilations,
                    config.working_size,
                )
            )
        return network.train().requires_grad_(True)

    def batch(self, network: Predict, generator: torch.Generator, *, validate: bool = False) -> Batch:
        """Moving and fixed images as two channels; the target are their pairs.

        In training, pairs are flipped and moved at random. The intensities are changed in what the network gets, and
        not in the target, whose images are compared with each other.
        """
        bank = self.validation_bank if validate else self.bank
        assert bank is not None
        pairs = bank.draw(self.config.batch_size, generator)
        if self.config.drawn_level > 0:
            pairs = drawn_pairs(pairs, self.config.drawn_level, generator)
        images = [pairs.moving, pairs.fixed]
        if not validate:
            pairs = random_flip(pairs, generator) if self.config.mirror else pairs
            pairs = random_affine(pairs, self.config.pose, generator)
            images = [intensity_jitter(one, self.config.repaint, generator) for one in (pairs.moving, pairs.fixed)]
        return Batch(torch.cat(images, dim=1), pairs)

    def error(self, predicted: Tensor, target: RegistrationBatch) -> Tensor:
        """The mean distance to the known fields in voxels or, without them, the dissimilarity of the images.

        Only voxels of the fixed image count, and not the border values that extend it to the common grid.
        """
        config = self.config
        if target.ddf is not None:
            distance = (predicted - target.ddf).norm(dim=1, keepdim=True)
            return config.error_weight * _mean_inside(distance, target.inside)
        loss = config.similarity_weight * self._unlike(warp(target.moving, predicted), target)
        return loss if config.label_weight == 0 else loss + config.label_weight * self._overlap(predicted, target)

    def _unlike(self, warped: Tensor, target: RegistrationBatch) -> Tensor:
        """How little the warped and the fixed images correlate: the mean over all grids on which they are compared."""
        images, found = (warped, target.fixed, target.inside.to(warped.dtype)), []
        for scale in self.config.similarity_scales:
            coarse = [-(-n // scale) for n in warped.shape[2:]]
            moving, fixed, inside = (F.interpolate(one, coarse, mode="area") if scale > 1 else one for one in images)
            likeness = LocalCorrelation(fixed, self.config.similarity_window)
            found.append(_mean_inside(1 - likeness(moving), inside))
        return torch.stack(found).mean()

    def measures(self, predicted: Tensor, target: RegistrationBatch) -> Mapping[str, float]:
        """The mean Dice of all structures, where there are labels."""
        if target.moving_label is None or target.fixed_label is None:
            return {}
        moved, fixed = warp(target.moving_label, predicted, "nearest"), target.fixed_label
        ids = [int(value) for value in torch.unique(fixed) if value > 0]
        scores = [compute_dice((moved == one).float(), (fixed == one).float()) for one in ids]
        dice = float(torch.cat(scores).nanmean()) if scores else math.nan
        return {} if math.isnan(dice) else {"dice": dice}

    def loss(self, predicted: Tensor, target: RegistrationBatch) -> Tensor:
        """The error, and the penalties on rough and folding fields."""
        config = self.config
        loss = self.error(predicted, target)
        if target.ddf is not None and config.relative_error:
            loss = loss / self.error(torch.zeros_like(predicted), target).clamp(min=_SHORTEST_VOX)
        if target.ddf is not None and config.label_weight > 0:
            loss = loss + config.label_weight * self._overlap(predicted, target)
        if config.smoothness_weight > 0:
            loss = loss + config.smoothness_weight * self.smoothness(predicted)
        if config.folding_weight > 0:
            loss = loss + config.folding_weight * folding_loss(predicted)
        return loss

    def _overlap(self, predicted: Tensor, target: RegistrationBatch) -> Tensor:
        """Dice loss over all labels in the batch but the background."""
        assert target.moving_label is not None
        assert target.fixed_label is not None
        values = torch.unique(torch.cat([target.moving_label, target.fixed_label]))
        ids = values[values > 0].view(1, -1, *(1,) * (predicted.ndim - 2))
        if not ids.numel():
            return predicted.new_zeros(())
        moving, fixed = ((one == ids).float() for one in (target.moving_label, target.fixed_label))
        overlap: Tensor = self.dice(warp(moving, predicted), fixed)
        return overlap

    @torch.no_grad()
    def sheet(self, network: nn.Module, generator: torch.Generator) -> Figure:
        """Fixed images and the moving ones as the network warps them, with the outlines of labels if there are any."""
        images, pairs, _ = self.batch(network, generator, validate=True)
        training = network.training
        ddf = network.eval()(images).float()
        network.train(training)
        warped = warp(pairs.moving, ddf)
        labels: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * len(warped)
        if pairs.moving_label is not None and pairs.fixed_label is not None:
            moved = warp(pairs.moving_label, ddf, "nearest")
            labels = [(middle_plane(a), middle_plane(b)) for a, b in zip(pairs.fixed_label, moved)]
        entries = [
            SheetEntry(f"fixed {i}", middle_plane(fixed), middle_plane(made), *marks, after_name="moving, warped")
            for i, (fixed, made, marks) in enumerate(zip(pairs.fixed, warped, labels))
        ]
        return contact_sheet(entries[:_SHEET_PAIRS])

    def write(self, network: nn.Module, path: Path, validation: Validation) -> None:
        """Write weights and structure, and a JSON file beside them that also says what the network has reached."""
        assert isinstance(network, RegistrationNetwork)
        save_registration(network, path)
        described = {
            "structure": asdict(network.structure),
            "source": "; ".join(filter(None, ["trained with monai_drdm.registration.train", validation.doubt])),
            "gates": validation.gates(),
        }
        text = json.dumps(described, indent=2) + "\n"
        atomically(path.with_suffix(".json"), lambda part: Path(part).write_text(text, encoding="utf-8"))


def _mean_inside(values: Tensor, inside: Tensor) -> Tensor:
    """The mean of values over the voxels of images; 0 where a strong pose moves a small image out of view."""
    mean: Tensor = (values * inside).sum() / inside.sum().clamp(min=1)
    return mean


def _digest(*banks: PairBank | ImageBank) -> str:
    """The digest of the pairs or images in all banks."""
    tensors: list[Tensor | None] = []
    for bank in banks:
        tensors += [bank.images, bank.labels, bank.group] if isinstance(bank, ImageBank) else vars(bank.pairs).values()
    return tensor_digest(tensor for tensor in tensors if tensor is not None)


def fit(
    config: RegistrationConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train a registration network, on known fields (paper, Algorithm 4) or unsupervised.

    Args:
        config: the settings.
        out: a new or empty folder or, with ``resume``, that of a run with the same settings.
        resume: continue from the latest intact checkpoint.
        progress: show a progress bar.
        should_stop: called after every step; once it returns True, the run saves a checkpoint and returns.

    Returns:
        The weights file, or None if ``should_stop`` ended the run.

    Raises:
        FileExistsError: another run uses the folder, or it is not empty and ``resume`` is False.
        FileNotFoundError: ``resume`` is True and the folder holds no run; no such data or ``init``.
        ValueError: ``resume`` with other settings or data; unusable data; ``init`` does not match the settings.
        FloatingPointError: the loss is not finite; the message names the batch.
    """
    return run_task(RegistrationTask(config), Path(out), resume=resume, progress=progress, should_stop=should_stop)
