"""Gradient norms at every step beside the epoch averages that hide them, and spikes by a stated rule (A2 Q4).

A spike is a step whose log norm lies more than `LIMIT` robust standard deviations (1.4826 times the median absolute
deviation, `FLOOR` at least) above the median of the `WINDOW` steps before it. Logarithms, since norms scatter by
factors; medians, since earlier spikes must not raise the bar for later ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from pcamlib.errors import RunError
from pcamlib.training.runs import Run

#: The training that notebook 03 looks into: small, without augmentation, and judged once, at its end.
BASE: dict[str, Any] = {
    "loader": {"batch_size": 32},
    "model": {"name": "cnn", "crop": 64, "pool": 2, "width": 8},
    "optimizer": {"lr": 2e-3},
    "train": {"epochs": 3, "evaluate_every": 10**6, "layer_norms": True},
}

WINDOW = 32
LIMIT = 4.0
FLOOR = 0.1  # of the log norm: 10 %; where norms hardly vary, nothing smaller counts
FEWEST = 8  # steps that a median must rest on

LAYER = "grad_norm/"
RULE = (
    f"log norm more than {LIMIT:g} robust standard deviations above the median of the {WINDOW} steps before "
    f"(at least {FEWEST})"
)


class Judged(NamedTuple):
    """A step (from 1), its gradient norm, the median norm before it, and by how many deviations it lies above that."""

    step: int
    norm: float
    usual: float
    deviations: float


def judged(norms: Sequence[float] | np.ndarray) -> list[Judged]:
    """Every step that has enough steps before it, held against them.

    Args:
        norms: (T,) of steps 1 to T; positive, or 0 where a step has no gradient at all.
    """
    logs, found = np.log(np.maximum(norms, 1e-30)), []
    for place in range(FEWEST, len(logs)):
        before = logs[max(0, place - WINDOW) : place]
        usual = np.median(before)
        scale = max(1.4826 * float(np.median(np.abs(before - usual))), FLOOR)
        by = float((logs[place] - usual) / scale)
        found.append(Judged(place + 1, float(norms[place]), float(np.exp(usual)), by))
    return found


def spikes(norms: Sequence[float] | np.ndarray) -> list[Judged]:
    """The steps that break the rule of this module, in order."""
    return [each for each in judged(norms) if each.deviations > LIMIT]


def strongest(norms: Sequence[float] | np.ndarray, most: int) -> list[int]:
    """Numbers of the `most` largest spikes; where there is none, of the one step that comes closest."""
    found = sorted(spikes(norms), key=lambda each: -each.deviations)[:most]
    return sorted(each.step for each in found or sorted(judged(norms), key=lambda each: -each.deviations)[:1])


def norms(run: Run) -> np.ndarray:
    """Global gradient norm before clipping of each step of a run; (T,) float64."""
    return np.array([row["grad_norm"] for row in run.metrics()])


def epoch_means(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """What a log of one row an epoch would keep: each epoch's last step, and the mean norm over it."""
    rows, values = run.metrics(), norms(run)
    # the loader counts on before it hands out the last batch of an epoch, so that step is the first of the next number
    turns = [row["step"] for before, row in itertools.pairwise(rows) if row["epoch"] > before["epoch"]]
    ends = np.unique([*turns, len(rows)])
    return ends, np.array([part.mean() for part in np.split(values, ends[:-1])])


def hidden(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row a seed: what the norm of single steps shows and an epoch average does not."""
    table = []
    for run in runs:
        values, (ends, means) = norms(run), epoch_means(run)
        ratios = values / np.repeat(means, np.diff(ends, prepend=0))
        top = int(ratios.argmax())
        table.append({
            "seed": run.config.seed, "steps": len(values), "epochs": len(ends),
            "median": round(float(np.median(values)), 3),
            "epoch means": [round(float(bound), 3) for bound in (means.min(), means.max())],
            "steps range": [round(float(bound), 3) for bound in (values.min(), values.max())],
            "largest step / its epoch mean": round(float(ratios[top]), 2), "at step": top + 1,
            "spikes": len(spikes(values)),
        })  # fmt: skip
    return table


def series(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """What the figure shows: norms of each seed, its epoch means, its spikes; and each layer's norm of the first seed.

    Raises:
        RunError: the first run did not log its layers.
    """
    shown: dict[str, list[Any]] = {"step": list(range(1, 1 + max(len(run.metrics()) for run in runs)))}
    for run in runs:
        name, (ends, means), values = f"seed {run.config.seed}", epoch_means(run), norms(run)
        shown |= {name: values.tolist(), f"{name} epoch end": ends.tolist(), f"{name} epoch mean": means.tolist()}
        shown[f"{name} spikes"] = [spike.step for spike in spikes(values)]
    rows = runs[0].metrics()
    layers = [key for key in rows[0] if key.startswith(LAYER)]
    if not layers:
        raise RunError(f"{runs[0].path}: logged no layers; train it with train.layer_norms=true")
    return shown | {key: [row[key] for row in rows] for key in layers}


def plot(shown: dict[str, list[Any]]) -> Figure:
    """Global norms of all seeds with their epoch means above, layers of the first seed below; log y."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6.4), sharex=True)
    names = [name for name in shown if name.startswith("seed ") and name.count(" ") == 1]
    for name in names:
        steps = shown["step"][: len(shown[name])]
        line = top.plot(steps, shown[name], lw=0.8, alpha=0.8, label=name)[0]
        edges = [0, *shown[f"{name} epoch end"]]
        top.stairs(shown[f"{name} epoch mean"], edges, baseline=None, lw=2.5, color=line.get_color())
        marked = shown[f"{name} spikes"]
        top.plot(marked, [shown[name][step - 1] for step in marked], "o", ms=8, mfc="none", color=line.get_color())
    top.plot([], [], lw=2.5, color="0.4", label="epoch mean")
    top.plot([], [], "o", ms=8, mfc="none", color="0.4", label="spike")
    top.set(yscale="log", ylabel="global gradient norm", title="every step of each seed, and the mean of its epoch")
    layers = [name for name in shown if name.startswith(LAYER)]
    for colour, name in zip(plt.get_cmap("viridis")(np.linspace(0, 0.95, len(layers))), layers, strict=True):
        # a norm of exactly 0 has no place on a log axis: a gap
        values = [value or np.nan for value in shown[name]]
        style = ":" if "norm" in name.removeprefix(LAYER) else "-"  # batch norms: a scale and a shift a channel
        bottom.plot(shown["step"][: len(values)], values, style, lw=1, color=colour, label=name.removeprefix(LAYER))
    bottom.set(yscale="log", xlabel="step", ylabel="gradient norm of a layer", title=f"each layer, {names[0]}")
    for axes in (top, bottom):
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    figure.tight_layout()
    return figure
