"""``monai-drdm register``: the same as ``python -m monai_drdm.registration.train``, which has the arguments."""

from __future__ import annotations

from collections.abc import Sequence

HELP = "train a registration network on pairs with known fields, or on images"


def main(arguments: Sequence[str]) -> int:
    """Run the training command and return its exit code."""
    from monai_drdm.registration.train import main as train

    return train(arguments, "monai-drdm register")
