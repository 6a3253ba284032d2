"""A small residual CNN for 2 cores: 3x3 convolutions in channels_last, early down-sampling, global average pooling."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016); the first may halve the resolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class CNN(nn.Module):
    """Stem at half resolution, then three residual stages of 1, 2 and 4 times `width` channels, the last two halving.

    Args:
        width: channels of the first stage; 32 gives 0.31 M weights.
        num_classes: logits.
        dropout_rate: before the last layer.
    """

    def __init__(self, width: int = 32, num_classes: int = 2, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.dropout = nn.Dropout(dropout_rate)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) float -> (B, num_classes) logits."""
        x = self.stages(functional.relu(self.norm(self.stem(images))))
        return self.head(self.dropout(x.mean((2, 3))))
