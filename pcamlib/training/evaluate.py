"""Predictions: one row a patch, stored, from which every reported number is computed afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcamlib.data.loader import Loader
from pcamlib.data.patches import Patches
from pcamlib.data.sampling import share
from pcamlib.errors import DataError
from pcamlib.files import atomic_path
from pcamlib.models import Classifier
from pcamlib.training import metrics
from pcamlib.training.distributed import World


@dataclass(frozen=True)
class Predictions:
    """What a model said about a split.

    Attributes:
        split: name of the split.
        fingerprint: of the patches predicted.
        index: (N,) int64, row in the split's file, ascending.
        label: (N,) uint8.
        probability: (N,) float64, of tumour.
    """

    split: str
    fingerprint: str
    index: np.ndarray
    label: np.ndarray
    probability: np.ndarray

    def save(self, path: str | Path) -> None:
        """Write as .npz, atomically."""
        with atomic_path(path) as part, open(part, "wb") as out:
            np.savez(
                out, split=self.split, fingerprint=self.fingerprint, index=self.index, label=self.label,
                probability=self.probability,
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what `save` wrote.

        Raises:
            DataError: missing or damaged.
        """
        try:
            with np.load(path) as stored:
                fields: dict[str, Any] = {name: stored[name] for name in ("index", "label", "probability")}
                return cls(str(stored["split"]), str(stored["fingerprint"]), **fields)
        except FileNotFoundError:
            raise DataError(f"{path}: no such predictions; `pcam evaluate RUN --split NAME` writes them") from None
        except Exception as error:  # zipfile and NumPy raise a dozen kinds, also EOFError and NotImplementedError
            reason = " ".join(str(error).split())
            raise DataError(f"{path}: damaged predictions ({reason}); evaluate the run again") from None

    def take(self, positions: np.ndarray) -> Predictions:
        """The rows at `positions`, or where a bool mask is true."""
        return replace(self, **{name: getattr(self, name)[positions] for name in ("index", "label", "probability")})

    def report(self, **options: Any) -> dict[str, Any]:
        """`metrics.report` of these predictions."""
        return metrics.report(self.label, self.probability, **options)


def predict(
    model: Classifier, loader: Loader, *, precision: str = "fp32", device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and tumour probabilities over one epoch of a sequential loader.

    Returns:
        (N,) int64 rows and (N,) float64 probabilities.
    """
    was_training = model.training
    model.eval()
    rows, logits = [], []
    enabled = precision == "bf16"
    with torch.inference_mode(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
        for batch in loader:
            logits.append(model(batch.images).float().cpu())
            rows.append(batch.rows)
    model.train(was_training)
    probability = torch.cat(logits).double().softmax(1)[:, 1].numpy()
    return np.concatenate(rows), probability


def evaluate(
    model: Classifier,
    patches: Patches,
    *,
    precision: str = "fp32",
    device: str = "cpu",
    batch_size: int = 250,
    world: World | None = None,
) -> Predictions:
    """Predict every patch of a split, also those that training drops: nobody may choose what is easy.

    With `world`, each process predicts some of the batches and all get every prediction, bitwise those of one process.

    Raises:
        DataError: the split has no labels.
    """
    world = world or World()
    batches = share(math.ceil(len(patches) / batch_size), world.rank, world.size)
    index = np.arange(len(patches))[batches.start * batch_size : batches.stop * batch_size]
    probability = np.empty(0)
    if len(index):  # there may be fewer batches than processes
        loader = Loader(patches, index, batch_size=batch_size, sampler="sequential", view=model.view, device=device)
        index, probability = predict(model, loader, precision=precision, device=device)
    index, probability = world.concat(index), world.concat(probability)
    assert patches.labels is not None  # the loader refuses otherwise
    return Predictions(patches.split, patches.fingerprint, index, patches.labels[index], probability)
