"""How each kind of network is trained: where it starts, what it is shown, and what is made small."""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn, Tensor

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import warp
from monai_drdm.io.files import atomically
from monai_drdm.networks import (
    load_network,
    NetworkCard,
    RecoveryNetwork,
    RecResACNet,
    save_network,
    VelocityUNet,
)
from monai_drdm.train.config import TrainConfig
from monai_drdm.train.data import digest_of, find_scans, load_bank, ScanBank
from monai_drdm.train.published import draw_published_batch, published_folding, published_loss, PublishedTarget
from monai_drdm.train.velocity import draw_batch, draw_images, folding_of, recovery_loss, Target
from monai_drdm.training.loop import Predict, Task
from monai_drdm.viz import contact_sheet, Figure, middle_plane, SheetEntry

T = TypeVar("T")
"""What a loss compares predictions with."""

_QUIET = 1e-2
_SHEET, _SHEET_LEVEL = 6, 0.5


class Recipe(Task, Generic[T]):
    """How one kind of network is trained.

    Args:
        config: the settings, complete.
        start: the network to start from; None: a new one.
    """

    config: TrainConfig

    def __init__(self, config: TrainConfig, start: RecoveryNetwork | None) -> None:
        self.config, self.start = config, start
        self.bank: ScanBank | None = None
        self.validation: ScanBank | None = None
        self.origin = "" if start is None else start.card.name

    def network(self) -> RecoveryNetwork:
        """The network to train."""
        network = self.untrained() if self.start is None else self.start
        network.card = dataclasses.replace(network.card, working_size=self.config.working_size)
        return network.train().requires_grad_(True)

    def card(self, network: RecoveryNetwork, name: str, gates: Mapping[str, float]) -> NetworkCard:
        """What is known of a network after its training."""
        before, data = "" if self.start is None else network.card.training_data, Path(self.config.data).resolve().name
        source = f"fine-tuned from {self.origin}" if self.origin else "trained"
        return dataclasses.replace(
            network.card,
            name=name,
            sha256="",
            source=f"{source} with monai_drdm.train",
            training_data=f"{before}; then {data}" if before else data,
            gates=gates,
        )

    def prepare(self, progress: bool) -> str:
        """Read scans to train and to validate on; what could not be used."""
        config = self.config
        if config.data == "synthetic":
            return ""
        bank = load_bank(
            find_scans(config.data, config.section),
            spatial_dims=config.spatial_dims,
            working_size=config.working_size,
            slice_axis=config.slice_axis,
            image_channel=config.image_channel,
            mix_dimensions=config.mix_dimensions,
            progress=progress,
        )
        self.bank, self.validation = bank.split(config.validation_share, config.seed)
        return bank.report()

    def fingerprint(self) -> str:
        """Of the scans of both parts; empty of random anatomy."""
        banks = [bank for bank in (self.bank, self.validation) if bank is not None]
        return digest_of(tensor for bank in banks for tensor in (bank.images, bank.weight)) if banks else ""

    def batch(
        self, network: Predict, generator: torch.Generator, *, validate: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], T]:
        """Images, what the network is told beside them, and the target."""
        image, told, target = self.draw(
            self.validation if validate else self.bank, network, generator, validate=validate
        )
        return image, (told,), target

    def sheet(self, network: nn.Module, generator: torch.Generator) -> Figure:
        """Images kept for validation before and after one draw each."""
        assert isinstance(network, RecoveryNetwork)
        images = draw_images(self.config, self.validation, generator)[:_SHEET]
        training = network.training
        fields = DRDM(network.eval()).sample(images, _SHEET_LEVEL, range(len(images)))
        network.train(training)
        entries = [
            SheetEntry(f"image {number}", middle_plane(before), middle_plane(after))
            for number, (before, after) in enumerate(zip(images, warp(images, fields)))
        ]
        return contact_sheet(entries)

    def write(self, network: nn.Module, weights: Path, gates: Mapping[str, float]) -> None:
        """Weights, and their card beside them."""
        assert isinstance(network, RecoveryNetwork)
        network.card = self.card(network, weights.parent.resolve().name, gates)
        atomically(weights, lambda part: save_network(network, part))
        card = json.dumps(json.loads(network.card.to_json()), indent=2) + "\n"
        atomically(weights.with_suffix(".json"), lambda part: Path(part).write_text(card, encoding="utf-8"))

    def loss(self, predicted: Tensor, target: T) -> Tensor:
        """What training makes small."""
        loss = self.error(predicted, target)
        if self.config.folding_weight > 0:
            loss = loss + self.config.folding_weight * self.folding(predicted, target)
        return loss

    @abstractmethod
    def untrained(self) -> RecoveryNetwork:
        """A new network."""

    @abstractmethod
    def draw(
        self, bank: ScanBank | None, network: Predict, generator: torch.Generator, *, validate: bool = False
    ) -> tuple[Tensor, Tensor, T]:
        """A batch: images ``(B, 1, *S)``, what the network is told beside them ``(B,)``, and the target.

        Args:
            bank: real scans; None: random anatomy alone.
            network: as far as what it is shown depends on it.
            generator: on the training device.
            validate: a batch that does not depend on the network.
        """

    @abstractmethod
    def error(self, predicted: Tensor, target: T) -> Tensor:
        """The loss without penalties: what validation reports."""

    @abstractmethod
    def folding(self, predicted: Tensor, target: T) -> Tensor:
        """The folding penalty of the deformation after what the network predicts is undone."""


