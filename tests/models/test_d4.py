"""The equivariant network: the same answer for all eight views, by ordinary convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcamlib.config import Model, validate
from pcamlib.data.augment import d4
from pcamlib.errors import ConfigError
from pcamlib.models import build
from pcamlib.models.d4 import D4CNN, ORDER, D4Conv, D4Norm, turned

STATISTICS = {"mean": [120.0, 130.0, 140.0], "std": [20.0, 30.0, 40.0]}


def network(width: int = 16) -> D4CNN:
    """Random weights, gains and statistics: a fresh network's all-equal ones would hide a fault in the tying."""
    torch.manual_seed(0)
    made = D4CNN(width)
    for module in made.modules():
        if isinstance(module, D4Norm):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return made.eval()


def spread(model: nn.Module, images: torch.Tensor) -> float:
    """Largest difference of any logit between a patch and one of its eight views."""
    with torch.no_grad():
        logits = torch.stack([model(turned(images, element)) for element in range(ORDER)])
    return float((logits - logits[0]).abs().max())


def test_models_and_data_number_the_elements_alike() -> None:
    images = torch.arange(27).view(1, 3, 3, 3)
    assert all(turned(images, element, (1, 2)).equal(d4(images, element)) for element in range(ORDER))


@pytest.mark.parametrize("side", [32, 48, 64])
def test_the_logits_are_the_same_for_all_eight_views(side: int) -> None:
    images = torch.randn(3, 3, side, side)
    assert spread(network(), images) < 1e-4
    images[0] = 0  # and differ between patches
    assert not torch.equal(network()(images)[0], network()(images)[1])


def test_the_whole_classifier_on_raw_patches() -> None:
    torch.manual_seed(1)
    model = build(Model(name="d4", crop=96, pool=2, width=16), STATISTICS).eval()
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    assert spread(model, images) < 1e-4


def test_the_spread_shows_what_breaks_the_symmetry() -> None:
    images, model = torch.randn(3, 3, 48, 48), network()
    model.stages[1].conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    assert spread(model, images) > 1e-3
    model = network()
    model.norm.statistics = lambda: (model.norm.running_mean, model.norm.running_var)  # untied within a field
    assert spread(model, images) > 1e-3
    model = network()
    model.stem.padding, model.stem.size = 2, 4  # 4x4 at stride 2 with padding 2: the grid shifts on an odd side
    assert spread(model, torch.randn(3, 3, 47, 47)) > 1e-3


def test_the_lifted_and_the_grouped_convolution_turn_with_the_patch() -> None:
    torch.manual_seed(0)
    lift, group = D4Conv(3, 2, 3, padding=1, lifting=True), D4Conv(2, 2, 3, padding=1)
    images = torch.randn(1, 3, 8, 8)

    def fields(x: torch.Tensor) -> torch.Tensor:
        return group(lift(x)).view(ORDER, 2, 8, 8)

    for element in range(ORDER):
        found, expected = fields(turned(images, element)), turned(fields(images), element)
        order = [next(h for h in range(ORDER) if torch.allclose(found[g], expected[h], atol=1e-5)) for g in range(8)]
        assert sorted(order) == list(range(ORDER)), "each map turns, and the eight change places"


def test_the_ordinary_network_is_the_same_map() -> None:
    model, images = network(), torch.randn(4, 3, 48, 48)
    plain = model.ordinary()
    own = {type(module).__name__ for module in plain.modules()} - {type(module).__name__ for module in model.modules()}
    assert own == {"Conv2d", "BatchNorm2d", "Identity"}
    assert not any(isinstance(module, (D4Conv, D4Norm)) for module in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-4)


def test_banks_are_built_once_in_eval_and_anew_for_other_weights() -> None:
    model, images = network(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before, bank = model(images), model.stem.bank()
        assert model.stem.bank() is bank
        with torch.autocast("cpu", torch.bfloat16):
            assert model.stem.bank().dtype == torch.bfloat16
        model.stem.weight.mul_(-1)
        assert not torch.equal(model(images), before)
    model(images).sum().backward()  # with gradients nothing is kept
    assert model.stem.weight.grad is not None and model.stem._kept is None


def test_gradients_reach_every_weight_in_training() -> None:
    model = network().train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("fields", [{"width": 20}, {"crop": 90, "pool": 2}, {"crop": 36}])
def test_sizes_that_break_the_symmetry_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"multiples of 8"):
        validate(Model, {"name": "d4", "width": 16, **fields})
    if "width" in fields:
        with pytest.raises(ValueError, match="multiple of 8"):
            D4CNN(fields["width"])
