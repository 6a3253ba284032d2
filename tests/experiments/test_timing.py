"""Ratios of times: interleaved, with an interval, and nothing claimed below the A/A floor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from pcamlib.experiments import timing


def test_rounds_are_interleaved_and_closed_by_the_first_kind_again() -> None:
    torch.set_num_threads(2)
    calls: list[str] = []

    def kind(name: str, seconds: float) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            assert torch.get_num_threads() == 1
            return seconds

        return run

    seconds = timing.interleaved([kind("a", 1.0), kind("b", 2.0), kind("c", 3.0)], 2)
    assert calls == ["a", "b", "c"] + 2 * ["a", "b", "c", "a"] and torch.get_num_threads() == 2
    assert seconds.tolist() == 2 * [[1.0, 2.0, 3.0, 1.0]]


def test_a_ratio_is_paired_and_its_interval_holds_it() -> None:
    rng = np.random.default_rng(0)
    load = rng.uniform(1, 40, 31)  # a neighbour slows both members of a pair alike
    noise = 1 + rng.normal(0, 0.01, (2, 31))
    value, (low, high) = timing.ratio(load * 1.3 * noise[0], load * noise[1])
    assert value == pytest.approx(1.3, abs=0.02) and low <= value <= high and high - low < 0.05


def test_nothing_is_shown_below_the_floor_or_across_one() -> None:
    seconds = np.array([[1.0, 1.2, 1.1], [1.0, 1.2, 0.9], [1.0, 1.2, 1.05]])
    assert timing.floor(seconds) == pytest.approx(0.1)
    assert timing.shown(1.2, (1.15, 1.25), 0.1) and timing.shown(0.8, (0.7, 0.85), 0.1)
    assert not timing.shown(1.05, (1.04, 1.06), 0.1) and not timing.shown(1.2, (0.99, 1.4), 0.1)
