"""One configuration over several seeds: mean, standard deviation and interval of every metric, beside constant answers.

Two kinds of chance stand beside each other and are never mixed: the seed's (t interval over runs) and that of the
patches judged (bootstrap interval of each run).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from pcamlib import provenance
from pcamlib.config import Config
from pcamlib.errors import ConfigError, RunError
from pcamlib.experiments import study
from pcamlib.training import metrics
from pcamlib.training.runs import Run

LOWER_IS_BETTER = ("nll", "ece")


def train(
    name: str, config: Config, seeds: Sequence[int], data: Path, folder: Path, report: Callable[[str], None] = print
) -> list[Run]:
    """Train `config` with each seed, or find the runs that are there; wandb groups them under `name`.

    Raises:
        ConfigError: fewer than two seeds, or one listed twice.
        RunError: two seeds gave the same weights.
    """
    seeds = list(seeds)
    if repeated := [seed for place, seed in enumerate(seeds) if seed in seeds[:place]]:
        raise ConfigError(f"seeds {seeds}: {repeated[0]} is listed twice; each seed counts once, choose another")
    if len(seeds) < 2:
        raise ConfigError(f"seeds {seeds}: a standard deviation needs at least two")
    config = config.override(f"tracking.group={config.tracking.group or name}")
    runs = [study.run(f"{name}-seed{s}", config.override(f"seed={s}"), data, folder, report) for s in seeds]
    distinct(runs)
    return runs


def distinct(runs: Sequence[Run]) -> dict[str, str]:
    """Digest of the final weights by name of the run.

    Raises:
        RunError: a run has not finished, or two are one run: their weights are equal.
    """
    found: dict[str, str] = {}
    for run in runs:
        if not run.success:
            raise RunError(f"{run.path}: has not finished; `pcam resume {run.path}` before it is counted")
        digest = run.success["weights"]
        if digest in found.values():
            other = next(name for name in found if found[name] == digest)
            raise RunError(f"{other} and {run.name} are one run, their weights are equal; a mean would count it twice")
        found[run.name] = digest
    return found


def comparable(runs: Sequence[Run]) -> None:
    """Nothing, where runs differ in their seeds only.

    Raises:
        RunError: they differ in another setting, or were judged on other patches; names it.
    """
    first = runs[0]
    prints = [run.predictions().fingerprint for run in runs]
    for run, fingerprint in zip(runs, prints, strict=True):
        ignore = ("seed", "tracking", "data.dir")
        if other := provenance.difference(first.config.model_dump(), run.config.model_dump(), ignore):
            raise RunError(f"{first.name} and {run.name} differ in more than the seed: {other[0][0]}: "
                           f"{other[0][1]} | {other[0][2]}")  # fmt: skip
        if fingerprint != prints[0]:
            raise RunError(f"{first.name} and {run.name} were judged on other patches; evaluate both on the same split")


def spread(values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> dict[str, Any]:
    """Mean, sample standard deviation, and the 95 % t interval of the mean, cut to the range that is possible.

    Returns:
        dict `mean`, `sd`, `interval`; the interval supposes that seeds scatter normally, with few it is wide.
    """
    mean, sd, k = float(np.mean(values)), float(np.std(values, ddof=1)), len(values)
    half = float(stats.t.ppf(0.975, k - 1)) * sd / math.sqrt(k)
    return {"mean": mean, "sd": sd, "interval": (max(mean - half, lowest), min(mean + half, highest))}


def reports(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """`metrics.report` of each run, computed from its stored validation predictions; errors as in `distinct`."""
    distinct(runs)
    comparable(runs)
    return [run.predictions().report() for run in runs]


def summary(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a metric, over the `reports` of several seeds.

    Returns:
        `metric`, `mean`, `sd`, `interval` (t, over seeds), `constant` (the best constant answer), `scores` (what it
        scores), and `beats it`: yes or no where the whole interval lies on one side of it, else not shown.
    """
    rows = []
    for name in metrics.METRICS:
        entries = [report["metrics"][name] for report in found if name in report["metrics"]]
        if len(entries) < len(found):
            continue  # undefined on these labels
        over = spread([entry["value"] for entry in entries], 0.0, math.inf if name == "nll" else 1.0)
        sign = -1 if name in LOWER_IS_BETTER else 1
        # a constant at the prevalence is perfectly calibrated and says nothing: no rival
        rivals = {} if name == "ece" else entries[0]["baseline"]
        best = max(rivals, key=lambda rival: sign * rivals[rival], default=None)
        row = {"metric": name, **over, "constant": best, "scores": rivals.get(best) if best else None}
        sides = {sign * (bound - row["scores"]) > 0 for bound in over["interval"]} if best else set()
        rows.append({**row, "beats it": None if not best else "not shown" if len(sides) > 1 else sides == {True}})
    return rows


