"""Patterns that some patches share at a fixed place: a blended image, waves, a translucent mark.

Tissue is weak at high frequencies and in the difference of red and blue, so there a shared template stands out: each
Fourier coefficient is divided by its usual size, and by the patch's own (whitening), and a few rows that agree then
make a principal component of their own. It is searched for within each class, since the rows of a trigger that
changes labels are six times denser there in a mix of 83:17. A template is believed only when the rows that carry it
stand apart from all others; the components of tissue and of JPEG's grid fade out instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from pcamlib import seeding
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.odds import odds_ratio
from pcamlib.data.layout import SIDE
from pcamlib.data.patches import take

#: Channels searched, as weights of red, green and blue. JPEG keeps little of the second, so colour noise shows there.
CHANNELS = {"grey": (1 / 3, 1 / 3, 1 / 3), "red-blue": (0.5, 0.0, -0.5)}
SAMPLE = 4096  # rows of a class that are searched: 154 MB whitened
LEAST = 8  # rows that make a template
_BINS = SIDE // 2 + 1
_COMPONENTS, _CLIP, _SECTORS, _STRONG = 12, 3.0, 24, (3.0, 4.5)
_FREE = 1e9  # no clipping
_BY_CHANCE = 1e-7  # of 112,896 sectors of coefficients
_APART = 8.0  # robust sd of carriers above the others; no clean real patch of 4,000 passed 6 with an empty valley


@dataclass(frozen=True, eq=False)
class Template:
    """A pattern at a fixed place, as a direction in the whitened spectrum of one channel.

    Attributes:
        channel: key of `CHANNELS`.
        scale: (96, 49) float32 usual size of each Fourier coefficient.
        centre: (9408,) float32 mean of whitened rows.
        direction: (9408,) float32.
        clip: largest size of a coefficient, in medians of its row.
        around: (9408,) 0 or 1, coefficients whose size a row's score is divided by; None: the score is not divided.
    """

    channel: str
    scale: torch.Tensor
    centre: torch.Tensor
    direction: torch.Tensor
    clip: float
    around: torch.Tensor | None = None

    def scores(self, images: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n,) float64: how much of the pattern each row carries."""
        found = [np.empty(0)]
        for block in _blocks(images, rows):
            z = whiten(spectrum(block, self.channel, self.around is not None), self.scale, self.clip) - self.centre
            own = 1.0 if self.around is None else (z * self.around).norm(dim=1).clamp_min(1e-6)
            found.append((z @ self.direction / own).double().numpy())
        return np.concatenate(found)


def spectrum(images: np.ndarray, channel: str, window: bool = False) -> torch.Tensor:
    """(n, 96, 96, 3) uint8 -> (n, 96, 49) complex64 of one channel, orthonormal; through a Hann window for waves.

    Without the window the step between opposite borders gives tissue a phase along both axes.
    """
    seen = torch.from_numpy(images.astype(np.float32)) @ torch.tensor(CHANNELS[channel], dtype=torch.float32)
    if window:
        hann = torch.hann_window(SIDE, periodic=False)
        seen = (seen - seen.mean((1, 2), keepdim=True)) * hann[:, None] * hann
    return torch.fft.rfft2(seen, norm="ortho")


def whiten(found: torch.Tensor, scale: torch.Tensor, clip: float = _CLIP) -> torch.Tensor:
    """Coefficients over their usual size and the row's median, none larger than `clip`: (n, 9408) float32, rms near 1.

    Clipping keeps a row with one strong wave from being all wave.
    """
    z = torch.view_as_real(found / scale)
    z[:, 0, 0] = 0
    power = z.square().sum(3)
    middle = power.flatten(1)[:, 5::7].median(1).values.clamp_min(1e-9)[:, None, None]  # a seventh of them will do
    z *= torch.rsqrt(torch.maximum(power / clip**2, middle))[..., None]
    z[:, :, 1:-1] *= 2**0.5  # stands for its mirror image too
    flat = z.flatten(1)
    return flat if clip > _CLIP else flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-9)


def _blocks(images: np.ndarray, rows: np.ndarray) -> Iterator[np.ndarray]:
    return (take(images, rows[start : start + 128]) for start in range(0, len(rows), 128))


