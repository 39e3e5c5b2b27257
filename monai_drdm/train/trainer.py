"""The training run: MONAI's engine around one step, with everything needed to stop at any time and go on."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint, ProgressBar
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel

from monai_drdm.io.files import atomically
from monai_drdm.networks import RecoveryNetwork, save_network
from monai_drdm.train.config import TrainConfig
from monai_drdm.train.data import find_scans, load_bank, ScanBank
from monai_drdm.train.folder import Checkpoints, claimed, telling_what_is_left, write_config
from monai_drdm.train.parts import Bfloat16Inferer, Progress
from monai_drdm.train.recipes import choose_recipe, Recipe
from monai_drdm.train.reports import Reports
from monai_drdm.train.step import draw_images
from monai_drdm.train.team import Team

_WEIGHTS = "network.safetensors"
_VALIDATION_BATCHES = 4


def fit(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train a network (Algorithm 1) and write it with everything that says how it came about.

    Args:
        config: the settings.
        out: a new or empty folder or, with ``resume``, that of a run with the same settings.
        resume: go on from the latest intact checkpoint.
        progress: show a progress bar.
        should_stop: asked after every step; once it says yes, the run saves and returns.

    Returns:
        The weights file, or None if the run was told to stop before its end.

    Raises:
        FileExistsError: the folder is in use, or holds something and not ``resume``.
        ValueError: ``resume`` with other settings, no usable scan, or ``init`` that is not what the settings say.
        FloatingPointError: a loss that is not finite; names the batch.
    """
    folder, recipe = Path(out), choose_recipe(config)
    team = Team(recipe.config.device)
    try:
        return _fit(recipe, folder, team, resume, progress and team.leads, should_stop)
    finally:
        team.leave()


def _fit(
    recipe: Recipe[Any], folder: Path, team: Team, resume: bool, progress: bool, should_stop: Callable[[], bool]
) -> Path | None:
    """What one process does between joining and leaving the others: nothing it holds may outlive this."""
    with claimed(folder, recipe.config, resume) if team.leads else nullcontext():
        training, validation, skipped = _banks(recipe.config, progress)
        if team.leads:
            print(skipped, end="", file=sys.stderr)
        run = _Run(recipe, folder, team, training, validation, should_stop, progress)
        with telling_what_is_left(folder):
            if team.leads:
                write_config(folder, recipe.config)
            return run.train(resume)


class _Run:
    """One training run in one folder."""

    def __init__(
        self,
        recipe: Recipe[Any],
        folder: Path,
        team: Team,
        training: ScanBank | None,
        validation: ScanBank | None,
        should_stop: Callable[[], bool],
        progress: bool,
    ) -> None:
        config = recipe.config
        torch.manual_seed(config.seed)
        self.recipe, self.config, self.folder, self.team, self.should_stop = recipe, config, folder, team, should_stop
        self.interrupted = False
        self.bank, self.validation = training, validation
        self.network = recipe.network().to(team.device)
        assert config.learning_rate is not None  # recipes complete their settings
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.progress = Progress(config)
        self.inferer = Bfloat16Inferer(config.bfloat16)
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
            averaged = self.averaged.module
            assert isinstance(averaged, RecoveryNetwork)
            name, gates = self.folder.resolve().name, {"validation_loss": self._validation_loss()}
            averaged.card = self.recipe.card(averaged, name, gates)
            atomically(weights, lambda part: save_network(averaged, part))
            card = json.dumps(json.loads(averaged.card.to_json()), indent=2) + "\n"
            atomically(weights.with_suffix(".json"), lambda part: Path(part).write_text(card, encoding="utf-8"))
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

    def _prepare(self, *_: Any) -> tuple[Tensor, Any, tuple[Tensor], dict[str, Any]]:
        """Batch ``i`` is a function of seed and ``i``, whatever happened before."""
        generator = self._generator(f"train/{self.team.rank}", self.trainer.state.iteration)
        network = self.inferer.bound(self.network)
        with self._batch_named():
            image, told, target = self.recipe.draw(self.bank, network, generator)
        return image, target, (told,), {}

    def _loss(self, predicted: Tensor, target: Any) -> Tensor:
        with self._batch_named():
            loss: Tensor = self.recipe.loss(predicted, target)
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
            images = draw_images(self.config, self.validation, self._generator("sheet", 0))
            self.reports.draw_sheet(self.averaged.module, images, self.trainer.state.iteration)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Loss of the averaged network on batches that are the same every time; 1 is doing nothing."""
        network = self.inferer.bound(self.averaged.module)
        losses = []
        for number in range(_VALIDATION_BATCHES):
            generator = self._generator("validate", number)
            image, told, target = self.recipe.draw(self.validation, network, generator, validate=True)
            losses.append(float(self.recipe.error(network(image, told), target)))
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


def _banks(config: TrainConfig, progress: bool) -> tuple[ScanBank | None, ScanBank | None, str]:
    """Scans to train on, scans to validate on, and what could not be used."""
    if config.data == "synthetic":
        return None, None, ""
    bank = load_bank(
        find_scans(config.data, config.section),
        spatial_dims=config.spatial_dims,
        working_size=config.working_size,
        slice_axis=config.slice_axis,
        image_channel=config.image_channel,
        mix_dimensions=config.mix_dimensions,
        progress=progress,
    )
    return *bank.split(config.validation_share, config.seed), bank.report()
