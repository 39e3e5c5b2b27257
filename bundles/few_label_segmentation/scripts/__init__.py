"""What the bundle trains with. ``mean_teacher`` and ``scans`` are those of the examples of monai_drdm."""

from pathlib import Path


def check_new(path: str) -> None:
    """Refuse to train where a trained network is already.

    Raises:
        FileExistsError: there is such a file.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists. Move it away, or choose another folder with --ckpt_dir.")
