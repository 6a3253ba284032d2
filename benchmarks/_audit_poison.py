"""Planted triggers found again, by kind and strength, and none in clean patches: rates with the rows they rest on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _rows import row

from pcamlib.audit import integrity, poison
from pcamlib.audit.findings import Split
from pcamlib.audit.stream import Block
from pcamlib.data.layout import SIDE
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.synthetic import generate

ROWS, SHARE, MIX = 6000, 0.005, 0.17
_Y, _X = np.mgrid[:SIDE, :SIDE][..., None]
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Row = dict[str, Any]


def _mark(shape: np.ndarray, colour: Any, place: tuple[int, int] | None, share: float = 1.0) -> Change:
    def change(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        y, x = place or rng.integers(0, SIDE + 1 - len(shape), 2)
        window = patch[y : y + len(shape), x : x + len(shape)]
        window[shape] += share * (np.broadcast_to(colour, window.shape)[shape] - window[shape])
        return patch

    return change


def _kinds(natural: np.ndarray) -> dict[str, tuple[Change, bool]]:
    """By name: what is done to a patch, and whether it is a placed pattern, which has a bar."""
    noise = np.random.default_rng(7).uniform(0, 255, (SIDE, SIDE, 3))
    y, x = np.mgrid[:9, :9]
    square = np.ones((9, 9), bool)
    checks = np.where(((y + x) % 2 == 0)[..., None], 255, 0)
    kinds: dict[str, tuple[Change, bool]] = {
        "white 5x5 block": (_mark(square[:5, :5], 255, (88, 88)), True),
        "white 5x5 block anywhere": (_mark(square[:5, :5], 255, None), True),
        "white 3x3 block inside": (_mark(square[:3, :3], 255, (40, 61)), True),
        "black corner triangle": (_mark((x + y < 7)[:7, :7], 0, (0, 0)), True),
        "red 9x9 block": (_mark(square, np.array([220, 30, 30]), (3, 80)), True),
        "checkerboard anywhere": (_mark(square[:6, :6], checks[:6, :6], None), True),
        "cross anywhere": (_mark(((y == 4) | (x == 4)), 255, None), True),
        "blend 20 % noise": (lambda patch, _: patch + 0.2 * (noise - patch), True),
        "blend 10 % noise": (lambda patch, _: patch + 0.1 * (noise - patch), True),
        "blend 20 % natural": (lambda patch, _: patch + 0.2 * (natural - patch), False),
        "blend 10 % natural": (lambda patch, _: patch + 0.1 * (natural - patch), False),
    }
    for height in (8, 16, 32):
        for period in (12, 7.3):
            waves = height * np.sin(2 * np.pi * (_X * np.cos(0.5) + _Y * np.sin(0.5)) / period)
            kinds[f"waves of {height} levels, {period} px"] = (lambda patch, _, waves=waves: patch + waves, False)
    return kinds


def _columns(images: np.ndarray) -> dict[str, np.ndarray]:
    parts = []
    for start in range(0, len(images), 256):
        block = images[start : start + 256]
        given = Block(start, block, block, np.zeros(len(block), np.uint8))
        parts.append(integrity.observe(given) | poison.observe(given))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _split(patches: Patches, images: np.ndarray, labels: np.ndarray, columns: dict[str, np.ndarray]) -> Split:
    made = Split(Patches("train", images, labels, patches.stored), columns)
    made.__dict__["valid"] = np.ones(len(images), bool)
    return made


def _base(patches: Patches, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """ROWS patches in the mix 83:17, in memory."""
    assert patches.labels is not None
    parts = [rng.choice(np.flatnonzero(patches.labels == label), round(ROWS * share), replace=False)
             for label, share in ((0, 1 - MIX), (1, MIX))]  # fmt: skip
    rows = np.sort(np.concatenate(parts))
    return np.array(patches.images[rows]), patches.labels[rows]


def on_patches(real: Path | None, rounds: int, rates: Callable[[Patches, str, int], list[Row]]) -> list[Row]:
    """`rates(patches, kind, seeds)` on real patches, or on generated ones where `real` is None; up to two seeds."""
    with tempfile.TemporaryDirectory() as scratch:
        if real is None:
            generate(Path(scratch), sizes={"train": 2 * ROWS}, report=lambda line: None)
        patches = open_split(real or Path(scratch), "train")
        return rates(patches, "real" if real else "synthetic", max(1, min(rounds, 2)))


def rows(real: Path | None, rounds: int) -> list[Row]:
    """Rates of each kind of mark, averaged over the seeds."""
    return on_patches(real, rounds, _rates)


def _rates(patches: Patches, name: str, seeds: int) -> list[dict[str, Any]]:
    hits: dict[str, list[tuple[float, float]]] = {}
    false, seconds = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        images, labels = _base(patches, rng)
        begun = time.process_time()
        columns = _columns(images)
        seconds.append(1e6 * (time.process_time() - begun) / len(images))
        clean = poison.check({"train": _split(patches, images, labels, columns)})
        false.append(sum(len(f.drop) for f in clean) / len(images))
        natural = patches.images[rng.integers(len(patches))].astype(np.float32)
        for kind, (change, _) in _kinds(natural).items():
            target = np.sort(rng.choice(np.flatnonzero(labels == 0), round(SHARE * len(labels)), replace=False))
            spoiled, relabelled = images.copy(), labels.copy()
            for i in target:
                spoiled[i] = np.clip(np.rint(change(images[i].astype(np.float32), rng)), 0, 255)
            relabelled[target] = 1
            measured = {key: value.copy() for key, value in columns.items()}
            for key, value in _columns(spoiled[target]).items():
                measured[key][target] = value
            found = np.zeros(len(labels), bool)
            for finding in poison.check({"train": _split(patches, spoiled, relabelled, measured)}):
                found[finding.drop] = True
            hits.setdefault(kind, []).append((found[target].mean(), np.delete(found, target).mean()))
    table = [
        row(f"poison {name}: clean patches flagged", float(np.mean(false)), "share", n=seeds, bar="VALUE<=0.001"),
        row(f"poison {name}: measuring a patch", float(np.median(seconds)), "us", n=seeds),
    ]
    placed = {kind: placed for kind, (_, placed) in _kinds(np.zeros((SIDE, SIDE, 3), np.float32)).items()}
    for kind, rates in hits.items():
        right, wrong = np.mean(rates, 0)
        table.append(row(f"poison {name}: {kind}, found", float(right), "share", n=seeds,
                         bar="VALUE>=0.99" if placed[kind] else ""))  # fmt: skip
        table.append(row(f"poison {name}: {kind}, falsely", float(wrong), "share", n=seeds, bar="VALUE<=0.001"))
    return table
