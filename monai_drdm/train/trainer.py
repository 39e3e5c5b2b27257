"""Training a recovery network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from monai_drdm.train.config import TrainConfig
from monai_drdm.train.recovery import choose_recipe
from monai_drdm.training.loop import run_task


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
    return run_task(choose_recipe(config), Path(out), resume=resume, progress=progress, should_stop=should_stop)
