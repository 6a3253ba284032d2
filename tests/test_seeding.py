"""Chance: uniform, keyed, and put back where it was."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pcamlib.seeding import counter_uniform, rng_state, seed_everything, set_rng_state, set_threads


@pytest.fixture
def settings() -> Iterator[None]:
    """Puts torch's global switches back."""
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])


def test_values_never_change() -> None:
    """Another generator would silently change every augmented run."""
    first = counter_uniform(0, 0, np.array([0, 1]), 2)
    assert first.tolist() == [[0.1296456182997474, 0.049920065672091285], [0.591449498199162, 0.29252335542281827]]


def test_draws_depend_on_their_key_alone() -> None:
    rows = np.arange(1000)
    whole = counter_uniform(7, 3, rows, 4)
    assert whole.shape == (1000, 4) and whole.dtype == np.float64
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(counter_uniform(7, 3, rows[order], 4), whole[order])
    assert np.array_equal(counter_uniform(7, 3, rows[500:501], 2)[0], whole[500, :2])
    assert np.array_equal(counter_uniform(7, 3, rows.astype(np.int32), 4), whole)
    keys = [(7, 3), (8, 3), (7, 4), (3, 7), (2**40, 0), (0, 2**40)]
    assert len({counter_uniform(*key, rows[:1], 1).item() for key in keys}) == len(keys)


@pytest.mark.parametrize("axis", ["seed", "epoch", "row", "draw"])
def test_draws_are_uniform_and_independent(axis: str) -> None:
    """Along each part of the key: Kolmogorov-Smirnov by hand, neighbours uncorrelated, all cells of a square hit."""
    n, one = 20_000, np.array([5])
    if axis == "row":
        values = counter_uniform(1, 2, np.arange(n), 1).ravel()
    elif axis == "draw":
        values = counter_uniform(1, 2, one, n).ravel()
    else:
        keys = ((k, 2) if axis == "seed" else (1, k) for k in range(n))
        values = np.array([counter_uniform(*key, one, 1).item() for key in keys])
    assert values.min() >= 0 and values.max() < 1
    ranked = np.sort(values)
    steps = np.arange(n + 1) / n
    distance = max(np.abs(ranked - steps[1:]).max(), np.abs(ranked - steps[:-1]).max())
    assert distance * np.sqrt(n) < 1.95  # 0.1 % of uniform samples lie above
    for lag in (1, 2, 8):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / np.sqrt(n)
    cells = np.histogram2d(values[:-1], values[1:], 10)[0]
    assert ((cells - n / 100) ** 2 / (n / 100)).sum() < 149  # chi-square, 99 degrees of freedom, 0.1 %


@pytest.mark.usefixtures("settings")
def test_seed_everything_seeds_every_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    assert draw() != first
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(one != other for one, other in zip(draw(), first, strict=True))
    seed_everything(2**33)  # numpy alone takes only 32 bits


def test_generator_state_comes_back() -> None:
    torch.manual_seed(0)
    torch.rand(3)
    state = rng_state()
    first = torch.rand(5)
    set_rng_state(state)
    assert torch.rand(5).equal(first)


@pytest.mark.usefixtures("settings")
def test_threads() -> None:
    assert set_threads(1) == 1 == torch.get_num_threads()
    assert set_threads(None) >= 1
