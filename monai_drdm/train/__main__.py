"""The command ``python -m monai_drdm.train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from monai_drdm.documents import Document
from monai_drdm.train import fit, TrainConfig
from monai_drdm.training.command import TrainingCommand


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; see ``TrainingCommand.run``."""
    return _COMMAND.run(arguments)


def _summarize(weights: Path) -> str:
    """The validation loss, from the card beside the weights."""
    loss = _CARD.read_json(weights.with_suffix(".json"))["gates"]["validation_loss"]
    return f"validation loss {loss:.2f} (1 is doing nothing)"


_CARD = Document("the card of the network", "The weights beside it hold the same card.")
_COMMAND = TrainingCommand(
    name="monai_drdm.train",
    description="Train a deformation-recovery network on unlabelled scans.",
    config_class=TrainConfig,
    flags={
        "data": "folder of scans, MONAI datalist, or 'synthetic'",
        "init": "network to start from: a name or a .safetensors file",
    },
    fit=fit,
    summarize=_summarize,
)


if __name__ == "__main__":
    sys.exit(main())
