"""One streaming pass over an x file: flags and identity of each patch, a content hash, a uint8 copy where needed.

float32, chunked, compressed and gzipped files are converted once into a cache; a contiguous uint8 file is only looked
at. An observer (the audit) sees the same blocks, so that bytes are read once for everybody. The pass is kept in shards:
an interrupted one goes on at the first shard that is missing. What it leaves appears whole or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcamlib import seeding
from pcamlib.data import convert
from pcamlib.data.layout import PATCH_BYTES, Stored
from pcamlib.errors import PcamError
from pcamlib.files import atomic_path, disk_errors, read_json, write_json

#: (first row, rows as stored, uint8 rows, flags) -> columns, (B, ...) arrays by name; called from several threads.
Observer = Callable[[int, np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]
Report = Callable[[str], None]

_SHARD = 16 * convert.BLOCK  # rows that an interruption costs at most


@dataclass(frozen=True)
class Scan:
    """What one pass found.

    Attributes:
        pixels: SHA-256 over `ids`: equal pixels in equal order give equal hashes, however they are stored.
        flags: (N,) uint8, bits of `convert.FLAGS`.
        ids: (N, 20) uint8: SHA-1 of each patch's uint8 bytes, which is also the id of a tile in the Kaggle version.
        converted: the raw uint8 copy, or None where the source is mapped in place.
    """

    pixels: str
    flags: np.ndarray
    ids: np.ndarray
    converted: Path | None


def scan(stored: Stored, report: Report = lambda line: None) -> Scan:
    """Scan (and where needed convert) an x array, or read the result of an earlier pass from the cache.

    Raises:
        DataError: the file cannot be read to its end.
        PcamError: the cache cannot be written, or the disk is full.
    """
    return _known(stored) or _pass(stored, "scan", None, report)[0]


def observe(stored: Stored, name: str, observer: Observer, report: Report = lambda line: None) -> dict[str, np.ndarray]:
    """What an observer makes of every row, with the scan made by the same pass where there is none yet.

    Args:
        stored: the x array.
        name: of the observer; another name is another result, so it should change with the observer's code.
        observer: called with consecutive blocks of at most `convert.BLOCK` rows.
        report: told about progress, at most every 5 s.

    Returns:
        Columns, (N, ...) arrays by name; kept in the cache, the earlier ones of this source replaced.

    Raises:
        DataError, PcamError: as `scan`.
    """
    columns = _columns(_kept(stored, name)) if _known(stored) else None
    return _pass(stored, name, observer, report)[1] if columns is None else columns


def _kept(stored: Stored, name: str) -> Path:
    return convert.entry(stored.path).with_suffix(f".{name}.npz")


def _columns(kept: Path) -> dict[str, np.ndarray] | None:
    """Columns of an earlier pass; None where there are none, or they are damaged."""
    try:
        with np.load(kept) as columns:
            return dict(columns)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _known(stored: Stored) -> Scan | None:
    """The result of an earlier pass, where it lies whole in the cache."""
    entry, total = convert.entry(stored.path), stored.shape[0]
    sizes = {".flags": total, ".ids": 20 * total} | ({} if _mapped(stored) else {".u8": total * PATCH_BYTES})
    files = {suffix: entry.with_suffix(suffix) for suffix in (".json", *sizes)}
    if not all(path.is_file() for path in files.values()):
        return None
    if any(files[suffix].stat().st_size != size for suffix, size in sizes.items()):
        return None
    flags, ids = np.fromfile(files[".flags"], np.uint8), np.fromfile(files[".ids"], np.uint8).reshape(total, 20)
    return Scan(read_json(files[".json"])["pixels"], flags, ids, files.get(".u8"))


def _mapped(stored: Stored) -> bool:
    return stored.offset is not None and stored.dtype == np.uint8


def _pass(stored: Stored, name: str, observer: Observer | None, report: Report) -> tuple[Scan, dict[str, np.ndarray]]:
    entry, total = convert.entry(stored.path), stored.shape[0]
    if entry.parent == stored.path.parent / ".pcam-cache":  # a replaced file leaves nothing behind
        for old in entry.parent.glob(f"{entry.name.rpartition('-')[0]}-*"):
            if not old.name.startswith(entry.name):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    with _alone(entry.with_suffix(".lock"), report):
        work, known = entry.with_suffix(".pass"), _known(stored)
        if known and observer is None:  # made by the process that was waited for
            return known, {}
        kept = _kept(stored, name)
        if known and observer and (columns := _columns(kept)) is not None:
            return known, columns
        copy = None if known or _mapped(stored) else work / "pixels.u8"
        if copy and not copy.exists():
            shutil.rmtree(work, ignore_errors=True)  # shards of a pass that needed no copy
        step = convert.slab(stored)
        step = -(-_SHARD // step) * step
        parts = [work / f"{name}-{first:09d}.npz" for first in range(0, total, step)]
        began, missing = time.monotonic(), [i for i, part in enumerate(parts) if not part.exists()]
        told, before = began, total - sum(min(step, total - i * step) for i in missing)
        with seeding.workers() as pool:
            for i in missing:
                first, last = i * step, min((i + 1) * step, total)
                _save(parts[i], _shard(stored, first, last, copy, observer, pool))
                before += last - first
                if time.monotonic() - told > 5:
                    told = time.monotonic()
                    report(f"{stored.path.name}: {before:,} of {total:,} patches, {told - began:.0f} s")
        columns = _joined(parts)
        flags, ids = columns.pop("flags"), columns.pop("ids")
        result = known or _finish(stored, flags, ids, copy)
        if observer:
            for old in kept.parent.glob(f"{entry.name}.{name.partition('-')[0]}-*.npz"):
                old.unlink(missing_ok=True)
            _save(kept, columns)
        shutil.rmtree(work)
        return result, columns


def _shard(
    stored: Stored, first: int, last: int, copy: Path | None, observer: Observer | None, pool: ThreadPoolExecutor
) -> dict[str, np.ndarray]:
    """Columns of rows `first` to `last`; their uint8 pixels are in `copy` when this returns."""

    def look(start: int, raw: np.ndarray) -> dict[str, np.ndarray]:
        images, flags = convert.to_uint8(raw)
        ids = np.stack([np.frombuffer(hashlib.sha1(image.data).digest(), np.uint8) for image in images])
        if out is not None:
            _write(out, images, start * PATCH_BYTES)
        return {"flags": flags, "ids": ids, **(observer(start, raw, images, flags) if observer else {})}

    with _opened(copy) as out:
        pending: deque[Future[dict[str, np.ndarray]]] = deque()
        done = []
        try:
            for start, rows in convert.blocks(stored, first, last):
                for i in range(0, len(rows), convert.BLOCK):
                    pending.append(pool.submit(look, start + i, rows[i : i + convert.BLOCK]))
                    if len(pending) > pool._max_workers + 1:  # bounds the blocks in memory
                        done.append(pending.popleft().result())
            done += [future.result() for future in pending]
        finally:
            wait(pending)  # none may write after the copy is closed
    return {name: np.concatenate([columns[name] for columns in done]) for name in done[0]}


def _finish(stored: Stored, flags: np.ndarray, ids: np.ndarray, copy: Path | None) -> Scan:
    entry, converted = convert.entry(stored.path), None
    for suffix, values in ((".flags", flags), (".ids", ids)):
        with atomic_path(entry.with_suffix(suffix)) as part:
            part.write_bytes(values.data)  # ndarray.tofile hides that the disk is full: its OSError has no errno
    if copy:
        converted = entry.with_suffix(".u8")
        with disk_errors(converted):
            with open(copy, "rb") as handle:
                os.fsync(handle.fileno())
            copy.replace(converted)
    pixels = hashlib.sha256(ids.data).hexdigest()
    record = {"source": stored.path.name, "rows": len(flags), "dtype": str(stored.dtype), "pixels": pixels}
    write_json(entry.with_suffix(".json"), record)
    return Scan(pixels, flags, ids, converted)


def _save(path: Path, columns: dict[str, np.ndarray]) -> None:
    with atomic_path(path) as part, open(part, "wb") as out:
        np.savez(out, allow_pickle=False, **columns)


def _joined(parts: list[Path]) -> dict[str, np.ndarray]:
    """Columns of all shards, one column in memory twice at a time."""
    shards = [np.load(part) for part in parts]
    try:
        return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    finally:
        for shard in shards:
            shard.close()


@contextmanager
def _opened(copy: Path | None) -> Iterator[int | None]:
    if copy is None:
        yield None
        return
    with disk_errors(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        out = os.open(copy, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            yield out
        finally:
            os.close(out)


def _write(out: int, images: np.ndarray, offset: int) -> None:
    view = memoryview(images.data).cast("B")
    while view:
        count = os.pwrite(out, view, offset)
        view, offset = view[count:], offset + count


@contextmanager
def _alone(path: Path, report: Report) -> Iterator[None]:
    """Two processes never make one pass: the second waits, then finds the first one's result."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")  # noqa: SIM115 - closed by the with below
    except OSError as error:
        raise PcamError(
            f"{path.parent}: the cache cannot be written ({error.strerror}); set PCAM_CACHE to a folder of your own"
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{path}: another process reads this file; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # a filesystem without locks: two passes would write the same bytes twice
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield  # the file stays: a waiting process holds on to it
