"""One streaming pass over an x file: what is wrong with each patch, a content hash, and a uint8 copy where needed.

float32, chunked, compressed and gzipped files are converted once into a cache; a contiguous uint8 file is only
scanned. Memory stays at two blocks whatever the file size. A cache entry is keyed by the source's path, size and
modification time, and appears whole or not at all.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch

from pcamlib.data.layout import PATCH_BYTES, Stored, not_hdf5, writable
from pcamlib.errors import DataError
from pcamlib.files import atomic_path, digest, read_json, write_json

#: Bits of a patch's flags; a patch is valid when none is set.
FLAGS = {"nan": 1, "range": 2, "black": 4, "white": 8}

_BLOCK_BYTES = 16 << 20  # fits beside its copy in cache-friendly memory; larger blocks were no faster
_CHUNKED_BYTES = 384 << 20  # a chunked file is read in whole chunk rows: (8192, 6, 6, 1) costs 768 chunks a row


@dataclass(frozen=True)
class Scan:
    """What one pass found.

    Attributes:
        pixels: SHA-256 of the uint8 pixels in row order.
        flags: (N,) uint8, bits of `FLAGS`.
        converted: the raw uint8 copy, or None where the source is mapped in place.
    """

    pixels: str
    flags: np.ndarray
    converted: Path | None


def cache_dir(source: Path) -> Path:
    """$PCAM_CACHE; else `.pcam-cache` beside the data; else, where that cannot be written, ~/.cache/pcam."""
    if os.environ.get("PCAM_CACHE"):
        return Path(os.environ["PCAM_CACHE"])
    if source.parent.name == ".pcam-cache":  # unpacked there
        return source.parent
    beside = source.parent / ".pcam-cache"
    return beside if writable(beside) else Path.home() / ".cache" / "pcam"


def _entry(source: Path) -> Path:
    status = source.stat()
    key = digest([str(source.resolve()), status.st_size, status.st_mtime_ns])[:16]
    return cache_dir(source) / f"{source.name.split('.')[0]}-{key}"


def unpack(source: Path) -> Path:
    """The `.h5` inside a `.h5.gz`, unpacked once into the cache; any other path as it is."""
    if source.suffix != ".gz":
        return source
    target = _entry(source).with_suffix(".h5")
    if not target.exists():
        if problem := not_hdf5(source):  # refused before anything is unpacked
            raise DataError(f"{source}: {problem}")
        with atomic_path(target) as part, gzip.open(source) as packed, open(part, "wb") as out:
            try:
                shutil.copyfileobj(packed, out, 16 << 20)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise DataError(f"{source}: damaged gzip ({error}); fetch it again") from None
    return target


def blocks(stored: Stored) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows) over an x array; the buffer is used again, so copy what you keep.

    A contiguous array is read with plain reads, not through a map: a file that shrinks meanwhile gives an error
    instead of a bus error, and resident memory stays at one block.
    """
    total = stored.shape[0]
    if stored.offset is not None:
        step = max(1, _BLOCK_BYTES // stored.row_bytes)
        buffer = np.empty((min(step, total), *stored.shape[1:]), stored.dtype)
        with open(stored.path, "rb", buffering=0) as handle:
            handle.seek(stored.offset)
            for start in range(0, total, step):
                block = buffer[: min(step, total - start)]
                _read_exactly(handle, block, stored.path)
                yield start, block
    else:
        rows = stored.chunks[0] if stored.chunks else 1
        step = max(_BLOCK_BYTES // stored.row_bytes, min(rows, _CHUNKED_BYTES // stored.row_bytes))
        step = max(rows, step // rows * rows) if rows * stored.row_bytes <= _CHUNKED_BYTES else step
        with h5py.File(stored.path, "r", rdcc_nbytes=64 << 20) as file:
            for start in range(0, total, step):
                try:
                    yield start, file[stored.key][start : start + step]
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


def scan(stored: Stored, report: Callable[[str], None] = lambda line: None) -> Scan:
    """Scan (and where needed convert) an x array, or read the result of an earlier pass from the cache.

    Raises:
        DataError: the file cannot be read to its end.
        PcamError: the cache cannot be written, or the disk is full; nothing half-written stays.
    """
    entry = _entry(stored.path)
    record, copy, marks = entry.with_suffix(".json"), entry.with_suffix(".u8"), entry.with_suffix(".flags")
    target = None if stored.offset is not None and stored.dtype == np.uint8 else copy
    total = stored.shape[0]
    if record.exists():
        known = read_json(record)
        whole = target is None or (copy.is_file() and copy.stat().st_size == total * PATCH_BYTES)
        if whole and marks.is_file() and marks.stat().st_size == total:
            return Scan(known["pixels"], np.fromfile(marks, np.uint8), target)
    if entry.parent == stored.path.parent / ".pcam-cache":  # a replaced file leaves nothing behind
        for old in entry.parent.glob(f"{entry.name.rpartition('-')[0]}-*"):
            old.unlink(missing_ok=True)
    if target is None:
        pixels, flags = _pass(stored, None, report)
    else:
        with atomic_path(target) as part, open(part, "wb") as out:
            pixels, flags = _pass(stored, out, report)
    with atomic_path(marks) as part:
        part.write_bytes(flags.data)  # ndarray.tofile hides that the disk is full: its OSError has no errno
    write_json(record, {"source": stored.path.name, "rows": total, "dtype": str(stored.dtype), "pixels": pixels})
    return Scan(pixels, flags, target)


def _pass(stored: Stored, out: BinaryIO | None, report: Callable[[str], None]) -> tuple[str, np.ndarray]:
    total, hasher = stored.shape[0], hashlib.sha256()
    flags = np.empty(total, np.uint8)
    verb, said = ("converting" if out else "scanning"), 0
    for start, block in blocks(stored):
        values, flags[start : start + len(block)] = to_uint8(block)
        hasher.update(values.data)
        if out:
            out.write(values.data)
        done = start + len(block)
        if done * 10 // total > said and total * stored.row_bytes > 1 << 30:  # a line per 10 % where it takes seconds
            said = done * 10 // total
            report(f"{verb} {stored.path.name}: {done:,} of {total:,} patches")
    return hasher.hexdigest(), flags
