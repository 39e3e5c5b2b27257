"""The training loop: MONAI's trainer around the steps of a ``Task``, which can be stopped at any time and resumed."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from ignite.handlers import Checkpoint
from monai.engines import SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import nn, Tensor
from torch.optim.swa_utils import AveragedModel

from monai_drdm.training.distributed import ProcessGroup
from monai_drdm.training.muon import Muon
from monai_drdm.training.precision import Bfloat16Inferer, has_native_bfloat16
from monai_drdm.training.reports import Reports
from monai_drdm.training.run_folder import (
    check_same_data,
    Checkpoints,
    explain_write_errors,
    lock_run_folder,
    write_config,
)
from monai_drdm.training.settings import RunConfig
from monai_drdm.training.task import Task, Validation
from monai_drdm.training.terminal import in_red, RunBar

_WEIGHTS = "network.safetensors"
_VALIDATION_BATCHES = 4
_VALIDATION_SHARE = 0.2
"""With ``max_minutes``, the largest time between two validations, as a share of it, if validations are quick."""
_TRAINING_PER_VALIDATION = 4
"""Between two validations within an epoch, training takes at least this many times as long as a validation."""
_NO_BETTER = (
    "This network is no better than doing nothing on its validation data. Train for longer, with another "
    "learning_rate, on other data, or from a trained network (init); look at the figures in sheets before you use it."
)
_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "muon": Muon}
_WARMUP_SHARE = 0.1
"""With ``max_minutes``, the largest share of it for the warm-up."""


def run_task(
    task: Task,
    folder: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train a network in a folder.

    Args:
        task: what is trained.
        folder: a new or empty folder or, with ``resume``, that of a run with the same settings.
        resume: continue from the latest intact checkpoint.
        progress: show a progress bar.
        should_stop: called after every step; once it returns True, the run saves a checkpoint and returns.

    Returns:
        The weights file, or None if ``should_stop`` ended the run. The validation loss is printed to standard error.

    Raises:
        FileExistsError: another run uses the folder, or it is not empty and ``resume`` is False.
        FileNotFoundError: ``resume`` is True and the folder holds no run.
        ValueError: ``resume`` with other settings or data; the task has no usable data.
        FloatingPointError: the loss is not finite; the message names the batch.
        OSError: a file of the run cannot be written.
    """
    processes = ProcessGroup(task.config.device)
    try:
        return _run_in_this_process(task, folder, processes, resume, progress and processes.is_rank_zero, should_stop)
    finally:
        processes.close()


def _run_in_this_process(
    task: Task,
    folder: Path,
    processes: ProcessGroup,
    resume: bool,
    progress: bool,
    should_stop: Callable[[], bool],
) -> Path | None:
    """Run between opening and closing the connection. It is a function, so that its variables are freed at its end."""
    with lock_run_folder(folder, task.config, resume) if processes.is_rank_zero else nullcontext():
        data = task.prepare(progress)
        if processes.is_rank_zero:
            print(data.skipped, end="", file=sys.stderr)
        loop = _Loop(task, folder, processes, should_stop, progress)
        with explain_write_errors(folder):
            if processes.is_rank_zero:
                check_same_data(folder, data.fingerprint, resume)
                write_config(folder, task.config)
            return loop.run(resume)


