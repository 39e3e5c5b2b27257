"""What the bundle trains with. ``mean_teacher`` and ``scans`` are those of the examples of monai_drdm."""

from collections.abc import Sequence
from pathlib import Path


def check_new(path: str) -> None:
    """Refuse to train where a trained network is already.

    Raises:
        FileExistsError: there is such a file.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists. Move it away, or choose another folder with --ckpt_dir.")


def check_trained(path: str, size: Sequence[int], factor: int) -> None:
    """Refuse to label without a trained network, or at a size that it cannot halve often enough.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a size that the network can see.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}. Train first, or name the folder of the network with --ckpt_dir.")
    if not isinstance(size, Sequence) or len(size) not in (2, 3) or any(n % factor for n in size):
        raise ValueError(f"size must be that of the training, two or three multiples of {factor}, got {size!r}.")
