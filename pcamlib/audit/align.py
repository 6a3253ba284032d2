"""How one patch lies on another: view and shift by phase correlation, then agreement of the pixels over the overlap.

Phase correlation (Kuglin and Hines 1975) weighs every frequency alike, so that neither a bright block nor a wave or
noise blended into both patches decides where they meet; a Hann window keeps the border, which a shift fills anew, out.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from pcamlib.data.augment import d4
from pcamlib.data.layout import PATCH_BYTES, SIDE

CYCLES = 16  # a patch: the finest frequency used, 6 pixels a wave, which JPEG of quality 50 spares
REACH = 18  # pixels: the largest shift along either axis; patches of one slide lie 16 apart
_TILE = 32  # pixels: agreement is taken in nine tiles
_BAND = (1.0, 6.0)  # pixels: the two Gaussians whose difference is compared
_WAVES = CYCLES + 1


@cache
def _waves() -> torch.Tensor:
    """(288, 34) float32 on a row of pixels, R, G, B: cosines and sines of 0 to 16 cycles about its middle, windowed."""
    place = torch.arange(SIDE, dtype=torch.float64)[:, None] + 0.5 - SIDE / 2
    angle = 2 * torch.pi / SIDE * place * torch.arange(_WAVES)
    waves = torch.cat([angle.cos(), angle.sin()], 1) * torch.cos(torch.pi / SIDE * place) ** 2
    return waves.float().repeat_interleave(3, 0) / 3


@cache
def disc() -> torch.Tensor:
    """(33, 17) bool: frequencies in use by cycles down, -16 to 16, and right, 0 to 16.

    The lowest, up to one cycle along both axes, are left out: the window spills the mean brightness into them.
    """
    radius = torch.arange(-CYCLES, _WAVES)[:, None] ** 2 + torch.arange(_WAVES) ** 2
    return (radius > 2) & (radius <= CYCLES**2 + 1)


def spectra(flat: torch.Tensor) -> torch.Tensor:
    """Windowed Fourier transform of the grey patches, origin in the middle.

    Args:
        flat: (B, 27648) float32, HWC.

    Returns:
        (B, 33, 17) complex64, in the order of `disc`; the other half plane is its conjugate.
    """
    waves = _waves()
    rows = (flat.reshape(-1, 3 * SIDE) @ waves).view(len(flat), SIDE, 2 * _WAVES)
    both = (waves[::3].T * 3) @ rows
    cc, cs, sc, ss = (quarter for half in both.chunk(2, 1) for quarter in half.chunk(2, 2))
    down, up = torch.complex(cc - ss, -cs - sc), torch.complex(cc + ss, sc - cs)
    return torch.cat([up[:, 1:].flip(1), down], 1)


@cache
def _steps() -> tuple[torch.Tensor, torch.Tensor]:
    """What a shift of -REACH to REACH pixels does to each frequency: (37, 33) and (17, 37) complex64."""
    shift = torch.arange(-REACH, REACH + 1)
    turn = 2 * torch.pi / SIDE * shift[:, None] * torch.arange(-CYCLES, _WAVES)
    steps = torch.polar(torch.ones_like(turn), turn)
    return steps, steps[:, CYCLES:].T.contiguous()


def register(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View and shift that turn the first patches into the second.

    Args:
        first: (P, 33, 17) `spectra`; `second` likewise.

    Returns:
        (P,) element of D4, as `augment.d4` numbers them; (P, 2) pixels down and right; (P,) height of the phase
        correlation, 1 for equal patches, 0.19 for the median pair of unlike ones.
    """
    weight = disc().float()
    weight[:, 0] /= 2  # a frequency and its conjugate lie both in this column
    first, second = torch.sgn(first), torch.sgn(second) * (weight / weight.sum())
    whole = torch.cat([first[:, :, 1:].flip(1, 2).conj(), first], 2)[..., None]
    views = torch.stack([d4(whole, element)[:, :, CYCLES:, 0] for element in range(8)], 1)
    cross = views.conj() * second[:, None]
    down, right = _steps()
    height, best = (down @ cross @ right).real.flatten(1).max(1)
    side = 2 * REACH + 1
    return best // side**2, torch.stack([best // side % side, best % side], 1) - REACH, height


@cache
def _gauss() -> list[torch.Tensor]:
    """Two (96, 96) blurs, cut off at four deviations: subnormal tails would make them ten times as slow."""
    apart = (torch.arange(SIDE)[:, None] - torch.arange(SIDE)).abs()
    return [torch.exp(-(apart**2) / (2 * sigma**2)) * (apart <= 4 * sigma) for sigma in _BAND]


def _band(grey: torch.Tensor, down: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(P, 96, 96): difference of two Gaussians that see only the pixels of the mask, 0 elsewhere."""
    mask = down[:, :, None] * right[:, None]
    fine, coarse = (
        (g @ (grey * mask) @ g) / ((down @ g)[:, :, None] * (right @ g)[:, None]).clamp_min(1e-6) for g in _gauss()
    )
    return (fine - coarse) * mask


def turned(grey: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """(P, S, S) patches, each under its own element of D4."""
    return torch.stack([d4(g[None, ..., None], int(v))[0, ..., 0] for g, v in zip(grey, view, strict=True)])


def agreement(first: torch.Tensor, second: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """How well the first patches, moved by `shift`, agree with the second where both show tissue.

    Args:
        first: (P, 96, 96) float32 grey, turned already; `second` likewise.
        shift: (P, 2) pixels down and right.

    Returns:
        (P, 3) float32: correlation of the band-passed pixels over the overlap; the median of the same over nine tiles,
        so that no single spot decides; brightness of the second over that of the first.
    """
    place = torch.arange(SIDE) - shift[..., None]  # (P, 2, 96): where a pixel of the second lies in the first
    down, right = ((place >= 0) & (place < SIDE)).float().unbind(1)
    y, x = place.clamp(0, SIDE - 1).unbind(1)
    moved = first[torch.arange(len(first))[:, None, None], y[:, :, None], x[:, None]]
    a, b = _band(moved, down, right), _band(second, down, right)
    sums = functional.avg_pool2d(torch.stack([a * b, a * a, b * b], 1), _TILE)
    tiles = sums[:, 0] / (sums[:, 1] * sums[:, 2]).sqrt().clamp_min(1e-6)
    total = sums.sum((2, 3))
    whole = total[:, 0] / (total[:, 1] * total[:, 2]).sqrt().clamp_min(1e-6)
    mask = down[:, :, None] * right[:, None]
    gain = (second * mask).sum((1, 2)) / (moved * mask).sum((1, 2)).clamp_min(1)
    return torch.stack([whole, tiles.flatten(1).median(1).values, gain], 1)


def phash(grey: torch.Tensor) -> torch.Tensor:
    """Perceptual hash: signs of the 8x8 lowest cosines of the 32x32 mean, about their median; (P, 64) bool."""
    place = (torch.arange(32) + 0.5) * torch.pi / 32
    cosines = torch.cos(torch.arange(8)[:, None] * place)
    low = (cosines @ functional.avg_pool2d(grey[:, None], 3)[:, 0] @ cosines.T).flatten(1)
    return low > low.median(1, keepdim=True).values


def grey(flat: torch.Tensor) -> torch.Tensor:
    """(B, 27648) HWC to (B, 96, 96): mean of the channels, added one by one, five times as fast as `mean`."""
    red, green, blue = flat.view(-1, PATCH_BYTES // 3, 3).unbind(2)
    return ((red + green + blue) / 3).view(-1, SIDE, SIDE)
