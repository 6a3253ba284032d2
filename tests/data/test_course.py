"""The course's interface: its own expectations, pickling, and the same weights for any number of workers."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, WeightedRandomSampler

import pcamlib
from pcamlib.data.augment import augment
from pcamlib.data.course import KeyedAugment, PCAMDataset, get_dataloaders, load_config, scale, setup_logger
from pcamlib.data.layout import split_path
from pcamlib.errors import ConfigError, DataError
from pcamlib.models.mlp import MLP
from pcamlib.training.checkpoint import weights_digest
from pcamlib.training.course import Trainer


def paths(folder: Path, split: str = "train") -> tuple[Path, Path]:
    """x and y of a split."""
    return split_path(folder, split, "x"), split_path(folder, split, "y")


@pytest.fixture
def course_files(tmp_path: Path, write: Callable[..., Path]) -> Path:
    """100 float32 patches as the course plants them, 20 positive, int64 labels; 24 valid ones."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, 255, (100, 96, 96, 3)).astype(np.float32)
    x[0, 0, 0, 0], x[1], x[2] = 1e5, 0, 255
    write(tmp_path, x, (np.arange(100) >= 80).astype(np.int64))
    return write(tmp_path, rng.integers(0, 256, (24, 96, 96, 3), np.uint8), np.arange(24) % 2, "valid")


def test_values_are_clipped_and_labels_long(course_files: Path) -> None:
    dataset = PCAMDataset(*map(str, paths(course_files)), transform=None)
    image, label = dataset[0]
    assert len(dataset) == 100 and image.shape == (3, 96, 96) and image.dtype == torch.uint8
    assert image[0, 0, 0] == 255 and image.max() <= 255 and image.min() >= 0
    assert label.dtype == torch.long and label.ndim == 0 and label == 0 and dataset[99][1] == 1
    assert not list(course_files.glob(".pcam-cache/*")), "float32 is read where it lies"


def test_filter_drops_black_and_white(course_files: Path) -> None:
    dataset = PCAMDataset(*paths(course_files), filter_data=True)
    assert len(dataset.indices) == len(dataset) == 98
    assert dataset.indices.dtype == np.int64 and dataset.indices[:3].tolist() == [0, 3, 4]
    plain = PCAMDataset(*paths(course_files))
    assert dataset[1][0].equal(plain[3][0]) and plain.indices.tolist() == list(range(100))


@pytest.mark.parametrize("kind", ["contiguous", "float32", "chunked", "gzip", "h5.gz"])
def test_every_form_gives_the_same_items(
    kind: str, tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    images[3] = 255
    write(tmp_path, images, labels, kind=kind)
    (x,) = tmp_path.glob("*_x.h5*")
    dataset = PCAMDataset(x, paths(tmp_path)[1], filter_data=True)
    assert dataset.indices.tolist() == [row for row in range(30) if row != 3]
    for item, row in enumerate(dataset.indices):
        image, label = dataset[item]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), images[row]) and label == labels[row]


def test_nan_reads_as_0(tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]) -> None:
    x = images.astype(np.float32)
    x[0, 1, 2, 0], x[0, 1, 2, 1], x[0, 1, 2, 2] = np.nan, -7, np.inf
    write(tmp_path, x, labels)
    assert PCAMDataset(*paths(tmp_path))[0][0][:, 1, 2].tolist() == [0, 0, 255]


@pytest.mark.parametrize("kind", ["contiguous", "gzip"])
def test_no_handle_crosses_a_pickle_or_a_fork(
    kind: str, tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path],
    killed: Callable[[Callable[[], None]], int],
) -> None:  # fmt: skip
    dataset = PCAMDataset(*paths(write(tmp_path, images, labels, kind=kind)))
    first = dataset[5][0]
    array = dataset._array
    text = pickle.dumps(dataset)
    assert len(text) < 10_000, "the pixels stay on disk"
    copy = pickle.loads(text)
    assert copy._array is None and copy[5][0].equal(first)

    def child() -> None:
        assert dataset[5][0].equal(first) and dataset._array is not array
        os._exit(17)

    assert killed(child) == 17
    assert dataset._array is array and dataset[6][0].shape == (3, 96, 96)


