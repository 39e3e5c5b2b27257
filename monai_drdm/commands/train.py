"""``monai-drdm train``: the same as ``python -m monai_drdm.train``, which has the arguments and their help."""

from __future__ import annotations

from collections.abc import Sequence

HELP = "train a recovery network on unlabelled scans"


def main(arguments: Sequence[str]) -> int:
    """Run the training command and return its exit code."""
    from monai_drdm.train.__main__ import main as train

    return train(arguments, "monai-drdm train")
