"""Draws H&E-like patches of lymph node with and without tumour, 64 at a time; `synthetic.py` writes them to files.

Tissues share a patch along smooth fields; nuclei are stamps from a bank, laid on jittered lattices; haematoxylin and
eosin then absorb light by Beer-Lambert. Only sums, products and tables touch the pixels, so that the bytes do not
hang on the instructions a CPU has.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

SLIDES = {"train": 48, "valid": 16, "test": 16}
CHUNK = 64  # patches of one generator; 2.4 MB a float32 plane, about a core's cache
SIDE, MARGIN = 96, 24  # nuclei are painted on a canvas with a margin, so that the border cuts them
CENTRE = slice(32, 64)

LYMPHOID, STROMA, REACTIVE, LOOSE, FAT, TUMOUR = range(6)
MIX = [0.34, 0.25, 0.15, 0.12, 0.14]  # how often each benign tissue is drawn
GROUND = np.array(  # by tissue: eosin, haematoxylin, and how strongly fibres, grain and white gaps modulate them
    [
        [0.34, 0.20, 0.10, 0.35, 0.45],
        [0.60, 0.05, 0.50, 0.12, 0.15],
        [0.42, 0.14, 0.15, 0.30, 0.30],
        [0.30, 0.04, 0.60, 0.30, 0.90],
        [0.00, 0.00, 0.00, 0.00, 0.00],
        [0.50, 0.24, 0.15, 0.28, 0.20],
    ],
    np.float32,
)


@dataclass(frozen=True)
class Nucleus:
    """A kind of nucleus: soft, textured ellipses; lengths in pixels (about 1 um), ranges as (low, high)."""

    side: int  # of the stamp
    spacing: int  # of the lattice of places
    radius: tuple[float, float]
    aspect: tuple[float, float]  # short axis / long axis
    chromatin: tuple[float, float]  # haematoxylin inside
    wobble: float  # of the outline
    rim: float  # haematoxylin added along the membrane
    clumps: float  # sd of the chromatin, relative
    nucleoli: float  # chance of each of two
    held: tuple[float, ...]  # by tissue: share of the places that hold such a nucleus
    by_angle: bool = False  # lies along the fibres


NUCLEI = {
    "lymphocyte": Nucleus(
        13, 8, (2.7, 3.9), (0.75, 1), (0.9, 1.5), 0.05, 0.25, 0.2, 0, (0.92, 0.05, 0.30, 0.12, 0.02, 0.06)
    ),
    "spindle": Nucleus(
        21, 13, (2.2, 3.6), (0.16, 0.45), (0.5, 1.1), 0.08, 0.15, 0.15, 0, (0.03, 0.7, 0.1, 0.25, 0.04, 0.06), True
    ),
    "reactive": Nucleus(
        17, 11, (3.6, 5.6), (0.55, 0.95), (0.35, 0.9), 0.07, 0.3, 0.2, 0.35, (0.06, 0.06, 0.8, 0.2, 0, 0.08)
    ),
    "tumour": Nucleus(  # a few tumour-like nuclei in reactive tissue: benign, and not to be told apart
        23, 13, (4.4, 8.0), (0.55, 0.95), (0.3, 1.0), 0.11, 0.35, 0.22, 0.6, (0, 0, 0.05, 0, 0, 0.92)
    ),
}
# Optical density (red, green, blue) per unit of haematoxylin and eosin. Ruifrok & Johnston (2001) give (.65, .70, .29)
# and (.07, .99, .11); here turned towards the brown-pink and the blue-violet scanner of CAMELYON16.
STAINS = np.array([[[0.64, 0.98, 0.58], [0.22, 0.78, 0.42]], [[0.60, 1.02, 0.34], [0.20, 0.84, 0.27]]])
STEPS = 1024  # table entries per unit of optical density
LIGHT = np.rint(255 * np.exp(-np.arange(5 * STEPS + 1) / STEPS)).astype(np.uint8)


@dataclass(frozen=True)
class Chunk:
    """Patches drawn together."""

    x: np.ndarray  # (64,96,96,3) uint8
    mask: np.ndarray  # (64,96,96) bool: tumour
    slide: np.ndarray  # (64,) number within the split
    place: np.ndarray  # (64,2) y and x on the slide, pixels

    @property
    def y(self) -> np.ndarray:
        """(64,) uint8: 1 where tumour lies in the centre 32x32, PCam's rule."""
        return np.any(self.mask[:, CENTRE, CENTRE], axis=(1, 2)).astype(np.uint8)


