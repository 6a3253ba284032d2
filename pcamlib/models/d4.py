"""A CNN whose logits are the same for all eight rotations and reflections of a patch.

Group convolutions (Cohen & Welling 2016, arXiv:1602.07576), used on PCam by Veeling et al. 2018 (arXiv:1806.03962).
A field is eight maps, one for each element of D4; turning the patch turns each map and permutes the eight. A filter is
stored once and laid out in its eight positions as a bank, so that every layer is one ordinary convolution of `width`
channels, fields times eight, at an ordinary convolution's speed (`ordinary` hands out that network). Nothing breaks the
symmetry on the way: kernels and strides fit even sides, down-sampling averages 2x2, statistics are tied within a field.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from pcamlib.models.cnn import CNN

ORDER = 8


def turned(maps: torch.Tensor, element: int, axes: tuple[int, int] = (-2, -1)) -> torch.Tensor:
    """Maps under one element of D4: `element % 4` quarter turns, then a reflection when `element >= 4`.

    The same three lines as `data.augment.d4`: `data` and `models` are strangers, and a test holds the two equal.
    """
    rotated = torch.rot90(maps, element % 4, axes)
    return rotated.flip(axes[1]) if element >= 4 else rotated


def _division() -> torch.Tensor:
    """(8, 8): the element that is g^-1 h, found by letting elements act on a square of distinct numbers."""
    square = torch.arange(9).view(3, 3)
    images = [turned(square, element) for element in range(ORDER)]
    table = torch.empty(ORDER, ORDER, dtype=torch.int64)
    for g in range(ORDER):
        for h in range(ORDER):  # g (g^-1 h) = h
            table[g, h] = next(e for e in range(ORDER) if torch.equal(turned(images[e], g), images[h]))
    return table


_DIVISION = _division()


class D4Conv(nn.Module):
    """Convolution from pixels (`lifting`) or fields to fields.

    Args:
        inputs: channels of the image when lifting, else fields.
        outputs: fields.
        size: of the square kernel.
        stride, padding: as in `nn.Conv2d`; with sides that keep the grid symmetric.
        lifting: the input is an image.
    """

    index: torch.Tensor

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, padding: int = 0, lifting: bool = False
    ) -> None:
        super().__init__()
        elements = 1 if lifting else ORDER
        self.inputs, self.outputs, self.size, self.stride, self.padding = inputs, outputs, size, stride, padding
        self.channels, count = elements * inputs, elements * inputs * size * size
        self.weight = nn.Parameter(torch.randn(outputs, count) * math.sqrt(2 / count))  # He et al. 2015
        # where in a filter each entry of its eight positions comes from, in channels_last order
        places = torch.arange(count).view(elements, inputs, size, size)
        positions = [turned(places if lifting else places[_DIVISION[g]], g) for g in range(ORDER)]
        index = torch.stack(positions).view(ORDER, self.channels, size, size).permute(0, 2, 3, 1).reshape(-1)
        self.register_buffer("index", index, persistent=False)
        self._kept: tuple[tuple[int, int, torch.dtype], torch.Tensor] | None = None

    def bank(self) -> torch.Tensor:
        """The filters in all eight positions, (8 outputs, channels, size, size), channels_last: an ordinary kernel."""
        kind, weight = self.weight.device.type, self.weight
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        keep = not (self.training or torch.is_grad_enabled())
        state = (weight._version, weight.data_ptr(), dtype)
        if keep and self._kept is not None and self._kept[0] == state:
            return self._kept[1]
        bank = weight.to(dtype).index_select(1, self.index).view(self.outputs, ORDER, self.size, self.size, -1)
        bank = bank.transpose(0, 1).reshape(ORDER * self.outputs, self.size, self.size, -1).permute(0, 3, 1, 2)
        self._kept = (state, bank) if keep else None
        return bank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, channels, H, W) -> (B, 8 outputs, H', W'); channels go element by element."""
        return functional.conv2d(x, self.bank(), stride=self.stride, padding=self.padding)

    def ordinary(self) -> nn.Conv2d:
        """The same map as `nn.Conv2d`."""
        bank = self.bank().detach()
        conv = nn.Conv2d(self.channels, len(bank), self.size, self.stride, self.padding, bias=False)
        conv.weight = nn.Parameter(bank.clone(memory_format=torch.channels_last))
        return conv


class D4Norm(nn.Module):
    """Batch normalisation with one gain and one offset a field, and in eval mode one mean and one variance.

    In training each of a field's eight maps has its own batch statistics: one fast kernel, and the same in expectation.

    Args:
        fields: number of fields.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, fields: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(fields)), nn.Parameter(torch.zeros(fields))
        self.register_buffer("running_mean", torch.zeros(ORDER * fields))
        self.register_buffer("running_var", torch.ones(ORDER * fields))

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance for eval mode, (8 fields,) each, tied within a field."""
        mean, var = (t.view(ORDER, -1).mean(0).repeat(ORDER) for t in (self.running_mean, self.running_var))
        return mean, var

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 8 fields, H, W) -> the same shape."""
        weight, bias = self.weight.repeat(ORDER), self.bias.repeat(ORDER)
        statistics = (self.running_mean, self.running_var) if self.training else self.statistics()
        return functional.batch_norm(x, *statistics, weight, bias, self.training, self.momentum, self.eps)

    def ordinary(self) -> nn.BatchNorm2d:
        """The same map, in eval mode, as `nn.BatchNorm2d`."""
        norm = nn.BatchNorm2d(len(self.running_mean), self.eps).eval()
        mean, var = self.statistics()
        norm.load_state_dict(
            {"weight": self.weight.repeat(ORDER), "bias": self.bias.repeat(ORDER), "running_mean": mean,
             "running_var": var, "num_batches_tracked": torch.tensor(0)}
        )  # fmt: skip
        return norm


class FieldMean(nn.Module):
    """Mean over the group: what is left does not change when the patch is turned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 8 fields) -> (B, fields)."""
        return x.view(len(x), ORDER, -1).mean(1)


class D4CNN(CNN):
    """The same network of fields.

    Args:
        width: channels of the first stage, a multiple of 8; 64 gives 0.15 M weights.
        num_classes: logits.
        dropout_rate: before the last layer.

    Raises:
        ValueError: the width is no multiple of 8.
    """

    def __init__(self, width: int = 64, num_classes: int = 2, dropout_rate: float = 0.0) -> None:
        if width % ORDER:
            raise ValueError(f"width {width} is no multiple of {ORDER}: a field has a map for each element of D4")
        stem = partial(D4Conv, lifting=True)
        kinds: dict[str, Any] = {"conv": D4Conv, "stem": stem, "norm": D4Norm, "pool": FieldMean()}
        super().__init__(width // ORDER, num_classes, dropout_rate, **kinds)

    def ordinary(self) -> CNN:
        """The same map, in eval mode, of `nn.Conv2d`, `nn.BatchNorm2d` and `nn.Linear` alone, as for an export."""
        plain = copy.deepcopy(self).eval()
        for parent in list(plain.modules()):
            for name, child in parent.named_children():
                if isinstance(child, (D4Conv, D4Norm)):
                    setattr(parent, name, child.ordinary())
        head = nn.Linear(ORDER * self.head.in_features, self.head.out_features)
        head.weight = nn.Parameter(self.head.weight.detach().repeat(1, ORDER) / ORDER)
        head.bias = nn.Parameter(self.head.bias.detach().clone())
        plain.pool, plain.head = nn.Identity(), head
        return plain
