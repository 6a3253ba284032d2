"""The course skeleton's data interface, so that code written against it runs on our data layer.

One item at a time is slow by nature (`benchmarks/loader.py`); new code takes `data.loader`. What both share: order and
augmentation depend on (seed, epoch, patch) alone, so any number of workers gives the same batches.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from pcamlib.config import read_yaml
from pcamlib.data import convert, scan
from pcamlib.data.augment import augment
from pcamlib.data.layout import Stored, find, inspect, read_labels
from pcamlib.errors import ConfigError, DataError

#: Of the image alone; with an attribute `keyed = True`, called as transform(image, index=row, epoch=epoch).
Transform = Callable[..., torch.Tensor]

load_config = read_yaml  # under the course's name


def _blank(stored: Stored) -> np.ndarray:
    """Rows all black or all white: those whose mean is exactly 0 or 255."""
    if stored.offset is not None and stored.dtype == np.uint8:
        flags = scan.scan(stored).flags  # kept on disk for the next time
    else:  # one pass without the uint8 copy, since this dataset reads the source itself
        flags = np.concatenate([convert.to_uint8(block)[1] for _, block in convert.blocks(stored)])
    return (flags & (convert.FLAGS["black"] | convert.FLAGS["white"])) != 0


class PCAMDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """(image, label) pairs of one x and one y file: (3, 96, 96) uint8, clipped, and a 0-d int64; item i is row
    `indices[i]`.

    Args:
        x_path, y_path: HDF5 files in the official layout, also gzipped.
        transform: of the image; see `Transform`.
        filter_data: leave out patches whose mean is 0 or 255.

    Raises:
        DataError: a missing, damaged or odd file; x and y of different length.
    """

    def __init__(
        self, x_path: str | Path, y_path: str | Path, transform: Transform | None = None, filter_data: bool = False
    ) -> None:
        for path in map(Path, (x_path, y_path)):
            if not path.is_file():
                raise DataError(f"{path}: no such file")
        self.transform = transform
        self._stored = inspect(convert.unpack(Path(x_path)), "x")
        labels, total = read_labels(convert.unpack(Path(y_path))), self._stored.shape[0]
        if len(labels) != total:
            raise DataError(f"{x_path}: {total:,} patches but {len(labels):,} labels in {y_path}")
        self.indices = np.flatnonzero(~_blank(self._stored)) if filter_data else np.arange(total)
        self.labels = torch.from_numpy(labels[self.indices].astype(np.int64))
        # in shared memory: workers start before the sampler sets the epoch, and may live through several
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._array: Any = None
        self._owner = -1

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = int(self.indices[item])
        values = np.array(self._source()[row])
        if values.dtype != np.uint8:
            values = convert.to_uint8(values[None])[0][0]
        image, label = torch.from_numpy(values).permute(2, 0, 1).contiguous(), self.labels[item].clone()
        if self.transform is None:
            return image, label
        key = {"index": row, "epoch": int(self._epoch)} if getattr(self.transform, "keyed", False) else {}
        return self.transform(image, **key), label

    def set_epoch(self, epoch: int) -> None:
        """Key the draws of a keyed transform, in running workers too."""
        self._epoch.fill_(epoch)

    def _source(self) -> Any:
        """The x array, opened by each process for itself: an HDF5 handle must not cross a fork."""
        if self._owner != os.getpid():
            mapped = self._stored.offset is not None
            self._array = self._stored.map() if mapped else h5py.File(self._stored.path, "r")[self._stored.key]
            self._owner = os.getpid()
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None, "_owner": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # a plain pickle has copied it; does nothing where it is shared


def scale(image: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 to the course's float32 -1..1."""
    return image.float().div_(127.5).sub_(1)


class KeyedAugment:
    """`augment.augment` for one (3, S, S) uint8 image, drawn from (seed, epoch, row); then `after`, e.g. `scale`."""

    keyed = True

    def __init__(
        self, seed: int, names: Sequence[str] = ("d4",), strength: float = 0.05, after: Transform | None = None
    ) -> None:
        self.seed, self.names, self.strength, self.after = seed, tuple(names), strength, after

    def __call__(self, image: torch.Tensor, *, index: int, epoch: int) -> torch.Tensor:
        batch = image.permute(1, 2, 0)[None].contiguous()
        batch = augment(batch, self.names, self.seed, epoch, np.array([index]), self.strength)
        image = batch[0].permute(2, 0, 1).contiguous()
        return image if self.after is None else self.after(image)


class EpochSampler(WeightedRandomSampler):
    """Both classes equally often; each iteration is the next epoch, its order a function of (seed, epoch)."""

    def __init__(self, dataset: PCAMDataset, seed: int) -> None:
        weights = 1.0 / torch.bincount(dataset.labels, minlength=2).double()
        super().__init__(weights[dataset.labels].tolist(), len(dataset), generator=torch.Generator())
        self.dataset, self.seed, self.epoch = dataset, seed, 0

    def __iter__(self) -> Iterator[int]:
        self.dataset.set_epoch(self.epoch)
        self.generator.manual_seed(int(np.random.SeedSequence([self.seed, self.epoch]).generate_state(1)[0]))
        self.epoch += 1
        return super().__iter__()


def get_dataloaders(config: dict[str, Any]) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Train (balanced, a new epoch at each iteration) and validation (every patch in order) over the official files.

    Args:
        config: `seed` (0) and `data`: `data_path`; optionally `batch_size` (32), `num_workers` (0), `augment` (names
            for `KeyedAugment`) and `filter_data` (of train only: nobody may choose what validation finds easy).

    Returns:
        loaders of (B, 3, 96, 96) float32 in -1..1 and (B,) int64.
    """
    data, seed = config.get("data") or {}, int(config.get("seed", 0))
    if "data_path" not in data:
        raise ConfigError("data.data_path is missing; give the folder that holds the official files")
    keyed = KeyedAugment(seed, data["augment"], after=scale) if data.get("augment") else scale
    train_x, train_y, valid_x, valid_y = (find(data["data_path"], s, part) for s in ("train", "valid") for part in "xy")
    train = PCAMDataset(train_x, train_y, keyed, data.get("filter_data", False))
    # a generator of its own: a DataLoader else draws from torch's global one, which dropout uses
    common = {"batch_size": data.get("batch_size", 32), "num_workers": data.get("num_workers", 0)}
    common["generator"] = torch.Generator().manual_seed(seed)
    train_loader: DataLoader[Any] = DataLoader(train, sampler=EpochSampler(train, seed), **common)
    return train_loader, DataLoader(PCAMDataset(valid_x, valid_y, scale), **common)


def setup_logger(name: str = "pcam") -> logging.Logger:
    """A logger of timed lines on stderr; asking again gives the same one, with one handler."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    return logger