class _Loop:
    """One training run in one folder."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        processes: ProcessGroup,
        should_stop: Callable[[], bool],
        progress: bool,
    ) -> None:
        self.task, self.config, self.folder = task, task.config, folder
        self.processes, self.should_stop, self.interrupted = processes, should_stop, False
        torch.manual_seed(self.config.seed)
        self.network = task.build_network().to(processes.device)
        self.averaged = AveragedModel(self.network, multi_avg_fn=self._update_average)
        self.averaged.eval()  # it is only validated and written
        self.inferer = self._build_inferer()
        self.trainer = self._build_trainer()
        self.progress = Progress(self.config)
        self.checkpoints = Checkpoints(folder, writes=processes.is_rank_zero)
        self.save = Checkpoint(
            self._state(),
            self.checkpoints,
            n_saved=None,
            global_step_transform=lambda engine, _: engine.state.iteration,
        )
        self.reports: Reports | None = None
        self.shows_bar = progress
        self.bar: RunBar | None = None
        self.validations: dict[int, Validation] = {}  # the latest, at its step
        self.nothing: dict[str, float] | None = None
        self.time_share = self.validated_at = 0.0
        self.next_validation: float | None = None
        self._attach_handlers()

    def run(self, resume: bool) -> Path | None:
        """Train to the end, or until ``should_stop``."""
        self.reports = Reports(self.folder) if self.processes.is_rank_zero else None
        if resume:
            self._restore()
        self.progress.start()
        self.time_share = self.validated_at = self.processes.from_rank_zero(self.progress.time_share())
        try:
            if not self._has_ended():  # the engine would start a finished run from its beginning
                self._train()
            return None if self.interrupted else self._finish()
        finally:
            if self.reports is not None:
                self.reports.close()

    def _train(self) -> None:
        """Take the steps that are left, or as many as time, patience and ``should_stop`` let it."""
        done, progress = self.trainer.state.iteration, self.progress
        if self.shows_bar:
            self.bar = RunBar(self._steps, progress.limit_seconds, done, progress.seconds())
        try:
            self.trainer.run()
        finally:
            if self.bar is not None:
                self.bar.close()

    def _finish(self) -> Path:
        """Validate the last step, unless that is done, and write the network."""
        weights, step = self.folder / _WEIGHTS, self.trainer.state.iteration
        if self.processes.is_rank_zero:
            validation = self.validations.get(step) or self._measure()
            self._report(step, validation)
            self.task.write(self.averaged.module, weights, validation)
            print(validation.summary(), file=sys.stderr)
            if not validation.beats_nothing:
                print(in_red(_NO_BETTER), file=sys.stderr)
        self.processes.barrier()  # no process ends before the weights are written
        return weights

    def _build_inferer(self) -> Bfloat16Inferer:
        native = has_native_bfloat16(self.processes.device)
        if self.config.bfloat16 and not native and self.processes.is_rank_zero:
            print("convolutions run in float32: this processor only imitates bfloat16", file=sys.stderr)
        return Bfloat16Inferer(self.config.bfloat16 and native)

    def _build_trainer(self) -> SupervisedTrainer:
        """MONAI's trainer; its step is ``_prepare_batch``, network, ``_loss``, gradients, ``_clip``, optimizer."""
        config = self.config
        assert config.learning_rate is not None  # tasks complete their settings
        assert config.optimizer is not None
        self.optimizer = _OPTIMIZERS[config.optimizer](
            self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        return SupervisedTrainer(
            device=self.processes.device,
            max_epochs=config.max_epochs,
            train_data_loader=range(config.epoch_length),
            epoch_length=config.epoch_length,
            network=self.processes.wrap(self.network),
            optimizer=self.optimizer,
            loss_function=self._loss,
            prepare_batch=self._prepare_batch,
            inferer=self.inferer,
            decollate=False,
        )

    def _attach_handlers(self) -> None:
        """Handlers of one event are called in the order in which they are attached."""
        trainer = self.trainer
        trainer.add_event_handler(Events.ITERATION_STARTED, self._set_learning_rate)
        trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self._clip)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.averaged.update_parameters(self.network))
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._log_loss)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._validate)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._show)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._validate_within_epoch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._stop_within_epoch)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._stop_if_needed)

    def _prepare_batch(self, *_: Any) -> tuple[Tensor, Any, tuple[Tensor, ...], dict[str, Any]]:
        """Draw the batch of this step; its random numbers depend on the seed, the rank and the step only."""
        generator = self._generator(f"train/{self.processes.rank}", self.trainer.state.iteration)
        with self._errors_name_the_batch():
            batch = self.task.batch(self.inferer.predictor(self.network), generator)
        return batch.images, batch.target, batch.conditions, {}

    def _loss(self, predicted: Tensor, target: Any) -> Tensor:
        with self._errors_name_the_batch():
            loss = self.task.loss(predicted, target)
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"the loss is {float(loss)}")
        return loss

    @contextmanager
    def _errors_name_the_batch(self) -> Iterator[None]:
        """Add the number of the batch to errors: functions of fields raise ``ValueError`` for infinite numbers."""
        try:
            yield
        except ValueError as error:
            raise FloatingPointError(
                f"batch {self.trainer.state.iteration} (seed {self.config.seed}): {error}. The last checkpoint is "
                "intact; start again with a lower learning_rate."
            ) from error

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.config.seed}/{purpose}/{number}".encode()).digest()
        return torch.Generator(self.processes.device).manual_seed(int.from_bytes(digest[:7], "big"))

    def _set_learning_rate(self) -> None:
        """Rise linearly during warm-up, then fall to zero along a cosine as steps, or time, run out."""
        config, done = self.config, self.trainer.state.iteration - 1
        self.time_share = self.processes.from_rank_zero(self.progress.time_share())
        if self.next_validation is None:
            cost = self.time_share - self.validated_at
            self.next_validation = self.time_share + max(_VALIDATION_SHARE, _TRAINING_PER_VALIDATION * cost)
        share = max(done / self._steps, self.time_share)
        warm = min(1.0, max((done + 1) / max(config.warmup_steps, 1), self.time_share / _WARMUP_SHARE))
        for group in self.optimizer.param_groups:
            group["lr"] = self.optimizer.defaults["lr"] * warm * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))

    @property
    def _steps(self) -> int:
        """Steps of the whole run, unless something else ends it."""
        return self.config.max_epochs * self.config.epoch_length

    def _clip(self) -> None:
        if self.config.clip_norm > 0:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)

    def _update_average(self, averages: Sequence[Tensor], newest: Sequence[Tensor], count: Tensor | int) -> None:
        """An exponential average whose decay starts small, so that the first, worst weights are forgotten soon.

        It is called once for all weights: reading ``count`` back from the GPU for each of them would take long.
        """
        decay = min(self.config.ema_decay, float((1 + count) / (10 + count)))
        for average, new in zip(averages, newest):
            average += (1 - decay) * (new - average)

    def _log_loss(self) -> None:
        if self.reports is not None:
            loss = float(self.trainer.state.output[CommonKeys.LOSS].detach())
            self.reports.log(self.trainer.state.iteration, {"loss": loss})

    def _show(self) -> None:
        if self.bar is None:
            return
        losses = f"loss {float(self.trainer.state.output[CommonKeys.LOSS].detach()):.3g}"
        if math.isfinite(self.progress.best):
            losses += f", best validation {self.progress.best:.3g}"
        self.bar.show(self.trainer.state.iteration, self.progress.seconds(), losses)

    def _validate_within_epoch(self) -> None:
        """Also validate, and save, when a share of the allowed time is over: an epoch may be longer than all of it."""
        within = self.trainer.state.iteration % self.config.epoch_length != 0
        if within and self.next_validation is not None and self.time_share >= self.next_validation:
            self._validate()
            self.save(self.trainer)

    def _validate(self) -> None:
        validation, step = self._measure(), self.trainer.state.iteration
        self.validations = {step: validation}
        self.validated_at, self.next_validation = self.time_share, None
        self.progress.count_validation(validation.network["validation_loss"])
        self._report(step, validation)

    def _report(self, step: int, validation: Validation) -> None:
        """Write the measured values and a figure, unless both exist already."""
        if self.reports is None:
            return
        if not self.reports.has_metric(step, "validation_loss"):
            self.reports.log(step, validation.network)
        if not self.reports.has_figure(step):
            figure = self.task.sheet(self.averaged.module, self._generator("sheet", 0))
            if figure is not None:
                self.reports.save_figure(step, figure)

    @torch.no_grad()
    def _measure(self) -> Validation:
        """The error of the averaged network on batches that are the same at every validation."""
        network = self.inferer.predictor(self.averaged.module)
        reached, nothing = [], []
        for number in range(_VALIDATION_BATCHES):
            batch = self.task.batch(network, self._generator("validate", number), validate=True)
            predicted = network(batch.images, *batch.conditions)
            reached.append(self._measure_batch(predicted, batch.target))
            if self.nothing is None:
                nothing.append(self._measure_batch(torch.zeros_like(predicted), batch.target))
        self.nothing = self.nothing or _means(nothing)
        return Validation(_means(reached), self.nothing)

    def _measure_batch(self, predicted: Tensor, target: Any) -> dict[str, float]:
        return {"validation_loss": float(self.task.error(predicted, target)), **self.task.measures(predicted, target)}

    def _stop_within_epoch(self) -> None:
        """Stop after any step but the last of an epoch, after which validation comes first."""
        if self.trainer.state.iteration % self.config.epoch_length:
            self._stop_if_needed()

    def _stop_if_needed(self) -> None:
        self.interrupted = self.processes.any(self.should_stop())
        if self.interrupted or self._has_ended():
            self.save(self.trainer)
            self.trainer.terminate()

    def _has_ended(self) -> bool:
        """Whether all steps are done, the time is up, or patience has run out; the same in all processes."""
        config, progress = self.config, self.progress
        all_steps = self.trainer.state.iteration >= self._steps
        out_of_patience = 0 < config.patience <= progress.without_improvement
        return self.processes.any(all_steps or out_of_patience or progress.time_share() >= 1)

    def _state(self) -> dict[str, Any]:
        """The content of a checkpoint. Do not rename the keys: checkpoints of earlier runs are read by them."""
        return {
            "trainer": self.trainer,
            "network": self.network,
            "optimizer": self.optimizer,
            "averaged": self.averaged,
            "progress": self.progress,
        }

    def _restore(self) -> None:
        """Load the latest intact checkpoint; without one, the run starts from its beginning."""
        saved = self.checkpoints.latest()
        if saved is not None:
            Checkpoint.load_objects(self._state(), saved)
        if self.reports is not None:
            self.reports.drop_after(self.trainer.state.iteration)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each entry, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


