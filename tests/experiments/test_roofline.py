"""Ceilings are measured, and a claim above them, or about no patches, is refused with its numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcamlib.experiments import roofline
from pcamlib.experiments.roofline import PATCH, Ceilings, Claim, ImpossibleError

#: A slow machine: 10 GB/s, 100 GFLOP/s.
SLOW = Ceilings("cpu", 1, {"cache": 1e10, "memory": 5e9}, {"fp32": 1e11, "bf16": 1e12})


def test_the_published_table_is_refused_by_what_was_fed():
    with pytest.raises(
        ImpossibleError, match=r"254,000 images/s cannot be: each input fed was 2 numbers of shape \(2,"
    ):
        roofline.check(Claim(254_000, (2,), 0), SLOW)
    with pytest.raises(ImpossibleError, match=r"a patch is 27,648 numbers of shape \(3, 96, 96\)"):
        roofline.check(Claim(1, (256, 2), 0), SLOW)  # however slow


def test_the_published_rate_is_refused_by_its_arithmetic_too():
    claim = Claim(254_000, PATCH, 56_000_000)
    with pytest.raises(ImpossibleError, match=r"56 MFLOP an image make 14,224 GFLOP/s, .* 100 GFLOP/s in fp32"):
        roofline.check(claim, SLOW)
    assert roofline.refusal(claim, SLOW).startswith("254,000 images/s cannot be")


def test_a_rate_is_refused_by_its_bytes():
    with pytest.raises(ImpossibleError, match=r"their pixels alone are 13.8 GB/s, and this device copies 10 GB/s"):
        roofline.check(Claim(500_000, PATCH, 0), SLOW)


def test_what_is_possible_is_told_as_shares():
    found = roofline.check(Claim(1000, PATCH, 56_000_000), SLOW)
    assert found["GFLOP/s"] == pytest.approx(56) and found["share of product"] == pytest.approx(0.56)
    assert found["GB/s"] == pytest.approx(0.027648) and found["share of copy"] == pytest.approx(0.0027648)
    assert roofline.refusal(Claim(1000, PATCH, 56_000_000), SLOW) == ""


def test_winograd_may_do_fewer_products_than_are_counted():
    assert roofline.check(Claim(4000, PATCH, 56_000_000), SLOW)["share of product"] == pytest.approx(2.24)
    with pytest.raises(ImpossibleError, match="in fp32 at its best"):
        roofline.check(Claim(8000, PATCH, 56_000_000), SLOW)
    assert roofline.check(Claim(8000, PATCH, 56_000_000, "bf16"), SLOW)["share of product"] < 1


def test_flops_are_those_of_one_image_whatever_the_batch():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(4 * 36, 2))
    expected = 2 * 27 * 4 * 36 + 2 * 4 * 36 * 2
    assert [roofline.flops(layers, torch.zeros(n, 3, 8, 8)) for n in (1, 5)] == [expected, expected]


def test_ceilings_of_this_machine_are_rates_it_reached():
    found = roofline.ceilings(rounds=1, side=128)
    assert found.threads == torch.get_num_threads() and set(found.flops) == {"fp32", "bf16", "fp16", "int8"}
    assert all(1e6 < rate < 1e16 for rate in (*found.flops.values(), *found.moved.values()))
    assert [row["unit"] for row in found.table()] == ["GB/s"] * 2 + ["GFLOP/s"] * 4
    assert not torch.backends.cuda.matmul.allow_tf32
