"""Rows planted on purpose: do the spikes of a training on them point at them, and does NaN stop it by name?

Flaws only reach a network that is fed the values as stored (`data.raw`): in the clean uint8 copy NaN is 0 and 1e5 is
255. Flipped labels look the same in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pcamlib.config import Config, parse
from pcamlib.data.patches import Patches, open_split
from pcamlib.data.rewrite import Truth
from pcamlib.errors import DivergedError, RunError
from pcamlib.experiments import culprits, gradients, seeds, study
from pcamlib.experiments.culprits import Traced
from pcamlib.training import checkpoint, loop
from pcamlib.training.runs import Run

#: Settings of every training here: what a network sees is the centre 48x48, where `flaws.rare_flaws` plants.
BASE: dict[str, Any] = {
    "data": {"drop": ["nan"], "raw": True},
    "loader": {"batch_size": 32},
    "model": {"name": "cnn", "crop": 48, "width": 8},
    "train": {"epochs": 2, "evaluate_every": 10**6},  # judged once, at the end
}
#: Name -> what differs from `BASE`, and the kinds of planted rows that reach this network.
WITNESSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mlp": (("model.name=mlp", "optimizer.lr=3e-4"), ("1e5", "flip")),
    "cnn": ((), ("1e5", "flip")),
    "cnn-uint8": (("data.raw=false", "data.drop=[nan, range]"), ("flip",)),
}
LATE = 2  # batches with a planted row that are traced beside the spikes, the last of a run: each costs 32 gradients


class Witness(NamedTuple):
    """A network trained on planted rows over several seeds, and its traced steps."""

    name: str
    runs: list[Run]
    traced: list[Traced]
    truth: dict[str, np.ndarray]


def truth_of(data: Path) -> dict[str, np.ndarray]:
    """Rows of the train split by planted kind (1e5, flip, nan), from the `truth.json` beside the data."""
    found = Truth.load(data / "truth.json").rows
    return {kind: found[key] for kind, key in (("1e5", "train/spike"), ("flip", "train/flip"), ("nan", "train/nan"))}


def witnesses(data: Path, chosen: Sequence[int], folder: Path, report: Callable[[str], None] = print) -> list[Witness]:
    """Train every network of `WITNESSES`; trace each run's spikes, and its last batches that hold a planted row."""
    patches, truth, found = open_split(data, "train"), truth_of(data), []
    for name, (changes, kinds) in WITNESSES.items():
        own = {kind: truth[kind] for kind in kinds}
        runs = seeds.train(f"planted-{name}", parse(BASE, changes), chosen, data, folder, report)
        traced: list[Traced] = []
        for run in runs:
            late = _holding(run, patches, np.concatenate(list(own.values())))[-LATE:]
            spiked = [spike.step for spike in gradients.spikes(gradients.norms(run))]
            traced += culprits.trace(run, data, [*spiked, *late])
        found.append(Witness(name, runs, traced, own))
    return found


def _holding(run: Run, patches: Patches, rows: np.ndarray) -> list[int]:
    """The steps whose batch holds one of `rows`, of those that the rule for spikes can judge."""
    config, judged = run.config, range(gradients.FEWEST + 1, len(run.metrics()) + 1)
    return [step for step in judged if np.isin(culprits.batch_rows(config, patches, step), rows).any()]


def marked(witness: Witness, patches: Patches) -> list[dict[str, Any]]:
    """The spikes of a network held against what was planted, over all seeds, one row a kind.

    Returns:
        `batches`: judged steps with a planted row; `recall`: the share of them that spiked; `spikes`: of all steps;
        `precision`: the share of them whose first patch (by its own gradient) is planted, None without spikes;
        `outranks`: mean share of the other patches of a traced batch whose own gradient is smaller than a planted
        one's (chance: one half), over `of` planted patches; and the median loss of planted patches in traced batches
        that spiked and in those that did not.
    """
    spiked = {(run.config.seed, spike.step) for run in witness.runs for spike in gradients.spikes(gradients.norms(run))}
    table = []
    for kind, rows in witness.truth.items():
        holding = {(run.config.seed, step) for run in witness.runs for step in _holding(run, patches, rows)}
        pointing = sum((each.seed, each.step) in spiked and each.rows[0] in rows for each in witness.traced)
        outranks: list[float] = []
        losses: dict[bool, list[float]] = {True: [], False: []}
        for each in witness.traced:
            places = np.flatnonzero(np.isin(each.rows, rows))
            outranks += (1 - places / (len(each.rows) - 1)).tolist()
            losses[(each.seed, each.step) in spiked] += each.loss[places].tolist()
        table.append({
            "network": witness.name, "planted": kind, "rows": len(rows), "seeds": len(witness.runs),
            "batches": len(holding), "recall": _ratio(len(holding & spiked), len(holding)), "spikes": len(spiked),
            "precision": _ratio(pointing, len(spiked)), "outranks": _middle(np.mean, outranks), "of": len(outranks),
            "loss, spiked": _middle(np.median, losses[True]), "loss, not": _middle(np.median, losses[False]),
        })  # fmt: skip
    return table


def _ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def _middle(of: Callable[[list[float]], Any], values: list[float]) -> float | None:
    return round(float(of(values)), 3) if values else None


class Stop(NamedTuple):
    """A training that came to a loss that is not finite.

    Attributes:
        step: at which it stopped; message, named: what it said, and the rows it named.
        again: what a second attempt, resumed, said.
        kept: step of the last checkpoint, which was loaded; None where none was written. finite: all its weights are.
    """

    step: int
    message: str
    named: list[int]
    again: str
    kept: int | None
    finite: bool


def stopped(name: str, config: Config, data: Path, folder: Path, report: Callable[[str], None] = print) -> Stop:
    """Train into a loss that is not finite, resume, and say what was left.

    Raises:
        RunError: the training came to its end.
    """

    def message(attempt: Callable[[], Run]) -> str:
        try:
            run = attempt()
        except DivergedError as error:
            return str(error)
        raise RunError(f"{run.path}: came to its end; no loss was infinite or NaN")

    first = message(lambda: study.run(name, config, data, folder, report))
    (path,) = folder.glob(f"{name}-????????")
    again = message(lambda: loop.resume(path, data, report=report))
    step, named = re.match(r"step (\d+)", first), re.search(r"patches ([\d, ]+):", first)
    assert step is not None, "a DivergedError names its step first"
    kept, weights = None, {}
    if Run(path).last.exists():
        tensors, meta = checkpoint.load(Run(path).last)
        kept, weights = meta["progress"]["step"], checkpoint.split(tensors, "model")
    finite = all(bool(torch.isfinite(value).all()) for value in weights.values())
    return Stop(int(step[1]), first, [int(row) for row in named[1].split(",")] if named else [], again, kept, finite)
