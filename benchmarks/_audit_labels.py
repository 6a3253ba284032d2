"""Label errors: planted flips found again, beside confident learning on the same out-of-fold probabilities."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _rows import row
from sklearn.metrics import roc_auc_score

from pcamlib.audit import labels, noise
from pcamlib.audit.findings import Split
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.synthetic import generate

#: CPU seconds at the stated rate with 10 % and 2 % flipped, for 20,000 real or 4,000 generated patches.
SECONDS = {"real": (150.0, 150.0), "synthetic": (20.0, 20.0)}


def flipped(patches: Patches, share: float, seed: int = 0) -> tuple[Patches, np.ndarray]:
    """The split with a share of its labels, of either class, turned over; (N,) bool: which."""
    assert patches.labels is not None
    wrong = np.zeros(len(patches), bool)
    wrong[np.random.default_rng(seed).choice(len(patches), round(share * len(patches)), replace=False)] = True
    return replace(patches, labels=patches.labels ^ wrong), wrong


def judge(patches: Patches, wrong: np.ndarray, seconds: float, seed: int = 0) -> dict[str, float]:
    """auroc, p100, f1, accused, peer (F1 of cleanlab), rate (estimated share of wrong labels)."""
    from cleanlab.filter import find_label_issues

    assert patches.labels is not None
    probability = labels.out_of_fold({"train": Split(patches, {})}, seconds=seconds, seed=seed).probability["train"]
    judged = np.flatnonzero(np.isfinite(probability))
    probability, given, wrong = probability[judged], patches.labels[judged].astype(np.int64), wrong[judged]
    model = noise.estimate(probability, given)
    suspicion = model.wrong(probability, given)
    accused = noise.cut(suspicion)
    both = np.stack([1 - probability, probability], 1)
    theirs = find_label_issues(given, both, filter_by="confident_learning", n_jobs=1)
    total = max(1, int(wrong.sum()))
    return {
        "auroc": float(roc_auc_score(wrong, suspicion)) if wrong.any() else float("nan"),
        "p100": float(wrong[np.argsort(-suspicion, kind="stable")[:100]].mean()),
        "f1": 2 * float(wrong[accused].sum()) / (len(accused) + total),
        "peer": 2 * float(wrong[theirs].sum()) / (int(theirs.sum()) + total),
        "accused": len(accused),
        "rate": float(np.mean(model.rates)),
    }


def rows(real: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Flips of 10 % and 2 % in either class; one run each whatever `rounds`, since a run takes minutes."""
    with tempfile.TemporaryDirectory() as folder:
        if real is None:
            generate(folder, seed=5, sizes={"train": 4000}, report=lambda line: None)
        patches = open_split(real or folder, "train")
        kind = "synthetic" if real is None else "real"
        many, few = (
            judge(*flipped(patches, share), budget) for share, budget in zip((0.1, 0.02), SECONDS[kind], strict=True)
        )
    what, peer = f"{kind}, {len(patches):,}: 10 % flipped", "cleanlab, same probabilities: "
    return [
        row(f"{what}, F1", many["f1"], "", n=1, against=f"{peer}{many['peer']:.3f}",
            ratio=many["f1"] / max(many["peer"], 1e-9), bar="VALUE>=0.60"),
        row(f"{what}, AUROC", many["auroc"], "", n=1, bar="VALUE>=0.90"),
        row(f"{what}, precision at 100", many["p100"], "", n=1, bar="VALUE>=0.9" if real else "VALUE>=0.8"),
        row(f"{what}, estimated share", many["rate"], "", n=1, against="0.1"),
        row(f"{kind}: 2 % flipped, AUROC", few["auroc"], "", n=1, bar="VALUE>=0.92"),
        row(f"{kind}: 2 % flipped, F1", few["f1"], "", n=1, against=f"{peer}{few['peer']:.3f}",
            ratio=few["f1"] / max(few["peer"], 1e-9)),
    ]  # fmt: skip
