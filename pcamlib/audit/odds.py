"""Association of a flaw with a class or split: the odds ratio and its interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Odds(NamedTuple):
    """An odds ratio with its 95 % interval; 1 means no association."""

    ratio: float
    low: float
    high: float

    @property
    def associated(self) -> bool:
        """Whether the interval leaves out 1."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.ratio:.2g} ({self.low:.2g} to {self.high:.2g})"


def odds_ratio(flawed: np.ndarray, exposed: np.ndarray) -> Odds:
    """Odds of a flaw among the exposed over the odds among the rest.

    Haldane-Anscombe correction (one half added to each cell) and Woolf's logarithmic interval, so that an empty cell
    gives a wide interval instead of infinity.

    Args:
        flawed: (N,) bool.
        exposed: (N,) bool, as in `labels == 1`.
    """
    cells = [float(np.count_nonzero(a & b)) + 0.5 for a in (flawed, ~flawed) for b in (exposed, ~exposed)]
    ratio = cells[0] * cells[3] / (cells[1] * cells[2])
    spread = 1.96 * math.sqrt(sum(1 / cell for cell in cells))
    return Odds(ratio, ratio * math.exp(-spread), ratio * math.exp(spread))
