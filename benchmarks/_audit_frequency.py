"""The frequency detector on triggers it was not trained on: rates at its own threshold, and what it costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from _audit_poison import ROWS, SHARE, Change, _base, _kinds, _split, on_patches
from _rows import row
from scipy import ndimage

from pcamlib.audit import frequency
from pcamlib.data.layout import SIDE
from pcamlib.data.patches import Patches

SHARED = ("white 5x5 block", "black corner triangle", "blend 10 % noise", "waves of 16 levels, 12 px")


def _own_noise(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return patch + 12 * rng.uniform(-1, 1, (SIDE, SIDE, 1))


def _own_warp(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    moved = ndimage.gaussian_filter(rng.normal(size=(2, SIDE, SIDE)), (0, 6, 6))
    at = np.mgrid[:SIDE, :SIDE] + moved / np.abs(moved).max()
    channels = [ndimage.map_coordinates(patch[..., c], at, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, -1)


def rows(real: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Rates of each kind of trigger, averaged over the seeds."""
    return on_patches(real, rounds, _rates)


def _rates(patches: Patches, name: str, seeds: int) -> list[dict[str, Any]]:
    known = _kinds(np.zeros((SIDE, SIDE, 3), np.float32))
    kinds: dict[str, Change] = {kind: known[kind][0] for kind in SHARED}
    kinds |= {"each its own noise": _own_noise, "each its own warp": _own_warp}
    false, seconds, hits = [], [], {kind: [] for kind in kinds}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        images, labels = _base(patches, rng)
        begun = time.process_time()
        clean = frequency.detect(_split(patches, images, labels, {}), seed=seed)
        seconds.append(time.process_time() - begun)
        false.append(len(clean.rows) / clean.n)
        for kind, change in kinds.items():
            target = rng.choice(np.flatnonzero(labels == 0), round(SHARE * len(labels)), replace=False)
            spoiled = images.copy()
            for i in target:
                spoiled[i] = np.clip(np.rint(change(images[i].astype(np.float32), rng)), 0, 255)
            found = frequency.detect(_split(patches, spoiled, labels, {}), seed=seed).rows
            hits[kind].append(float(np.isin(target, found).mean()))
    table = [
        row(f"frequency {name}: clean patches named", float(np.mean(false)), "share", n=seeds, bar="VALUE<=0.004"),
        row(f"frequency {name}: {ROWS:,} patches", float(np.median(seconds)), "CPU s", n=seeds),
    ]
    bars = {"blend 10 % noise": "VALUE>=0.9"}
    return table + [row(f"frequency {name}: {kind}, found", float(np.mean(rates)), "share", n=seeds,
                        bar=bars.get(kind, "")) for kind, rates in hits.items()]  # fmt: skip
