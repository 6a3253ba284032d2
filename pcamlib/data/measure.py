"""The pixel measurements behind `features.py`, block by block: 18 numbers a patch, finite for any pixels.

Optical density is -log10((value + 1) / 256), parted into stains with the vectors of Ruifrok and Johnston 2001. Being
linear, its mean over 2x2 pixels is the logarithm of their product: a quarter of the logarithms.
"""

from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import torch

from pcamlib import sources
from pcamlib.data import scan
from pcamlib.data.augment import STAINS
from pcamlib.data.layout import SIDE, Stored
from pcamlib.files import digest

#: By name: unit and what it is. Each is measured over the patch; those of `CENTRED` also over its parts.
MEASURED = {
    "brightness": ("0..1", "mean luminance (ITU-R 601)"),
    "contrast": ("0..1", "standard deviation of luminance"),
    "saturation": ("0..1", "mean HSV saturation"),
    "hue": ("degrees", "hue of the mean colour, from magenta: below 0 to purple and blue, above to pink and red"),
    "haematoxylin": ("OD", "mean optical density (log10) of haematoxylin, Ruifrok-Johnston"),
    "eosin": ("OD", "mean optical density (log10) of eosin, Ruifrok-Johnston"),
    "white_share": ("0..1", "share of pixels with every channel at 220 or above: glass or fat"),
    "black_share": ("0..1", "share of pixels with every channel at 20 or below"),
    "sharpness": ("log10", "log10(1 + variance of the Laplacian of luminance, in grey levels); low: blurred"),
    "entropy": ("bits", "entropy of luminance in 64 levels"),
    "nuclei": ("per mm2", "nuclei, estimated: peaks of haematoxylin 4 um or more apart; crowded ones are undercounted"),
}
#: Measured also as the centre 32x32, which decides the label, minus what surrounds it.
CENTRED = ("brightness", "saturation", "haematoxylin", "eosin", "sharpness", "entropy", "nuclei")

_CHUNK = 64  # patches at once: 16 would stay in a core's cache, but two threads then wait for each other (GIL)
_HALF = SIDE // 2
_MM2 = (2 * 0.972e-3) ** 2  # of a pixel of the half-resolution map; level 2 of slides scanned at 0.243 um
_STANDS_OUT = 0.08  # OD, of a nucleus over its surround; chosen by eye on a few real patches
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_UNMIX = torch.from_numpy(np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)).T / log(10)).float()


def _gaussian(sigma: float) -> torch.Tensor:
    """(48, 48) weights that smooth one axis of the half-resolution map; beyond the border counts as unknown."""
    at = torch.arange(_HALF, dtype=torch.float32)
    distance = (at[:, None] - at).abs() / sigma
    weights = torch.exp(-(distance**2) / 2) * (distance < 4)  # what is further off would be denormal, and slow
    return weights / weights.sum(1, keepdim=True)


