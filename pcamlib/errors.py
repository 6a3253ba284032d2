"""Errors meant for people: what was wrong, where, and what to do, on one line.

The command line prints a `PcamError` as that one line and exits with code 2; any other exception is a bug of ours
and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PcamError(Exception):
    """Bad input or a broken file; the message names the place and the way out."""

    exit_code = 2  # of `pcam`


class ConfigError(PcamError):
    """A configuration key, value or override that does not fit."""


class DataError(PcamError):
    """A data file that is missing, damaged or not PCam-shaped."""


class CheckpointError(PcamError):
    """A checkpoint that is damaged or belongs to another model or data set."""


class RunError(PcamError):
    """A run folder that is missing, incomplete, or in use by another process."""


class DivergedError(RunError):
    """A loss, gradient or weight that is no longer finite."""


class NotebookError(PcamError):
    """A notebook that cannot start, or did not reach its last cell."""


class EvidenceError(PcamError):
    """A claim that lacks what makes it one: n, distinct runs, an interval."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelled name: `; did you mean 'x'?`, or the list of what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # `lr` for optimizer.lr
        close = [one for one in known if one.endswith(f".{name}")]
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
