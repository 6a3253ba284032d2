"""Patches copied to a node's own disk, once a node, where that is faster than reading them where they lie.

In a Slurm job with $PCAM_SCRATCH set, `near` times random patches of the file, a copy of some of it, and random patches
of that copy; the file is copied when that pays within `PASSES` readings of all of it. Whatever is wrong with the
scratch disk is said in one line, and the file is read where it lies. Paths, fingerprints and caches stay those of the
file itself: only the mapped bytes come from the copy.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pcamlib.data.layout import PATCH_BYTES
from pcamlib.errors import PcamError
from pcamlib.files import atomic_path, digest

PASSES = 3  # readings of the whole file within which a copy must pay; an epoch is one, a search makes dozens
SAMPLE = 64 << 20  # bytes read and written to measure; a smaller file is not worth the question
Report = Callable[[str], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speeds:
    """Bytes per second: random patches where the file lies, a copy to scratch, random patches from there."""

    shared: float
    copying: float
    scratch: float

    def pays(self) -> bool:
        """Whether copying once and reading the copy `PASSES` times takes less than reading the file as often."""
        return 1 / self.copying + PASSES / self.scratch < PASSES / self.shared

    def __str__(self) -> str:
        rates = (self.shared, self.scratch, self.copying)
        there, here, copied = (f"{rate / 1e6:,.3g} MB/s" for rate in rates)
        return f"random patches at {there} where they lie, {here} from scratch, {copied} to copy"


@functools.cache
def near(path: Path) -> Path:
    """Where a file of patches is best read: a copy on this node's scratch disk, or `path` itself.

    `path` outside a Slurm job and where $PCAM_SCRATCH is unset or empty. Asked once a process.
    """
    scratch = os.environ.get("PCAM_SCRATCH")
    return stage(path, Path(scratch), log.info) if scratch and "SLURM_JOB_ID" in os.environ else path


def stage(path: Path, scratch: Path, report: Report = print) -> Path:
    """The copy of a file in `scratch`, made if that pays (see `Speeds.pays`); else `path`.

    One process of a node measures and copies, the others wait. A copy is known by name, size and time of the file; it
    appears whole or not at all, and none is ever removed: other jobs may read it.
    """
    try:
        size = path.stat().st_size
        if size < SAMPLE or path.stat().st_dev == scratch.stat().st_dev:  # on one disk there is nothing to gain
            return path
        folder = _own(scratch)
        target = folder / f"{digest([path.name, size, path.stat().st_mtime_ns])[:16]}-{path.name}"
        with _alone(target.with_name(f".{target.name}.lock"), report):
            if target.exists() and target.stat().st_size == size:
                return target
            if (free := shutil.disk_usage(folder).free) < size + SAMPLE:
                needed = f"{free / 1e9:.3g} GB of the {size / 1e9:.3g} it needs"
                report(f"{path.name}: read where it lies: {scratch} has {needed}")
                return path
            speeds = measure(path, folder)
            if not speeds.pays():
                report(f"{path.name}: {speeds}; read where it lies")
                return path
            began = time.monotonic()
            with atomic_path(target) as part:
                shutil.copyfile(path, part)
                if part.stat().st_size != size:
                    raise PcamError(f"{path}: changed while it was copied")
            report(f"{path.name}: {speeds}; copied to {folder} in {time.monotonic() - began:.1f} s")
            return target
    except (OSError, PcamError) as error:  # full, read-only, gone: nothing here is worth losing a job for
        report(f"{path.name}: read where it lies: no copy in {scratch} ({error})")
        return path


def measure(path: Path, folder: Path) -> Speeds:
    """Time the three ways on `SAMPLE` bytes, none of them out of the system's cache; leaves nothing in `folder`."""
    with open(path, "rb", buffering=0) as file, tempfile.NamedTemporaryFile(dir=folder, buffering=0) as copy:
        shared = _random(file.fileno())
        _forget(file.fileno())
        began = time.monotonic()
        for start in range(0, SAMPLE, 1 << 20):
            copy.write(os.pread(file.fileno(), min(1 << 20, SAMPLE - start), start))
        os.fsync(copy.fileno())
        copying = SAMPLE / (time.monotonic() - began)
        return Speeds(shared, copying, _random(copy.fileno()))


def _random(file: int) -> float:
    """Bytes per second over `SAMPLE` bytes of patches at random places of an open file."""
    _forget(file)
    count = os.fstat(file).st_size // PATCH_BYTES
    places = np.random.default_rng(0).permutation(count)[: max(1, SAMPLE // PATCH_BYTES)]
    began = time.monotonic()
    for place in places.tolist():
        os.pread(file, PATCH_BYTES, place * PATCH_BYTES)
    return len(places) * PATCH_BYTES / (time.monotonic() - began)


def _forget(file: int) -> None:
    """Drop a file's pages from the system's cache, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)


def _own(scratch: Path) -> Path:
    """A folder of this user's own in a place that others write to as well."""
    folder = scratch / f"pcam-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PcamError(f"{folder}: belongs to somebody else")
    return folder


@contextmanager
def _alone(path: Path, report: Report) -> Iterator[None]:
    """One process of this node at a time; scratch is its own disk, so a file lock is seen by all."""
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"{path.name}: another process of this node looks at it; waiting")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
