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


def test_any_number_of_threads_may_be_compared_too() -> None:
    torch.set_num_threads(2)
    seen: list[float] = []

    def count() -> float:
        seen.append(float(torch.get_num_threads()))
        return seen[-1]

    assert timing.alternating([count], 1).tolist() == [[2.0, 2.0]] and seen == [2.0] * 3


def test_a_timed_call_lasts_long_enough_and_keeps_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call() -> None:
        now[0] += 0.008

    timed = timing.Timed(call, images=4)
    assert (timed.calls, timed.each) == (3, []) and timed.about == pytest.approx(0.008)  # 3 x 8 ms > 20 ms
    assert timed() == pytest.approx(0.008) and timed.each == pytest.approx([0.008] * 3)


def test_a_gpu_is_waited_for_on_both_sides_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(f"wait for {device}"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: said.append("clock") or float(len(said)))
    timed = timing.Timed(lambda: said.append("call"), device="cuda:0", least=0.0)
    del said[:]
    timed()
    assert said == ["wait for cuda:0", "clock", "call", "wait for cuda:0", "clock"]


def test_a_median_has_an_interval_that_narrows_with_rounds() -> None:
    values = np.random.default_rng(0).normal(10, 1, 400)
    (few, (a, b)), (many, (c, d)) = timing.median(values[:10]), timing.median(values)
    assert a <= few <= b and c <= many <= d and d - c < (b - a) / 2 and c < 10 < d


def test_a_quantile_is_told_where_enough_calls_can() -> None:
    each = [0.001 * n for n in range(1, 101)]
    found = timing.latency(each)
    assert found["p50 ms"] == pytest.approx(50.5) and found["p90 ms"] == pytest.approx(90.1) and found["calls"] == 100
    assert found["p99 ms"] == pytest.approx(99.01) and timing.latency(each[:99])["p99 ms"] is None
    assert timing.latency(each[:9])["p90 ms"] is None and timing.latency(each[:10])["p90 ms"] is not None


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
