"""Times on a machine that is never quiet: rounds that interleave what is compared, and an A/A floor.

One-shot timings lie by up to 11 times here. So every call is warmed up, a sample lasts long enough for the clock, kinds
alternate within a round, and the first kind closes each round once more: what it differs from itself is the floor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pcamlib.seeding import one_thread


def clock(device: str = "cpu") -> float:
    """Seconds since some moment, read when the device has done all it was told: a GPU works on after a call returns."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Timed:
    """A call whose time is taken: calling this gives the mean seconds of a call over one sample.

    A caller waits for each answer before the next call, so a GPU is waited for every time.

    Args:
        call: what is timed; it runs twice at once, which builds what later calls reuse.
        images: that one call handles.
        device: where it computes.
        least: seconds that a sample lasts at least; the clock's own noise is microseconds.

    Attributes:
        about: seconds of one call, the second one.
        calls: in a sample.
        each: seconds of every call in every sample.
    """

    def __init__(self, call: Callable[[], object], images: int = 1, device: str = "cpu", least: float = 0.02) -> None:
        self.call, self.images, self.device = call, images, device
        self.each: list[float] = []
        self._once()
        self.about = self._once()
        self.calls = max(1, math.ceil(least / self.about))

    def __call__(self) -> float:
        taken = [self._once() for _ in range(self.calls)]
        self.each += taken
        return sum(taken) / len(taken)

    def _once(self) -> float:
        begun = clock(self.device)
        self.call()
        return clock(self.device) - begun


def interleaved(timed: Sequence[Callable[[], float]], rounds: int) -> np.ndarray:
    """`alternating` with one torch thread: two slow each other up to 40 times where a neighbour is on a core."""
    with one_thread():
        return alternating(timed, rounds)


def alternating(timed: Sequence[Callable[[], float]], rounds: int) -> np.ndarray:
    """Seconds of each in turn, round after round, each round closed by the first once more; as many threads as are set.

    All are called once beforehand, to warm up.

    Returns:
        (rounds, len(timed) + 1) float64; the last column is the first kind again.
    """
    for each in timed:
        each()
    return np.array([[each() for each in (*timed, timed[0])] for _ in range(rounds)])


def resampled(rounds: int) -> np.ndarray:
    """(2000, rounds) int64: rounds drawn with replacement, the same for every quantity of one measurement."""
    return np.random.default_rng(0).integers(0, rounds, (2000, rounds))


def median(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median of (rounds,) values, and its 95 % bootstrap interval over the rounds."""
    low, high = np.percentile(np.median(values[resampled(len(values))], 1), [2.5, 97.5])
    return float(np.median(values)), (float(low), float(high))


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Median of paired ratios, and its 95 % bootstrap interval over the rounds."""
    return median(above / below)


def floor(seconds: np.ndarray) -> float:
    """Median deviation of the first kind from itself within a round: no difference below it is claimed."""
    return float(np.median(np.abs(seconds[:, -1] / seconds[:, 0] - 1)))


def shown(value: float, interval: tuple[float, float], least: float) -> bool:
    """Whether a ratio differs from 1 by more than the floor, and its interval leaves 1 out."""
    return abs(value - 1) > least and not interval[0] <= 1 <= interval[1]


def latency(each: Sequence[float]) -> dict[str, float | int | None]:
    """Milliseconds within which 50, 90 and 99 % of the calls answered; None where too few calls could tell.

    Returns:
        dict `p50 ms`, `p90 ms` (from 10 calls on), `p99 ms` (from 100 calls on), `calls`.
    """
    found: dict[str, float | int | None] = {
        f"p{q} ms": 1000 * float(np.percentile(each, q)) if len(each) >= 100 / (100 - q) else None for q in (50, 90, 99)
    }
    return {**found, "calls": len(each)}
