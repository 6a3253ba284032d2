"""Networks by name. A `Classifier` takes raw patches: its normalisation travels with its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pcamlib.config import Model
from pcamlib.models.cnn import CNN
from pcamlib.models.d4 import D4CNN, turned
from pcamlib.models.mlp import MLP


class Classifier(nn.Module):
    """View, normalisation, network: uint8 patches in, two logits out.

    Args:
        network: maps normalised images to (B, 2) logits.
        mean, std: of each channel on the training split, 0..255.
        crop: side of the centre square that is looked at.
        pool: pixels averaged on a side; the network sees `crop / pool` pixels a side.
        flat: hand the network NHWC images, whose flattening is free (an MLP does not care about pixel order).
        views: 8: in eval mode the logits are the mean over the eight rotations and reflections of the patch.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop: int,
        pool: int = 1,
        flat: bool = False,
        views: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.crop, self.pool, self.flat, self.views = network, crop, pool, flat, views
        # rounded to bf16 (0.4 % at most), so that a bf16 pass over uint8 pixels gives the float32 one, rounded
        scale = torch.tensor(std, dtype=torch.float32).reciprocal().bfloat16().float()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", (-torch.tensor(mean, dtype=torch.float32) * scale).bfloat16().float())

    def view(self, images: torch.Tensor) -> torch.Tensor:
        """What the network sees: (B, S, S, 3) uint8 with S >= crop -> (B, crop / pool, crop / pool, 3) uint8.

        A loader applies it before augmentation, which then has `pool` squared fewer pixels to turn and stain.
        """
        edge, side, step = (images.shape[1] - self.crop) // 2, self.crop // self.pool, self.pool
        images = images[:, edge : edge + self.crop, edge : edge + self.crop]
        if step == 1:
            return images
        total = images[:, ::step].to(torch.int16)
        for row in range(1, step):
            total += images[:, row::step]
        total = total.view(-1, side, side, step, 3)
        total = sum((total[:, :, :, column] for column in range(1, step)), start=total[:, :, :, 0])
        return total.add_(step * step // 2).div_(step * step, rounding_mode="floor").to(torch.uint8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of whole patches, or of what `view` made of them.

        Args:
            images: (B, 3, S, S) uint8; or uint8 or float 0..255 with S = crop / pool.

        Returns:
            (B, 2) float32: normal, tumour.
        """
        if images.shape[-1] != self.crop // self.pool:
            images = self.view(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        kind = images.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        count, _, height, width = images.shape
        # by whole rows of pixels: broadcasting over 3 channels in the innermost place is 5 times slower
        rows = images.permute(0, 2, 3, 1).reshape(count, height, width * 3).to(dtype)
        x = torch.addcmul(self.shift.to(dtype).repeat(width), rows, self.scale.to(dtype).repeat(width))
        x = x.view(count, height, width, 3)
        if self.training or self.views == 1:
            return self._logits(x)
        views = (turned(x, element, (1, 2)) for element in range(self.views))
        return torch.stack([self._logits(view.contiguous()) for view in views]).mean(0)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, S, 3) normalised -> (B, 2) float32."""
        return self.network(x if self.flat else x.permute(0, 3, 1, 2)).float()


def build(model: Model, statistics: dict[str, Sequence[float]]) -> Classifier:
    """A fresh network with torch's default initialisation (drawn from the global generator: seed first).

    Args:
        model: the configuration's model section.
        statistics: `mean` and `std` of the training split, from `data.patches.channel_statistics`.
    """
    mean, std = statistics["mean"], statistics["std"]
    if model.name == "mlp":
        side = model.crop // model.pool
        network: nn.Module = MLP((side, side, 3), model.hidden_units, 2, model.dropout_rate)
        return Classifier(network, mean, std, crop=model.crop, pool=model.pool, flat=True, views=model.views)
    network = (D4CNN if model.name == "d4" else CNN)(model.width, 2, model.dropout_rate)
    classifier = Classifier(network, mean, std, crop=model.crop, pool=model.pool, views=model.views)
    return classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stub
