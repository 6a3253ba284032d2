"""Slice features: the streaming pass over a split, against measuring one patch after the other.

    python benchmarks/features.py [--json FILE] [--rounds 5] [--patches 2048]

Ours is the whole pass with all cores, from the x file to the columns kept in the cache, the hash that guards it
included; CPU time, summed over the cores, is what busy neighbours disturb least. The peer takes decoded patches and
computes the same features with NumPy, SciPy and matplotlib, a patch at a time, on one core as such loops do. Patches
are generated; the file lies in the page cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
from _rows import arguments, finish, interleaved, row
from matplotlib.colors import rgb_to_hsv
from scipy import ndimage, stats

from pcamlib import seeding
from pcamlib.data import measure, scan
from pcamlib.data.augment import STAINS
from pcamlib.data.patches import open_split
from pcamlib.data.synthetic import generate

UNMIX = np.linalg.inv(STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True))
CENTRE = np.zeros((96, 96), bool)
CENTRE[32:64, 32:64] = True


def one(image: np.ndarray) -> list[float]:
    """The features of one patch, as people write them."""
    grey = image @ [0.299, 0.587, 0.114]
    saturation = rgb_to_hsv(image / 255)[..., 1]
    density = -np.log10((image + 1.0) / 256) @ UNMIX
    laplacian = ndimage.laplace(grey)
    stands_out = ndimage.gaussian_filter(density[..., 0], 1.6) - ndimage.gaussian_filter(density[..., 0], 8)
    peak = (stands_out == ndimage.maximum_filter(stands_out, 9)) & (stands_out > 0.08)
    found = [grey.std(), *image.mean((0, 1)), (image.min(2) >= 220).mean(), (image.max(2) <= 20).mean()]
    for where in (np.ones((96, 96), bool), CENTRE, ~CENTRE):
        found += [plane[where].mean() for plane in (grey, saturation, density[..., 0], density[..., 1], peak)]
        found += [
            np.log10(1 + laplacian[where].var()),
            stats.entropy(np.histogram(grey[where], 64, (0, 256))[0], base=2),
        ]
    return found


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--patches", type=int, default=2048)
    options = parser.parse_args()
    seeding.set_threads(None)
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), sizes={"train": options.patches}, report=lambda line: None)
        patches, number = open_split(folder, "train"), count()
        few = np.array(patches.images[:32])
        assert patches.valid.any()  # scanned before anything is timed

        def ours(clock: Callable[[], float] = time.perf_counter) -> float:
            begun = clock()
            scan.observe(patches.stored, f"features-{next(number)}", measure.observe)
            return len(patches) / (clock() - begun)

        def block() -> float:
            begun = time.perf_counter()
            with seeding.one_thread():
                measure.observe(0, few, few, patches.flags[:32])
            return len(few) / (time.perf_counter() - begun)

        def naive() -> float:
            begun = time.perf_counter()
            for image in few:
                one(image)
            return len(few) / (time.perf_counter() - begun)

        contestants = {"ours": ours, "cpu": lambda: ours(time.process_time), "block": block, "naive": naive}
        found = interleaved(contestants, options.rounds)
    note = f"patch by patch: {found['naive']:,.0f}"
    rows = [
        row("slice features, the pass, all cores", found["ours"], "img/s", n=options.rounds, bar="VALUE>=5000"),
        row("  a second of CPU time", found["cpu"], "img/s", n=options.rounds),
        row("  the measurements alone, one core", found["block"], "img/s", n=options.rounds, against=note,
            ratio=found["block"] / found["naive"]),
    ]  # fmt: skip
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
