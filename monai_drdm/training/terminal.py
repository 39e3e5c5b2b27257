"""What a training run shows on the terminal."""

from __future__ import annotations

import math
import os
import sys

from tqdm import tqdm


class RunBar:
    """One bar for the whole run: the share of it that is done, and the time that is left.

    Args:
        steps: of the whole run.
        limit_seconds: time of the whole run; infinity without a limit.
        done: steps of earlier sessions.
        seconds: of earlier sessions.
    """

    def __init__(self, steps: int, limit_seconds: float, done: int, seconds: float) -> None:
        self.steps, self.limit_seconds, self.begun_at, self.begun_seconds = steps, limit_seconds, done, seconds
        self.bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {desc}", miniters=0)

    def show(self, step: int, seconds: float, losses: str) -> None:
        """Show the run after a step, and the time that it has taken so far, interruptions left out."""
        per_step = (seconds - self.begun_seconds) / max(step - self.begun_at, 1)
        left = max(min(per_step * (self.steps - step), self.limit_seconds - seconds), 0.0)
        share = min(max(step / self.steps, seconds / max(self.limit_seconds, 1e-9)), 1.0)
        self.bar.set_description_str(
            f"{tqdm.format_interval(math.ceil(left))} left, step {step}, {losses}", refresh=False
        )
        self.bar.update(share - self.bar.n)

    def close(self) -> None:
        """Leave the bar as it is last."""
        self.bar.refresh()
        self.bar.close()


def in_red(text: str) -> str:
    """The text, in red if standard error is a terminal that shows colours (see no-color.org)."""
    colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[31m{text}\033[0m" if colours else text
