"""What logging costs a training step: nothing logged, metrics.jsonl, and metrics.jsonl with wandb's offline copy."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np

from pcamlib.config import Config
from pcamlib.experiments import timing
from pcamlib.training.state import Training
from pcamlib.training.tracking import MetricsFile, Tracker, WandbTracker


class _Steps:
    """Training steps that log to some trackers; calling it gives the seconds of `steps` of them."""

    def __init__(self, state: Training, trackers: list[Tracker], steps: int) -> None:
        self.state, self.trackers, self.steps, self.done = state, trackers, steps, 0
        self.batch = next(iter(state.loader))
        self.share: list[float] = []  # of each call, spent in `log`

    def __call__(self) -> float:
        begun, logging = time.perf_counter(), 0.0
        for _ in range(self.steps):
            self.done += 1
            row = {"step": self.done, **self.state.step(self.batch, 0.5), "epoch": 0}
            row |= {"progress": 0.5, "seconds": begun, "attempt": 0}
            before = time.perf_counter()
            for tracker in self.trackers:
                tracker.log(row)
            logging += time.perf_counter() - before
        whole = time.perf_counter() - begun
        self.share.append(logging / whole)
        return whole


def cost(config: Config, data: str | Path, rounds: int = 11, steps: int = 3) -> dict[str, Any]:
    """Time of a training step with each way of logging as a ratio to that without; interleaved, one thread.

    The time inside `log` is also taken alone: it is far below what the times of two steps can tell apart. What
    wandb's own process does meanwhile on another core is in neither.

    Args:
        config: what a step is; its tracking is ignored.
        data: folder with the official files.
        rounds: paired rounds.
        steps: of each kind in a round.

    Returns:
        dict `table` (columns logging; ratio, its 95 % interval, whether it is shown above the floor; share of a step
        spent in `log`; bytes a step on disk), `floor` (A against A), `rounds`, and `opening`: how many steps the
        opening and closing of a wandb run last.
    """
    state = Training(config, data)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        one, two = (stack.enter_context(closing(MetricsFile(folder / f"{n}.jsonl"))) for n in ("one", "two"))
        begun = time.perf_counter()
        copy = WandbTracker(config.override("tracking.wandb=offline"), folder, 0)
        opened = time.perf_counter() - begun
        trackers: dict[str, list[Tracker]] = {"none": [], "jsonl": [one], "jsonl and wandb offline": [two, copy]}
        kinds = {kind: _Steps(state, found, steps) for kind, found in trackers.items()}
        seconds = timing.interleaved(list(kinds.values()), rounds)
        begun = time.perf_counter()
        copy.close()
        opened += time.perf_counter() - begun
        jsonl, wandb = (sum(file.stat().st_size for file in folder.glob(pattern))
                        for pattern in ("one.jsonl", "wandb/offline-run-*/*.wandb"))  # fmt: skip
    sizes = dict(zip(kinds, (0, jsonl, jsonl + wandb), strict=True))
    least, rows = timing.floor(seconds), []
    for place, (kind, stepped) in enumerate(kinds.items()):
        value, interval = timing.ratio(seconds[:, place], seconds[:, 0])
        rows.append({
            "logging": kind,
            "ratio": value if place else None,
            "interval": interval if place else None,
            "shown": timing.shown(value, interval, least) if place else None,
            "share of a step": float(np.median(stepped.share)),
            "bytes a step": round(sizes[kind] / stepped.done),
        })  # fmt: skip
    opening = opened * steps / float(np.median(seconds[:, 0]))
    return {"table": rows, "floor": least, "rounds": rounds, "opening": opening}
