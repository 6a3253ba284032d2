"""One checkpoint that answers: patches in, probabilities and calls out.

answers = Predictor("best.safetensors").answer(patches)       # (N, 96, 96, 3) uint8
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcamlib.config import validate
from pcamlib.errors import ConfigError
from pcamlib.training.decision import Decision, scaled
from pcamlib.training.state import load_classifier

BATCH = 64  # patches at once


@dataclass(frozen=True)
class Answers:
    """What a checkpoint says about N patches.

    Attributes:
        probability: (N,) float64 of tumour, as the network gives it.
        confidence: (N,) float64 of tumour, calibrated.
        tumour: (N,) bool, probability >= threshold.
        threshold: of the probability.
    """

    probability: np.ndarray
    confidence: np.ndarray
    tumour: np.ndarray
    threshold: float


class Predictor:
    """A checkpoint, loaded once.

    Attributes:
        path: of the checkpoint.
        meta: its metadata: `model`, `normalisation`, `synthetic`, `recorded`, `provenance`, ...
        decision: threshold and temperature chosen on validation; None in a checkpoint of an unfinished run.
        model: in eval mode, on the CPU.

    Raises:
        CheckpointError: missing, damaged, a pickle, or not one of ours.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.model, self.meta = load_classifier(path)
        stored: dict[str, Any] | None = self.meta.get("decision")
        self.decision = validate(Decision, stored) if stored else None

    def threshold(self, wanted: str | float = "chosen") -> float:
        """A threshold as a number; "chosen" is the checkpoint's own.

        Raises:
            ConfigError: no number from 0 to 1, or none was chosen.
        """
        if wanted == "chosen":
            if self.decision is None:
                raise ConfigError(f"{self.path}: carries no threshold: its run did not finish; give --threshold 0.5")
            return self.decision.threshold
        try:
            value = float(wanted)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= 1:
            raise ConfigError(f"threshold '{wanted}': give a number from 0 to 1, or 'chosen'")
        return value

    def probability(self, images: np.ndarray) -> np.ndarray:
        """(N, 96, 96, 3) uint8 -> (N,) float64 of tumour, in batches of at most `BATCH`."""
        parts = [self._batch(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _batch(self, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            logits = self.model(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2))
        return logits.double().softmax(1)[:, 1].numpy()

    def calibrated(self, probability: np.ndarray) -> np.ndarray:
        """Probabilities that mean what they say; unchanged where no temperature was fitted."""
        return scaled(probability, self.decision.temperature) if self.decision else probability

    def answer(self, images: np.ndarray, threshold: str | float = "chosen") -> Answers:
        """Everything about (N, 96, 96, 3) uint8 patches."""
        cut, probability = self.threshold(threshold), self.probability(images)
        return Answers(probability, self.calibrated(probability), probability >= cut, cut)
