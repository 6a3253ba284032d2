"""Order of an epoch: a pure function of (seed, epoch), so a restart needs two numbers and no replay."""

from __future__ import annotations

import numpy as np

from pcamlib.errors import DataError


def order(kind: str, labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Positions into `labels` in the order in which an epoch visits them.

    Args:
        kind: "shuffle" (each position once) or "balanced" (with replacement, both classes equally likely).
        labels: (N,) 0 or 1.
        seed: run seed.
        epoch: epoch number from 0.

    Returns:
        (N,) int64.

    Raises:
        DataError: "balanced" where one class is absent.
    """
    rng = np.random.default_rng([seed, epoch])
    if kind == "shuffle":
        return rng.permutation(len(labels))
    members = [np.flatnonzero(labels == label) for label in (0, 1)]
    for label, rows in enumerate(members):
        if len(rows) == 0:
            raise DataError(f"balanced sampling needs both classes; there is no patch with label {label}")
    positive = rng.random(len(labels)) < 0.5
    place = rng.random(len(labels))
    sizes = np.where(positive, len(members[1]), len(members[0]))
    choice = (place * sizes).astype(np.int64)
    return np.where(positive, members[1][choice % len(members[1])], members[0][choice % len(members[0])])


def share(count: int, rank: int, size: int) -> slice:
    """Contiguous part of `count` things that falls to process `rank` of `size`; parts differ by one thing at most."""
    return slice(count * rank // size, count * (rank + 1) // size)


def positives_per_batch(labels: np.ndarray, positions: np.ndarray, batch_size: int) -> np.ndarray:
    """Positives in each whole batch of an epoch's order; (number of batches,) int64."""
    whole = len(positions) // batch_size * batch_size
    return labels[positions[:whole]].reshape(-1, batch_size).sum(1, dtype=np.int64)
