"""A gradient spike traced to the patches of its batch.

The order of an epoch is a function of (seed, epoch), so the rows of any step follow from the configuration. To know
which of them pulled, the run is trained again up to that step, bit by bit, and each patch's own gradient is taken at
the weights of that time, with frozen batch statistics (GraNd, Paul et al. 2021, arXiv:2107.07075).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn import functional

from pcamlib.config import Config
from pcamlib.data import convert
from pcamlib.data.loader import Batch
from pcamlib.data.patches import Patches
from pcamlib.data.sampling import order
from pcamlib.errors import DataError, RunError
from pcamlib.experiments import gradients
from pcamlib.training.runs import Run
from pcamlib.training.state import Training

CLASSES = ("normal", "tumour")


def batch_rows(config: Config, patches: Patches, step: int) -> np.ndarray:
    """Rows of the train split that step `step` (from 1) learns from, from the configuration alone; (B,) int64."""
    rows, size = patches.rows(config.data.drop, config.data.limit, config.data.clean), config.loader.batch_size
    epoch, place = divmod(step - 1, math.ceil(len(rows) / size))
    assert patches.labels is not None  # nothing is trained without
    visited = order(config.loader.sampler, patches.labels[rows], config.seed, epoch)
    return rows[visited[place * size : (place + 1) * size]]


def replay(run: Run, data: Path, steps: Iterable[int]) -> Iterator[tuple[int, Training, Batch]]:
    """Train a run again; just before each of `steps` give its number, the state at that time and the batch to come.

    Raises:
        RunError: the run followed the clock, or a step does not repeat what the run logged.
    """
    config, logged, wanted = run.config, run.metrics(), set(steps)
    if config.train.time_limit:
        raise RunError(f"{run.path}: followed the clock (train.time_limit), so no step can be repeated")
    if wanted and not 1 <= min(wanted) <= max(wanted) <= len(logged):
        raise RunError(f"{run.path}: steps {min(wanted)} to {max(wanted)} asked for; it has 1 to {len(logged)}")
    state = Training(config, data)
    state.model.train()
    while wanted:
        for batch in state.loader:
            number = state.progress.step + 1
            if number in wanted:
                yield number, state, batch
            found = state.step(batch, state.progress.step / (state.total or math.inf))
            state.progress.step = number
            if found["loss"] != logged[number - 1]["loss"] or found["grad_norm"] != logged[number - 1]["grad_norm"]:
                raise RunError(
                    f"{run.path}: step {number} gave a loss of {logged[number - 1]['loss']} and gives {found['loss']} "
                    f"now: other code, threads or machine; train it again"
                )
            wanted.discard(number)
            if not wanted:
                return


def own_gradients(model: torch.nn.Module, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient norm over all weights of each patch alone, with frozen batch statistics; (B,) float64 each."""
    model, weights = model.eval(), list(model.parameters())
    losses, sizes = [], []
    for place in range(len(batch.rows)):
        loss = functional.cross_entropy(model(batch.images[place : place + 1]), batch.labels[place : place + 1])
        pulled = torch.autograd.grad(loss, weights, allow_unused=True)
        losses.append(float(loss.detach()))
        sizes.append(float(torch.nn.utils.get_total_norm([each for each in pulled if each is not None])))
    return np.array(losses), np.array(sizes)


def batch_norm_of(model: torch.nn.Module, batch: Batch, smoothing: float = 0.0) -> float:
    """Gradient norm of a batch as training computes it, in float32."""
    loss = functional.cross_entropy(model.train()(batch.images), batch.labels, label_smoothing=smoothing)
    pulled = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return float(torch.nn.utils.get_total_norm([each for each in pulled if each is not None]))


class Traced(NamedTuple):
    """A step and its batch at the weights of that time, the patch with the largest own gradient first.

    Attributes:
        rows, labels: (B,) of the batch; loss, own: (B,) loss and gradient norm of each patch alone.
        without: gradient norm of the batch without its first patch.
    """

    seed: int
    step: int
    rows: np.ndarray
    labels: np.ndarray
    loss: np.ndarray
    own: np.ndarray
    without: float

    @property
    def share(self) -> float:
        """Of the summed own norms, what the first patch has."""
        return float(self.own[0] / self.own.sum())


