"""The loader: every patch once, resumed at any batch the very same, memory bounded whatever the file size."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from pcamlib.data.augment import augment
from pcamlib.data.layout import split_path
from pcamlib.data.loader import Batch, Loader
from pcamlib.data.patches import Patches, open_split
from pcamlib.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def patches(tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]) -> Patches:
    """30 rows, of which row 4 is black."""
    images[4] = 0
    return open_split(write(tmp_path, images, labels), "train")


def same(one: Batch, other: Batch) -> bool:
    """Bitwise equal batches."""
    return (
        one.images.equal(other.images) and one.labels.equal(other.labels) and one.rows.tolist() == other.rows.tolist()
    )


def test_every_row_once_an_epoch(patches: Patches) -> None:
    loader = Loader(patches, patches.rows(), batch_size=8)
    assert len(loader) == 4
    epochs = []
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.rows) for batch in batches] == [8, 8, 8, 5]
        epochs.append(np.concatenate([batch.rows for batch in batches]))
        assert sorted(epochs[-1]) == [row for row in range(30) if row != 4]
        for batch in batches:
            assert patches.labels is not None and batch.labels.tolist() == patches.labels[batch.rows].tolist()
            assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), patches.images[batch.rows])
    assert epochs[0].tolist() != epochs[1].tolist()


def test_batches_are_channels_last_views(patches: Patches) -> None:
    batch = next(iter(Loader(patches, batch_size=8)))
    assert batch.images.shape == (8, 3, 96, 96) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64 and batch.rows.dtype == np.int64
    batch.images.zero_()  # a copy: the file is untouched
    assert patches.images[batch.rows].any()


def test_sequential_keeps_the_order_given(patches: Patches) -> None:
    loader = Loader(patches, np.array([9, 4, 2]), batch_size=2, sampler="sequential")
    assert [batch.rows.tolist() for batch in loader] == [[9, 4], [2]]
    assert [batch.rows.tolist() for batch in loader] == [[9, 4], [2]]


def test_balanced_draws_about_half(patches: Patches) -> None:
    loader = Loader(patches, batch_size=29, sampler="balanced")
    share = np.mean([float(label) for _ in range(40) for batch in loader for label in batch.labels])
    assert abs(share - 0.5) < 0.06


def centre(images: torch.Tensor) -> torch.Tensor:
    return images[:, 16:80, 16:80]


def test_view_is_what_the_batch_shows(patches: Patches) -> None:
    batch = next(iter(Loader(patches, batch_size=5, view=centre)))
    assert batch.images.shape == (5, 3, 64, 64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), patches.images[batch.rows][:, 16:80, 16:80])


def test_augmentation_is_keyed_by_row(patches: Patches) -> None:
    loader = Loader(patches, batch_size=8, seed=3, augmentations=["d4", "stain"], strength=0.1)
    for epoch in range(2):
        for batch in loader:
            plain = torch.from_numpy(patches.images[batch.rows])
            expected = augment(plain, ["d4", "stain"], 3, epoch, batch.rows, 0.1)
            assert batch.images.permute(0, 2, 3, 1).equal(expected)


def test_resident_gives_the_same(patches: Patches) -> None:
    options: dict[str, Any] = {"batch_size": 8, "seed": 1, "sampler": "balanced", "augmentations": ["d4"]}
    for one, other in zip(Loader(patches, **options), Loader(patches, resident=True, **options), strict=True):
        assert same(one, other)


def test_resident_patches_are_sent_in_blocks(patches: Patches, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device once, in the order of the rows; a batch reads the file no more."""
    monkeypatch.setattr("pcamlib.data.loader._BLOCK", 7)
    loader, plain = (Loader(patches, patches.rows(), batch_size=8, resident=resident) for resident in (True, False))
    assert loader._resident is not None and loader._resident.shape == (29, 96 * 96 * 3)
    monkeypatch.setattr(loader, "_copy", None)
    for one, other in zip(loader, plain, strict=True):
        assert same(one, other)


@pytest.mark.parametrize(("batch_size", "processes"), [(8, 2), (7, 2), (10, 3)])
@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_shares_of_a_batch_make_the_batch(sampler: str, batch_size: int, processes: int, patches: Patches) -> None:
    """Whatever the number of processes: the same patches, augmented the same, in the same order."""
    options: dict[str, Any] = {"batch_size": batch_size, "sampler": sampler, "augmentations": ["d4", "stain"]}
    whole = Loader(patches, **options)
    parts = [Loader(patches, world=(rank, processes), **options) for rank in range(processes)]
    assert len({len(part) for part in [whole, *parts]}) == 1
    for _ in range(2):
        for batch, *shares in zip(whole, *parts, strict=True):
            assert batch.images.equal(torch.cat([share.images for share in shares]))
            assert batch.labels.equal(torch.cat([share.labels for share in shares]))
            assert batch.rows.tolist() == np.concatenate([share.rows for share in shares]).tolist()
            assert [share.share for share in shares] == [len(share.rows) / len(batch.rows) for share in shares]
            assert batch.share == 1 and max(len(s.rows) for s in shares) - min(len(s.rows) for s in shares) <= 1
            assert all(part.state_dict() == whole.state_dict() for part in parts), "positions are the whole batch's"


