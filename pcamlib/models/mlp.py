"""The course's multi-layer perceptron: flatten -> (Linear, ReLU, Dropout) x len(hidden_units) -> Linear."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import nn


class MLP(nn.Module):
    """Fully connected classifier on raw pixels, as in the course's skeleton.

    Args:
        input_shape: shape of one image, for example (3, 96, 96): 27,648 inputs.
        hidden_units: units of each hidden layer.
        num_classes: logits.
        dropout_rate: after each hidden layer.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden_units: Sequence[int],
        num_classes: int = 2,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [math.prod(input_shape), *hidden_units]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(dropout_rate)]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, *input_shape) float -> (B, num_classes) logits."""
        return self.layers(images.flatten(1))