def test_bad_files_are_named(
    tmp_path: Path, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path]
) -> None:
    write(tmp_path, images, labels[:-1])
    with pytest.raises(DataError, match=r"train_x\.h5: 30 patches but 29 labels"):
        PCAMDataset(*paths(tmp_path))
    for name in ("nowhere.h5", "nowhere.h5.gz"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            PCAMDataset(tmp_path / name, paths(tmp_path)[1])
    with pytest.raises(DataError, match=r"valid_x\.h5: missing"):
        get_dataloaders({"data": {"data_path": str(tmp_path)}})
    with pytest.raises(ConfigError, match=r"data\.data_path"):
        get_dataloaders({"seed": 1})


def test_loaders_give_the_course_batches(course_files: Path) -> None:
    train, valid = get_dataloaders({"data": {"data_path": str(course_files), "batch_size": 4, "num_workers": 0}})
    assert isinstance(train.sampler, WeightedRandomSampler) and len(train) == 25
    images, labels = next(iter(train))
    assert images.shape == (4, 3, 96, 96) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    assert labels.shape == (4,) and labels.dtype == torch.long
    seen = torch.cat([label for _, label in valid])
    assert seen.tolist() == [0, 1] * 12
    assert scale(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]


def test_sampler_balances_each_epoch_anew(course_files: Path) -> None:
    config = {"seed": 3, "data": {"data_path": str(course_files), "batch_size": 40, "filter_data": True}}
    train, _ = get_dataloaders(config)
    assert next(iter(train))[1].sum() > 12
    orders = [list(train.sampler) for _ in range(50)]
    labels = train.dataset.labels
    assert all(len(order) == 98 for order in orders) and orders[0] != orders[1]
    assert abs(np.mean([labels[order].float().mean() for order in orders]) - 0.5) < 0.03
    again, _ = get_dataloaders(config)
    torch.manual_seed(99)  # the global generator plays no part
    state = torch.get_rng_state()
    assert [list(again.sampler) for _ in range(51)][1:] == orders
    next(iter(again))
    assert torch.get_rng_state().equal(state)
    other, _ = get_dataloaders({**config, "seed": 4})
    assert list(other.sampler) not in orders


@pytest.mark.parametrize("workers", [0, 2])
def test_each_iteration_is_a_new_keyed_epoch(workers: int, course_files: Path) -> None:
    options = {"data_path": str(course_files), "batch_size": 10, "num_workers": workers, "augment": ["d4", "stain"]}
    train, _ = get_dataloaders({"seed": 3, "data": options})
    plain = PCAMDataset(*paths(course_files))
    orders, _ = get_dataloaders({"seed": 3, "data": options})
    for epoch in range(3):
        rows = np.array(list(orders.sampler))
        source = torch.stack([plain[row][0] for row in rows[:10]]).permute(0, 2, 3, 1).contiguous()
        expected = augment(source, ["d4", "stain"], 3, epoch, rows[:10], 0.05).permute(0, 3, 1, 2)
        assert next(iter(train))[0].equal(scale(expected))


def test_epoch_reaches_workers_that_live_on(course_files: Path) -> None:
    dataset = pickle.loads(pickle.dumps(PCAMDataset(*paths(course_files), transform=KeyedAugment(0))))
    loader: DataLoader[Any] = DataLoader(dataset, 100, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(next(iter(loader))[0])
    assert epochs[0].equal(epochs[2]) and not epochs[0].equal(epochs[1])


class GlobalFlip:
    """What people write: a draw from torch's global generator."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return scale(image.flip(2) if torch.rand(()) < 0.5 else image)


def _weights(folder: Path, workers: int, transform: Any = None) -> str:
    """Digest of the MLP's weights after two epochs."""
    options = {"data_path": str(folder), "batch_size": 16, "num_workers": workers, "augment": ["d4", "stain"]}
    config = {"seed": 1, "data": options, "training": {"epochs": 2, "save_dir": str(folder / f"w{workers}")}}
    train, valid = get_dataloaders(config)
    if transform:
        train.dataset.transform = transform
    torch.manual_seed(1)
    model = MLP((3, 96, 96), [16], 2, 0.2)
    Trainer(model, torch.optim.Adam(model.parameters()), config, "cpu").fit(train, valid)
    return weights_digest(model)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_weights_do_not_depend_on_the_number_of_workers(course_files: Path) -> None:
    assert _weights(course_files, 0) == _weights(course_files, 2) == _weights(course_files, 4)


def test_a_global_draw_does_depend_on_it(course_files: Path) -> None:
    assert _weights(course_files, 0, GlobalFlip()) != _weights(course_files, 2, GlobalFlip())


def test_config_and_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"batch_size": 32}}))
    assert load_config(tmp_path / "c.yaml") == {"data": {"batch_size": 32}}
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "d.yaml")
    (tmp_path / "c.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        load_config(tmp_path / "c.yaml")
    assert "\n" not in str(caught.value)
    logger = setup_logger("pcam-test")
    assert setup_logger("pcam-test") is logger and len(logger.handlers) == 1 and logger.level == logging.INFO
    logger.info("hello")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("INFO hello") and line[:2] == "20"


def test_names_are_importable_from_the_package() -> None:
    for name in pcamlib.__all__:
        assert getattr(pcamlib, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = pcamlib.Nothing
