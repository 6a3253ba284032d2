"""The cost of logging: every way logs every step it is timed for, and the ratios come with interval and floor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcamlib.experiments import logging_cost


def test_cost_of_each_way_of_logging(tiny: Any, synthetic_dir: Path) -> None:
    pytest.importorskip("wandb")
    found = logging_cost.cost(tiny(), synthetic_dir, rounds=3, steps=2)
    none, jsonl, both = found["table"]
    assert [row["logging"] for row in found["table"]] == ["none", "jsonl", "jsonl and wandb offline"]
    assert none["ratio"] is None and none["bytes a step"] == 0
    for row in (jsonl, both):
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1] and row["shown"] in (True, False)
        assert 0 < row["share of a step"] < 1
    assert 100 < jsonl["bytes a step"] < both["bytes a step"]
    assert none["share of a step"] < jsonl["share of a step"] < both["share of a step"]
    assert found["rounds"] == 3 and found["floor"] >= 0 and found["opening"] > 0
