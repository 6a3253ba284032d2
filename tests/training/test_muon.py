"""The optimiser: orthogonal updates, AdamW beside them, and all of its state in a checkpoint."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcamlib.config import parse
from pcamlib.models import build
from pcamlib.training.checkpoint import load_optimizer, optimizer_tensors
from pcamlib.training.muon import Muon, orthogonal
from pcamlib.training.state import optimizer_for

STATISTICS = {"mean": [120.0, 130.0, 140.0], "std": [20.0, 30.0, 40.0]}


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    for dtype in (torch.float32, torch.bfloat16):
        found = orthogonal(matrix, dtype)
        values = torch.linalg.svdvals(found.float())
        assert found.dtype == dtype and found.shape == shape
        assert values.min() > 0.5 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonal(matrix).flatten(), (left @ right).flatten(), 0) > 0.95


def test_zero_stays_zero() -> None:
    assert orthogonal(torch.zeros(3, 5)).equal(torch.zeros(3, 5))


def test_the_others_move_as_torch_moves_them() -> None:
    torch.manual_seed(0)
    mine, reference = (nn.Parameter(torch.ones(7)) for _ in range(2))
    ours = Muon([nn.Parameter(torch.ones(2, 2))], [mine], lr=0.02, other_lr=3e-3)
    adam = torch.optim.AdamW([reference], lr=3e-3, weight_decay=0.0)
    for _ in range(5):
        mine.grad = reference.grad = torch.randn(7)
        ours.step(), adam.step()
    torch.testing.assert_close(mine, reference)


def test_a_convolution_moves_as_its_matrix() -> None:
    torch.manual_seed(0)
    grad = torch.randn(6, 4, 3, 3)
    kernel = nn.Parameter(torch.zeros(6, 4, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(torch.zeros(6, 36))
    kernel.grad, matrix.grad = grad.to(memory_format=torch.channels_last), grad.flatten(1)
    Muon([kernel, matrix], [], lr=0.1, other_lr=0.1).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    assert kernel.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["d4", "cnn", "mlp"])
def test_every_weight_has_one_place_and_the_last_layer_is_adams(name: str) -> None:
    config = parse({"model": {"name": name, "width": 8}, "optimizer": {"name": "muon", "lr": 0.02}})
    model = build(config.model, STATISTICS)
    matrices, others = (group["params"] for group in optimizer_for(model, config, "fp32").param_groups)
    assert len(matrices) + len(others) == len(list(model.parameters()))
    assert all(p.ndim > 1 for p in matrices)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    assert any(p is last.weight for p in others) and not any(p is last.weight for p in matrices)


def test_the_state_comes_back_bit_by_bit() -> None:
    def trained(stop: int | None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        images = torch.randn(4, 3, 6, 6)
        optimizer = Muon([layer.weight], [layer.bias], lr=0.05, other_lr=0.01, weight_decay=0.1)
        for step in range(6):
            if step == stop:
                stored = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer).items()}
                optimizer = Muon([layer.weight], [layer.bias], lr=0.05, other_lr=0.01, weight_decay=0.1)
                load_optimizer(optimizer, stored)
            optimizer.zero_grad()
            layer(images).square().sum().backward()
            optimizer.step()
        return [layer.weight, layer.bias]

    assert all(torch.equal(a, b) for a, b in zip(trained(None), trained(3), strict=True))
