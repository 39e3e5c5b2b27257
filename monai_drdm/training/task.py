"""The interface between the training loop and what is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TYPE_CHECKING

import torch
from torch import nn, Tensor

from monai_drdm.documents import NO_BETTER
from monai_drdm.training.settings import RunConfig

if TYPE_CHECKING:
    from monai_drdm.viz import Figure

_NOTICEABLE = 0.02
"""By how much, as a share, a network must be better than doing nothing."""
Predict = Callable[..., Tensor]
"""A network as a function of images and conditions; its prediction is in float32."""


class DataSummary(NamedTuple):
    """What ``Task.prepare`` has read."""

    fingerprint: str = ""
    """A digest of the data, by which a resumed run notices that they have changed; empty: there is nothing to check."""
    skipped: str = ""
    """Lines about files that could not be used, for the user; empty if all could."""


class Batch(NamedTuple):
    """One batch on the training device."""

    images: Tensor
    """``(B, C, *S)``: the first input of the network."""
    target: Any
    """What ``Task.loss`` and ``Task.error`` compare the prediction with."""
    conditions: tuple[Tensor, ...] = ()
    """Further inputs of the network, such as deformation levels ``(B,)``."""


class Validation(NamedTuple):
    """What a network has reached on the validation batches, beside doing nothing, which is predicting zero."""

    network: Mapping[str, float]
    """The mean of ``Task.error`` as ``validation_loss``, and those of ``Task.measures``."""
    nothing: Mapping[str, float]
    """The same of doing nothing."""

    @property
    def beats_nothing(self) -> bool:
        """Whether the validation loss is noticeably below that of doing nothing."""
        nothing = self.nothing["validation_loss"]
        return self.network["validation_loss"] < nothing - _NOTICEABLE * abs(nothing)

    @property
    def doubt(self) -> str:
        """What a card says of a network that is no better than doing nothing; empty for a better one."""
        return "" if self.beats_nothing else NO_BETTER

    def gates(self) -> dict[str, float]:
        """Everything that was measured, for a card."""
        return {**self.network, **{f"{name}_of_doing_nothing": value for name, value in self.nothing.items()}}

    def summary(self) -> str:
        """A line for the user."""
        return "; ".join(
            f"{name.replace('_', ' ')} {value:.2f} ({self.nothing[name]:.3g} is doing nothing)"
            for name, value in self.network.items()
        )


class Task(Protocol):
    """What is trained: a network, its batches, its loss, and the file that is written at the end.

    The training loop calls ``prepare`` once, then ``build_network``. Every step draws a ``batch``, predicts
    ``network(images, *conditions)`` and minimises ``loss``. Every validation averages ``error`` and ``measures`` over a
    few validation batches and saves the ``sheet``; there is one after the last step in any case. Then ``write`` is
    called. The loop does all the rest: optimizer, learning rate, averaged weights, checkpoints, reports, several
    processes.

    All randomness of a batch must come from the generator: this makes a resumed run repeat the steps of an
    uninterrupted one.
    """

    @property
    def config(self) -> RunConfig:
        """The settings, complete: ``learning_rate`` and ``optimizer`` are not None."""

    def prepare(self, progress: bool) -> DataSummary:
        """Read the data.

        Args:
            progress: whether to show a progress bar.

        Raises:
            ValueError: there are no usable data.
        """

    def build_network(self) -> nn.Module:
        """The network to train, in training mode."""

    def batch(self, network: Predict, generator: torch.Generator, *, validate: bool = False) -> Batch:
        """Draw a batch.

        Args:
            network: the network as it is now, for tasks whose inputs depend on its predictions.
            generator: on the training device.
            validate: draw from the validation data; the batch must not depend on the network then.
        """

    def loss(self, predicted: Tensor, target: Any) -> Tensor:
        """The number to minimise."""

    def error(self, predicted: Tensor, target: Any) -> Tensor:
        """The loss without penalties, which validation reports. A prediction of zero is that of doing nothing."""

    def measures(self, predicted: Tensor, target: Any) -> Mapping[str, float]:
        """What else validation reports, by name; empty for nothing."""

    def sheet(self, network: nn.Module, generator: torch.Generator) -> Figure | None:
        """A figure of what the network does, saved after every validation; None for no figure."""

    def write(self, network: nn.Module, path: Path, validation: Validation) -> None:
        """Write the trained network, and what it has reached, to files in the run's folder."""
