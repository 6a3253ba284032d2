"""What a search saw: best so far by trial, parallel coordinates, and how much of the score each setting explains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.importance import FanovaImportanceEvaluator

from pcamlib.errors import RunError
from pcamlib.experiments.space import Categorical, Space

LEAST = 4  # completed trials below which a share of the variance means nothing


def best_so_far(table: pd.DataFrame, metric: str) -> list[float | None]:
    """The best completed value after each trial, in the order of their places; None before the first."""
    best: list[float | None] = []
    for state, value in zip(table["state"], table["value"], strict=True):
        last = best[-1] if best else None
        if state == "complete":
            last = value if last is None else (max if metric == "auc" else min)(last, value)
        best.append(last)
    return best


def history(tables: Mapping[str, pd.DataFrame], metric: str) -> dict[str, list[Any]]:
    """Value, state and best so far of every trial of each search, as series."""
    series: dict[str, list[Any]] = {}
    for name, table in tables.items():
        series[f"{name}: value"] = [None if value is None else float(value) for value in table["value"]]
        series[f"{name}: state"] = list(table["state"])
        series[f"{name}: best so far"] = best_so_far(table, metric)
    return series


def race(tables: Mapping[str, pd.DataFrame], metric: str) -> list[dict[str, Any]]:
    """Best so far of each search, to four places, after 1, 2, 5, 10, 20, ... trials and after the last."""
    longest = max(len(table) for table in tables.values())
    stops = sorted({n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n < longest} | {longest})
    found = {name: best_so_far(table, metric) for name, table in tables.items()}
    best = {name: [None if value is None else round(value, 4) for value in values] for name, values in found.items()}
    return [{"trials": n, **{name: best[name][min(n, len(best[name])) - 1] for name in best}} for n in stops]


def plot_history(series: Mapping[str, Sequence[Any]], metric: str) -> Figure:
    """Every trial as a dot (a cross where it was pruned), the best so far as a line."""
    figure, axes = plt.subplots(figsize=(7.5, 3.4))
    names = [key.removesuffix(": value") for key in series if key.endswith(": value")]
    styles = (("C0", -0.08, 5), ("C1", 0.08, 1.5), ("C2", 0.0, 1))  # a wide line first: equal ones stay visible
    for name, (colour, shift, width) in zip(names, styles, strict=False):
        for state, mark in (("complete", "o"), ("pruned", "x")):
            shown = [
                (place + 1 + shift, value)
                for place, (value, s) in enumerate(zip(series[f"{name}: value"], series[f"{name}: state"], strict=True))
                if s == state and value is not None
            ]
            if shown:
                label = f"{name}, {state}"
                axes.plot(*zip(*shown, strict=True), mark, color=colour, alpha=0.75, ms=5, label=label)
        best = [np.nan if value is None else value for value in series[f"{name}: best so far"]]
        axes.step(
            range(1, len(best) + 1), best, where="post", color=colour, lw=width, alpha=0.7, label=f"{name}, best so far"
        )
    axes.set(xlabel="trial", ylabel=f"valid {metric}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    return figure


def plot_parallel(table: pd.DataFrame, space: Space) -> Figure:
    """Parallel coordinates: one line a trial, from setting to setting to its score; pruned ones are grey and thin."""
    keys = [*space.parameters]
    done = table[(table["state"] == "complete")]["value"].astype(float)
    scale = Normalize(done.min(), done.max() if done.max() > done.min() else done.min() + 1e-6)
    colours = colormaps["viridis" if space.metric == "auc" else "viridis_r"]
    figure, axes = plt.subplots(figsize=(1.5 * len(keys) + 3, 4))
    heights = {key: [height(space, key, value) for value in table[key]] for key in keys}
    order = table["value"].astype(float).fillna(-np.inf).to_numpy().argsort()
    for place in order if space.metric == "auc" else order[::-1]:  # the best are drawn last
        complete = table["state"].iloc[place] == "complete"
        ys = [heights[key][place] for key in keys]
        if complete:
            value = scale(table["value"].iloc[place])
            axes.plot(range(len(keys) + 1), [*ys, value], color=colours(value), lw=1.6, alpha=0.9)
        else:
            axes.plot(range(len(keys)), ys, color="0.75", lw=0.7, zorder=1)
    for x, key in enumerate(keys):
        axes.axvline(x, color="0.3", lw=0.8)
        for y, text in _ticks(space, key):
            axes.annotate(text, (x, y), (-4, 0), textcoords="offset points", size=7, ha="right", va="center",
                          bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8})  # fmt: skip
    axes.axvline(len(keys), color="0.3", lw=0.8)
    axes.set_xticks(range(len(keys) + 1), [*(key.replace(".", "\n") for key in keys), f"valid\n{space.metric}"], size=8)
    axes.set_yticks([])
    axes.set_xlim(-0.45, len(keys) + 0.05)
    axes.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(scale, colours), ax=axes, pad=0.01, label=f"valid {space.metric}")
    figure.tight_layout()
    return figure


def height(space: Space, key: str, value: Any) -> float:
    """Where a value stands on its axis, 0 to 1."""
    parameter = space.parameters[key]
    if isinstance(parameter, Categorical):
        return parameter.stored.index(value) / (len(parameter.stored) - 1)
    low, high, at = parameter.low, parameter.high, value
    if parameter.log:
        low, high, at = np.log(low), np.log(high), np.log(value)
    return float((at - low) / (high - low)) if high > low else 0.5


def _ticks(space: Space, key: str) -> list[tuple[float, str]]:
    parameter = space.parameters[key]
    if isinstance(parameter, Categorical):
        return [(height(space, key, choice), str(choice)) for choice in parameter.stored]
    middle = np.sqrt(parameter.low * parameter.high) if parameter.log else (parameter.low + parameter.high) / 2
    return [(height(space, key, value), f"{value:.2g}") for value in (parameter.low, middle, parameter.high)]


def importance(studies: Sequence[optuna.Study], *, resamples: int = 20, seed: int = 0) -> list[dict[str, Any]]:
    """Share of the score's variance that each setting explains alone, by fANOVA (Hutter et al. 2014).

    What is missing to 1 is what settings explain together. A forest is fitted to the completed trials of all studies;
    the interval comes from fitting it again on resampled trials, and with few trials it is wide.

    Returns:
        Rows setting, share, interval (95 %), largest share first.

    Raises:
        RunError: fewer than four trials completed.
    """
    complete = [t for study in studies for t in study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))]
    if len(complete) < LEAST:
        raise RunError(f"{len(complete)} trials completed; importance needs {LEAST}: give more trials, or prune less")
    rng = np.random.default_rng(seed)
    whole = _fanova(complete, seed)
    draws = [_fanova([complete[i] for i in rng.integers(0, len(complete), len(complete))], seed)
             for _ in range(resamples)]  # fmt: skip
    rows = []
    for key, share in sorted(whole.items(), key=lambda item: -item[1]):
        low, high = np.percentile([draw[key] for draw in draws], [2.5, 97.5])
        rows.append({"setting": key, "share": share, "interval": [min(low, share), max(high, share)]})
    return rows


def _fanova(trials: Sequence[optuna.trial.FrozenTrial], seed: int) -> dict[str, float]:
    study = optuna.create_study()
    study.add_trials(trials)
    evaluator = FanovaImportanceEvaluator(n_trees=32, seed=seed)
    return evaluator.evaluate(study)  # optuna.importance would stretch the shares to a sum of 1, whatever they explain


def plot_importance(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars with their intervals."""
    figure, axes = plt.subplots(figsize=(6.5, 0.45 * len(rows) + 1.0))
    share = np.array([row["share"] for row in rows])
    bars = np.abs(np.array([row["interval"] for row in rows]).T - share)
    axes.barh([row["setting"] for row in rows], share, xerr=bars, color="#4c78a8", height=0.6, capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="share of the variance explained alone (fANOVA)", xlim=(0, 1))
    figure.tight_layout()
    return figure
