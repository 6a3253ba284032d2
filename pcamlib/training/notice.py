"""Notice to leave: USR1, which Slurm sends before the time limit, and TERM, which it sends before it kills.

Within `notice` they are noted instead of ending the process; who finds one noted saves, and raises `Stopped`, on which
`pcam` ends with code 75. slurm/common.sh then puts the job back into the queue.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pcamlib.errors import RunError

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_active: list[list[str]] = []  # the outermost block's signals, in the order in which they came


class Stopped(RunError):
    """A run that was told to leave and has saved itself; the same command later goes on with it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


@contextmanager
def notice() -> Iterator[list[str]]:
    """Within, USR1 and TERM are noted; yields the names of those that came, a list that grows.

    A block within a block shares its list. Outside the main thread nothing is noted: Python allows no handlers there.
    """
    if _active or threading.current_thread() is not threading.main_thread():
        yield _active[0] if _active else []
        return
    came: list[str] = []

    def note(number: int, frame: Any) -> None:
        came.append(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    _active.append(came)
    try:
        yield came
    finally:
        _active.clear()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
