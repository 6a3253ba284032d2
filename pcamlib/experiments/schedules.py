"""Settings compared over the same seeds: clipping as a counterfactual, and learning-rate schedules (A2 Q4).

Every difference is taken seed by seed, so that the chance of initial weights and order, which both members share,
cancels; a difference whose interval over seeds holds 0 is said to be none. The intervals of one table hold together
at 95 %, each being the wider the more settings stand against the first (Bonferroni: Holm's correction is as strict with
the first claim, and has no intervals to show).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from pcamlib.config import Config
from pcamlib.experiments import gradients, seeds
from pcamlib.training.runs import Run

#: Name -> settings; the first, without any schedule, is what the others have to beat.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": ("schedule.name=constant",),
    "warm-up": ("schedule.name=constant", "schedule.warmup=0.2"),
    "step": ("schedule.name=step",),
    "cosine": ("schedule.name=cosine",),
    "onecycle": ("schedule.name=onecycle",),
}
JUDGED = ("nll", "auc", "accuracy")


def train(
    base: Config,
    settings: Mapping[str, Sequence[str]],
    chosen: Sequence[int],
    data: Path,
    folder: Path,
    report: Callable[[str], None] = print,
) -> dict[str, list[Run]]:
    """`base` under each of the named settings, over the same seeds; errors as in `seeds.train`."""
    return {
        name: seeds.train(name, base.override(*changes), chosen, data, folder, report)
        for name, changes in settings.items()
    }


def scores(run: Run) -> dict[str, float]:
    """What a run ended with: mean training loss of its last epoch, validation NLL, AUC and accuracy of its last row."""
    rows, (ends, _) = run.metrics(), gradients.epoch_means(run)
    last = [row["loss"] for row in rows[(ends[-2] if len(ends) > 1 else 0) :]]
    return {"train loss": float(np.mean(last)), **{f"valid {key}": rows[-1][f"valid_{key}"] for key in JUDGED}}


def compare(arms: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """One row an arm: mean and sd over seeds of each score, and how its AUC differs from the first arm's.

    Returns:
        `valid auc minus NAME` (mean over seeds), its t interval at 1 - 0.05 / (arms - 1), and `verdict`: none, better
        or worse.
    """
    first = next(iter(arms))
    reference, table = [scores(run) for run in arms[first]], []
    for name, runs in arms.items():
        own = [scores(run) for run in runs]
        row: dict[str, Any] = {"setting": name, "seeds": len(runs)}
        for key in own[0]:
            over = seeds.spread([each[key] for each in own])
            row |= {key: round(over["mean"], 4), f"sd of {key}": round(over["sd"], 4)}
        gap = seeds.spread([each["valid auc"] - other["valid auc"] for each, other in zip(own, reference, strict=True)])
        half = stats.t.ppf(1 - 0.025 / max(1, len(arms) - 1), len(runs) - 1) * gap["sd"] / np.sqrt(len(runs))
        low, high = gap["mean"] - half, gap["mean"] + half
        verdict = "none" if low <= 0 <= high else "better" if low > 0 else "worse"
        itself = name == first
        row[f"valid auc minus {first}"] = None if itself else round(gap["mean"], 4)
        row["95 % of that"] = None if itself else [round(low, 4), round(high, 4)]
        table.append({**row, "verdict": None if itself else verdict})
    return table


def choose(table: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The arm to take, and why: the best of those shown to beat the first; where none is, the first, the simplest."""
    first, *rest = table
    better = [row for row in rest if row["verdict"] == "better"]
    if not better:
        top = max(table, key=lambda row: row["valid auc"])
        lead = "" if top is first else f"'{top['setting']}' has the highest mean AUC, {top['valid auc']:.4f}, but no "
        return first["setting"], (
            f"{lead or 'No '}setting is shown to beat '{first['setting']}' ({first['valid auc']:.4f}) with "
            f"{first['seeds']} seeds: every interval of a difference holds 0 or lies below it. So the simplest stays"
        )
    best = max(better, key=lambda row: row["valid auc"])
    low, high = best["95 % of that"]
    return best["setting"], (
        f"'{best['setting']}' beats '{first['setting']}' by {low:.4f} to {high:.4f} AUC (95 % for all settings "
        f"together, {best['seeds']} seeds). Of the {len(better)} shown to do so it has the highest mean AUC, "
        f"{best['valid auc']:.4f}"
    )


def clipped(runs: Sequence[Run]) -> str:
    """In how many steps of all runs the norm exceeded `train.grad_clip`, and the largest factor it was cut by."""
    norms, most = np.concatenate([gradients.norms(run) for run in runs]), runs[0].config.train.grad_clip
    assert most is not None, "runs without clipping"
    return f"{int((norms > most).sum()):,} of {len(norms):,}, at most by {max(float(norms.max()) / most, 1.0):.1f}"


def by_epoch(run: Run) -> dict[str, float]:
    """Mean learning rate of each epoch of a run."""
    rates, ends = np.array([row["lr"] for row in run.metrics()]), gradients.epoch_means(run)[0]
    return {f"epoch {number}": float(f"{part.mean():.3g}") for number, part in enumerate(np.split(rates, ends[:-1]), 1)}


def series(arms: Mapping[str, Sequence[Run]]) -> dict[str, list[float]]:
    """What the figure shows: learning rate of each step, loss (mean over seeds), final AUCs."""
    shown: dict[str, list[float]] = {}
    for name, runs in arms.items():
        losses = np.mean([[row["loss"] for row in run.metrics()] for run in runs], 0)
        shown |= {f"{name} lr": [row["lr"] for row in runs[0].metrics()], f"{name} loss": losses.tolist()}
        shown[f"{name} auc"] = [scores(run)["valid auc"] for run in runs]
    return shown


def plot(shown: Mapping[str, Sequence[float]]) -> Figure:
    """Learning rate by step, loss smoothed over a tenth of training, final AUC of each seed with a line a seed."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
    names = [key.removesuffix(" lr") for key in shown if key.endswith(" lr")]
    for name in names:
        rates, losses = shown[f"{name} lr"], shown[f"{name} loss"]
        width = max(1, len(losses) // 10)
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        left.plot(range(1, len(rates) + 1), rates, label=name)
        middle.plot(range(width, len(losses) + 1), smooth, label=name)
    aucs = np.array([shown[f"{name} auc"] for name in names])
    right.plot(range(len(names)), aucs, "-", color="0.8", lw=0.8, zorder=1)
    for place, values in enumerate(aucs):
        right.plot([place] * len(values), values, "o", ms=5)
        right.plot([place - 0.25, place + 0.25], [values.mean()] * 2, color="black", lw=1.5)
    right.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    left.set(xlabel="step", ylabel="learning rate")
    middle.set(xlabel="step", ylabel="loss, running mean over seeds")
    right.set(ylabel="final AUC on valid")
    left.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    return figure
