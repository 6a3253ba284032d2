"""Where the time of a training step goes, and whether it really goes there: each part is taken away and timed again.

The parts are the loader, the copy to the device, forward, backward (with the update of the weights) and logging. That a
part takes a share of the time is a prediction: without it a step is shorter by as much. On a GPU, or with two threads,
parts overlap and the prediction can be wrong; the loop without the part says so.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn import functional

from pcamlib.config import Config
from pcamlib.data.loader import Batch
from pcamlib.experiments import timing
from pcamlib.experiments.throughput import TOLERANCE, endless
from pcamlib.training.state import Training
from pcamlib.training.tracking import MetricsFile

PARTS = ("loader", "copy", "forward", "backward", "logging")
#: What goes with a part that is taken away: without a forward pass there is nothing to go back through.
WITHOUT = {"forward": ("forward", "backward")}


class _Loop:
    """Training steps as in `training.loop`, whole or without some parts; calling it gives seconds a step.

    With `clocked` it also appends the seconds of each part to `parts`, waiting for the device in between.
    """

    def __init__(
        self, state: Training, batches: Iterator[Batch], log: MetricsFile, steps: int, without: tuple[str, ...] = (),
        clocked: bool = False,
    ) -> None:  # fmt: skip
        self.state, self.batches, self.log, self.steps = state, batches, log, steps
        self.without, self.clocked = without, clocked
        self.host = next(batches)
        self.resident = self._sent(self.host)
        self.parts: list[dict[str, float]] = []

    def __call__(self) -> float:
        begun = timing.clock(self.state.device)
        for step in range(self.steps):
            marks = [self._mark()]
            host = self.host if "loader" in self.without else next(self.batches)
            marks.append(self._mark())
            batch = self.resident if {"loader", "copy"} & set(self.without) else self._sent(host)
            marks.append(self._mark())
            row = self._step(batch, marks)
            marks.append(self._mark())
            if "logging" not in self.without:
                self.log.log({"step": step, **row, "epoch": 0, "progress": 0.5, "seconds": begun, "attempt": 0})
            marks.append(self._mark())
            if self.clocked:
                self.parts.append(dict(zip(PARTS, np.diff(marks).tolist(), strict=True)))
        return (timing.clock(self.state.device) - begun) / self.steps

    def _mark(self) -> float:
        return timing.clock(self.state.device) if self.clocked else 0.0

    def _sent(self, host: Batch) -> Batch:
        if self.state.device == "cpu":
            return host
        images, labels = (one.pin_memory().to(self.state.device, non_blocking=True) for one in host[:2])
        return Batch(images, labels, host.rows, host.share)

    def _step(self, batch: Batch, marks: list[float]) -> dict[str, float]:
        """The step, or what is left of it; a mark where the forward pass ends."""
        model, state = self.state.model, self.state
        if "forward" in self.without:
            return {"loss": 0.0, "lr": 0.0, "grad_norm": 0.0}
        if "backward" in self.without:
            with torch.no_grad(), torch.autocast(state.device, torch.bfloat16, enabled=state.precision == "bf16"):
                loss = functional.cross_entropy(model(batch.images), batch.labels)
            return {"loss": float(loss), "lr": 0.0, "grad_norm": 0.0}
        hook = model.register_forward_hook(lambda *_: marks.append(self._mark()))
        try:
            return state.step(batch, 0.5)
        finally:
            hook.remove()


@dataclass(frozen=True)
class Parts:
    """The parts of a training step.

    Attributes:
        table: rows `part`, `ms` of a step, `share`, its `95 %`, `taken away` (with what goes along), `predicted ms`
            and `measured ms` of a step without it, what the two differ by as a share of the whole step (`off by`, `its
            95 %`), and `verdict`.
        name: the part with the largest share.
        confirmed: whether the loop without it is faster, by as much as was predicted.
        step: seconds of a whole step, median.
        floor: A against A.
        rounds, batch_size, precision, device: of the measurement.
    """

    table: list[dict[str, Any]]
    name: str
    confirmed: bool
    step: float
    floor: float
    rounds: int
    batch_size: int
    precision: str
    device: str


def parts(settings: Config, folder: str | Path, *, rounds: int = 7, steps: int = 2) -> Parts:
    """Take a training step apart, and take each part away in turn; as many threads as `settings` says.

    Args:
        settings: what a step is.
        folder: with the official files.
        rounds: interleaved; each holds the whole loop, the clocked one, and the loop without each part.
        steps: of each in a round.

    A verdict is `confirmed` where the loop without the part is shown to be faster and takes the predicted time, within
    5 % of a whole step or the floor; `not shown` where the gain lies below the floor; `too noisy` where that floor is
    above 10 %, since then nothing can be confirmed; else `not as predicted`.
    """
    state = Training(settings, folder)
    host = copy.copy(state.loader)
    host.device = torch.device("cpu")  # the copy to the device is timed on its own
    batches = endless(host)
    present = [part for part in PARTS if part != "copy" or state.device != "cpu"]
    with tempfile.TemporaryDirectory() as scratch, closing(MetricsFile(Path(scratch) / "metrics.jsonl")) as log:
        loops = {"whole": _Loop(state, batches, log, steps), "clocked": _Loop(state, batches, log, steps, clocked=True)}
        for part in present:
            loops[part] = _Loop(state, batches, log, steps, WITHOUT.get(part, (part,)))
        seconds = timing.alternating(list(loops.values()), rounds)
    least, column = timing.floor(seconds), dict(zip(loops, seconds.T, strict=False))
    taken = {
        part: np.array([one[part] for one in loops["clocked"].parts]).reshape(-1, steps).mean(1)[-rounds:]
        for part in PARTS
    }
    whole, rows = sum(taken.values()), []
    for part in PARTS:
        share, interval = timing.ratio(taken[part], np.asarray(whole))
        row = {"part": part, "ms": 1000 * float(np.median(taken[part])), "share": share, "95 %": interval}
        gone = sum((taken[name] for name in WITHOUT.get(part, (part,))), np.zeros(rounds))
        left = column.get(part)
        rows.append(
            {
                **row,
                **_removal(column["whole"], gone, left, least),
                "taken away": " and ".join(WITHOUT.get(part, (part,))),
            }
        )
    largest = max(rows, key=lambda row: row["share"])
    return Parts(
        rows, largest["part"], largest["verdict"] == "confirmed", float(np.median(column["whole"])), least, rounds,
        settings.loader.batch_size, state.precision, state.device,
    )  # fmt: skip


def _removal(whole: np.ndarray, gone: np.ndarray, left: np.ndarray | None, least: float) -> dict[str, Any]:
    """What was predicted of the loop without a part, and what was measured.

    Args:
        whole: (rounds,) seconds of a step.
        gone: (rounds,) of them in what is taken away.
        left: (rounds,) of a step without it; None where there is no such part here.
        least: A against A.
    """
    columns = ("predicted ms", "measured ms", "off by", "its 95 %")
    if left is None:
        return {**dict.fromkeys(columns), "verdict": "there is none on a CPU"}
    expected = np.median(whole - gone)
    off, (low, high) = timing.median((left - expected) / np.median(whole))
    near = max(TOLERANCE, least)
    if not timing.shown(*timing.ratio(left, whole), least) or np.median(left) > np.median(whole):
        verdict = "not shown"
    elif least > 2 * TOLERANCE:
        verdict = "too noisy"
    else:
        verdict = "confirmed" if low <= near and high >= -near else "not as predicted"
    found = (1000 * float(expected), 1000 * float(np.median(left)), off, (low, high))
    return {**dict(zip(columns, found, strict=True)), "verdict": verdict}


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: the share of each part. Right: a step without it, predicted and measured."""
    figure, (shares, steps) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    names = [row["part"] for row in rows]
    bars = np.abs(np.array([row["95 %"] for row in rows]).T - [row["share"] for row in rows])
    shares.barh(names, [100 * row["share"] for row in rows], xerr=100 * bars, color="steelblue")
    shares.set(xlabel="share of a training step (%)")
    shares.set_ylim(len(names) - 0.5, -0.5)
    there = [row for row in rows if row["measured ms"] is not None]
    places = [names.index(row["part"]) for row in there]
    steps.plot([row["predicted ms"] for row in there], places, "|", ms=18, mew=2, color="black", label="predicted")
    steps.plot([row["measured ms"] for row in there], places, "o", color="firebrick", label="measured")
    labels = [f"without {row['taken away']}" for row in rows]
    steps.set(xlabel="a step without the part (ms)", yticks=range(len(names)), yticklabels=labels)
    steps.set_xlim(left=0)
    steps.set_ylim(len(names) - 0.5, -0.5)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    return figure
