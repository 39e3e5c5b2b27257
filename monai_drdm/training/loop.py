"""The training run: MONAI's engine around one step, with everything needed to stop at any time and go on.

What is trained, on what, and what it leaves is a ``Task``.
"""

from __future__ import annotations

import hashlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TYPE_CHECKING

import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, ProgressBar
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel

from monai_drdm.training.distributed import Team
from monai_drdm.training.precision import Bfloat16Inferer, computes_bfloat16, Progress
from monai_drdm.training.reports import Reports
from monai_drdm.training.run_folder import check_data, Checkpoints, claimed, telling_what_is_left, write_config
from monai_drdm.training.settings import RunConfig

if TYPE_CHECKING:
    from monai_drdm.viz import Figure

Predict = Callable[..., Tensor]
_WEIGHTS = "network.safetensors"
_VALIDATION_BATCHES = 4


class Task(ABC):
    """A network, its batches, its loss, and what is kept of it."""

    config: RunConfig

    @abstractmethod
    def prepare(self, progress: bool) -> str:
        """Read the data; what is to be said of what could not be used.

        Raises:
            ValueError: no usable data.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """What ``prepare`` read, in short; empty where there is nothing to read."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The network to train."""

    @abstractmethod
    def batch(
        self, network: Predict, generator: torch.Generator, *, validate: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...], Any]:
        """A batch: images, what the network is given beside them, and the target.

        Args:
            network: as far as what it is shown depends on it.
            generator: on the training device; the batch depends on it alone.
            validate: of the scans kept for validation, and without the network.
        """

    @abstractmethod
    def loss(self, predicted: Tensor, target: Any) -> Tensor:
        """What training makes small."""

    @abstractmethod
    def error(self, predicted: Tensor, target: Any) -> Tensor:
        """The loss without penalties: what validation reports."""

    @abstractmethod
    def sheet(self, network: nn.Module, generator: torch.Generator) -> Figure:
        """A look at what the network does."""

    @abstractmethod
    def write(self, network: nn.Module, weights: Path, gates: Mapping[str, float]) -> None:
        """Write the trained network as a file in the folder of its run."""


