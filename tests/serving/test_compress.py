"""Smaller networks are what they say, and the table compares all of them on the same patches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from pcamlib.config import parse, recipe
from pcamlib.data.patches import open_split
from pcamlib.models import build, onnx
from pcamlib.serving import compress
from pcamlib.serving.predict import Predictor

STATISTICS = {"mean": [180.0, 140.0, 170.0], "std": [40.0, 50.0, 35.0]}


@pytest.fixture(scope="module")
def predictor(checkpoint: Path) -> Predictor:
    return Predictor(checkpoint)


def forward(model: nn.Module, images: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def images(synthetic_dir: Path) -> np.ndarray:
    return np.array(open_split(synthetic_dir, "train").images[:96])


def test_the_smallest_weights_are_zero_and_the_rest_as_they_were(predictor):
    before, after = (
        torch.cat([p.detach().flatten() for p in model.parameters() if p.ndim > 1])
        for model in (predictor.model, compress.zeroed(predictor.model, 0.6))
    )
    gone = after == 0
    assert gone.float().mean() == pytest.approx(0.6, abs=0.001)
    assert (after[~gone] == before[~gone]).all() and before[gone].abs().max() < before[~gone].abs().min()


def test_channels_that_do_nothing_go_first_and_change_nothing(predictor, images):
    """Two of eight filters of the first block silenced: without them the answers are the same."""
    model = compress.zeroed(predictor.model, 0)
    for block in model.network.stages:
        idle = len(block.norm1.weight) // 4
        block.norm1.weight.data[1 : 1 + idle] = block.norm1.bias.data[1 : 1 + idle] = 0
    small = compress.narrowed(model, 0.25)
    assert [block.conv1.weight.shape[0] for block in small.network.stages] == [6, 12, 24]
    assert (forward(small, images) - forward(model, images)).abs().max() < 1e-5
    less, whole = (sum(p.numel() for p in each.parameters()) for each in (small, model))
    assert less < 0.8 * whole
    assert len(onnx.export(small)) < len(onnx.export(model))
    half = compress.narrowed(model, 0.5)
    assert (forward(half, images) - forward(model, images)).abs().max() > 1e-3


def test_only_the_cnn_is_narrowed():
    for name in ("mlp", "d4"):
        assert compress.narrowed(build(parse(recipe(name), ["model.width=8"]).model, STATISTICS), 0.5) is None


def test_settling_measures_batch_statistics(predictor, images):
    model = compress.zeroed(predictor.model, 0)
    seen = []
    hook = model.network.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    compress.settle(model, images)
    hook.remove()
    assert [len(each) for each in seen] == [64, 32] and not model.training
    expected = torch.stack([each.mean((0, 2, 3)) for each in seen]).mean(0)
    assert torch.allclose(model.network.norm.running_mean, expected, atol=1e-5)


def test_every_way_is_called_in_every_round():
    called = []
    ways = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = compress.latency(ways, 5)
    assert called == list("ab") * 15 and all(len(each) == 5 and (each > 0).all() for each in seconds.values())


def test_the_table_compares_every_way_on_the_same_patches(checkpoint, synthetic_dir):
    valid, train = (open_split(synthetic_dir, split) for split in ("valid", "train"))
    rows = compress.table(checkpoint, valid, train, levels=(0.5,), most=200, rounds=10)
    ways = [row["way"] for row in rows]
    assert ways == ["eager fp32", "ONNX fp32", "ONNX fp16", "ONNX int8", "ONNX fp32, 50 % weights zero",
                    "ONNX fp32, 50 % channels out"]  # fmt: skip
    by = dict(zip(ways, rows, strict=True))
    for row in rows:
        assert (row["n"], row["patches"]) == (200, "synthetic")
        assert row["95 %"][0] <= row["AUC"] <= row["95 %"][1] and 0 < row["p50 ms"] <= row["p90 ms"]
    assert by["eager fp32"]["off by"] == 0 and by["eager fp32"]["times eager"] == 1
    assert by["ONNX fp32"]["off by"] < 1e-5 < by["ONNX fp16"]["off by"] < by["ONNX int8"]["off by"]
    zeros, narrow = by["ONNX fp32, 50 % weights zero"], by["ONNX fp32, 50 % channels out"]
    assert zeros["MB"] == pytest.approx(by["ONNX fp32"]["MB"], rel=0.01) and narrow["MB"] < 0.95 * zeros["MB"]
    assert zeros["MB gzipped"] < by["ONNX fp32"]["MB gzipped"]
    figure = compress.plot(rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ways
    assert "n = 200 synthetic patches" in figure.axes[0].get_title("left")
    plt.close(figure)
