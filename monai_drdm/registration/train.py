"""The command ``python -m monai_drdm.registration.train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from monai_drdm.registration.task import fit, RegistrationConfig
from monai_drdm.training.command import TrainingCommand


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; see ``TrainingCommand.run``."""
    return _COMMAND.run(arguments)


_COMMAND = TrainingCommand(
    name="monai_drdm.registration.train",
    description="Train a registration network on pairs with known fields, or on images to be made alike.",
    config_class=RegistrationConfig,
    flags={
        "pairs": "folder of monai-drdm pairs, or its datalist",
        "images": "folder or datalist of images to register with each other",
        "labels": "folder of label maps with the file names of the images",
        "init": "network.safetensors of an earlier run to go on from",
    },
    fit=fit,
)


if __name__ == "__main__":
    sys.exit(main())