class Progress:
    """How long a run has trained, interruptions left out, and how its validations went.

    Args:
        config: gives the limit of time.
    """

    def __init__(self, config: RunConfig) -> None:
        self.limit_seconds = config.max_minutes * 60
        self.earlier_seconds = 0.0
        self.started: float | None = None
        self.best = math.inf
        self.without_improvement = 0

    def start(self) -> None:
        """Start counting time."""
        self.started = time.monotonic()

    def seconds(self) -> float:
        """Seconds of training so far."""
        return self.earlier_seconds + (0.0 if self.started is None else time.monotonic() - self.started)

    def time_share(self) -> float:
        """The share of the allowed time that is over, in [0, 1]; 0 without a limit."""
        limit = self.limit_seconds
        return 0.0 if math.isinf(limit) else min(self.seconds() / max(limit, 1e-9), 1.0)

    def count_validation(self, loss: float) -> None:
        """Note a validation loss, and count those since the best one."""
        self.without_improvement = 0 if loss < self.best else self.without_improvement + 1
        self.best = min(self.best, loss)

    def state_dict(self) -> dict[str, float]:
        """The state that a checkpoint keeps."""
        return {"seconds": self.seconds(), "best": self.best, "stale": self.without_improvement}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the state from a checkpoint."""
        self.earlier_seconds, self.best = state["seconds"], state["best"]
        self.without_improvement = int(state["stale"])
