"""The course's trainer and tracker: scores of whole epochs, whole checkpoints, a folder for each run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pcamlib.config import read_yaml
from pcamlib.errors import ConfigError, PcamError, RunError
from pcamlib.files import _part_name
from pcamlib.training import checkpoint
from pcamlib.training.course import ExperimentTracker, Trainer
from pcamlib.training.tracking import read_metrics


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Three epochs into a folder of its own."""
    return {"training": {"epochs": 3, "save_dir": str(tmp_path / "saved")}}


@pytest.fixture
def loader() -> DataLoader[Any]:
    """21 patches of 3 bright and 18 dark ones, in batches of 8, 8 and 5: batch means would mislead."""
    torch.manual_seed(0)
    labels = (torch.arange(21) > 17).long()
    return DataLoader(TensorDataset(torch.randn(21, 3, 8, 8) + labels.view(-1, 1, 1, 1), labels), batch_size=8)


def trainer(config: dict[str, Any], rate: float = 0.05) -> Trainer:
    """A linear model under plain SGD."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    return Trainer(model, torch.optim.SGD(model.parameters(), rate), config, "cpu")


def test_scores_are_those_of_the_whole_epoch(config: dict[str, Any], loader: DataLoader[Any]) -> None:
    judge = trainer(config)
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    with torch.no_grad():
        logits = judge.model(images)
    loss, accuracy, f1 = judge.validate(loader, 0)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-6)
    assert accuracy == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    assert f1 == pytest.approx(f1_score(labels, logits.argmax(1)))
    batches = [float(nn.functional.cross_entropy(judge.model(x), y).detach()) for x, y in loader]
    assert abs(float(np.mean(batches)) - loss) > 1e-3, "the mean of batch means is another number"


def test_validation_changes_nothing(config: dict[str, Any], loader: DataLoader[Any]) -> None:
    judge = trainer(config)
    before = checkpoint.weights_digest(judge.model)
    assert judge.validate(loader, 0) == judge.validate(loader, 1)
    assert checkpoint.weights_digest(judge.model) == before and not judge.model.training
    judge.train_epoch(loader, 0)
    assert checkpoint.weights_digest(judge.model) != before and judge.model.training


def test_fit_learns_tracks_and_keeps_the_best(tmp_path: Path, config: dict[str, Any], loader: DataLoader[Any]) -> None:
    tracker = ExperimentTracker("first", config, tmp_path / "runs")
    student = trainer(config)
    history = student.fit(loader, loader, tracker)
    tracker.close()
    assert [row["step"] for row in read_metrics(tracker.path / "metrics.jsonl")] == [0, 1, 2]
    losses = [row["val_loss"] for row in history]
    assert losses == sorted(losses, reverse=True) and len(history) == 3
    assert set(history[0]) == {f"{a}_{b}" for a in ("train", "val") for b in ("loss", "accuracy", "f1")}
    saved = sorted((tmp_path / "saved").iterdir())
    assert [path.name for path in saved] == ["epoch_000.safetensors", "epoch_001.safetensors", "epoch_002.safetensors"]
    tensors, meta = checkpoint.load(saved[-1])
    assert meta == {"epoch": 2, "val_loss": losses[-1], "config": config}
    fresh = trainer(config)
    checkpoint.load_weights(fresh.model, checkpoint.split(tensors, "model"), saved[-1])
    assert checkpoint.weights_digest(fresh.model) == checkpoint.weights_digest(student.model)


def test_no_checkpoint_where_validation_got_worse(
    tmp_path: Path, config: dict[str, Any], loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, losses = trainer(config), iter([0.5, 0.7, math.nan])
    monkeypatch.setattr(student, "validate", lambda loader, epoch: (next(losses), 0.0, 0.0))
    student.fit(loader, loader)
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["epoch_000.safetensors"]


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_checkpoint_holds_the_optimiser(optimizer: Any, config: dict[str, Any], loader: DataLoader[Any]) -> None:
    student = trainer(config)
    student.optimizer = optimizer(student.model.parameters())
    student.train_epoch(loader, 0)
    tensors, _ = checkpoint.load(student.save_checkpoint(0, 0.5))
    stored = checkpoint.split(tensors, "optimizer")
    assert set(stored) == {f"{n}.{name}" for n in (0, 1) for name in ("exp_avg", "exp_avg_sq", "step")}


def test_a_full_disk_leaves_no_checkpoint(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "saved" / "epoch_004.safetensors"
    path.parent.mkdir()
    _part_name(path).symlink_to("/dev/full")
    with pytest.raises(PcamError, match="the disk is full"):
        trainer(config).save_checkpoint(4, 0.5)
    assert list(path.parent.iterdir()) == []


def test_a_loss_that_is_not_finite_stops(config: dict[str, Any], loader: DataLoader[Any]) -> None:
    student = trainer(config)
    loader.dataset.tensors[0][9] = math.nan  # type: ignore[attr-defined]
    with pytest.raises(RunError, match="epoch 7, batch 1: the loss is nan"):
        student.train_epoch(loader, 7)
    assert all(parameter.isfinite().all() for parameter in student.model.parameters())


def test_what_is_missing_is_named(loader: DataLoader[Any]) -> None:
    with pytest.raises(ConfigError, match=r"training\.epochs is missing"):
        trainer({"training": {}}).fit(loader, loader)
    with pytest.raises(ConfigError, match=r"training\.save_dir is missing"):
        trainer({}).save_checkpoint(0, 0.0)
    with pytest.raises(RunError, match="no batch"):
        trainer({}).validate(DataLoader(TensorDataset(torch.zeros(0, 3, 8, 8))), 0)


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    trackers = [ExperimentTracker("twin", {"seed": seed}, tmp_path) for seed in range(3)]
    for number, tracker in enumerate(trackers):
        tracker.log_metrics(0, {"loss": np.float32(number), "f1": torch.tensor(0.5)})  # type: ignore[dict-item]
        tracker.close()
    assert [tracker.path.name for tracker in trackers] == ["twin", "twin-2", "twin-3"]
    for number, tracker in enumerate(trackers):
        assert read_yaml(tracker.path / "config.yaml") == {"seed": number}
        assert read_metrics(tracker.path / "metrics.jsonl") == [{"step": 0, "loss": number, "f1": 0.5}]
    path = trackers[0].get_checkpoint_path("best.safetensors")
    assert path == tmp_path / "twin" / "checkpoints" / "best.safetensors" and path.parent.is_dir()