def each(runs: Sequence[Run], found: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row a seed and metric: value and bootstrap interval over patches."""
    return pd.DataFrame([
        {"seed": run.config.seed, "metric": name, "value": entry["value"], "interval": entry["interval"]}
        for run, report in zip(runs, found, strict=True)
        for name, entry in report["metrics"].items()
    ])  # fmt: skip


def always_tumour(share: float, beta: float) -> float:
    """F-beta of calling everything tumour, where a `share` of the patches is: recall 1, precision `share`."""
    return (1 + beta**2) * share / (beta**2 * share + 1)


def f2_series(runs: Sequence[Run], points: int = 41) -> dict[str, list[float]]:
    """What the figure on F2 shows: F-beta of "always tumour" by share of tumour, and F2 of each run by threshold."""
    grid = np.linspace(0, 1, points).tolist()
    series = {"share": grid, "threshold": grid}
    series |= {f"F{beta} of always tumour": [always_tumour(share, beta) for share in grid] for beta in (1, 2)}
    for run in runs:
        seen = run.predictions()
        one = np.ones((1, len(seen.label)))
        scored = [metrics.scores(seen.label, seen.probability, one, threshold)["f2"][0] for threshold in grid]
        series[f"seed {run.config.seed}"] = [float(value) for value in scored]
    return series


def curves(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Training loss of each run at every step, and its validation NLL where it was evaluated, else None."""
    longest = max((run.metrics() for run in runs), key=len)
    series: dict[str, list[Any]] = {"step": [row["step"] for row in longest]}
    for run in runs:
        for name, key in (("loss", "loss"), ("valid", "valid_nll")):
            series[f"seed {run.config.seed} {name}"] = [row.get(key) for row in run.metrics()]
    return series


def plot_curves(series: dict[str, list[Any]]) -> Figure:
    """Training loss as lines, validation NLL as dots of the same colour."""
    figure, axes = plt.subplots(figsize=(7, 3))
    steps = series["step"]
    for name in (name for name in series if name.endswith(" loss")):
        seed = name.removesuffix(" loss")
        line = axes.plot(steps[: len(series[name])], series[name], lw=1, label=seed)[0]
        axes.plot(steps[: len(series[name])], series[f"{seed} valid"], "o", ms=7, mec="black", color=line.get_color())
    axes.plot([], [], "o", ms=7, mfc="white", mec="black", label="NLL on valid")
    axes.set(xlabel="step", ylabel="loss of the batch")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.tight_layout()
    return figure


def plot_f2(series: dict[str, list[float]], share: float) -> Figure:
    """F-beta of a constant by share of tumour, and F2 of each seed by threshold; `share`: of the split judged."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for beta, style in ((1, "--"), (2, "-")):
        left.plot(series["share"], series[f"F{beta} of always tumour"], style, color="firebrick", label=f"F{beta}")
    left.axvline(share, color="grey", lw=0.8, ls=":")
    left.plot([share], [always_tumour(share, 2)], "o", color="firebrick")
    left.annotate(f"{always_tumour(share, 2):.3f}", (share, always_tumour(share, 2)), (-6, 4), ha="right",
                  textcoords="offset points")  # fmt: skip
    left.set(xlabel="share of tumour in the split", ylabel="F-beta", title="calling everything tumour", ylim=(0, 1.02))
    for name in (name for name in series if name.startswith("seed ")):
        right.plot(series["threshold"], series[name], lw=1.2, label=name)
    right.axhline(always_tumour(share, 2), color="firebrick", label="always tumour")
    right.axvline(0.5, color="grey", lw=0.8, ls=":")
    right.set(xlabel="threshold", ylabel="F2", title="F2 of the model by threshold", ylim=(0.5, 1))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="lower left" if axes is right else "lower right")
    figure.tight_layout()
    return figure


def plot(rows: Sequence[dict[str, Any]], singles: pd.DataFrame) -> Figure:
    """One panel a metric: each seed with its bootstrap interval, the mean with its t interval, the best constant."""
    seeds = list(dict.fromkeys(singles["seed"]))
    figure, axes = plt.subplots(1, len(rows), figsize=(1.6 * len(rows), 3.2))
    for panel, row in zip(np.atleast_1d(axes), rows, strict=True):
        own = singles[singles["metric"] == row["metric"]]
        values, bounds = own["value"].to_numpy(), np.array(own["interval"].tolist())
        bars = np.abs(bounds.T - values)
        panel.errorbar(range(len(seeds)), values, bars, fmt="o", ms=4, capsize=2, color="tab:blue")
        middle = [[row["mean"] - row["interval"][0]], [row["interval"][1] - row["mean"]]]
        panel.errorbar([len(seeds)], [row["mean"]], middle, fmt="D", ms=5, capsize=4, color="black")
        if row["constant"]:
            panel.axhline(row["scores"], color="firebrick", lw=1, ls="--")
        panel.set_title(row["metric"], fontsize=9)
        panel.set_xticks(range(len(seeds) + 1), [*map(str, seeds), "mean"], fontsize=7)
        panel.set_xlim(-0.6, len(seeds) + 0.6)
        panel.tick_params(axis="y", labelsize=7)
    figure.supxlabel("seed (dashed: the best constant answer)", fontsize=8)
    figure.tight_layout()
    return figure
