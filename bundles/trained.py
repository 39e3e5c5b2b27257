"""Checks of the bundles that train a segmenter: the file of the trained network, and the size of images."""

from collections.abc import Sequence
from pathlib import Path


def check_new(path: str) -> None:
    """Refuse to train where a trained network is already.

    Raises:
        FileExistsError: there is such a file.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists. Move it away, or choose another folder with --ckpt_dir.")


def check_trained(path: str) -> None:
    """Refuse to use a network before it is trained.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}. Train first, or name the folder of the network with --ckpt_dir.")


def check_size(size: Sequence[int], factor: int) -> None:
    """Refuse a size that the network cannot halve often enough.

    Raises:
        ValueError: not two or three multiples of ``factor``.
    """
    if not isinstance(size, Sequence) or len(size) not in (2, 3) or any(n % factor for n in size):
        raise ValueError(f"size must be that of the training, two or three multiples of {factor}, got {size!r}.")
