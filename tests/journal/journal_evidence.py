"""The evidence that the journal expects of notebooks 00 and 01, small and made through the recorder."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from pcamlib.journal.evidence import Recorder

DATA = {"train": "a" * 64, "valid": "b" * 64}
METRIC = {"n": 3000, "interval": (0.79, 0.83), "baseline": {"prevalence": 0.5}}


def notebook(root: Path, name: str, code: str) -> Path:
    """Write a notebook of one code cell."""
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(exist_ok=True)
    cell = {"cell_type": "code", "source": code, "metadata": {}, "outputs": [], "execution_count": 1}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def plot() -> plt.Figure:
    """A figure of one line."""
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.plot([0, 1, 2], [0.7, 0.6, 0.5])
    axes.set_xlabel("epoch")
    plt.close(figure)
    return figure


def data_evidence(root: Path, synthetic: bool) -> Recorder:
    """The evidence that the journal expects of notebook 00, not closed yet."""
    evidence = Recorder("00_data", root, data=DATA, synthetic=synthetic)
    splits = {"train": 20000, "valid": 3000}
    evidence.table(
        "data.splits",
        [
            {"split": s, "patches": n, "positive": n // 2, "negative": n // 2, "dtype": "uint8", "fingerprint": DATA[s]}
            for s, n in splits.items()
        ],
        caption="The files.",
    )
    for name in ("balance", "examples", "intensity", "outliers", "sampler"):
        evidence.figure(f"data.{name}", plot(), {"loss": [0.7, 0.6, 0.5]}, caption=f"The {name} of the data.", n=3000)
    evidence.table("data.outliers.table", [{"what": "NaN", "patches": 0}])
    evidence.table("data.normalisation", [{"channel": c, "mean": 0.7, "sd": 0.2} for c in "RGB"], n=20000)
    evidence.table("data.sampler.positives", [{"sampler": "balanced", "expected": 16, "measured": 15.9}])
    evidence.figure("data.mlp.loss", plot(), {"train": [0.7, 0.6, 0.5]}, caption="The loss.")
    evidence.value("data.mlp.epochs", 3)
    evidence.metric("data.mlp.auc", 0.81, **METRIC, seeds=(0,), runs={"mlp-0": "c" * 64})
    return evidence


def reproducibility_evidence(root: Path, synthetic: bool, equal: bool = True) -> Recorder:
    """The evidence that the journal expects of notebook 01, not closed yet."""
    evidence = Recorder("01_reproducibility", root, data=DATA, synthetic=synthetic, parameters={"root": root})
    evidence.table(
        "repro.sources",
        [
            {
                "source": source,
                "equal weights": same,
                "first differing step": None if same else 1,
                "first differing tensor": None if same else "layer.weight",
                "control": "seed_everything",
                "equal with control": True,
            }
            for source, same in (("seed", False), ("workers", True), ("threads", False))
        ],
    )
    evidence.value("repro.twins.equal", equal, runs={"a": "d" * 64, "b": "d" * 64 if equal else "e" * 64})
    evidence.table("repro.twins.table", [{"step": 1, "run a": "d" * 64, "run b": "d" * 64}])
    evidence.figure("repro.twins", plot(), {"a": [1.0, 2.0]}, caption="Two runs.")
    evidence.value("repro.twins.verdict", "no difference" if equal else "first difference: config: seed: 0 | 1")
    evidence.value("repro.cost", 1.08, note="Median of 5 pairs.")
    evidence.value("repro.cost.shown", True)
    evidence.table("repro.config", [{"parameter": "optimizer.lr", "from": 1e-3, "to": 1e-4, "AUC": [0.79, 0.83]}])
    evidence.table("repro.environment", [{"condition": "threads", "value": 2}])
    return evidence
