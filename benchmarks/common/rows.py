"""Results are rows in JSON-lines files beside the script that wrote them, so that a stopped run can go on."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSON-lines file, or none if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []


def append_rows(path: Path, *rows: dict[str, Any]) -> None:
    """Add rows to a JSON-lines file in one write, with floats rounded to six significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write("".join(json.dumps(rounded(row), separators=(",", ":")) + "\n" for row in rows))


def rounded(value: Any) -> Any:
    """The same value with every float in it rounded to six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value