class VelocityRecipe(Recipe[Target]):
    """For ``VelocityUNet``."""

    def untrained(self) -> RecoveryNetwork:
        """A new network."""
        return VelocityUNet(self.config.spatial_dims, 1, self.config.channels)

    def draw(
        self, bank: ScanBank | None, network: Predict, generator: torch.Generator, *, validate: bool = False
    ) -> tuple[Tensor, Tensor, Target]:
        """Images, their deformation levels, and the target; for validation without a roll-out."""
        config = dataclasses.replace(self.config, roll_out=0.0) if validate else self.config
        image, target = draw_batch(config, bank, network, generator)
        return image, target.level, target

    def error(self, predicted: Tensor, target: Target) -> Tensor:
        """Relative error of the field and of its differences."""
        return recovery_loss(predicted, target, self.config.gradient_share)

    def folding(self, predicted: Tensor, target: Target) -> Tensor:
        """The penalty after the whole way back."""
        return folding_of(predicted, target)


class PublishedRecipe(Recipe[PublishedTarget]):
    """For ``RecResACNet``, as published."""

    def network(self) -> RecoveryNetwork:
        """The network to train; its time table stays as it is."""
        network = super().network()
        assert isinstance(network, RecResACNet)
        network.time_embed.requires_grad_(False)
        return network

    def untrained(self) -> RecoveryNetwork:
        """A new network that says little: displacements of random weights are larger than images."""
        network = RecResACNet(self.config.spatial_dims)
        with torch.no_grad():
            network.conv_out.weight *= _QUIET
            assert network.conv_out.bias is not None
            nn.init.zeros_(network.conv_out.bias)
        return network

    def draw(
        self, bank: ScanBank | None, network: Predict, generator: torch.Generator, *, validate: bool = False
    ) -> tuple[Tensor, Tensor, PublishedTarget]:
        """Images, their time steps, and the target."""
        return draw_published_batch(self.config, bank, generator)

    def error(self, predicted: Tensor, target: PublishedTarget) -> Tensor:
        """Distance, angle and smoothness."""
        return published_loss(self.config, predicted, target)

    def folding(self, predicted: Tensor, target: PublishedTarget) -> Tensor:
        """The penalty after one step back."""
        return published_folding(predicted, target)


_RECIPES: dict[str, type[Recipe[Any]]] = {"velocity_unet": VelocityRecipe, "recresacnet": PublishedRecipe}


def choose_recipe(config: TrainConfig) -> Recipe[Any]:
    """The recipe of the network that the settings name, or of the one to start from.

    Settings that depend on the network are filled in: ``.config`` is complete.

    Raises:
        ValueError: ``init`` of another kind, number of dimensions, channels or features than the settings say.
        FileNotFoundError: no such ``init``.
    """
    if not config.init:
        return _RECIPES[config.network](config, None)
    start = load_network(config.init)
    card = start.card
    if (card.spatial_dims, card.in_channels) != (config.spatial_dims, 1) or config.network not in ("", card.kind):
        wanted = f"{config.spatial_dims}D {config.network or 'network'}"
        raise ValueError(
            f"init must be a {wanted} for images of one channel, got {card.name!r}: {card.spatial_dims}D {card.kind} "
            f"for {card.in_channels}. Set spatial_dims and network to match it, or choose another."
        )
    if card.input_range != (0.0, 1.0):
        raise ValueError(f"init must take images in [0, 1], as they are shown in training, got {card.input_range}.")
    features = card.channels or config.channels
    if config.channels not in (features, TrainConfig.channels):
        raise ValueError(
            f"channels are those of init {card.name!r}, {features}, got {config.channels}. Leave them out."
        )
    size = config.working_size or card.working_size
    complete = dataclasses.replace(config, network=card.kind, working_size=size, channels=features)
    return _RECIPES[card.kind](complete, start)
