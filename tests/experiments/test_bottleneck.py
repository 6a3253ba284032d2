"""Parts of a step are measured, the largest is named, and taking it away shows whether it was."""

from __future__ import annotations

import time

import numpy as np
import pytest

from pcamlib.config import parse, recipe
from pcamlib.data.loader import Loader
from pcamlib.experiments import bottleneck
from pcamlib.training.tracking import MetricsFile

CONFIG = parse(recipe("mlp"), ["train.threads=1", "loader.batch_size=8", "model.pool=4"])


def slowed(monkeypatch, owner, name, seconds):
    """`owner.name` takes longer."""
    whole = getattr(owner, name)

    def slow(self, *arguments):
        time.sleep(seconds)
        return whole(self, *arguments)

    monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize(("part", "owner", "name"), [("loader", Loader, "_batch"), ("logging", MetricsFile, "log")])
def test_a_planted_bottleneck_is_named_and_confirmed(synthetic_dir, monkeypatch, part, owner, name):
    slowed(monkeypatch, owner, name, 0.1)
    found = bottleneck.parts(CONFIG, synthetic_dir, rounds=3, steps=1)
    row = next(row for row in found.table if row["part"] == part)
    assert (found.name, found.confirmed, row["verdict"]) == (part, True, "confirmed")
    assert row["share"] > 0.5 and row["measured ms"] < 1000 * found.step - 70


def test_every_part_is_there_and_shares_add_up(synthetic_dir):
    found = bottleneck.parts(CONFIG, synthetic_dir, rounds=3, steps=1)
    assert [row["part"] for row in found.table] == list(bottleneck.PARTS)
    assert sum(row["share"] for row in found.table) == pytest.approx(1, abs=0.15)  # of medians
    assert {row["part"]: row["taken away"] for row in found.table}["forward"] == "forward and backward"
    copy = found.table[1]
    assert copy["verdict"] == "there is none on a CPU" and copy["measured ms"] is None
    assert (found.batch_size, found.device, found.rounds) == (8, "cpu", 3)
    shares, steps = bottleneck.plot(found.table).axes
    assert len(shares.patches) == 5 and len(steps.get_lines()[1].get_xdata()) == 4


WHOLE = np.array([10.0, 11.0, 10.5, 10.2, 10.8])


def test_a_gain_as_predicted_confirms():
    found = bottleneck._removal(WHOLE, 0.6 * WHOLE, 0.4 * WHOLE, 0.02)
    assert found["verdict"] == "confirmed" and found["off by"] == pytest.approx(0, abs=0.03)


def test_a_noisy_machine_confirms_nothing():
    assert bottleneck._removal(WHOLE, 0.6 * WHOLE, 0.4 * WHOLE, 0.2)["verdict"] == "too noisy"


def test_a_part_that_hides_behind_another_is_not_as_predicted():
    assert bottleneck._removal(WHOLE, 0.6 * WHOLE, 0.8 * WHOLE, 0.02)["verdict"] == "not as predicted"


def test_a_gain_below_the_floor_or_a_loss_shows_nothing():
    assert bottleneck._removal(WHOLE, 0.01 * WHOLE, 0.99 * WHOLE, 0.02)["verdict"] == "not shown"
    assert bottleneck._removal(WHOLE, 0.6 * WHOLE, 1.5 * WHOLE, 0.02)["verdict"] == "not shown"
