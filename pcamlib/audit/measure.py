"""The measurements of an audit: one pass over each file, in which every check sees every block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pcamlib import sources
from pcamlib.audit import duplicates, integrity, near, poison
from pcamlib.audit.findings import Split
from pcamlib.audit.stream import Block
from pcamlib.data import layout, scan
from pcamlib.data.patches import header, open_split
from pcamlib.data.slides import read_slides
from pcamlib.files import digest

OBSERVERS = (integrity, duplicates, near, poison)


def observe(start: int, raw: np.ndarray, images: np.ndarray, flags: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of all `OBSERVERS` for one block; arguments as `scan.Observer`."""
    block = Block(start, raw, images, flags)
    return {name: column for module in OBSERVERS for name, column in module.observe(block).items()}


def measured(folder: str | Path, report: Callable[[str], None] = print) -> dict[str, Split]:
    """The splits of a folder with their columns; each file is read once, or not at all where the cache has them.

    Headers, labels and meta files of every split are checked before any pixel is read.

    Raises:
        DataError: a file is missing, damaged or does not fit the others.
        PcamError: the cache cannot be written.
    """
    names = layout.present(folder)
    stored = {name: header(folder, name)[0] for name in names}
    slides = {name: read_slides(folder, name, stored[name].shape[0]) for name in names}
    name = f"audit-{digest(sources.digests(Path(__file__)))[:8]}"
    columns = {split: scan.observe(stored[split], name, observe, report) for split in names}
    return {split: Split(open_split(folder, split), columns[split], slides[split]) for split in names}
