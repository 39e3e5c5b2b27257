"""Training a recovery network: which task the settings ask for, and its run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from monai_drdm.networks import load_network, NetworkCard
from monai_drdm.train.config import TrainConfig
from monai_drdm.train.published import PublishedTask
from monai_drdm.train.velocity import VelocityTask
from monai_drdm.training.loop import run_task

_TASKS: dict[str, type[VelocityTask] | type[PublishedTask]] = {
    "velocity_unet": VelocityTask,
    "recresacnet": PublishedTask,
}


def fit(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    progress: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Train a recovery network (Algorithm 1) and write it with its card, checkpoints, metrics and figures.

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
        ValueError: ``resume`` with other settings or data; no usable scan; ``init`` does not match the settings.
        FloatingPointError: the loss is not finite; the message names the batch.
    """
    return run_task(choose_task(config), Path(out), resume=resume, progress=progress, should_stop=should_stop)


def choose_task(config: TrainConfig) -> VelocityTask | PublishedTask:
    """The task for the kind of network that the settings name, or for the network in ``init``.

    The task's ``config`` is complete: settings that depend on the network are filled in.

    Raises:
        ValueError: ``init`` has another kind, number of dimensions, channels or features than the settings.
        FileNotFoundError: no such ``init``.
    """
    if not config.init:
        return _TASKS[config.network](config, None)
    start = load_network(config.init)
    complete = _matched(config, start.card)
    return _TASKS[complete.network](complete, start)


def _matched(config: TrainConfig, card: NetworkCard) -> TrainConfig:
    """The settings, completed by those of the network in ``init``; raises ``ValueError`` if they do not match."""
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
    return dataclasses.replace(config, network=card.kind, working_size=size, channels=features)
