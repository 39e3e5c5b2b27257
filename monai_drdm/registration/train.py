"""The command ``python -m monai_drdm.registration.train``, which is also ``monai-drdm register``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from monai_drdm.interrupts import ends_at_once


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run a command line and return its exit code; see ``TrainingCommand.run``."""
    with ends_at_once("monai_drdm.registration.train"):
        from monai_drdm.registration.config import RegistrationConfig
        from monai_drdm.training.command import TrainingCommand

        command = TrainingCommand(
            name="monai_drdm.registration.train",
            description="Train a registration network on pairs with known fields, or on images to be made alike.",
            config_class=RegistrationConfig,
            flags={
                "pairs": "folder of monai-drdm pairs, or its datalist (default: none; needs --images then)",
                "images": "folder or datalist of images to register with each other (default: none)",
                "labels": "folder of label maps with the file names of the images (default: none)",
                "init": "network.safetensors of an earlier run to go on from (default: a new network)",
            },
            load_fit=_load_fit,
        )
        return command.run(arguments, program)


def _load_fit() -> Callable[..., Path | None]:
    from monai_drdm.registration.task import fit

    return fit


if __name__ == "__main__":
    sys.exit(main())
