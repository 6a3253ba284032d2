"""The course skeleton's trainer and tracker, on our checkpoints, metrics and files; new code takes `training.loop`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from pcamlib.errors import ConfigError, RunError
from pcamlib.files import write_text
from pcamlib.training import checkpoint, metrics
from pcamlib.training.tracking import MetricsFile


class ExperimentTracker:
    """A folder of its own for one experiment: `config.yaml`, `metrics.jsonl`, `checkpoints/`.

    Where `base_dir/experiment_name` is taken, the next free number is added: two runs never share their metrics.
    """

    def __init__(self, experiment_name: str, config: dict[str, Any], base_dir: str | Path = "runs/course") -> None:
        self.path, number = Path(base_dir) / experiment_name, 1
        while True:
            try:
                self.path.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
                self.path = Path(base_dir) / f"{experiment_name}-{number}"
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        self._metrics = MetricsFile(self.path / "metrics.jsonl")

    def log_metrics(self, epoch: int, metrics: dict[str, float]) -> None:
        """Append one epoch's numbers."""
        self._metrics.log({"step": epoch, **{name: float(value) for name, value in metrics.items()}})

    def get_checkpoint_path(self, filename: str) -> Path:
        """Where a checkpoint of this experiment goes; its folder exists."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        return folder / filename

    def close(self) -> None:
        """Close the metrics file."""
        self._metrics.close()


class Trainer:
    """Trains a classifier of two logits; every score comes from a whole epoch's predictions, not from batch means.

    Args:
        model: (B, 3, 96, 96) -> (B, 2) logits.
        optimizer: over the model's parameters.
        config: `training` with `epochs` (for `fit`) and `save_dir` (for checkpoints).
        device: where to compute.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], device: str | torch.device
    ) -> None:
        self.model, self.optimizer, self.config, self.device = model.to(device), optimizer, config, device

    def train_epoch(self, loader: DataLoader[Any], epoch: int) -> tuple[float, float, float]:
        """One pass with updates; loss, accuracy and F1 of the predictions made on the way.

        Raises:
            RunError: the loss is not finite; the weights are those before that batch.
        """
        self.model.train()
        return self._epoch(loader, epoch, update=True)

    def validate(self, loader: DataLoader[Any], epoch: int) -> tuple[float, float, float]:
        """Loss, accuracy and F1 of the model as it is."""
        self.model.eval()
        with torch.inference_mode():
            return self._epoch(loader, epoch, update=False)

    def _epoch(self, loader: DataLoader[Any], epoch: int, update: bool) -> tuple[float, float, float]:
        losses, labels, probabilities = [], [], []
        for number, batch in enumerate(loader):
            images, label = (part.to(self.device) for part in batch)
            logits = self.model(images)
            each = functional.cross_entropy(logits, label, reduction="none")
            if update:
                loss = each.mean()
                if not math.isfinite(float(loss.detach())):
                    raise RunError(
                        f"epoch {epoch}, batch {number}: the loss is {float(loss.detach())}; lower the learning rate"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
            losses.append(each.detach())
            labels.append(label)
            probabilities.append(logits.detach().double().softmax(1)[:, 1])
        if not losses:
            raise RunError(f"epoch {epoch}: the loader gave no batch")
        truth, probability = torch.cat(labels).cpu().numpy(), torch.cat(probabilities).cpu().numpy()
        scores = metrics.scores(truth, probability, torch.ones(1, len(truth)).numpy())
        return float(torch.cat(losses).double().mean()), float(scores["accuracy"][0]), float(scores["f1"][0])

    def save_checkpoint(self, epoch: int, val_loss: float) -> Path:
        """Write weights and optimiser to `save_dir/epoch_EPOCH.safetensors`; returns the path."""
        path = Path(self._setting("save_dir")) / f"epoch_{epoch:03d}.safetensors"
        tensors = {
            **checkpoint.join("model", self.model.state_dict()),
            **checkpoint.join("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
        }
        checkpoint.save(path, tensors, {"epoch": epoch, "val_loss": val_loss, "config": self.config})
        return path

    def fit(
        self, train_loader: DataLoader[Any], val_loader: DataLoader[Any], tracker: ExperimentTracker | None = None
    ) -> list[dict[str, float]]:
        """Train for `training.epochs`, with a checkpoint whenever the validation loss is the lowest so far.

        Returns:
            one dict an epoch: `train_` and `val_` with `loss`, `accuracy`, `f1`.
        """
        history: list[dict[str, float]] = []
        best = math.inf
        for epoch in range(int(self._setting("epochs"))):
            scores = (*self.train_epoch(train_loader, epoch), *self.validate(val_loader, epoch))
            names = [f"{split}_{score}" for split in ("train", "val") for score in ("loss", "accuracy", "f1")]
            row = dict(zip(names, scores, strict=True))
            history.append(row)
            if tracker:
                tracker.log_metrics(epoch, row)
            if row["val_loss"] < best:
                best = row["val_loss"]
                self.save_checkpoint(epoch, best)
        return history

    def _setting(self, key: str) -> Any:
        section = self.config.get("training") or {}
        if key not in section:
            raise ConfigError(f"training.{key} is missing from the configuration")
        return section[key]