_FINE, _COARSE = _gaussian(0.8), _gaussian(4)  # 1.6 and 8 um
_SLOPE = 1e-7 * torch.arange(_HALF * _HALF, dtype=torch.float32).view(_HALF, _HALF)  # OD; of equal peaks one is higher
# where each pixel's histogram of 64 levels starts: two a patch, surround and centre
_BINS = torch.arange(0, 128 * _CHUNK, 128, dtype=torch.int32).view(-1, 1, 1).repeat(1, SIDE, SIDE)
_BINS[:, SIDE // 3 : 2 * SIDE // 3, SIDE // 3 : 2 * SIDE // 3] += 64


def measured(stored: Stored) -> tuple[np.ndarray, np.ndarray]:
    """The measurements of every row of an x file, in one streaming pass; or as an earlier pass left them in the cache.

    Returns:
        (N, 18) float32, `MEASURED` and then `CENTRED`; (N, 3) float32, mean optical density of haematoxylin, eosin and
        the residual stain.

    Raises:
        DataError, PcamError: as `scan.observe`.
    """
    columns = scan.observe(stored, f"features-{digest(sources.digests(Path(__file__)))[:8]}", observe)
    return columns["values"], columns["density"]


def observe(start: int, raw: np.ndarray, images: np.ndarray, flags: np.ndarray) -> dict[str, np.ndarray]:
    """`values` and `density` of one block, as `measured` returns them; arguments as `scan.Observer`."""
    parts = [_measure(images[first : first + _CHUNK]) for first in range(0, len(images), _CHUNK)]
    values, density = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return {"values": values, "density": density}


def _measure(images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 96, 96, 3) uint8 -> (B, 18) and (B, 3) float32."""
    planes = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 0, 1, 2)))
    high, low, colour = planes.amax(0), planes.amin(0), planes.float()
    grey = torch.mv(colour.view(3, -1).T, _LUMA).view(low.shape)
    mean = colour.mean((2, 3))
    tint = 60 * (mean[0] - mean[2]) / (mean.amax(0) - mean.amin(0)).clamp(min=1)
    density = _density(colour.add_(1))
    haematoxylin, eosin, residual = (_parts(plane) for plane in density)
    brightness = _parts(grey)
    parts = {  # (3, B): patch, centre, surround
        "brightness": brightness / 255,
        "saturation": _parts((high - low).float().div_(high.clamp(min=1))),
        "haematoxylin": haematoxylin,
        "eosin": eosin,
        "sharpness": _sharpness(grey),
        "entropy": _entropy(grey),
        "nuclei": _parts(_peaks(density[0])) / _MM2,
    }
    whole = {name: values[0] for name, values in parts.items()} | {
        "contrast": (_parts(grey.square())[0] - brightness[0].square()).clamp(min=0).sqrt() / 255,
        "hue": tint,
        "white_share": _share(low.numpy() >= 220),
        "black_share": _share(high.numpy() <= 20),
    }
    columns = [whole[name] for name in MEASURED] + [parts[name][1] - parts[name][2] for name in CENTRED]
    return torch.stack(columns, 1), torch.stack([haematoxylin[0], eosin[0], residual[0]], 1)


def _parts(plane: torch.Tensor, border: int = 0) -> torch.Tensor:
    """(B, S, S) -> (3, B): mean over all, over the centre ninth, over the rest; `border` is what is cut off already."""
    side = plane.shape[-1]
    third = (side + 2 * border) // 3
    centre = plane[:, third - border : 2 * third - border, third - border : 2 * third - border]
    inside, total = centre.sum((1, 2)), plane.sum((1, 2))
    n, m = side * side, centre[0].numel()
    return torch.stack([total / n, inside / m, (total - inside) / (n - m)])


def _share(mask: np.ndarray) -> torch.Tensor:
    """(B, 96, 96) bool -> (B,) share that is true; whole arrays are counted ten times as fast as along axes."""
    return torch.tensor([np.count_nonzero(patch) for patch in mask]) / (SIDE * SIDE)


def _density(light: torch.Tensor) -> torch.Tensor:
    """(3, B, 96, 96) in 1..256 -> (3, B, 48, 48): mean optical density of each stain over 2x2 pixels."""
    light = light[:, :, ::2] * light[:, :, 1::2]
    light = (light[..., ::2] * light[..., 1::2]).log_().div_(-4).add_(log(256))  # at most 256**4: exact enough
    return (_UNMIX @ light.view(3, -1)).view(light.shape)


def _sharpness(grey: torch.Tensor) -> torch.Tensor:
    """(B, 96, 96) -> (3, B)."""
    laplacian = grey[:, 1:-1, 1:-1] * -4
    for shifted in (grey[:, :-2, 1:-1], grey[:, 2:, 1:-1], grey[:, 1:-1, :-2], grey[:, 1:-1, 2:]):
        laplacian += shifted
    variance = _parts(laplacian.square(), 1) - _parts(laplacian, 1).square()
    return torch.log10(1 + variance.clamp(min=0))


def _entropy(grey: torch.Tensor) -> torch.Tensor:
    """(B, 96, 96) -> (3, B) bits."""
    place = (grey / 4).to(torch.int32).add_(_BINS[: len(grey)])
    counts = torch.from_numpy(np.bincount(place.view(-1).numpy(), minlength=128 * len(grey))).view(-1, 2, 64).float()
    counts = torch.stack([counts.sum(1), counts[:, 1], counts[:, 0]])
    total = counts.sum(-1)
    return (total.log() - (counts * counts.clamp(min=1).log()).sum(-1) / total).clamp(min=0) / log(2)


def _peaks(stain: torch.Tensor) -> torch.Tensor:
    """(B, 48, 48) optical density -> (B, 48, 48) float32, 1 at each nucleus: stands out, and highest within 4 um."""
    relief = _FINE @ stain @ _FINE.T - _COARSE @ stain @ _COARSE.T + _SLOPE
    top = relief
    for axis in (1, 2):
        before, top = top, top.clone()
        for step in (1, 2):
            for here, there in ((0, step), (step, 0)):
                part = top.narrow(axis, here, _HALF - step)
                torch.maximum(part, before.narrow(axis, there, _HALF - step), out=part)
    return ((relief == top) & (relief > _STANDS_OUT)).float()
