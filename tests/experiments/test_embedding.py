"""Embedding: what the last layer is given, who is near, and which pixels a model is sensitive to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcamlib.config import Model
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.synthetic import generate
from pcamlib.errors import DataError
from pcamlib.experiments import embedding
from pcamlib.models import Classifier, build

GREY = {"mean": [128.0] * 3, "std": [50.0] * 3}
MODELS = [
    Model(name="mlp", crop=32, hidden_units=[8]),
    Model(name="cnn", width=8, crop=64, pool=2),
    Model(name="d4", width=8, crop=32),
    Model(name="cnn", width=8, crop=32, views=8),
]


def made(model: Model) -> Classifier:
    torch.manual_seed(0)
    return build(model, GREY)


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Patches:
    folder = tmp_path_factory.mktemp("patches")
    generate(folder, sizes={"valid": 64}, report=lambda line: None)
    return open_split(folder, "valid")


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m.name}-{m.views}")
def test_the_head_makes_the_logits_of_what_was_embedded(model: Model, patches: Patches) -> None:
    network, rows = made(model), np.array([3, 60, 7, 3])
    vectors = embedding.embed(network, patches, rows, batch=3)
    assert network.training and network.views == model.views
    network.eval()
    network.views = 1
    images = torch.from_numpy(np.array(patches.images[rows])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits, again = network(images), embedding.head(network)(torch.from_numpy(vectors))
    assert torch.allclose(logits, again, atol=1e-5) and vectors.dtype == np.float32
    assert not np.allclose(vectors[0], vectors[1]) and np.allclose(vectors[0], vectors[3], atol=1e-5)


def test_every_row_is_embedded_and_no_hook_stays(patches: Patches) -> None:
    network = made(MODELS[0])
    whole = embedding.embed(network, patches)
    assert whole.shape == (64, 8) and not embedding.head(network)._forward_pre_hooks
    assert np.abs(embedding.embed(network, patches, precision="bf16") - whole).max() < 0.05 * np.abs(whole).max()
    with pytest.raises(DataError, match="outside 0 to 63"):
        embedding.embed(network, patches, np.array([64]))


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m.name}-{m.views}")
def test_saliency_lies_within_what_the_model_looks_at(model: Model, patches: Patches) -> None:
    network, image = made(model), np.array(patches.images[0])
    found = embedding.saliency(network, image)
    inside = np.zeros((96, 96), bool)
    edge = (96 - model.crop) // 2
    inside[edge : 96 - edge, edge : 96 - edge] = True
    assert found.shape == (96, 96) and found.dtype == np.float32
    assert (found[~inside] == 0).all() and (found[inside] >= 0).all() and found[inside].any()
    assert (found == embedding.saliency(network, image)).all()
    assert network.training and all(weight.grad is None for weight in network.parameters())


def test_saliency_of_a_linear_model_is_its_weights(patches: Patches) -> None:
    network = made(Model(name="mlp", crop=32, pool=2, hidden_units=[]))
    weight = embedding.head(network).weight.detach().view(2, 16, 16, 3)
    expected = ((weight[1] - weight[0]) * network.scale).abs().sum(-1).numpy() / 4
    found = embedding.saliency(network, np.array(patches.images[1]))
    assert np.allclose(found[32:64:2, 33:64:2], expected, rtol=1e-4)


def test_saliency_refuses_what_is_no_patch() -> None:
    for image in (np.zeros((96, 96), np.uint8), np.zeros((96, 96, 3), np.float32)):
        with pytest.raises(DataError, match="uint8 image is needed"):
            embedding.saliency(made(MODELS[0]), image)


def test_neighbours_are_nearest_by_angle_and_not_oneself() -> None:
    vectors = np.array([[1, 0], [9, 1], [0, 1], [0, 0], [1, 0.5], [2, 0]], np.float32)
    assert embedding.neighbours(vectors, 0, 3).tolist() == [5, 1, 4]
    assert embedding.neighbours(vectors, 2, 99).tolist() == [4, 1, 0, 3, 5]
    with pytest.raises(DataError, match="no row 6"):
        embedding.neighbours(vectors, 6)
