"""Where to call a patch tumour, and what a probability means: chosen on validation, carried by the checkpoint.

A threshold is chosen by F-beta or by what a missed tumour costs; one temperature divides every logit (Guo et al. 2017),
so the order of the patches, and with it the AUC and every call, stays. Both are chosen on all validation patches: what
they would score on others is shown out of fold by `experiments.threshold` and `experiments.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import Field
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit

from pcamlib.config import Strict
from pcamlib.training import checkpoint, runs
from pcamlib.training.evaluate import Predictions

_CLIP = 1e-7  # as in metrics: a logit of 16
#: Loss of (true positives, false positives, positives, negatives), to be minimised; arrays of one shape.
Rule = Callable[[Any, Any, Any, Any], Any]


def f_beta(beta: float) -> Rule:
    """One minus F-beta: recall counts beta times as much as precision."""
    square = beta * beta
    return lambda tp, fp, positive, negative: 1 - (1 + square) * tp / (square * positive + tp + fp)


def cost(ratio: float) -> Rule:
    """Cost a patch, in false alarms, when a missed tumour costs `ratio` of them."""
    return lambda tp, fp, positive, negative: (ratio * (positive - tp) + fp) / (positive + negative)


def sweep(labels: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every threshold that calls another set of patches, and what it calls.

    Returns:
        (K,) thresholds, falling, halfway between neighbouring probabilities, from just above 1 (none) to 0 (all);
        (K,) true and (K,) false positives at `probability >= threshold`.
    """
    values, inverse = np.unique(-probability, return_inverse=True)
    true = np.bincount(inverse, labels, len(values)).cumsum()
    false = np.bincount(inverse, 1 - labels.astype(float), len(values)).cumsum()
    values = -values
    cuts = np.append((values[:-1] + values[1:]) / 2, 0.0)
    return np.append(np.nextafter(1.0, 2.0), cuts), np.append(0.0, true), np.append(0.0, false)


def choose(labels: np.ndarray, probability: np.ndarray, rule: Rule) -> float:
    """The threshold with the least loss; of equal ones the highest."""
    cuts, true, false = sweep(labels, probability)
    positive = float(labels.sum())
    return float(cuts[np.argmin(rule(true, false, positive, len(labels) - positive))])


def scaled(probability: np.ndarray, temperature: float | np.ndarray) -> np.ndarray:
    """Probabilities with their logits divided by a temperature."""
    return expit(logit(np.clip(probability, _CLIP, 1 - _CLIP)) / temperature)


def temperature(labels: np.ndarray, probability: np.ndarray) -> float:
    """The temperature with the least NLL, between 1/20 and 20."""

    def loss(log_t: float) -> float:
        p = np.clip(scaled(probability, np.exp(log_t)), _CLIP, 1 - _CLIP)
        return float(-np.where(labels == 1, np.log(p), np.log1p(-p)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(20), np.log(20)), method="bounded").x))


class Decision(Strict):
    """What a checkpoint carries beside its weights: a patch is called tumour where probability >= `threshold`."""

    rule: str = Field(description="what the threshold is the best by")
    threshold: float = Field(ge=0, description="of the probability as the network gives it, not of the calibrated one")
    temperature: float = Field(gt=0, description="divides the logit; the result is the calibrated probability")
    split: str
    n: int = Field(gt=0, description="patches that both were chosen on")
    fingerprint: str = Field(description="of these patches")


def decide(predictions: Predictions) -> Decision:
    """Threshold by F2, the course's score, and temperature by NLL, of a validation split's predictions."""
    label, probability = predictions.label, predictions.probability
    return Decision(
        rule="F2",
        threshold=choose(label, probability, f_beta(2)),
        temperature=temperature(label, probability),
        split=predictions.split,
        n=len(label),
        fingerprint=predictions.fingerprint,
    )


def inscribe(run: runs.Run, predictions: Predictions, result: dict[str, Any], precision: str) -> None:
    """Write into best.safetensors what those who get it alone must know: decision, scores, where it comes from."""
    tensors, meta = checkpoint.load(run.best)
    scores = {name: {"value": one["value"], "interval": one["interval"]} for name, one in result["metrics"].items()}
    recorded = {"split": predictions.split, "fingerprint": predictions.fingerprint, "n": result["n"]}
    recorded |= {"precision": precision, "best_of": result["best_of"], "metrics": scores}
    origin = {name: run.provenance[name] for name in ("code", "torch", "python", "data", "config", "started")}
    origin |= {"run": run.name, "seed": run.config.seed, "machine": run.provenance["machine"]["device_name"]}
    more = {"decision": decide(predictions).model_dump(), "recorded": recorded, "provenance": origin}
    checkpoint.save(run.best, tensors, {**meta, **more})
