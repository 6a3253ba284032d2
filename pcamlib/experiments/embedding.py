"""What a network makes of a patch: the vector its last layer sees, the nearest other patches, the pixels that count."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from pcamlib.data.layout import SIDE
from pcamlib.data.patches import Patches, take
from pcamlib.errors import DataError
from pcamlib.models import Classifier

_DRAWS, _NOISE = 8, 25.5  # copies, and grey levels: a tenth of the range, as in Smilkov et al.


def head(model: Classifier) -> nn.Linear:
    """The last linear layer, which makes the two logits."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)][-1]


def embed(
    model: Classifier, patches: Patches, rows: np.ndarray | None = None, *, precision: str = "fp32", batch: int = 250
) -> np.ndarray:
    """What `head` is given for each patch; of a model that averages eight views, for the patch as it lies.

    Args:
        rows: (N,) of the split; None: every row.
        precision: "fp32" or "bf16".
        batch: patches at once.

    Returns:
        (N, D) float32.

    Raises:
        DataError: no rows, or rows that the split does not have.
    """
    rows = np.arange(len(patches)) if rows is None else np.asarray(rows, np.int64)
    if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(patches):
        raise DataError(f"{patches.stored.path}: nothing to embed, or rows outside 0 to {len(patches) - 1:,}")
    device, found = model.scale.device, list[torch.Tensor]()
    hook = head(model).register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().cpu()))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    try:
        with _evaluated(model, views=1), torch.inference_mode(), autocast:
            for first in range(0, len(rows), batch):
                images = torch.from_numpy(take(patches.images, rows[first : first + batch]))
                model(images.to(device).permute(0, 3, 1, 2))
    finally:
        hook.remove()
    return torch.cat(found).numpy()


def saliency(model: Classifier, image: np.ndarray, seed: int = 0) -> np.ndarray:
    """How strongly each pixel moves the margin of the tumour logit over the normal one: where, not why.

    SmoothGrad (Smilkov et al. 2017, arXiv:1706.03825): the gradient, averaged over noisy copies of the image; absolute
    values are summed over the channels.

    Args:
        image: (96, 96, 3) uint8.
        seed: of the noise.

    Returns:
        (96, 96) float32, logits per grey level; 0 outside the square that the model looks at.

    Raises:
        DataError: an image of another shape or type.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise DataError(f"saliency: a (96, 96, 3) uint8 image is needed, not {image.shape} {image.dtype}")
    device = model.scale.device
    seen = model.view(torch.from_numpy(image.copy())[None]).permute(0, 3, 1, 2)
    noise = torch.randn(_DRAWS, *seen.shape[1:], generator=torch.Generator().manual_seed(seed))
    with _evaluated(model, model.views), torch.enable_grad():
        copies = (seen + _NOISE * noise).to(device).requires_grad_()
        logits = model(copies)
        gradient = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), copies)[0]
    found = gradient.mean(0).abs().sum(0).cpu() / model.pool**2  # a pixel is that share of a pooled one
    found = found.repeat_interleave(model.pool, 0).repeat_interleave(model.pool, 1)
    return functional.pad(found, [(SIDE - model.crop) // 2] * 4).numpy()


def neighbours(vectors: np.ndarray, row: int, k: int = 8) -> np.ndarray:
    """The rows whose vectors point most nearly the way of `row`'s (cosine), itself left out.

    Args:
        vectors: (N, D) float32, as `embed` gives them.
        row: whose neighbours.
        k: how many.

    Returns:
        (min(k, N - 1),) int64, nearest first.

    Raises:
        DataError: no such row.
    """
    if not 0 <= row < len(vectors):
        raise DataError(f"no row {row} among {len(vectors):,} vectors")
    likeness = vectors @ vectors[row] / np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    order = np.argsort(-likeness, kind="stable")
    return order[order != row][:k]


@contextmanager
def _evaluated(model: Classifier, views: int) -> Iterator[None]:
    """The model in eval mode with so many views, and then as it was."""
    training, before = model.training, model.views
    model.eval()
    model.views = views
    try:
        yield
    finally:
        model.train(training)
        model.views = before
