"""A small residual CNN for 2 cores: 3x3 convolutions in channels_last, early down-sampling, global average pooling.

Resolution is halved by 2x2 means between the stages, not by strides: at equal images a strided twin of 64 channels
stayed .01 of AUC behind (docs/LOG.md, 2026-11-21), and means keep the grid symmetric, which `d4` needs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional


def convolution(inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0) -> nn.Conv2d:
    """`nn.Conv2d` without bias, initialised as by He et al. 2015."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / (inputs * size * size)))
    return conv


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, conv: Callable[..., nn.Module], norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, padding=1), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3, padding=1), norm(outputs)
        self.shortcut = conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        y = functional.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)), inplace=True)


class CNN(nn.Module):
    """Stem at half resolution, then three residual stages of 1, 2 and 4 times `width` channels, the last two halving.

    Args:
        width: channels of the first stage; 32 gives 0.31 M weights, 64 four times as many.
        num_classes: logits.
        dropout_rate: before the last layer.
        conv, stem, norm: what makes a convolution, the first one, a normalisation.
        pool: after the mean over positions.
    """

    def __init__(
        self,
        width: int = 32,
        num_classes: int = 2,
        dropout_rate: float = 0.0,
        *,
        conv: Callable[..., nn.Module] = convolution,
        stem: Callable[..., nn.Module] = convolution,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        pool: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem, self.norm = stem(3, width, 4, stride=2, padding=1), norm(width)
        sizes = (width, width, 2 * width, 4 * width)
        self.stages = nn.ModuleList(Residual(a, b, conv, norm) for a, b in itertools.pairwise(sizes))
        self.pool = pool or nn.Identity()
        self.dropout = nn.Dropout(dropout_rate)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float, S at least 8 -> (B, num_classes) logits."""
        x = functional.relu(self.norm(self.stem(images)), inplace=True)
        for number, stage in enumerate(self.stages):
            x = stage(functional.avg_pool2d(x, 2) if number else x)
        return self.head(self.dropout(self.pool(x.mean((2, 3)))))
