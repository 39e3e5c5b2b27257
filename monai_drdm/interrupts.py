"""Ending a command that is still starting when Ctrl-C is pressed."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C has ended."""


@contextmanager
def ends_at_once(command: str) -> Iterator[None]:
    """Within it, Ctrl-C ends the process with a line and the code 130, not with a traceback.

    It is for the time in which a command imports what it needs, which takes seconds. No file is open then, and
    libraries that are half imported may turn the ``KeyboardInterrupt`` that Python would raise into other errors.

    Args:
        command: its name, which begins the line.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{command}: interrupted\n".encode())
        os._exit(INTERRUPTED)

    elsewhere = threading.current_thread() is not threading.main_thread()  # signals reach the main thread only
    if elsewhere or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # also if Ctrl-C is ignored, as in the background of a script, or handled by another program
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