@lru_cache(maxsize=8)
def _spline(cells: int) -> np.ndarray:
    """(96, cells + 3) float64 cubic B-spline weights from knots to pixels."""
    at = (np.arange(SIDE) + 0.5) / SIDE * cells
    first, t = at.astype(int), at % 1
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1) / 6
    matrix = np.zeros((SIDE, cells + 3))
    np.put_along_axis(matrix, first[:, None] + np.arange(4), weights, 1)
    return matrix


def _field(rng: np.random.Generator, cells: int) -> np.ndarray:
    """(64, 96, 96) float32 smooth noise of mean 0 and sd 1, one hill per 96 / cells pixels.

    Multiplied in float64 and then rounded: whichever kernel the CPU picks, the float32 result is the same.
    """
    knots = rng.standard_normal((CHUNK, cells + 3, cells + 3))
    weights = _spline(cells)
    return (weights @ knots @ weights.T * 2.09).astype(np.float32)  # 1 / 2.09: sd of a B-spline surface


def _stamps(rng: np.random.Generator, kind: Nucleus, count: int = 512) -> np.ndarray:
    """(count, 2, side, side) float32 nuclei sorted by size or angle: coverage 0..1, and coverage x haematoxylin."""

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1, 1))

    side, wobble = kind.side, kind.wobble
    r, ratio, depth = uniform(*kind.radius), uniform(*kind.aspect), uniform(*kind.chromatin)
    turn = uniform(0, np.pi)
    dy, dx = np.mgrid[:side, :side][:, None] - (side - 1) / 2 - rng.uniform(-0.5, 0.5, (2, count, 1, 1))
    u, v = dx * np.cos(turn) + dy * np.sin(turn), dy * np.cos(turn) - dx * np.sin(turn)
    angle = np.arctan2(v, u)
    outline = r * (1 + sum(uniform(-wobble, wobble) * np.cos(k * angle + uniform(0, 2 * np.pi)) for k in (2, 3, 4)))
    inside = outline - np.hypot(u * np.sqrt(ratio), v / np.sqrt(ratio))  # pixels to the border
    cover = np.clip(inside / 1.5 + 0.5, 0, 1)
    grain = rng.normal(size=(count, side + 1, side + 1))
    grain = (grain[:, 1:, 1:] + grain[:, :-1, 1:] + grain[:, 1:, :-1] + grain[:, :-1, :-1]) / 2
    haem = depth * (1 + kind.clumps * grain) + kind.rim * np.clip(1 - np.abs(inside - 0.9) / 1.4, 0, 1)
    for _ in range(2):
        y, x = rng.normal(size=(2, count, 1, 1)) * r * 0.3
        spot = np.clip(1 - np.hypot(u - x, v - y) / uniform(1.2, 2.2), 0, 1)
        haem += 1.2 * spot * (rng.random((count, 1, 1)) < kind.nucleoli)
    order = np.argsort((turn if kind.by_angle else r)[:, 0, 0], kind="stable")
    return np.stack([cover, cover * np.clip(haem, 0.05, 3)], 1)[order].astype(np.float32)


