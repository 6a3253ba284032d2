"""The networks whose speed is measured, and how they are fed and called.

Weights are random, since speed does not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from pcamlib import config, seeding
from pcamlib.data.patches import Patches, channel_statistics
from pcamlib.errors import ConfigError, nearest
from pcamlib.models import Classifier, build

#: What is changed in recipe `cnn`: nothing, and four times its channels, which is 16 times its arithmetic.
MODELS: dict[str, list[str]] = {"small": [], "large": ["model.width=128"]}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def settings(name: str) -> config.Config:
    """The configuration that has the model `name` of `MODELS`.

    Raises:
        ConfigError: there is no such model.
    """
    if name not in MODELS:
        raise ConfigError(f"unknown model '{name}'{nearest(name, MODELS)}")
    return config.parse(config.recipe("cnn"), MODELS[name])


def network(name: str, patches: Patches, device: str = "cpu") -> Classifier:
    """A model of `MODELS` in eval mode, with random weights and the batch statistics of some patches.

    Raises:
        ConfigError: there is no such model.
    """
    chosen = settings(name)
    seeding.seed_everything(chosen.seed)
    model = build(chosen.model, channel_statistics(patches)).to(device)
    with torch.no_grad():
        model(batch(patches, 64, device))  # activations as wide as in a trained network
    return model.eval()


def batch(patches: Patches, size: int, device: str = "cpu") -> torch.Tensor:
    """(size, 3, 96, 96) uint8 in channels_last memory on the device: the first patches, repeated where too few."""
    rows = np.arange(size) % len(patches)
    return torch.from_numpy(patches.images[rows]).permute(0, 3, 1, 2).to(device)


def forward(model: Classifier, precision: str = "fp32") -> Callable[[torch.Tensor], torch.Tensor]:
    """(B, 3, 96, 96) uint8 -> (B, 2) logits, without gradients, in fp32, bf16 or fp16 (the latter two by autocast)."""
    device = next(model.parameters()).device.type
    dtype = AUTOCAST.get(precision, torch.bfloat16)

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=precision in AUTOCAST):
            return model(images)

    return run
