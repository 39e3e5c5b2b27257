"""The progress bar of a run over many cases, and the error message if none of them can be used."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm


class LateBar:
    """A progress bar that appears only when the first step is done.

    A run that fails at once, or in every case, then ends with the reason and without a bar.

    Args:
        total: number of steps; None: not known.
        unit: what a step is.
        desc: name of the bar.
        shown: show it at all.
    """

    def __init__(self, total: int | None, unit: str, desc: str | None = None, *, shown: bool = True) -> None:
        self._options = {"total": total, "desc": desc, "unit": unit, "disable": not shown}
        self._started = time.time()
        self._bar: tqdm[Any] | None = None
        self._held: list[str] = []
        self._waiting = 0

    def __enter__(self) -> LateBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def done(self, steps: int = 1) -> None:
        """Count finished steps, after showing the lines of those that were skipped before."""
        self.say_skipped()
        if self._bar is None:
            self._bar = tqdm(**self._options)
            self._bar.start_t = self._started  # the time before the first step counts too
        self._bar.update(self._waiting + steps)
        self._waiting = 0

    def skipped(self, steps: int = 1, line: str | None = None) -> None:
        """Count skipped steps. ``line`` says why; it is shown as soon as another step is done."""
        self._waiting += steps
        self._held += [] if line is None else [line]
        if self._bar is not None:
            self.done(0)

    def say_skipped(self) -> None:
        """Show the lines that are still held back."""
        for line in self._held:
            tqdm.write(line, file=sys.stderr)
        self._held.clear()


def none_usable(failed: Mapping[str, str]) -> str:
    """The message if every case failed. A reason that all cases share is given only once.

    Args:
        failed: the reason for each case, by name.
    """
    name, reason = next(iter(failed.items()))
    if len(failed) == 1:
        return f"{name}: {reason}"
    if len({_in_general(name, reason) for name, reason in failed.items()}) == 1:
        return f"none of {len(failed)} cases can be used, all for one reason, here that of {name}: {reason}"
    return f"none of {len(failed)} cases can be used:" + "".join(f"\n  {one}: {why}" for one, why in failed.items())


def _in_general(name: str, reason: str) -> str:
    """A reason without the name of the case and without numbers, so that equal reasons can be recognised."""
    return re.sub(r"\d+", "#", re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "…", reason))
