"""What the benchmarks share: where the data are, what machine this is, and resumable JSON lines."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monai_drdm.fields import resize_image

RESULTS = Path(__file__).parent / "results"


def data_folder() -> Path:
    """The folder of scans, from ``MONAI_DRDM_DATA``."""
    folder = os.environ.get("MONAI_DRDM_DATA")
    if not folder or not Path(folder).is_dir():
        raise SystemExit("Set MONAI_DRDM_DATA to the folder that holds acdc/acdc2d_160.npz.")
    return Path(folder)


def machine() -> dict[str, Any]:
    """Processor, threads and torch version of a run."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def acdc_slices(patients: range, count: int, size: int = 256) -> list[tuple[int, Tensor]]:
    """``count`` slices spread evenly over the given patients, as ``(index, (1, 1, size, size) image)``."""
    archive = np.load(data_folder() / "acdc" / "acdc2d_160.npz")
    indices = np.flatnonzero(np.isin(archive["patient"], list(patients)))
    chosen = indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]
    images = torch.from_numpy(archive["image"][chosen]).float()[:, None]
    return [(int(i), resize_image(image[None], (size, size))) for i, image in zip(chosen, images)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file; none if it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []


def append_rows(path: Path, *rows: dict[str, Any]) -> None:
    """Add rows to a JSON-lines file in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
