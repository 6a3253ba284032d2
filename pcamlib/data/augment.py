"""Augmentation of whole batches, drawn per patch from (seed, epoch, patch index), never from global state.

D4: the eight rotations and reflections of the square, exact on pixels. Shift: by whole pixels. Stain: haematoxylin,
eosin and residual optical densities each get a gain and an offset (HED jitter, Tellez et al. 2018,
doi:10.1109/TMI.2018.2820199), with the stain vectors of Ruifrok and Johnston 2001.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from pcamlib.seeding import counter_uniform

#: Rows: haematoxylin, eosin, DAB (residual); columns: optical density in R, G, B. Ruifrok & Johnston 2001.
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])


def d4(images: torch.Tensor, element: int) -> torch.Tensor:
    """One element of D4 on NHWC images: `element % 4` quarter turns, then a reflection when `element >= 4`."""
    turned = torch.rot90(images, element % 4, (1, 2))
    return turned.flip(2) if element >= 4 else turned


def random_d4(images: torch.Tensor, draw: np.ndarray) -> torch.Tensor:
    """Each patch under its own element of D4.

    Args:
        images: (B, S, S, 3), any dtype.
        draw: (B,) uniform in [0, 1).
    """
    elements = (draw * 8).astype(np.int64)
    out = torch.empty_like(images)
    for element in range(8):
        rows = torch.from_numpy(np.flatnonzero(elements == element)).to(images.device)
        if len(rows):
            out[rows] = d4(images[rows], element)
    return out


def random_shift(images: torch.Tensor, draws: np.ndarray, pixels: int) -> torch.Tensor:
    """Each patch moved by whole pixels, its border mirrored: nothing is interpolated, so nothing is blurred.

    Args:
        images: (B, S, S, C), any dtype.
        draws: (B, 2) uniform in [0, 1): down and to the right.
        pixels: largest move; the label is decided by the centre 32x32, so a few leave nearly every label true.
    """
    count, side, _, channels = images.shape
    wide = images.new_empty(count, side + 2 * pixels, side + 2 * pixels, channels)
    inner = slice(pixels, pixels + side)
    wide[:, inner, inner] = images
    wide[:, :pixels, inner] = images[:, 1 : pixels + 1].flip(1)
    wide[:, pixels + side :, inner] = images[:, side - 1 - pixels : side - 1].flip(1)
    wide[:, :, :pixels] = wide[:, :, pixels + 1 : 2 * pixels + 1].flip(2)
    wide[:, :, pixels + side :] = wide[:, :, side - 1 : side - 1 + pixels].flip(2)
    out = torch.empty_like(images)
    corners = (draws * (2 * pixels + 1)).astype(np.int64).tolist()
    for number, (top, left) in enumerate(corners):
        out[number] = wide[number, top : top + side, left : left + side]
    return out


def random_stain(images: torch.Tensor, draws: np.ndarray, strength: float) -> torch.Tensor:
    """HED jitter.

    Args:
        images: (B, S, S, 3) uint8.
        draws: (B, 6) uniform in [0, 1): gain and offset of each stain.
        strength: gains in 1 +- 2 strength, offsets in +- strength (optical density); 0.05 is light, 0.2 heavy.

    Returns:
        (B, S, S, 3) uint8.
    """
    spread = 2 * draws - 1
    gain, offset = 1 + 2 * strength * spread[:, :3], strength * spread[:, 3:]
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    mixing = np.einsum("ij,bj,jk->bik", np.linalg.inv(unit), gain, unit)  # RGB density -> stains -> RGB density
    shift = (offset @ unit)[:, None, :]
    size = images.shape
    table = -torch.log((torch.arange(256, dtype=torch.float32, device=images.device) + 1) / 256)
    density = table[images.view(size[0], -1, 3).int()]
    matrix = torch.from_numpy(mixing).to(images.device, torch.float32)
    density = torch.baddbmm(torch.from_numpy(shift).to(images.device, torch.float32), density, matrix)
    return density.neg_().exp_().mul_(256).sub_(1).round_().clamp_(0, 255).to(torch.uint8).view(size)


def augment(
    images: torch.Tensor, names: Sequence[str], seed: int, epoch: int, index: np.ndarray, strength: float
) -> torch.Tensor:
    """Apply the named augmentations to a batch.

    Args:
        images: (B, S, S, 3) uint8.
        names: any of "d4", "stain"; "shift" is `random_shift`'s, before the model's view is taken.
        index: (B,) patch rows; with seed and epoch they key the draws.
        strength: of the stain jitter.

    Returns:
        (B, S, S, 3) uint8.
    """
    if not names:
        return images
    draws = counter_uniform(seed, epoch, index, 7)
    if "d4" in names:
        images = random_d4(images, draws[:, 0])
    if "stain" in names:
        images = random_stain(images, draws[:, 1:], strength)
    return images
