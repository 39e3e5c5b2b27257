"""What the training of all recovery networks has in common: scans, the network to start from, and its card."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn, Tensor

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import warp
from monai_drdm.io.files import atomically
from monai_drdm.networks import NetworkCard, RecoveryNetwork, save_network
from monai_drdm.train.config import TrainConfig
from monai_drdm.train.data import find_scans, load_bank, ScanBank
from monai_drdm.train.synthetic import synthetic_images
from monai_drdm.training.run_folder import tensor_digest
from monai_drdm.training.task import DataSummary, Validation
from monai_drdm.viz import contact_sheet, Figure, middle_plane, SheetEntry

_SHEET_IMAGES, _SHEET_LEVEL = 6, 0.5


class RecoveryTask(ABC):
    """The part of a ``Task`` that is the same for all recovery networks.

    A subclass for one kind of network adds ``batch``, ``loss`` and ``error``.

    Args:
        config: the settings, complete.
        start: the network to start from; None: a new one.
    """

    def __init__(self, config: TrainConfig, start: RecoveryNetwork | None) -> None:
        self.config, self.start = config, start
        self.start_name = "" if start is None else start.card.name
        self.bank: ScanBank | None = None
        self.validation_bank: ScanBank | None = None

    @abstractmethod
    def new_network(self) -> RecoveryNetwork:
        """An untrained network."""

    def build_network(self) -> RecoveryNetwork:
        """The network to train: the one to start from, or a new one."""
        network = self.new_network() if self.start is None else self.start
        network.card = dataclasses.replace(network.card, working_size=self.config.working_size)
        return network.train().requires_grad_(True)

    def prepare(self, progress: bool) -> DataSummary:
        """Read the scans and split them into those to train and to validate on; random anatomy needs no reading."""
        config = self.config
        if config.data == "synthetic":
            return DataSummary()
        bank = load_bank(
            find_scans(config.data, config.section),
            spatial_dims=config.spatial_dims,
            working_size=config.working_size,
            slice_axis=config.slice_axis,
            image_channel=config.image_channel,
            mix_dimensions=config.mix_dimensions,
            progress=progress,
        )
        self.bank, self.validation_bank = banks = bank.split(config.validation_share, config.seed)
        digest = tensor_digest(tensor for one in banks for tensor in (one.images, one.weight))
        return DataSummary(digest, bank.report())

    def scans(self, validate: bool) -> ScanBank | None:
        """The scans to train or to validate on; None: random anatomy only."""
        return self.validation_bank if validate else self.bank

    def sheet(self, network: nn.Module, generator: torch.Generator) -> Figure:
        """Validation images before and after one random deformation each."""
        assert isinstance(network, RecoveryNetwork)
        images = draw_images(self.config, self.scans(validate=True), generator)[:_SHEET_IMAGES]
        training = network.training
        fields = DRDM(network.eval()).sample(images, _SHEET_LEVEL, range(len(images)))
        network.train(training)
        entries = [
            SheetEntry(f"image {number}", middle_plane(before), middle_plane(after))
            for number, (before, after) in enumerate(zip(images, warp(images, fields)))
        ]
        return contact_sheet(entries)

    def measures(self, predicted: Tensor, target: Any) -> Mapping[str, float]:
        """No further measures besides the error."""
        return {}

    def write(self, network: nn.Module, path: Path, validation: Validation) -> None:
        """Write the weights, and their card as a separate JSON file."""
        assert isinstance(network, RecoveryNetwork)
        network.card = self._card(network, path.parent.resolve().name, validation)
        atomically(path, lambda part: save_network(network, part))
        card = network.card.to_json(indent=2) + "\n"
        atomically(path.with_suffix(".json"), lambda part: Path(part).write_text(card, encoding="utf-8"))

    def _card(self, network: RecoveryNetwork, name: str, validation: Validation) -> NetworkCard:
        """The card of the trained network."""
        earlier = "" if self.start is None else network.card.training_data
        data = Path(self.config.data).resolve().name
        source = f"fine-tuned from {self.start_name}" if self.start_name else "trained"
        return dataclasses.replace(
            network.card,
            name=name,
            sha256="",
            source=f"{source} with monai_drdm.train" + (f"; {validation.doubt}" if validation.doubt else ""),
            training_data=f"{earlier}; then {data}" if earlier else data,
            gates=validation.gates(),
        )


def draw_images(config: TrainConfig, bank: ScanBank | None, generator: torch.Generator) -> Tensor:
    """Undeformed images ``(B, 1, *S)``: real scans, random anatomy, or some of both.

    Args:
        config: gives the number and size of the images, and the share of random anatomy.
        bank: real scans; None: random anatomy only.
        generator: on the training device.
    """
    shape = (config.working_size,) * config.spatial_dims
    synthetic = config.batch_size if bank is None else round(config.synthetic_share * config.batch_size)
    parts = [synthetic_images(generator, synthetic, shape)] if synthetic else []
    if bank is not None and synthetic < config.batch_size:
        parts.append(bank.draw(config.batch_size - synthetic, generator))
    return torch.cat(parts)
