"""Every way to run a network is measured, or says why it is not; and it says how far its answers lie apart."""

from __future__ import annotations

import pytest
import torch

from pcamlib.data.patches import open_split
from pcamlib.experiments import networks, roofline, variants


@pytest.fixture(scope="module")
def measured(synthetic_dir):
    patches = open_split(synthetic_dir, "train")
    model = networks.network("small", patches)
    return model, *variants.table("small", model, networks.batch(patches, 8), sizes=(1, 8), rounds=2)


def test_each_way_is_a_row_at_each_size(measured):
    _, rows, floors = measured
    assert [(row["runtime"], row["precision"]) for row in rows] == 2 * list(variants.WAYS)
    assert set(floors) == {1, 8} and [row["batch size"] for row in rows] == [1] * 8 + [8] * 8
    assert {row["runtime"] for row in rows if row["img/s"] is None} == {"torch.compile"}
    assert {row["why"] for row in rows if row["img/s"] is None} == {variants.UNMEASURED}
    assert all(row["95 %"][0] <= row["img/s"] <= row["95 %"][1] for row in rows if row["img/s"])


def test_answers_are_compared(measured):
    off = {(row["runtime"], row["precision"]): row["off by"] for row in measured[1]}
    assert off["eager", "fp32"] == 0 and off["ONNX Runtime", "fp32"] < 1e-5 and off["eager, nchw", "fp32"] < 1e-5
    assert 1e-5 < off["eager", "bf16"] < 0.1 and 1e-5 < off["ONNX Runtime", "int8"] < 0.2


def test_the_model_is_left_in_its_own_layout(measured):
    weight = measured[0].network.stages[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_rows_are_held_against_the_ceilings(measured):
    rows = measured[1]
    slow = roofline.Ceilings("cpu", 1, {"memory": 1e12}, dict.fromkeys(("fp32", "bf16", "fp16", "int8"), 1.0))
    fast = roofline.Ceilings("cpu", 1, {"memory": 1e12}, dict.fromkeys(("fp32", "bf16", "fp16", "int8"), 1e15))
    variants.check(rows, 56_000_000, fast)
    with pytest.raises(roofline.ImpossibleError):
        variants.check(rows, 56_000_000, slow)


def test_without_a_compiler_the_row_says_so(synthetic_dir, monkeypatch):
    patches = open_split(synthetic_dir, "train")
    monkeypatch.setenv("CXX", "no-such-compiler")
    prepared = variants.Prepared(networks.network("small", patches), networks.batch(patches, 1), compiled=True)
    with pytest.raises(variants.AbsentError, match=r"no C\+\+ compiler here"):
        prepared.way("torch.compile", "fp32")


class Uncompilable(torch.nn.Module):
    """What `torch.compile` returns for code that it cannot compile: it fails when it is called."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        raise torch._dynamo.exc.Unsupported("a thing it cannot do\nand a page of hints")


def test_what_does_not_compile_is_a_row(synthetic_dir, monkeypatch):
    monkeypatch.setattr(torch, "compile", Uncompilable)
    monkeypatch.setattr(variants, "WAYS", (("eager", "fp32"), ("torch.compile", "fp32")))
    patches = open_split(synthetic_dir, "train")
    images = networks.batch(patches, 2)
    rows, _ = variants.table("small", networks.network("small", patches), images, sizes=(2,), rounds=1, compiled=True)
    assert rows[1]["img/s"] is None and rows[1]["why"] == "does not compile: a thing it cannot do"