def test_a_process_without_a_patch_is_refused(patches: Patches) -> None:
    Loader(patches, batch_size=7, world=(0, 2))  # the last batch has 2
    with pytest.raises(ConfigError, match=r"batch_size=7: the smallest batch of 30 patches has 2 for 3 processes"):
        Loader(patches, batch_size=7, world=(0, 3))
    with pytest.raises(ConfigError, match=r"batch_size=2: the smallest batch of 30 patches has 2 for 3 processes"):
        Loader(patches, batch_size=2, world=(0, 3))


@pytest.mark.parametrize("sampler", ["shuffle", "balanced"])
def test_resumes_at_every_batch(sampler: str, patches: Patches) -> None:
    def fresh() -> Loader:
        options: dict[str, Any] = {"view": centre, "augmentations": ["d4", "stain"]}
        return Loader(patches, batch_size=5, sampler=sampler, seed=2, **options)

    def stream(loader: Loader) -> itertools.chain[Batch]:
        return itertools.chain.from_iterable(iter(loader) for _ in range(99))

    whole = list(itertools.islice(stream(fresh()), 18))  # three epochs of 6 batches
    for taken in range(13):
        first = fresh()
        for _ in itertools.islice(stream(first), taken):
            pass
        second = fresh()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for number, batch in enumerate(itertools.islice(stream(second), 5)):
            assert same(batch, whole[taken + number])


def test_next_iteration_goes_on_where_the_last_stopped(patches: Patches) -> None:
    loader = Loader(patches, patches.rows(), batch_size=8)
    first = next(iter(loader))
    rest = list(loader)
    assert len(rest) == 3
    assert len(set(np.concatenate([batch.rows for batch in [first, *rest]]))) == 29
    assert loader.state_dict()["epoch"] == 1 and loader.state_dict()["position"] == 0


@pytest.mark.parametrize(
    ("other", "key"), [({"seed": 1}, "seed"), ({"batch_size": 4}, "batch_size"), ({"sampler": "balanced"}, "sampler")]
)
def test_state_of_another_epoch_is_refused(other: dict[str, Any], key: str, patches: Patches) -> None:
    state = Loader(patches, patches.rows(), batch_size=8).state_dict()
    with pytest.raises(CheckpointError, match=f"the loader's {key} was"):
        Loader(patches, patches.rows(), **{"batch_size": 8, **other}).load_state_dict(state)
    with pytest.raises(CheckpointError, match="the loader's rows was 29 and is 28"):
        Loader(patches, patches.rows(limit=28), batch_size=8).load_state_dict(state)


def test_nothing_to_load_is_refused(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match="no labels"):
        Loader(open_split(write(tmp_path, images, None, "test"), "test"))
    with pytest.raises(DataError, match="no valid patch"):
        black = open_split(write(tmp_path, np.zeros_like(images), labels), "train")
        Loader(black, black.rows())


def _resident() -> int:
    """Bytes of this process in memory, mapped file pages included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("RssFile", "RssAnon")))


def test_memory_stays_bounded_over_a_large_file(tmp_path: Path) -> None:
    rows = 22_000  # 608 MB of zeros that cost no disk: allocated, never written
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    path = split_path(tmp_path, "train", "x")
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((rows, 96, 96, 3))
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, space, creation)
    with h5py.File(split_path(tmp_path, "train", "y"), "w") as file:
        file["y"] = np.arange(rows).astype(np.uint8).reshape(-1, 1, 1, 1) % 2
    assert path.stat().st_size > 600_000_000 and path.stat().st_blocks * 512 < 10_000_000

    loader = Loader(open_split(tmp_path, "train"), np.arange(rows), batch_size=128)
    list(itertools.islice(loader, 2))  # torch's own buffers
    before, peak = _resident(), 0
    for batch in loader:
        peak = max(peak, _resident())
        assert len(batch.rows)
    assert peak - before < 256 << 20
    assert int(open_split(tmp_path, "train").flags.sum()) == 4 * rows  # the scan reads all of it too
    assert _resident() - before < 256 << 20