def trace(run: Run, data: Path, steps: Iterable[int]) -> list[Traced]:
    """Each of `steps` with its patches ranked by their own gradient; errors as in `replay`."""
    found = []
    for step, state, batch in replay(run, data, steps):
        model = copy.deepcopy(state.model)  # batch statistics and gradients of the replay stay as they were
        with torch.random.fork_rng(devices=[]):  # dropout draws
            loss, own = own_gradients(model, batch)
            first = np.argsort(-own, kind="stable")
            kept = np.sort(first[1:])
            rest = torch.from_numpy(kept).to(batch.labels.device)
            fewer = Batch(batch.images[rest], batch.labels[rest], batch.rows[kept])
            without = batch_norm_of(copy.deepcopy(state.model), fewer, run.config.train.label_smoothing)
        labels = batch.labels.cpu().numpy()
        found.append(Traced(run.config.seed, step, batch.rows[first], labels[first], loss[first], own[first], without))
    return found


def flags(patches: Patches, row: int) -> str:
    """What the scan and, where there is one, the audit say against a row."""
    said = [name for name, bit in convert.FLAGS.items() if patches.flags[row] & bit]
    return ", ".join(said + [rule for rule, rows in _audited(patches).items() if row in rows]) or "no flag"


def flagged_by(patches: Patches) -> str:
    """Who could have flagged a row: "the scan", or "the scan and the audit" where these patches were audited."""
    return "the scan and the audit" if _audited(patches) else "the scan (they were not audited)"


def _audited(patches: Patches) -> dict[str, list[int]]:
    try:
        return patches.audited
    except DataError:  # flags are an extra: nothing here waits for an audit
        return {}


def spike_table(runs: Sequence[Run], traced: Sequence[Traced], patches: Patches) -> list[dict[str, Any]]:
    """One row a traced step: how large its norm is, which patch pulled most, and what the norm is without it."""
    known = {(run.config.seed, each.step): each for run in runs for each in gradients.judged(gradients.norms(run))}
    table = []
    for each in traced:
        step = known[each.seed, each.step]
        table.append({
            "seed": each.seed, "step": each.step, "norm": round(step.norm, 3), "usual": round(step.usual, 3),
            "spike": step.deviations > gradients.LIMIT, "first patch": int(each.rows[0]),
            "label": CLASSES[each.labels[0]], "loss": round(float(each.loss[0]), 3),
            "share of own norms": round(each.share, 3), "norm without it": round(each.without, 3),
            "flags": flags(patches, int(each.rows[0])),
        })  # fmt: skip
    return table


def gallery(
    traced: Sequence[Traced], patches: Patches, truth: Mapping[str, np.ndarray] = {}, most: int = 8
) -> tuple[Figure, dict[str, list[str]]]:
    """A line of patches for each traced step, the strongest first; what was planted is framed. And what was shown.

    Patches are drawn from the uint8 copy: NaN is black there and 1e5 white.
    """
    lines = max(len(traced), 1)
    figure, axes = plt.subplots(lines, most, figsize=(1.25 * most, 1.75 * lines), squeeze=False)
    shown: dict[str, list[str]] = {}
    for axis in axes.flat:
        axis.axis("off")
    for line, each in zip(axes, traced, strict=False):
        name = f"seed {each.seed}, step {each.step}"
        line[0].text(-0.08, 0.5, name.replace(", ", "\n"), rotation=90, size=7, ha="right", va="center",
                     transform=line[0].transAxes)  # fmt: skip
        for axis, row, label, own in zip(line, each.rows.tolist(), each.labels, each.own, strict=False):
            planted = ", ".join(kind for kind, rows in truth.items() if row in rows)
            axis.imshow(patches.images[row])
            edge = "firebrick" if planted else "0.7"
            axis.add_patch(plt.Rectangle((-0.5, -0.5), 96, 96, fill=False, color=edge, lw=4 if planted else 0.6))
            said = f"{planted}: {flags(patches, row)}" if planted else flags(patches, row)
            axis.set_title(f"{row} {CLASSES[label]}\nown {own:.3g}\n{said}", size=6, pad=2,
                           color="firebrick" if planted else "black")  # fmt: skip
            shown.setdefault(name, []).append(f"train {row}: {CLASSES[label]}, {said}")
    if not traced:
        axes[0, 0].text(0.5, 0.5, "no spike", size=9, ha="center", va="center")
    figure.tight_layout(pad=0.4)
    return figure, shown or {"no spike": []}
