"""Stages, sizes, and the plateau by its rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcamlib.data.patches import open_split
from pcamlib.experiments import memory, networks, roofline, throughput
from pcamlib.experiments.roofline import ImpossibleError
from pcamlib.experiments.throughput import plateau

ROOMY = roofline.Ceilings("cpu", 1, {"cache": 1e12, "memory": 1e12}, dict.fromkeys(("fp32", "bf16", "fp16"), 1e13))


@pytest.fixture(scope="module")
def patches(synthetic_dir):
    return open_split(synthetic_dir, "train")


@pytest.fixture(scope="module")
def small(patches):
    return networks.network("small", patches)


def seconds(rates: list[float], sizes: list[int], rounds: int = 9, noise: float = 0.01) -> np.ndarray:
    """(rounds, sizes) seconds of a batch at these rates."""
    jitter = 1 + np.random.default_rng(0).normal(0, noise, (rounds, len(sizes)))
    return np.array(sizes) / np.array(rates) * jitter


def test_the_plateau_is_the_smallest_batch_that_is_as_good_as_the_best():
    sizes = [1, 8, 64, 512]
    found = plateau(sizes, seconds([100, 500, 980, 1000], sizes), floor=0.01)
    assert (found.size, found.low, found.high, found.reached, found.tolerance) == (64, 64, 64, True, 0.05)
    assert plateau(sizes, seconds([100, 500, 980, 700], sizes), 0.01).size == 64  # larger may be worse
    assert plateau(sizes, seconds([1000, 990, 980, 995], sizes), 0.01).size == 1


def test_a_rate_that_still_rises_has_no_plateau():
    found = plateau([1, 8, 64], seconds([100, 500, 900], [1, 8, 64]), 0.01)
    assert found.size == 64 and not found.reached


def test_what_lies_below_the_floor_is_no_difference():
    assert plateau([1, 8, 64], seconds([100, 850, 1000], [1, 8, 64]), 0.01).size == 64
    assert plateau([1, 8, 64], seconds([100, 850, 1000], [1, 8, 64]), 0.2).size == 8


def test_noise_widens_the_interval_of_the_plateau():
    sizes = [1, 8, 64, 512]
    found = plateau(sizes, seconds([100, 930, 950, 1000], sizes, noise=0.1), 0.01)
    assert found.low < found.high and found.low <= found.size <= found.high


def test_stages_are_patches_a_second_of_each_alone_and_of_both(patches, small):
    found = throughput.stages(small, patches, 16, ROOMY, precisions=("fp32", "bf16"), rounds=3)
    rates = {(row["what"], row["precision"]): row["img/s"] for row in found.table}
    assert set(rates) == {
        ("loader only", ""),
        *((w, p) for w in ("model only", "end to end") for p in ("fp32", "bf16")),
    }
    assert rates["loader only", ""] > 3 * rates["model only", "fp32"]  # 27 kB against 56 MFLOP
    assert found.rounds == 3 and set(found.serial) == {"fp32", "bf16"}
    row = next(row for row in found.table if row["what"] == "model only")
    assert row["GFLOP/s"] == pytest.approx(row["img/s"] * 0.056033792)
    assert row["95 %"][0] <= row["img/s"] <= row["95 %"][1]


def test_single_patches_are_answered_often_enough_for_a_99th_percentile(patches, small):
    found = throughput.single_stream(small, patches, calls=120)
    assert found["calls"] == 120 and 0 < found["p50 ms"] <= found["p90 ms"] <= found["p99 ms"]


def test_more_seconds_are_more_rounds(patches, small):
    found = throughput.stages(small, patches, 1, ROOMY, rounds=2, seconds=1.0)
    assert found.rounds > 2


def test_a_measurement_above_the_ceilings_is_refused(patches, small):
    slow = roofline.Ceilings("cpu", 1, {"memory": 1e12}, {"fp32": 1e6})
    with pytest.raises(ImpossibleError, match="images/s cannot be"):
        throughput.stages(small, patches, 4, slow, rounds=1)


def test_sizes_that_take_too_long_are_left_out_and_say_so(patches, small):
    found = throughput.scaling({"small": small}, patches, [1, 4, 4096], ROOMY, rounds=2, longest=0.3)
    assert [bool(row["img/s"]) for row in found.table] == [True, True, False]
    assert found.table[2]["why"].startswith("left out: a batch would take about ")
    (row,) = found.plateau_rows()
    assert row["batch size"] in (1, 4) and row["best img/s"] == max(r["img/s"] or 0 for r in found.table)


def test_running_out_of_memory_is_a_row(patches, small, monkeypatch):
    def batch(patches, size, device):
        if size == 8:
            torch.empty(1 << 60, dtype=torch.uint8)  # torch's own error
        return networks.batch(patches, size, device)

    monkeypatch.setattr(throughput, "batch", batch)
    found = throughput.scaling({"small": small}, patches, [1, 8], ROOMY, rounds=1)
    assert [(row["batch size"], row["why"]) for row in found.table] == [(1, ""), (8, memory.OUT)]


def test_the_figure_shows_every_model_and_what_failed(patches, small):
    found = throughput.scaling({"small": small}, patches, [1, 4], ROOMY, rounds=1)
    used = [{"model": "small", "batch size": 1, "MiB": 5.0}, {"model": "small", "batch size": 4, "MiB": None}]
    fast, full = throughput.plot_scaling(found, used, 64).axes
    assert [text.get_text() for text in fast.get_legend().get_texts()] == ["small"]
    assert [list(line.get_xdata()) for line in full.get_lines()][:2] == [[1], [4]]
