"""Learning-rate schedules at their corners."""

from __future__ import annotations

import math
from typing import get_args

import pytest

from pcamlib.config import Schedule
from pcamlib.training.schedule import factor

NAMES = get_args(Schedule.model_fields["name"].annotation)
#: name, warm-up -> multiple at progress 0, half of the warm-up, its end, 0.5, 0.75, 1.
CORNERS = {
    ("constant", 0.0): {0.0: 1, 0.5: 1, 0.75: 1, 1.0: 1},
    ("constant", 0.2): {0.0: 0, 0.1: 0.5, 0.2: 1, 1.0: 1},
    ("step", 0.0): {0.0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 1.0: 0.01},
    ("step", 0.5): {0.0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.1, 0.875: 0.01, 1.0: 0.01},
    ("cosine", 0.0): {0.0: 1, 1 / 3: 0.75, 0.5: 0.5, 2 / 3: 0.25, 1.0: 0},
    ("cosine", 0.5): {0.0: 0, 0.25: 0.5, 0.5: 1, 0.75: 0.5, 1.0: 0},
    ("onecycle", 0.0): {0.0: 0, 0.15: 0.5, 0.3: 1, 0.65: 0.5, 1.0: 0},
    ("onecycle", 0.1): {0.0: 0, 0.05: 0.5, 0.1: 1, 0.55: 0.5, 1.0: 0},
}


def test_every_name_of_the_configuration_is_here() -> None:
    assert {name for name, _ in CORNERS} == set(NAMES)


@pytest.mark.parametrize(("name", "warmup"), CORNERS)
def test_corners(name: str, warmup: float) -> None:
    for progress, expected in CORNERS[name, warmup].items():
        assert factor(name, progress, warmup) == pytest.approx(expected, abs=1e-12), progress


@pytest.mark.parametrize(("name", "warmup"), [*CORNERS, *((name, 0.999) for name in NAMES)])
def test_between_0_and_1_with_one_peak(name: str, warmup: float) -> None:
    curve = [factor(name, step / 1000, warmup) for step in range(1001)]
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in curve)
    top = curve.index(max(curve))
    assert max(curve) == pytest.approx(1, abs=1e-2)
    assert curve[: top + 1] == sorted(curve[: top + 1])
    assert curve[top:] == sorted(curve[top:], reverse=True)


def test_past_the_end_it_stays_at_its_end() -> None:
    """A time limit is overrun by a part of a step."""
    assert factor("cosine", 1.02) == pytest.approx(0)
    assert factor("onecycle", 1.02, 0.15) == pytest.approx(0)
