"""The reports that a training run leaves in its folder: metrics as JSON lines and for TensorBoard, and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from monai_drdm.documents import Document
from monai_drdm.io.files import atomically
from monai_drdm.viz import Figure

_METRICS = "metrics.jsonl"
_ROWS = Document("the metrics of a run", "Move the file away to go on without its rows.")


class Reports:
    """Writes the reports of one run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step to ``metrics.jsonl`` and to TensorBoard."""
        with (self.folder / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def drop_after(self, step: int) -> None:
        """Drop the metrics of later steps, which a resumed run repeats, and a last line that was cut off."""
        path = self.folder / _METRICS
        if path.is_file():
            with _ROWS.reading(path):
                lines = [line for line in _ROWS.read_text(path).splitlines() if line.endswith("}")]
                kept = "".join(line + "\n" for line in lines if _ROWS.parse_json(line, path)["step"] <= step)
            atomically(path, lambda part: Path(part).write_text(kept, encoding="utf-8"))

    def has_metric(self, step: int, name: str) -> bool:
        """Whether a metric of a step is logged."""
        path = self.folder / _METRICS
        if not path.is_file():
            return False
        last = [line for line in _ROWS.read_text(path).splitlines() if line.startswith(f'{{"step": {step},')]
        return any(name in _ROWS.parse_json(line, path) for line in last)

    def has_figure(self, step: int) -> bool:
        """Whether the figure of a step is saved."""
        return self._figure(step).is_file()

    def save_figure(self, step: int, figure: Figure) -> None:
        """Save a figure as ``sheets/step_N.png``."""
        path = self._figure(step)
        path.parent.mkdir(exist_ok=True)
        atomically(path, lambda part: figure.savefig(part, dpi=80))

    def _figure(self, step: int) -> Path:
        return self.folder / "sheets" / f"step_{step}.png"

    def close(self) -> None:
        """Finish writing to TensorBoard."""
        self.board.close()
