"""What a run tells about itself: metrics as JSON lines and for TensorBoard, and contact sheets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from monai_drdm.io.files import atomically
from monai_drdm.viz import Figure

_METRICS = "metrics.jsonl"


class Reports:
    """The reports of one run, in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, float]) -> None:
        """Add numbers of one ``step``."""
        with (self.folder / _METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, int(row["step"]))

    def forget_after(self, step: int) -> None:
        """Drop the metrics of steps that are taken again, and a line that was cut."""
        path = self.folder / _METRICS
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
            atomically(path, lambda part: Path(part).write_text(kept, encoding="utf-8"))

    def draw(self, figure: Figure, step: int) -> None:
        """Keep a figure: ``sheets/step_N.png``."""
        path = self.folder / "sheets" / f"step_{step}.png"
        path.parent.mkdir(exist_ok=True)
        atomically(path, lambda part: figure.savefig(part, dpi=80))

    def close(self) -> None:
        """Finish writing."""
        self.board.close()
