"""Batches by one gather from the memory map: no per-item Python, no worker processes.

A batch is copied at about the speed of memcpy (`benchmarks/loader.py`), so worker processes would only add a copy. The
position is two integers, so a stopped epoch goes on at the next batch.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pcamlib.data.augment import augment, random_shift
from pcamlib.data.layout import PATCH_BYTES, SIDE
from pcamlib.data.patches import Patches, release
from pcamlib.data.sampling import order, share
from pcamlib.errors import CheckpointError, ConfigError, DataError
from pcamlib.seeding import counter_uniform

_BLOCK = 2048  # patches sent to the device at a time: 54 MiB
# Patch bytes touched before their pages are given back. Newer kernels map 2 MiB of page cache around each touch: at
# 64 MiB the resident pages of a 1.6 GB file grew to 1.5 GiB, at 4 MiB to 0.45, for a tenth of the loader's speed.
_RESIDENT_LIMIT = 4 << 20


class Batch(NamedTuple):
    """images: (B, 3, S, S) uint8 in channels_last memory; labels: (B,) int64; rows: (B,) int64 rows of the split.

    share: of the patches of the whole batch, 1 where one process trains.
    """

    images: torch.Tensor
    labels: torch.Tensor
    rows: np.ndarray
    share: float = 1.0


class _Gather:
    """Rows of an array by the faster of two equal copies: with all threads, or with one.

    On two idle cores two threads copy 1.7 times as fast; where a neighbour takes a core they wait for each other, down
    to a tenth. Every 16th batch tries the other way.
    """

    def __init__(self, rows: np.ndarray) -> None:
        self._array = rows
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "not writable": the map is read-only on purpose
            self._tensor = torch.from_numpy(rows)
        self._seconds, self._calls = [0.0, 0.0], 0  # a batch, smoothed

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        self._calls += 1
        way = int(self._seconds[1] < self._seconds[0]) ^ (self._calls % 16 == 0)
        begun = time.perf_counter()
        if way:
            flat = self._tensor.index_select(0, torch.from_numpy(rows))
        else:  # rows were checked once: "clip" spares the check and the buffered copy that goes with it
            flat = torch.from_numpy(np.take(self._array, rows, axis=0, mode="clip"))
        self._seconds[way] = 0.7 * self._seconds[way] + 0.3 * (time.perf_counter() - begun) / len(rows)
        return flat


class Loader:
    """Iterates over one epoch at a time; the next `iter` goes on where the last one stopped.

    Args:
        patches: an opened split, with labels.
        rows: (M,) rows to use, as from `Patches.rows`, which scans the file once; None: every row, without a scan.
        batch_size: patches a batch; the last one of an epoch may be smaller.
        sampler: "shuffle", "balanced", or "sequential" (evaluation).
        seed: keys order and augmentation.
        augmentations: names for `augment.augment`.
        strength: of the stain jitter.
        shift: largest move in pixels.
        view: what the model sees of a batch, (B, 96, 96, 3) to (B, S, S, 3) uint8, applied before augmentation.
        device: where batches go.
        pin: copy through page-locked memory (a CUDA device only).
        resident: keep all used patches in the device's memory; a batch is then an index on the device.
        world: (rank, processes): of each batch, this loader reads the share of one process.

    Raises:
        DataError: no labels, no rows, or rows that the split does not have.
        ConfigError: a batch with fewer patches than processes.
    """

    def __init__(
        self,
        patches: Patches,
        rows: np.ndarray | None = None,
        *,
        batch_size: int = 128,
        sampler: str = "shuffle",
        seed: int = 0,
        augmentations: Sequence[str] = (),
        strength: float = 0.05,
        shift: int = 4,
        view: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: str | torch.device = "cpu",
        pin: bool = False,
        resident: bool = False,
        world: tuple[int, int] = (0, 1),
    ) -> None:
        if patches.labels is None:
            raise DataError(f"{patches.stored.path}: this split has no labels; it can be predicted, not trained on")
        self.rows = np.arange(len(patches)) if rows is None else np.asarray(rows, np.int64)
        if len(self.rows) == 0:
            raise DataError(f"{patches.stored.path}: no valid patch is left to load")
        self.patches, self.batch_size, self.sampler, self.seed = patches, batch_size, sampler, seed
        self.augmentations, self.strength, self.shift, self.view = tuple(augmentations), strength, shift, view
        self.device, self.pin, self.world = torch.device(device), pin, world
        if (least := len(self.rows) % batch_size or batch_size) < world[1]:
            raise ConfigError(
                f"loader.batch_size={batch_size}: the smallest batch of {len(self.rows):,} patches has {least} for "
                f"{world[1]} processes; choose another batch size, or fewer processes"
            )
        self.epoch = 0
        self.position = 0
        self._labels = patches.labels[self.rows]
        if self.rows.min() < 0 or self.rows.max() >= len(patches):
            raise DataError(
                f"{patches.stored.path}: rows {self.rows.min()} to {self.rows.max()} of {len(patches):,} asked for"
            )
        self._copy = _Gather(patches.images.reshape(len(patches), PATCH_BYTES))
        self._touched = 0
        self._resident = self._reside() if resident else None

    def __len__(self) -> int:
        """Batches in a whole epoch."""
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        positions = self.order()
        while self.position < len(positions):
            chosen = positions[self.position : self.position + self.batch_size]
            self.position += len(chosen)
            epoch = self.epoch
            if self.position >= len(positions):  # before the yield: a checkpoint taken now points at the next epoch
                self.epoch, self.position = epoch + 1, 0
                yield self._batch(chosen, epoch)
                return
            yield self._batch(chosen, epoch)

    def _reside(self) -> torch.Tensor:
        """(M, 27648) uint8 on the device, sent in blocks: a whole split in host memory would be 7 GiB beside it."""
        held = torch.empty((len(self.rows), PATCH_BYTES), dtype=torch.uint8, device=self.device)
        for start in range(0, len(held), _BLOCK):
            held[start : start + _BLOCK] = self._copy(self.rows[start : start + _BLOCK])
            release(self.patches.images)
        return held

    def order(self) -> np.ndarray:
        """(M,) positions into `rows` in this epoch's order."""
        if self.sampler == "sequential":
            return np.arange(len(self.rows))
        return order(self.sampler, self._labels, self.seed, self.epoch)

    def _batch(self, chosen: np.ndarray, epoch: int) -> Batch:
        whole = len(chosen)
        chosen = chosen[share(whole, *self.world)]
        rows = self.rows[chosen]
        labels = torch.from_numpy(self._labels[chosen].astype(np.int64))
        images = self.gather(chosen).view(-1, SIDE, SIDE, 3)
        if "shift" in self.augmentations:  # of the whole patch: what moves into the view was there
            images = random_shift(images, counter_uniform(self.seed, epoch, rows, 9)[:, 7:], self.shift)
        if self.view is not None:
            images = self.view(images)
        images = augment(images.contiguous(), self.augmentations, self.seed, epoch, rows, self.strength)
        images = images.permute(0, 3, 1, 2)  # NHWC bytes are NCHW in channels_last: no copy
        if self.device.type != "cpu":
            images, labels = self._send(images), self._send(labels)
        return Batch(images, labels, rows, len(rows) / whole)

    def gather(self, chosen: np.ndarray) -> torch.Tensor:
        """(B, 27648) uint8: the patches at positions `chosen` of `rows`."""
        if self._resident is not None:
            return self._resident.index_select(0, torch.from_numpy(chosen).to(self.device))
        flat = self._copy(self.rows[chosen])
        self._touched += flat.nbytes
        if self._touched > _RESIDENT_LIMIT:
            self._touched = 0
            release(self.patches.images)
        return flat

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type == self.device.type:  # "cuda" names the current GPU, a tensor's device its number
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.pin else tensor.to(self.device)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from; JSON-able."""
        fixed = {"seed": self.seed, "sampler": self.sampler, "rows": len(self.rows), "batch_size": self.batch_size}
        return {"epoch": self.epoch, "position": self.position, **fixed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken: the next batch is the very same.

        Raises:
            CheckpointError: the state was taken with another seed, order, batch size or number of patches.
        """
        mine = self.state_dict()
        for key in ("seed", "sampler", "rows", "batch_size"):
            if state.get(key) != mine[key]:
                raise CheckpointError(
                    f"the loader's {key} was {state.get(key)!r} and is {mine[key]!r}: not the same epoch"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
