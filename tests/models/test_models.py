"""Networks: shapes, memory layout, and a normalisation that travels with the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcamlib.config import Model
from pcamlib.models import Classifier, build
from pcamlib.models.d4 import turned

STATISTICS = {"mean": [120.0, 130.0, 140.0], "std": [20.0, 30.0, 40.0]}
MODELS = {
    "mlp": Model(name="mlp", crop=96, hidden_units=[16, 8]),
    "mlp without hidden layers": Model(name="mlp", crop=32, hidden_units=[]),
    "cnn": Model(name="cnn", crop=64, width=8),
    "cnn, whole patch": Model(name="cnn", crop=96, width=4, dropout_rate=0.5),
    "cnn, odd crop": Model(name="cnn", crop=33, width=4),
    "cnn, pooled": Model(name="cnn", crop=64, pool=2, width=4),
    "cnn, eight views": Model(name="cnn", crop=64, width=4, views=8),
    "d4": Model(name="d4", crop=96, pool=2, width=16, dropout_rate=0.5),
    "mlp, pooled": Model(name="mlp", crop=96, pool=3, hidden_units=[8]),
}


def patches(count: int, side: int = 96) -> torch.Tensor:
    """uint8 in the loader's layout: NHWC bytes seen as NCHW."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def built(model: Model) -> Classifier:
    torch.manual_seed(0)
    return build(model, STATISTICS).eval()


@pytest.mark.parametrize("name", MODELS)
def test_two_float32_logits_a_patch(name: str) -> None:
    model = built(MODELS[name])
    for count in (1, 5):
        logits = model(patches(count))
        assert logits.shape == (count, 2) and logits.dtype == torch.float32 and logits.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(patches(2)).dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_only_the_centre_square_is_seen(name: str) -> None:
    model, images = built(MODELS[name]), patches(3)
    crop, edge = model.crop, (96 - model.crop) // 2
    inside = images[..., edge : edge + crop, edge : edge + crop]
    assert model(images).equal(model(inside)), "a patch that is cropped already gives the same"
    outside = images.clone()
    outside[..., :edge, :] = 0
    outside[..., edge + crop :] = 255
    assert model(outside).equal(model(images))
    inner = images.clone()
    inner[..., 48, 48] = 255 - inner[..., 48, 48]
    assert not model(inner).equal(model(images))


@pytest.mark.parametrize(("crop", "pool"), [(96, 1), (96, 2), (64, 4), (33, 3), (32, 1)])
def test_the_view_averages_squares_and_rounds_half_up(crop: int, pool: int) -> None:
    model, images = built(Model(name="cnn", crop=crop, pool=pool, width=4)), patches(3)
    side, edge = crop // pool, (96 - crop) // 2
    square = images.permute(0, 2, 3, 1)[:, edge : edge + crop, edge : edge + crop]
    total = square.long().reshape(3, side, pool, side, pool, 3).sum((2, 4))
    seen = model.view(images.permute(0, 2, 3, 1))
    assert seen.dtype == torch.uint8 and seen.equal(((total + pool * pool // 2) // (pool * pool)).to(torch.uint8))
    assert model(images).equal(model(seen.permute(0, 3, 1, 2))), "seen by the loader or by the model itself"


def test_the_batch_is_left_as_it_was() -> None:
    for images in (patches(2), patches(2).float()):
        before = images.clone()
        built(MODELS["cnn"])(images)
        assert images.equal(before)


def test_uint8_and_float_patches_score_alike() -> None:
    model = built(MODELS["cnn"])
    assert model(patches(2)).equal(model(patches(2).float()))


def test_normalisation_is_that_of_its_statistics() -> None:
    classifier = Classifier(nn.Identity(), STATISTICS["mean"], STATISTICS["std"], crop=96)
    image = torch.tensor([120, 160, 100], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 96, 96)
    assert classifier(image)[0, :, 5, 5].tolist() == pytest.approx([0.0, 1.0, -1.0], abs=0.03)  # rounded to bf16
    with torch.autocast("cpu", torch.bfloat16):
        assert classifier(image).equal(classifier.to(torch.float32)(image)), "the same constants in both precisions"
    assert {"scale", "shift"} <= set(built(MODELS["mlp"]).state_dict()), "saved with the weights"


def test_a_cnn_stays_channels_last_to_the_end() -> None:
    """In NCHW its convolutions would copy at each layer."""
    model, seen = built(MODELS["cnn"]), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(patches(4))
    assert len(seen) == 9
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in seen)


def test_flattening_for_the_mlp_is_free() -> None:
    model, seen = built(MODELS["mlp"]), []
    model.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    model(patches(4))
    assert seen == [True]


def test_the_mlp_is_the_course_skeleton_s() -> None:
    kinds = [type(layer).__name__ for layer in built(MODELS["mlp"]).network.layers]
    assert kinds == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    weights = sum(p.numel() for p in build(Model(name="mlp"), STATISTICS).parameters())
    assert weights == 27648 * 64 + 64 + 64 * 32 + 32 + 32 * 2 + 2


def test_the_same_seed_gives_the_same_network() -> None:
    a, b = built(MODELS["cnn"]).state_dict(), built(MODELS["cnn"]).state_dict()
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("model", [Model(name="cnn"), Model(name="mlp"), Model(name="mlp", hidden_units=[512, 128])])
def test_weights_stay_under_100_mb(model: Model) -> None:
    weights = sum(t.numel() * t.element_size() for t in build(model, STATISTICS).state_dict().values())
    assert weights < 100e6
    if model.name == "cnn":
        assert 1.2e6 < weights < 1.3e6, "0.31 M weights, as the docstring says"


@pytest.mark.parametrize("pool", [2, 3, 4])
def test_pooling_is_the_rounded_mean(pool: int) -> None:
    model, images = built(Model(name="cnn", crop=48, pool=pool, width=4)), patches(3)
    seen = model.view(images.permute(0, 2, 3, 1))
    inside = images[..., 24:72, 24:72].double()
    expected = torch.nn.functional.avg_pool2d(inside, pool).permute(0, 2, 3, 1)
    assert seen.shape == (3, 48 // pool, 48 // pool, 3)
    assert (seen.double() - expected).abs().max() <= 0.5
    assert model(images).equal(model(seen.permute(0, 3, 1, 2))), "the loader may apply the view first"


def test_eight_views_give_one_answer_for_all_of_them() -> None:
    alone, averaged = (built(Model(name="cnn", crop=64, width=4, views=views)) for views in (1, 8))
    images = patches(3)
    views = [turned(images, element) for element in range(8)]
    with torch.no_grad():
        singles = torch.stack([alone(view) for view in views])
        answers = [averaged(view) for view in views]
        assert averaged.train()(images).shape == (3, 2)  # one view in training
    assert (singles - singles[0]).abs().max() > 1e-3
    for answer in answers:
        torch.testing.assert_close(answer, singles.mean(0), rtol=1e-4, atol=1e-5)