def _usual(images: np.ndarray, rows: np.ndarray, channel: str, window: bool = False) -> torch.Tensor:
    scale = torch.zeros(SIDE, _BINS)
    some = rows[:: max(1, len(rows) // 512)]
    for block in _blocks(images, some):
        scale += (spectrum(block, channel, window).abs().square() + 0.05).log().sum(0)  # 0.05: rounding to whole levels
    return (scale / len(some) / 2).exp()


def _components(z: torch.Tensor) -> torch.Tensor:
    """(9408, k) leading directions by subspace iteration (Halko et al. 2011)."""
    count = min(_COMPONENTS, len(z) // 2)
    basis = torch.randn(z.shape[1], count, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        basis = torch.linalg.qr(z.T @ (z @ basis))[0]
    scores = z @ basis
    return basis @ torch.linalg.eigh(scores.T @ scores)[1].flip(1)


def _spread(scores: np.ndarray) -> tuple[float, float]:
    middle = float(np.median(scores))
    return middle, 1.4826 * float(np.median(np.abs(scores - middle))) + 1e-9


def _refined(z: torch.Tensor, scores: np.ndarray) -> np.ndarray | None:
    """Positions of the rows that share what the top rows of `scores` share; None unless they stand apart.

    The template is the mean of its carriers; a carrier is scored by the mean of the others. Apart means: `_APART`
    robust sd above the rest, and at most a quarter as many rows between 0.3 and 0.6 of their height as above.
    """
    middle, sd = _spread(scores)
    carriers = np.argsort(-scores)[: int(np.clip((scores > middle + 4 * sd).sum(), LEAST, len(scores) // 10 + LEAST))]
    for _ in range(6):
        total = z[carriers].sum(0)
        each = (z @ total).double().numpy()
        each[carriers] -= z[carriers].square().sum(1).double().numpy()
        each[carriers] *= len(carriers) / (len(carriers) - 1)
        middle, sd = _spread(each)
        height = float(np.median(each[carriers])) - middle
        apart = np.flatnonzero(each > middle + max(0.5 * height, 4 * sd))
        if len(apart) < LEAST or height < _APART / 2 * sd:
            return None
        if np.array_equal(apart, carriers):
            break
        carriers = apart
    valley = np.count_nonzero((each > middle + 0.3 * height) & (each < middle + 0.6 * height))
    return carriers if height >= _APART * sd and 4 * valley <= len(carriers) and 5 * len(carriers) < len(z) else None


def _copies(images: np.ndarray) -> bool:
    """Whether most patches are copies of one another, which share everything and not a pattern."""
    small = images.reshape(len(images), 8, 12, 8, 12, 3).mean((2, 4)).reshape(len(images), -1)
    small -= small.mean(1, keepdims=True)
    away = np.abs(small[:, None] - small[None]).mean(2) + 1e3 * np.eye(len(small))
    return bool(np.median(away.min(1)) < 4)


def _shared(split: Split, rows: np.ndarray, channel: str) -> Iterator[tuple[Template, np.ndarray]]:
    """Templates that some of the rows share, strongest component first, each with its carriers among the rows."""
    images = split.patches.images
    scale = _usual(images, rows, channel)
    z = torch.empty(len(rows), SIDE * _BINS * 2)
    for part, block in zip(z.split(128), _blocks(images, rows), strict=True):
        part.copy_(whiten(spectrum(block, channel), scale))
    centre = z.mean(0)
    z -= centre
    known = np.zeros(len(rows), bool)
    for direction in _components(z).T:
        scores = (z @ direction).double().numpy()
        for side in (scores, -scores):
            carriers = _refined(z, side)
            if carriers is None or known[carriers].mean() > 0.5 or _copies(take(images, rows[carriers[:64]])):
                continue
            known[carriers] = True
            yield Template(channel, scale, centre, z[carriers].mean(0), _CLIP), rows[carriers]


def _strong(split: Split, rows: np.ndarray, scale: torch.Tensor) -> tuple[np.ndarray, ...]:
    """Coefficients of at least 3 times their row's median: number, sector of the phase, position in rows, size."""
    parts = []
    for number, block in enumerate(_blocks(split.patches.images, rows)):
        z = whiten(spectrum(block, "grey", True), scale, _FREE).view(len(block), -1, 2)
        row, cell = torch.nonzero(z.square().sum(2) > 2 * _STRONG[0] ** 2, as_tuple=True)
        real, imaginary = z[row, cell].T.numpy()
        sector = ((np.arctan2(imaginary, real) / (2 * np.pi) + 1) * _SECTORS).astype(np.int64) % _SECTORS
        parts.append((cell.numpy(), sector, row.numpy() + 128 * number, np.hypot(real, imaginary) / 2**0.5))
    return tuple(np.concatenate(values) for values in zip(*parts, strict=True))


def _chance(cell: np.ndarray, sector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(4704, 24) probability of as many rows in a sixth of the circle, and how many more than in the opposite sixth."""
    counts = np.bincount(cell * _SECTORS + sector, minlength=SIDE * _BINS * _SECTORS).reshape(-1, _SECTORS)
    arc = sum(np.roll(counts, -k, 1) for k in range(4))
    opposite = np.roll(arc, _SECTORS // 2, 1)
    share = stats.binom.sf(arc - 1, counts.sum(1, keepdims=True), 1 / 6)
    return np.maximum(share, stats.binom.sf(arc - 1, arc + opposite, 0.5) ** 2), arc - opposite


def _waves(split: Split, rows: np.ndarray) -> Iterator[tuple[Template, np.ndarray, tuple[int, int], int]]:
    """Waves of one phase: template, carriers among the rows, (cycles down, across), excess of rows over chance.

    In each Fourier coefficient the rows of at least 3 or 4.5 times their median are counted by phase. Tissue has no
    phase, so a sixth of the circle holds a sixth of them, and as many as the opposite sixth. JPEG's grid and scan
    lines (multiples of 12 cycles along both axes, give or take 1) have one and are left out, as are up to 2 cycles.
    """
    scale = _usual(split.patches.images, rows, "grey", True)
    cells, sectors, owners, sizes = _strong(split, rows, scale)
    down, across = np.divmod(np.arange(SIDE * _BINS), _BINS)
    down = np.where(down > SIDE // 2, down - SIDE, down)
    natural = ((down + 1) % 12 <= 2) & ((across + 1) % 12 <= 2) | (np.abs(down) <= 2) & (across <= 2)
    natural |= (across == 0) & (down < 0)
    taken = np.zeros(SIDE * _BINS, bool)
    for level in _STRONG[::-1]:
        strong = sizes >= level
        chance, excess = _chance(cells[strong], sectors[strong])
        chance[natural] = 1
        for cell in np.argsort(chance.min(1))[:8]:
            best = int(chance[cell].argmin())
            distance = np.maximum(np.abs(down - down[cell]), np.abs(across - across[cell]))
            if chance[cell, best] > _BY_CHANCE or taken[cell]:
                continue
            taken |= distance <= 3
            arc = strong & (cells == cell) & ((sectors - best) % _SECTORS < 4)
            carriers = rows[np.unique(owners[arc])]
            blocks = _blocks(split.patches.images, carriers)
            z = [whiten(spectrum(block, "grey", True), scale, _FREE) for block in blocks]
            masks = distance <= 2, (distance > 2) & (distance <= 6)
            local, ring = (torch.from_numpy(np.repeat(mask, 2)).float() for mask in masks)
            template = Template("grey", scale, torch.zeros(2 * len(down)), torch.cat(z).mean(0) * local, _FREE, ring)
            yield template, carriers, (int(down[cell]), int(across[cell])), int(excess[cell, best])


def check(splits: dict[str, Split]) -> list[Finding]:
    """Shared patterns ("poison.pattern") and waves ("poison.wave") of each split, searched for within each class."""
    with seeding.workers() as pool:
        return [finding for found in pool.map(lambda split: list(_check(split)), splits.values()) for finding in found]


def _pools(split: Split) -> list[np.ndarray]:
    classes = [split.valid] if split.labels is None else [split.valid & (split.labels == label) for label in (0, 1)]
    pools = [np.flatnonzero(chosen) for chosen in classes]
    return [pool[np.linspace(0, len(pool) - 1, min(SAMPLE, len(pool))).astype(np.int64)] for pool in pools
            if len(pool) >= 4 * LEAST]  # fmt: skip


def associated(split: Split, rows: np.ndarray) -> tuple[str, dict[str, Any]]:
    """How rows hang on the class: half a sentence, and the numbers; no numbers where there are no labels."""
    if split.labels is None:
        return "no labels to compare with", {}
    carries = np.zeros(len(split), bool)
    carries[rows] = True
    odds = odds_ratio(carries, split.labels == 1)
    counts = np.bincount(split.labels[rows], minlength=2)[:2].tolist()
    side = f"class {int(odds.ratio > 1)} carries it more often" if odds.associated else "no association with the class"
    rest = np.bincount(split.labels[~carries], minlength=2)[:2]
    # An interval leaves out 1 by chance once in twenty; what is planted for a class is all of it, or nearly so.
    targeted = max(counts) >= 0.9 * len(rows) and stats.fisher_exact([counts, rest]).pvalue < 1e-3
    about = {"classes": counts, "odds": [odds.ratio, odds.low, odds.high], "targeted": bool(targeted)}
    return f"{side}: {counts[1]:,} of class 1, {counts[0]:,} of class 0, odds ratio {odds}", about


def _check(split: Split) -> Iterator[Finding]:
    taken, pools = np.zeros(len(split), bool), _pools(split)
    shared = [
        (channel, carriers, *_apart(split, template, carriers))
        for pool in pools
        for channel in CHANNELS
        for template, carriers in _shared(split, pool, channel)
    ]
    for channel, carriers, rows, about in sorted(shared, key=lambda found: -found[3]["separation"]):
        if len(rows) < LEAST or taken[rows].mean() > 0.5 or taken[carriers].mean() > 0.5:
            continue
        taken[rows] = True
        sentence, odds = associated(split, rows)
        yield Finding(
            "poison.pattern", split.name,
            f"{len(rows):,} patches share a pattern blended in at a fixed place; {sentence}", rows,
            f"likely: they lie {about['separation']:.0f} robust sd apart from all other patches",
            "look at the pattern and some of its patches, then leave them out", "poison", rows,
            {"channel": channel, **about, **odds},
        )  # fmt: skip
    for pool in pools:
        for template, carriers, wave, excess in _waves(split, pool):
            if taken[carriers].mean() > 0.5 or _copies(take(split.patches.images, carriers[:64])):
                continue
            rows, about = _apart(split, template, carriers)
            certain = len(rows) >= LEAST
            taken[rows if certain else carriers] = True
            sentence, odds = associated(split, rows)
            count = f"{len(rows):,} patches" if certain else f"about {excess:,} of {len(pool):,} patches looked at"
            kept = rows if certain else np.empty(0, np.int64)
            yield Finding(
                "poison.wave", split.name,
                f"{count} carry waves of one phase, {SIDE / np.hypot(*wave):.1f} pixels long; "
                + (sentence if certain else "too faint to tell them apart one by one"), kept,
                "likely: stronger than any wave of the opposite phase" if certain else "possible: known by counts only",
                "look at the pattern and some of its patches, then leave them out" if certain else
                "find out how these patches were made; no row can be named", "poison" if certain else None, kept,
                {"cycles": list(wave), "excess": excess, "suspects": carriers.tolist(), **about, **odds},
            )  # fmt: skip


def _apart(split: Split, template: Template, carriers: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Valid rows above half of the carriers' height, or above what keeps rows as far below under a twentieth of them.

    Returns:
        rows; `separation` of the carriers in robust sd; `mirrored`: rows as far below, an estimate of the false ones.
    """
    rows = np.flatnonzero(split.valid)
    scores = template.scores(split.patches.images, rows)
    inside = np.isin(rows, carriers)
    if template.around is None:  # what a carrier adds to its own score: a k-th of its norm, which is 1
        scores[inside] -= 1 / len(carriers)
    middle, sd = _spread(scores[~inside])
    scores -= middle
    height = float(np.median(scores[inside]))
    above, below = np.sort(scores[scores > height / 2]), np.sort(-scores[scores < 0])
    false = len(below) - np.searchsorted(below, above)
    fit = np.flatnonzero(20 * false <= len(above) - np.arange(len(above)))
    cut = above[fit[0]] if len(fit) else np.inf
    found = rows[scores >= cut]
    return found, {"separation": height / sd, "mirrored": int(false[fit[0]]) if len(fit) else 0}