def run_task(
    task: Task,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train; see ``fit``."""
    team = Team(task.config.device)
    try:
        return _run_task(task, folder, team, resume, progress and team.leads, should_stop)
    finally:
        team.leave()


def _run_task(
    task: Task, folder: Path, team: Team, resume: bool, progress: bool, should_stop: Callable[[], bool]
) -> Path | None:
    """What one process does between joining and leaving the others: nothing it holds may outlive this."""
    with claimed(folder, task.config, resume) if team.leads else nullcontext():
        skipped = task.prepare(progress)
        if team.leads:
            print(skipped, end="", file=sys.stderr)
        run = _Run(task, folder, team, should_stop, progress)
        with telling_what_is_left(folder):
            if team.leads:
                check_data(folder, task.fingerprint(), resume)
                write_config(folder, task.config)
            return run.train(resume)


class _Run:
    """One training run in one folder."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        team: Team,
        should_stop: Callable[[], bool],
        progress: bool,
    ) -> None:
        config = task.config
        torch.manual_seed(config.seed)
        self.task, self.config, self.folder, self.team, self.should_stop = task, config, folder, team, should_stop
        self.interrupted = False
        self.network = task.network().to(team.device)
        assert config.learning_rate is not None  # tasks complete their settings
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.progress = Progress(config)
        fast = computes_bfloat16(team.device)
        self.inferer = Bfloat16Inferer(config.bfloat16 and fast)
        if config.bfloat16 and not fast and team.leads:
            print("convolutions run in float32: this processor only imitates bfloat16", file=sys.stderr)
        self.trainer = SupervisedTrainer(
            device=team.device,
            max_epochs=config.max_epochs,
            train_data_loader=range(config.epoch_length),
            epoch_length=config.epoch_length,
            network=team.wrap(self.network),
            optimizer=self.optimizer,
            loss_function=self._loss,
            prepare_batch=self._prepare,
            inferer=self.inferer,
            decollate=False,
        )
        self.averaged = AveragedModel(self.network, multi_avg_fn=self._average)
        self.averaged.eval()  # only ever judged and written
        self.checkpoints = Checkpoints(folder, team.leads)
        self.checkpoint = Checkpoint(
            self._state(),
            self.checkpoints,
            n_saved=None,
            global_step_transform=lambda engine, _: engine.state.iteration,
        )
        self.reports: Reports | None = None
        self._attach(progress)

    def train(self, resume: bool) -> Path | None:
        """Run to the end, or until told to stop."""
        self.reports = Reports(self.folder) if self.team.leads else None
        if resume:
            self.restore()
        self.progress.start()
        try:
            if not self._ended():  # the engine would take a finished run for a new one
                self.trainer.run()
        finally:
            if self.reports is not None:
                self.reports.close()
        if self.interrupted:
            return None
        weights = self.folder / _WEIGHTS
        if self.team.leads:
            self.task.write(self.averaged.module, weights, {"validation_loss": self._validation_loss()})
        self.team.any(False)  # nobody leaves before it is written
        return weights

    def restore(self) -> None:
        """Go on from the latest checkpoint that is whole; without one, from the start."""
        saved = self.checkpoints.latest()
        if saved is not None:
            Checkpoint.load_objects(self._state(), saved)
        if self.reports is not None:
            self.reports.forget_after(self.trainer.state.iteration)

    def _state(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer,
            "network": self.network,
            "optimizer": self.optimizer,
            "averaged": self.averaged,
            "progress": self.progress,
        }

    def _attach(self, progress: bool) -> None:
        trainer = self.trainer
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.averaged.update_parameters(self.network))
        trainer.add_event_handler(Events.ITERATION_STARTED, self._set_learning_rate)
        trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._clip)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._log_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._validate)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.checkpoint)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_asked)
        if progress:
            bar = ProgressBar(persist=True)
            bar.attach(trainer, output_transform=lambda output: {"loss": float(output[CommonKeys.LOSS].detach())})

    def _prepare(self, *_: Any) -> tuple[Tensor, Any, tuple[Tensor, ...], dict[str, Any]]:
        """Batch ``i`` is a function of seed and ``i``, whatever happened before."""
        generator = self._generator(f"train/{self.team.rank}", self.trainer.state.iteration)
        network = self.inferer.bound(self.network)
        with self._batch_named():
            image, told, target = self.task.batch(network, generator)
        return image, target, told, {}

    def _loss(self, predicted: Tensor, target: Any) -> Tensor:
        with self._batch_named():
            loss: Tensor = self.task.loss(predicted, target)
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss is {float(loss)}")
        return loss

    @contextmanager
    def _batch_named(self) -> Iterator[None]:
        """Say which batch it was that brought numbers that are not finite."""
        try:
            yield
        except ValueError as error:
            raise FloatingPointError(
                f"batch {self.trainer.state.iteration} (seed {self.config.seed}): {error}. The last checkpoint is "
                "intact; start again with a lower learning_rate."
            ) from error

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}/{number}".encode()).digest()
        return torch.Generator(self.team.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def _set_learning_rate(self) -> None:
        config, done = self.config, self.trainer.state.iteration - 1
        spent = self.team.as_leader(self.progress.spent())
        share = max(done / (config.max_epochs * config.epoch_length), spent)
        warm = min(1.0, (done + 1) / max(config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * warm * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    def _average(self, averages: Sequence[Tensor], newest: Sequence[Tensor], count: Tensor | int) -> None:
        """An exponential average that forgets its first, worst weights sooner. Reads one number back a step."""
        decay = min(self.config.ema_decay, float((1 + count) / (10 + count)))
        for average, new in zip(averages, newest):
            average += (1 - decay) * (new - average)

    def _clip(self) -> None:
        if self.config.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)

    def _log_step(self) -> None:
        if self.reports is not None:
            loss = float(self.trainer.state.output[CommonKeys.LOSS].detach())
            self.reports.write({"step": self.trainer.state.iteration, "loss": loss})

    def _validate(self) -> None:
        mean = self._validation_loss()
        self.progress.validated(mean)
        if self.reports is not None:
            self.reports.write({"step": self.trainer.state.iteration, "validation_loss": mean})
            figure = self.task.sheet(self.averaged.module, self._generator("sheet", 0))
            self.reports.draw(figure, self.trainer.state.iteration)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Error of the averaged network on batches that are the same every time."""
        network = self.inferer.bound(self.averaged.module)
        losses = []
        for number in range(_VALIDATION_BATCHES):
            generator = self._generator("validate", number)
            image, told, target = self.task.batch(network, generator, validate=True)
            losses.append(float(self.task.error(network(image, *told), target)))
        return sum(losses) / len(losses)

    def _stop_within_epoch(self) -> None:
        """After the last step of an epoch comes its validation first."""
        if self.trainer.state.iteration % self.config.epoch_length:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        self.interrupted = self.team.any(self.should_stop())
        if self.interrupted or self._ended():
            self.checkpoint(self.trainer)
            self.trainer.terminate()

    def _ended(self) -> bool:
        """All steps are taken, the time is spent, or patience is lost; all processes find the same."""
        config = self.config
        done = self.trainer.state.iteration >= config.max_epochs * config.epoch_length
        lost = 0 < config.patience <= self.progress.stale
        return self.team.any(done or lost or self.progress.spent() >= 1)
