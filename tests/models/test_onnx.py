"""An exported network answers as the one it came from, for any number of patches; int8 nearly so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcamlib.config import parse, recipe
from pcamlib.models import Classifier, build, onnx
from pcamlib.models.onnx import OnnxError

STATISTICS = {"mean": [180.0, 140.0, 170.0], "std": [40.0, 50.0, 35.0]}
IMAGES = np.random.default_rng(0).integers(0, 256, (24, 3, 96, 96)).astype(np.uint8)


def network(name: str, *changes: str) -> Classifier:
    torch.manual_seed(0)
    model = build(parse(recipe(name), changes).model, STATISTICS)
    with torch.no_grad():
        model(torch.from_numpy(IMAGES))  # batch statistics
    return model.eval()


@pytest.fixture(scope="module")
def small() -> tuple[Classifier, bytes]:
    model = network("cnn", "model.width=8")
    return model, onnx.export(model)


def truth(model: Classifier, images: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(images)).numpy()


def test_a_model_is_exported_with_any_batch_and_raw_patches(small):
    model, exported = small
    session = onnx.session(exported, threads=1)
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 96, 96])
    for count in (1, 2, 24):
        answers = onnx.logits(session, IMAGES[:count])
        assert answers.shape == (count, 2) and np.abs(answers - truth(model, IMAGES[:count])).max() < 1e-5


@pytest.mark.parametrize("name", ["mlp", "d4"])
def test_other_networks_are_exported_too(name):
    model = network(name, "model.width=8")
    answers = onnx.logits(onnx.session(onnx.export(model)), IMAGES[:3])
    assert np.abs(answers - truth(model, IMAGES[:3])).max() < 1e-5


def test_memory_order_does_not_matter(small):
    _, exported = small
    session = onnx.session(exported)
    turned = np.ascontiguousarray(IMAGES.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)  # a loader's batch
    assert not turned.flags.c_contiguous and (onnx.logits(session, turned) == onnx.logits(session, IMAGES)).all()


def test_export_leaves_the_model_in_training(small):
    model = network("mlp").train()
    onnx.export(model)
    assert model.training and not small[0].training


def test_int8_is_smaller_and_answers_nearly_the_same(small):
    model, exported = small
    quantised = onnx.quantize(exported, IMAGES)
    wide = onnx.export(network("cnn"))
    assert len(onnx.quantize(wide, IMAGES)) < len(wide) / 2  # tables by channel weigh on a narrow one
    answers = onnx.logits(onnx.session(quantised), IMAGES)
    expected = truth(model, IMAGES)
    off = np.abs(answers - expected).max()
    assert 0 < off < 0.3 * expected.std() + 0.1


def test_bad_input_is_told_in_one_line(small):
    with pytest.raises(OnnxError, match=r"not a whole ONNX model .*; export it again"):
        onnx.session(small[1][:1000])
    with pytest.raises(OnnxError, match="not a whole ONNX model"):
        onnx.quantize(b"no model", IMAGES)
    with pytest.raises(OnnxError, match="int8 needs patches"):
        onnx.quantize(small[1], IMAGES[:0])