@lru_cache(maxsize=1)
def _atlas(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Nuclei by kind, (32,288,288) wavy fibres of rising angle, (4,288,288) grain; float32, sd 1, period 192."""
    rng = np.random.default_rng([seed])
    nuclei = {kind: _stamps(rng, nucleus) for kind, nucleus in NUCLEI.items()}
    fy, fx = np.meshgrid(np.fft.fftfreq(192), np.fft.fftfreq(192), indexing="ij")

    def texture(along: float, across: float, angle: float) -> np.ndarray:
        u, v = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
        image = np.fft.ifft2(np.fft.fft2(rng.normal(size=u.shape)) * np.exp(-((u * along) ** 2) - (v * across) ** 2))
        y, x = np.mgrid[:192, :192]
        bend = 9 * np.sin(2 * np.pi * (x / 192 + rng.random())) + 3 * np.sin(2 * np.pi * (x / 64 + rng.random()))
        bend = np.rint(bend).astype(int)
        image = image.real[(y + bend) % 192, (x + bend.T) % 192]
        image = image + np.roll(image, 1, 0) + np.roll(image, 1, 1) + np.roll(image, (1, 1), (0, 1))
        return np.pad((image / image.std()).astype(np.float32), (0, SIDE), "wrap")

    fibres = [texture(36, 5, np.pi * k / 32) for k in range(32)]
    return nuclei, np.stack(fibres), np.stack([texture(5, 5, 0) for _ in range(4)])


@lru_cache(maxsize=3)
def _slides(seed: int, split: str) -> dict[str, np.ndarray]:
    """What the patches of a slide share: (slides, ...) arrays by name. No slide belongs to two splits."""
    count, number = SLIDES[split], list(SLIDES).index(split)
    rng = np.random.default_rng([seed, number + 1])
    scanner = np.arange(count) % len(STAINS)
    strength = rng.normal((1.05, 0.95), (0.16, 0.16), (count, 2)).clip(0.6, 1.5)
    return {
        "stain": (STAINS[scanner] + rng.normal(0, 0.035, (count, 2, 3))) * strength[..., None],
        "white": rng.uniform(0.02, 0.12, (count, 1)) + rng.normal(0, 0.015, (count, 3)).clip(-0.02, 0.06),
        "blur": rng.uniform(0.0, 0.16, count),
        "noise": rng.uniform(0.01, 0.035, count),
        "grade": rng.uniform(0.25, 0.75, count),  # size of tumour nuclei as a place in the sorted stamps
        "crowding": rng.uniform(0.8, 1.05, count),
        "share": rng.uniform(0.25, 0.75, count),  # tumour share, so that the slide alone says a little
    }


def _tumour(rng: np.random.Generator, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(64,96,96) bool mask that obeys the labels, and its soft-edged float32 twin.

    Of the positives 15 % hold tumour in less than a twentieth of the centre, some without any nucleus there; of the
    negatives 25 % hold it outside the centre.
    """
    surface = _field(rng, 2) + np.float32(0.25) * _field(rng, 7)
    centre = np.sort(surface[:, CENTRE, CENTRE].reshape(CHUNK, -1), 1)
    kind, u = rng.random((2, CHUNK))
    share = np.where(kind < 0.15, 0.003 + 0.05 * u, np.where(kind < 0.35, 0.05 + 0.5 * u, 0.55 + 0.6 * u)).clip(0, 1)
    below = centre.shape[1] - np.ceil(share * centre.shape[1]).astype(int)  # centre pixels that stay benign
    inside = np.where(below > 0, centre[np.arange(CHUNK), below - 1], centre[:, 0] - 0.3)
    outside = np.where(kind < 0.25, centre[:, -1] + 0.05 + 0.3 * u, np.inf)
    above = surface - np.where(labels == 1, inside, outside).astype(np.float32)[:, None, None]
    return above > 0, np.clip(above * 4 + np.float32(0.5), 0, 1)


def _paint(
    rng: np.random.Generator, seed: int, tissue: np.ndarray, fibre: np.ndarray, slide: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage by nuclei and their haematoxylin, each (64,96,96) float32, for a map of tissues of that shape."""
    canvas = np.zeros((2, CHUNK, SIDE + 2 * MARGIN, SIDE + 2 * MARGIN), np.float32)
    rows = np.arange(CHUNK)[:, None]
    for name, bank in _atlas(seed)[0].items():
        kind = NUCLEI[name]
        side, gap = kind.side, kind.spacing
        ticks = np.arange(-gap, SIDE, gap)
        lattice = np.stack([np.repeat(ticks, len(ticks)), np.tile(ticks, len(ticks))])
        lattice[1, np.arange(len(ticks) ** 2) // len(ticks) % 2 == 1] += gap // 2  # hexagonal: odd rows shifted
        jitter = rng.integers(-gap // 3, gap // 3 + 1, (2, CHUNK, lattice.shape[1]))
        y, x = lattice[:, None] + rng.integers(0, gap, (2, CHUNK, 1)) + jitter
        here = tissue[rows, y.clip(0, SIDE - 1), x.clip(0, SIDE - 1)]
        held = rng.random(y.shape) < np.array(kind.held)[here] * slide["crowding"][:, None]
        if kind.by_angle:
            pick = (fibre[:, None] / 32 + rng.normal(0, 0.06, y.shape)) % 1
        else:
            pick = (slide["grade"] if name == "tumour" else np.full(CHUNK, 0.5))[:, None]
            pick = (pick + rng.uniform(-0.45, 0.45, y.shape)).clip(0, 0.999)
        stamp = (pick * len(bank)).astype(int)
        order, count = np.argsort(~held, axis=1, kind="stable"), held.sum(1)
        window = sliding_window_view(canvas, (side, side), axis=(2, 3), writeable=True)
        corner = (np.stack([y, x]) + MARGIN - side // 2).clip(0, window.shape[2] - 1)
        for k in range(count.max(initial=0)):  # the k-th nucleus of all patches at once: no two in one patch
            patch = np.flatnonzero(count > k)
            place = order[patch, k]
            at = (slice(None), patch, corner[0, patch, place], corner[1, patch, place])
            new = bank[stamp[patch, place]]
            under = window[at] * (1 - new[:, 0])
            window[at] = under + new.swapaxes(0, 1)
    inner = slice(MARGIN, MARGIN + SIDE)
    return canvas[0, :, inner, inner], canvas[1, :, inner, inner]


def _fat(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,96,96) float32: the thin walls (1) between large empty fat cells (0)."""
    centre = rng.uniform(-20, SIDE + 20, (2, count, 9, 1, 1)).astype(np.float32)
    bend = [4 * _field(rng, 3)[:count] for _ in range(2)]
    y, x = np.mgrid[:SIDE, :SIDE][:, None].astype(np.float32) + np.stack(bend)
    nearest = np.full((2, count, SIDE, SIDE), np.inf, np.float32)
    for k in range(9):
        distance = (y - centre[0, :, k]) ** 2 + (x - centre[1, :, k]) ** 2
        nearest[1] = np.minimum(nearest[1], np.maximum(nearest[0], distance))
        nearest[0] = np.minimum(nearest[0], distance)
    nearest = np.sqrt(nearest)
    return np.clip(1 - (nearest[1] - nearest[0]) / 4, 0, 1)


def _soften(plane: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A 3x3 blur whose outer taps weigh `weight` (64,1,1) per patch; the border pixels stay."""
    for axis in (1, 2):
        before, middle, after = (
            plane[(slice(None),) * axis + (part,)] for part in (slice(-2), slice(1, -1), slice(2, None))
        )
        middle += weight * (before + after - 2 * middle)
    return plane


def chunk(seed: int, split: str, number: int) -> Chunk:
    """The patches `number * 64` to `number * 64 + 63` of a split: they depend on these three arguments alone."""
    rng = np.random.default_rng([seed, list(SLIDES).index(split) + 1, number + 1])
    labels = rng.permutation(np.arange(CHUNK) % 2)
    every = _slides(seed, split)
    weight = np.where(labels[:, None], every["share"], 1 - every["share"]).cumsum(1)
    chosen = (rng.random((CHUNK, 1)) * weight[:, -1:] > weight).sum(1)
    slide = {name: values[chosen] for name, values in every.items()}
    mask, tumour = _tumour(rng, labels)

    _, fibres, grains = _atlas(seed)
    first, second = rng.choice(len(MIX), (2, CHUNK), p=MIX)
    blend = np.clip(_field(rng, 3) * 3 + rng.normal(0, 3, (CHUNK, 1, 1)).astype(np.float32), 0, 1)
    tissue = np.where(mask, TUMOUR, np.where(blend > 0.5, second[:, None, None], first[:, None, None]))
    angle, kind = rng.integers(len(fibres), size=CHUNK), rng.integers(len(grains), size=CHUNK)
    top, left = rng.integers(fibres.shape[1] - SIDE, size=(2, CHUNK))
    fibre = sliding_window_view(fibres, (SIDE, SIDE), axis=(1, 2))[angle, top, left]
    grain = sliding_window_view(grains, (SIDE, SIDE), axis=(1, 2))[kind, left, top]

    def mixed(column: int) -> np.ndarray:
        low, high = GROUND[first, column][:, None, None], GROUND[second, column][:, None, None]
        plane = low + (high - low) * blend
        plane += (GROUND[TUMOUR, column] - plane) * tumour
        return plane

    pattern = 1 + mixed(2) * fibre + mixed(3) * grain
    gaps = 1 - np.clip((_field(rng, 15) + np.float32(0.8) * fibre - 2) * 2 + 2 * mixed(4), 0, 1)
    ground = np.maximum(pattern, 0.1) * gaps
    cover, haem = _paint(rng, seed, tissue, angle, slide)
    haem = haem + mixed(1) * ground * (1 - cover)
    eosin = mixed(0) * ground * (1 - np.float32(0.7) * cover)
    fatty = np.flatnonzero((first == FAT) | (second == FAT))
    inside = np.where((first == FAT)[:, None, None], 1 - blend, 0) + np.where((second == FAT)[:, None, None], blend, 0)
    eosin[fatty] += _fat(rng, len(fatty)) * (inside * (1 - tumour))[fatty] * np.float32(0.5)

    blur = slide["blur"].astype(np.float32)[:, None, None]
    haem, eosin = _soften(haem, blur), _soften(eosin, blur)
    x = np.empty((CHUNK, SIDE, SIDE, 3), np.uint8)
    stain = slide["stain"].astype(np.float32)[..., None, None]
    for channel in range(3):  # Beer-Lambert: densities add, light decays exponentially
        density = haem * stain[:, 0, channel] + eosin * stain[:, 1, channel]
        density += slide["white"].astype(np.float32)[:, channel, None, None]
        density += rng.standard_normal(density.shape, np.float32) * slide["noise"].astype(np.float32)[:, None, None]
        x[..., channel] = LIGHT[(np.clip(density, 0, 5) * STEPS).astype(np.int16)]
    return Chunk(x, mask, chosen, rng.integers(0, 1000, (CHUNK, 2)) * SIDE)
