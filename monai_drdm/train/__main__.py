"""The command ``python -m monai_drdm.train``, which is also ``monai-drdm train``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from monai_drdm.interrupts import ends_at_once


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a command line and return its exit code; see ``TrainingCommand.run``."""
    with ends_at_once("monai_drdm.train"):
        from monai_drdm.train.config import TrainConfig
        from monai_drdm.training.command import TrainingCommand

        command = TrainingCommand(
            name="monai_drdm.train",
            description="Train a deformation-recovery network on unlabelled scans.",
            config_class=TrainConfig,
            flags={
                "data": "folder of scans, MONAI datalist, or 'synthetic', which is random anatomy (default: synthetic)",
                "init": "network to start from: a name or a .safetensors file (default: a new one)",
            },
            load_fit=_load_fit,
        )
        return command.run(arguments, program)


def _load_fit() -> Callable[..., Path | None]:
    from monai_drdm.train.trainer import fit

    return fit


if __name__ == "__main__":
    sys.exit(main())
