"""Networks by name. A `Classifier` takes raw patches: its normalisation travels with its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pcamlib.config import Model
from pcamlib.models.cnn import CNN
from pcamlib.models.mlp import MLP


class Classifier(nn.Module):
    """Centre crop, normalisation, network: uint8 patches in, two logits out.

    Args:
        network: maps normalised images to (B, 2) logits.
        mean, std: of each channel on the training split, 0..255.
        crop: side of the centre square that the network sees.
        flat: hand the network NHWC images, whose flattening is free (an MLP does not care about pixel order).
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], crop: int, flat: bool = False
    ) -> None:
        super().__init__()
        self.network, self.crop, self.flat = network, crop, flat
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, S, S) uint8 or float, 0..255, S >= crop -> (B, 2) float32 logits (normal, tumour)."""
        edge = (images.shape[-1] - self.crop) // 2
        if edge:
            images = images[..., edge : edge + self.crop, edge : edge + self.crop]
        x = images.float().sub_(self.mean) if images.dtype == torch.uint8 else images.float() - self.mean
        x = x.div_(self.std).contiguous(memory_format=torch.channels_last)
        return self.network(x.permute(0, 2, 3, 1) if self.flat else x).float()


def build(model: Model, statistics: dict[str, Sequence[float]]) -> Classifier:
    """A fresh network with torch's default initialisation (drawn from the global generator: seed first).

    Args:
        model: the configuration's model section.
        statistics: `mean` and `std` of the training split, from `data.patches.channel_statistics`.
    """
    mean, std = statistics["mean"], statistics["std"]
    if model.name == "mlp":
        network: nn.Module = MLP((model.crop, model.crop, 3), model.hidden_units, 2, model.dropout_rate)
        return Classifier(network, mean, std, model.crop, flat=True)
    network = CNN(model.width, 2, model.dropout_rate)
    classifier = Classifier(network, mean, std, model.crop)
    return classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
