"""The order of an epoch: a pure function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import pytest

from pcamlib.data.sampling import order, positives_per_batch, share
from pcamlib.errors import DataError

LABELS = (np.arange(5000) % 5 == 0).astype(np.uint8)


@pytest.mark.parametrize("kind", ["shuffle", "balanced"])
def test_order_is_a_function_of_seed_and_epoch(kind: str) -> None:
    first = order(kind, LABELS, 3, 4)
    np.random.default_rng().random()
    assert first.dtype == np.int64 and np.array_equal(first, order(kind, LABELS, 3, 4))
    for other in ((3, 5), (4, 4), (4, 3)):
        assert not np.array_equal(first, order(kind, LABELS, *other))


def test_shuffle_takes_each_once() -> None:
    assert np.array_equal(np.sort(order("shuffle", LABELS, 0, 0)), np.arange(5000))


def test_balanced_draws_about_half_from_everybody() -> None:
    drawn = np.concatenate([order("balanced", LABELS, 0, epoch) for epoch in range(20)])
    share = LABELS[drawn].mean()
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(len(drawn))
    counts = np.bincount(drawn, minlength=5000)
    assert counts[LABELS == 1].min() > 15 and counts[LABELS == 0].min() > 0  # 50 and 12.5 expected
    assert abs(counts[LABELS == 1].var() / counts[LABELS == 1].mean() - 1) < 0.2  # Poisson


def test_balanced_needs_both_classes() -> None:
    with pytest.raises(DataError, match="no patch with label 1"):
        order("balanced", np.zeros(5, np.uint8), 0, 0)


def test_positives_in_batches_of_32() -> None:
    plain = positives_per_batch(LABELS, order("shuffle", LABELS, 0, 0), 32)
    balanced = positives_per_batch(LABELS, order("balanced", LABELS, 0, 0), 32)
    assert len(plain) == len(balanced) == 156
    assert abs(plain.mean() - 6.4) < 0.7 and abs(balanced.mean() - 16) < 0.9


@pytest.mark.parametrize("count", [1, 5, 16, 33])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_contiguous_even_and_complete(count: int, size: int) -> None:
    parts = [np.arange(count)[share(count, rank, size)] for rank in range(size)]
    assert np.concatenate(parts).tolist() == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
