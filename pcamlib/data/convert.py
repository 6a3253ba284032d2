"""Any stored form of patches, read block by block and made uint8; and where its cache lies.

Memory stays at some blocks whatever the file size. A cache entry is keyed by the source's path, size and modification
time. `scan.py` makes the pass.
"""

from __future__ import annotations

import gzip
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from pcamlib.data.layout import Stored, not_hdf5, writable
from pcamlib.errors import DataError
from pcamlib.files import atomic_path, digest

#: Bits of a patch's flags; a patch is valid when none is set.
FLAGS = {"nan": 1, "range": 2, "black": 4, "white": 8}

BLOCK = 256  # rows: 7 MB as uint8, 28 MB as float32; larger blocks were no faster
_CHUNKED_BYTES = 384 << 20  # a chunked file is read in whole chunk rows: (8192, 6, 6, 1) costs 768 chunks a row


def cache_dir(source: Path) -> Path:
    """$PCAM_CACHE; else `.pcam-cache` beside the data; else, where that cannot be written, ~/.cache/pcam."""
    if os.environ.get("PCAM_CACHE"):
        return Path(os.environ["PCAM_CACHE"])
    if source.parent.name == ".pcam-cache":  # unpacked there
        return source.parent
    beside = source.parent / ".pcam-cache"
    return beside if writable(beside) else Path.home() / ".cache" / "pcam"


def entry(source: Path) -> Path:
    """Where the cache keeps what belongs to a source file: a path to which suffixes are added."""
    status = source.stat()
    key = digest([str(source.resolve()), status.st_size, status.st_mtime_ns])[:16]
    return cache_dir(source) / f"{source.name.split('.')[0]}-{key}"


def unpack(source: Path) -> Path:
    """The `.h5` inside a `.h5.gz`, unpacked once into the cache; any other path as it is."""
    if source.suffix != ".gz":
        return source
    target = entry(source).with_suffix(".h5")
    if not target.exists():
        if problem := not_hdf5(source):  # refused before anything is unpacked
            raise DataError(f"{source}: {problem}")
        with atomic_path(target) as part, gzip.open(source) as packed, open(part, "wb") as out:
            try:
                shutil.copyfileobj(packed, out, 16 << 20)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{source}: damaged gzip ({error}); fetch it again") from None
    return target


def slab(stored: Stored) -> int:
    """Rows read at once: `BLOCK`, or whole rows of chunks, so that none is unpacked twice."""
    rows = stored.chunks[0] if stored.chunks else 1
    if stored.offset is not None or rows * stored.row_bytes > _CHUNKED_BYTES:
        return BLOCK
    return -(-BLOCK // rows) * rows


def blocks(stored: Stored, first: int = 0, last: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows) over rows `first` to `last` of an x array, `slab` rows at a time.

    A contiguous array is read with plain reads, not through a map: a file that shrinks meanwhile gives an error
    instead of a bus error, and resident memory stays at the blocks in use.

    Raises:
        DataError: the rows cannot be read.
    """
    last, step = stored.shape[0] if last is None else last, slab(stored)
    if stored.offset is not None:
        with open(stored.path, "rb", buffering=0) as handle:
            handle.seek(stored.offset + first * stored.row_bytes)
            for start in range(first, last, step):
                block = np.empty((min(step, last - start), *stored.shape[1:]), stored.dtype)
                _read_exactly(handle, block, stored.path)
                yield start, block
    else:
        with h5py.File(stored.path, "r", rdcc_nbytes=64 << 20) as file:
            for start in range(first, last, step):
                try:
                    yield start, file[stored.key][start : min(start + step, last)]
                except OSError as error:
                    raise DataError(
                        f"{stored.path}: rows from {start} cannot be read ({error}); fetch it again"
                    ) from None


def _read_exactly(handle: Any, block: np.ndarray, path: Path) -> None:
    view = memoryview(block.data).cast("B")
    while view:
        count = handle.readinto(view)
        if not count:
            raise DataError(f"{path}: ended in mid-array; the file shrank or is truncated: copy it again")
        view = view[count:]


def to_uint8(block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flags and uint8 values of a block.

    Args:
        block: (B, 96, 96, 3) uint8 or float32.

    Returns:
        (B, 96, 96, 3) uint8: rounded, clipped to 0..255, NaN as 0; and (B,) uint8 flags.
    """
    values = torch.from_numpy(block).flatten(1)
    low, high = values.amin(1), values.amax(1)  # NaN in a row makes both NaN; aminmax is 20 times slower on uint8
    nan = torch.isnan(low) if values.is_floating_point() else torch.zeros(len(low), dtype=torch.bool)
    flags = torch.zeros(len(low), dtype=torch.uint8)
    if values.is_floating_point():
        if bool(nan.any()):  # the rest of such a row is judged too
            rows = values[nan]
            low[nan] = torch.nan_to_num(rows, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).amin(1)
            high[nan] = torch.nan_to_num(rows, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1)
        flags |= FLAGS["range"] * ((low < 0) | (high > 255)).to(torch.uint8)
        values = values.clamp(0, 255).round_()
        if bool(nan.any()):
            values = values.nan_to_num_(nan=0.0)
        values = values.to(torch.uint8)
    flags |= FLAGS["nan"] * nan.to(torch.uint8)
    flags |= FLAGS["black"] * ((high == 0) & (low == 0) & ~nan).to(torch.uint8)
    flags |= FLAGS["white"] * ((low == 255) & (high == 255) & ~nan).to(torch.uint8)
    return values.view(block.shape).numpy(), flags.numpy()
