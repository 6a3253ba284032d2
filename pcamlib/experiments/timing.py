"""Ratios of times on a machine that is never quiet: rounds that interleave what is compared, and an A/A floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pcamlib.seeding import one_thread


def interleaved(timed: Sequence[Callable[[], float]], rounds: int) -> np.ndarray:
    """Seconds of each in turn, round after round, each round closed by the first once more; one torch thread.

    All are called once beforehand, to warm up. With two threads a neighbour on the second core slows a step up to 40
    times.

    Returns:
        (rounds, len(timed) + 1) float64; the last column is the first kind again.
    """
    with one_thread():
        for each in timed:
            each()
        return np.array([[each() for each in (*timed, timed[0])] for _ in range(rounds)])


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median of paired ratios, and its 95 % bootstrap interval over the rounds."""
    ratios = above / below
    draws = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], 1), [2.5, 97.5])
    return float(np.median(ratios)), (float(low), float(high))


def floor(seconds: np.ndarray) -> float:
    """Median deviation of the first kind from itself within a round: no difference below it is claimed."""
    return float(np.median(np.abs(seconds[:, -1] / seconds[:, 0] - 1)))


def shown(value: float, interval: tuple[float, float], least: float) -> bool:
    """Whether a ratio differs from 1 by more than the floor, and its interval leaves 1 out."""
    return abs(value - 1) > least and not interval[0] <= 1 <= interval[1]
