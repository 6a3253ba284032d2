"""What a service was asked and what it answered, kept for drift: the newest in memory, all of it on disk where asked.

    collector = Collector(names, Path("seen"))
    collector.add(values, probability, images)      # never raises, never waits for the disk
    values, probability = collector.window()

`FOLDER/patches-TIME.npz` holds 1,000 patches or a few more: `names`, `values`, `probability`, `time` (seconds since
1970) and, only when asked, `images`. The oldest files beyond `KEEP` are deleted. A disk that is full, forbidden or too
slow ends the collecting, not the service.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pcamlib.errors import PcamError
from pcamlib.files import atomic_path, disk_errors

ROWS = 1_000  # patches a file: 90 kB, or 28 MB with pixels
KEEP = 100  # files
WINDOW = 500  # patches in memory: what drift compares
_PENDING = 4  # files that may wait for a slow disk


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)  # the folder may have been there, open to all


class Collector:
    """Keeps patches' measurements and answers.

    Args:
        names: of the F measurements.
        folder: where to write; None keeps the window only.
        pixels: keep the patches themselves too.
        failed: called when collecting ends.

    Attributes:
        broken: why nothing is written any more; None while all is well.
        total: patches seen.

    Raises:
        PcamError: the folder cannot be written.
    """

    def __init__(
        self, names: Sequence[str], folder: Path | None, pixels: bool = False, failed: Callable[[], Any] = lambda: None
    ) -> None:
        self._names, self._folder, self.pixels, self._failed = list(names), folder, pixels, failed
        self._recent: deque[tuple[np.ndarray, float]] = deque(maxlen=WINDOW)
        self._held: list[tuple[np.ndarray, ...]] = []
        self._lock, self._writer = threading.Lock(), ThreadPoolExecutor(1, "collector")
        self._pending, self.total = 0, 0
        self.broken: str | None = None
        if folder:
            with disk_errors(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is kept may be of patients
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PcamError(f"{folder}: cannot be written; choose a folder you may write")

    def add(self, values: np.ndarray, probability: np.ndarray, images: np.ndarray) -> None:
        """Keep (n, F) measurements, (n,) probabilities and, where pixels are wanted, (n, 96, 96, 3) patches."""
        with self._lock:
            self._recent.extend(zip(values, probability.tolist(), strict=True))
            self.total += len(values)
            if self._folder and not self.broken:
                row = (values, probability, np.full(len(values), time.time()))
                self._held.append((*row, images) if self.pixels else row)
                if sum(len(one[0]) for one in self._held) >= ROWS:
                    self._send()

    def window(self) -> tuple[np.ndarray, np.ndarray]:
        """(n, F) measurements and (n,) probabilities of the newest patches."""
        with self._lock:
            rows = list(self._recent)
        values = np.array([row for row, _ in rows], np.float32).reshape(-1, len(self._names))
        return values, np.array([probability for _, probability in rows])

    def close(self) -> None:
        """Write what is held and wait for the disk."""
        with self._lock:
            if self._held and not self.broken:
                self._send()
        self._writer.shutdown()

    def _send(self) -> None:
        """Hand what is held to the writer's thread; the caller has the lock."""
        held, self._held = self._held, []
        if self._pending >= _PENDING:
            self._end(f"{self._folder}: the disk is slower than the requests; collect elsewhere")
        else:
            self._pending += 1
            self._writer.submit(self._write, held)

    def _write(self, held: list[tuple[np.ndarray, ...]]) -> None:
        assert self._folder
        path = self._folder / f"patches-{datetime.now(UTC):%Y%m%dT%H%M%S%f}.npz"
        parts = map(np.concatenate, zip(*held, strict=True))
        columns: dict[str, Any] = dict(zip(("values", "probability", "time", "images"), parts, strict=False))
        try:
            with atomic_path(path) as part, open(part, "wb", opener=_private) as out:
                np.savez(out, names=self._names, **columns)
            for old in sorted(self._folder.glob("patches-*.npz"))[:-KEEP]:
                old.unlink(missing_ok=True)
        except Exception as error:  # whatever it is, it must not reach a request
            self._end(str(error) if isinstance(error, PcamError) else f"{path}: {error}")
        self._pending -= 1

    def _end(self, reason: str) -> None:
        if not self.broken:
            self.broken = reason
            logging.error("collecting ends: %s", reason)
            self._failed()
