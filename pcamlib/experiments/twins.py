"""Sources of non-determinism, each switched on alone and measured bit by bit on the course's own training path.

    python -m pcamlib.experiments.twins DATA '{"workers": 2}'     # prints a digest of every tensor at every step

A trajectory trains the course's MLP (with dropout) on `get_dataloaders` batches in a process of its own and records a
digest of each weight and optimiser tensor after every step. Two trajectories are equal, or the first step and the
first tensor at which they part are named.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch.nn import functional
from torch.utils.data import DataLoader, WeightedRandomSampler

from pcamlib import seeding
from pcamlib.config import parse, recipe
from pcamlib.data.course import EpochSampler, KeyedAugment, PCAMDataset
from pcamlib.data.layout import find
from pcamlib.data.loader import Loader
from pcamlib.data.patches import channel_statistics, open_split
from pcamlib.errors import RunError
from pcamlib.experiments import timing
from pcamlib.models import build
from pcamlib.models.mlp import MLP
from pcamlib.training import checkpoint, runs


@dataclass(frozen=True)
class Condition:
    """One way to run the same training.

    Attributes:
        seed: of initial weights, dropout and augmentation; None leaves them to chance.
        order_seed: of the sampler's generator; None leaves it unseeded.
        augmentation: "keyed" by (seed, epoch, patch) or "global", from torch's global generator.
        workers: of the DataLoader.
        threads: of torch.
        capability: ATEN_CPU_CAPABILITY of the process, "" for the machine's best.
        deterministic: only kernels that repeat themselves.
        resume_at: step after which the process state is saved, thrown away and loaded again; None: never.
        resume: "full" (weights, optimiser, generators) or "weights".
    """

    seed: int | None = 0
    order_seed: int | None = 0
    augmentation: str = "keyed"
    workers: int = 0
    threads: int = 1
    capability: str = ""
    deterministic: bool = True
    resume_at: int | None = None
    resume: str = "full"


BASE = Condition()

# fmt: off
#: Source; what two conditions differ from `BASE` in without its control, and with it; the control.
SOURCES: tuple[tuple[str, tuple[dict[str, Any], ...], tuple[dict[str, Any], ...], str], ...] = (
    ("random seed", ({"seed": None}, {"seed": None}), ({}, {}), "seed_everything(config.seed)"),
    ("sampling order", ({"order_seed": None}, {"order_seed": None}), ({}, {}), "the sampler's own generator, seeded"),
    ("worker count, augmentation from the global generator",
     ({"augmentation": "global"}, {"augmentation": "global", "workers": 2}), ({}, {"workers": 2}),
     "draws keyed by (seed, epoch, patch index)"),
    ("thread count", ({}, {"threads": 2}), ({"threads": 2}, {"threads": 2}), "train.threads fixed and recorded"),
    ("algorithm choice (kernels of another CPU)", ({}, {"capability": "default"}),
     ({"capability": "default"}, {"capability": "default"}), "ATEN_CPU_CAPABILITY pinned; recorded in any case"),
    ("resume with the weights alone", ({}, {"resume_at": 5, "resume": "weights"}), ({}, {"resume_at": 5}),
     "optimiser and generators in the checkpoint"),
    ("deterministic algorithms switched off", ({}, {"deterministic": False}), ({}, {}),
     "deterministic kernels, in seed_everything"),
)
# fmt: on


def trajectory(data: str | Path, condition: Condition, steps: int, batch_size: int = 32) -> list[dict[str, str]]:
    """Digest of every tensor after each step, step 0 being the initial weights; in this process."""
    torch.set_num_threads(condition.threads)
    if condition.seed is not None:
        seeding.seed_everything(condition.seed)
    torch.set_deterministic_debug_mode("error" if condition.deterministic else "default")
    loader = _loader(data, condition, batch_size)
    model, optimizer = _fresh()
    found = [_digests(model, optimizer)]
    while len(found) <= steps:
        for images, labels in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(images.float() / 255), labels).backward()
            optimizer.step()
            if len(found) == condition.resume_at:
                model, optimizer = _restored(model, optimizer, condition.resume)
            found.append(_digests(model, optimizer))
            if len(found) > steps:
                break
    return found


def _loader(data: str | Path, condition: Condition, batch_size: int) -> DataLoader[Any]:
    transform = KeyedAugment(condition.seed or 0) if condition.augmentation == "keyed" else _global_flip
    dataset = PCAMDataset(find(data, "train", "x"), find(data, "train", "y"), transform)
    if condition.order_seed is None:
        generator = torch.Generator()
        generator.seed()  # from the system's entropy
        sampler = WeightedRandomSampler([1.0] * len(dataset), len(dataset), generator=generator)
    else:
        sampler = EpochSampler(dataset, condition.order_seed)
    return DataLoader(dataset, batch_size, sampler=sampler, num_workers=condition.workers, generator=torch.Generator())


def _fresh() -> tuple[MLP, torch.optim.Adam]:
    model = MLP((3, 96, 96), [64, 32], 2, dropout_rate=0.2)
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def _restored(model: MLP, optimizer: torch.optim.Adam, kind: str) -> tuple[MLP, torch.optim.Adam]:
    """A new model and optimiser holding what a checkpoint of that kind would have kept."""
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, generators = checkpoint.optimizer_tensors(optimizer), seeding.rng_state()
    new, other = _fresh()
    checkpoint.load_weights(new, weights, "memory")
    if kind == "full":
        checkpoint.load_optimizer(other, state)
        seeding.set_rng_state(generators)
    else:
        seeding.seed_everything(BASE.seed or 0)  # what a new process does before it loads the weights
    return new, other


def _global_flip(image: torch.Tensor) -> torch.Tensor:
    """The usual augmentation: a coin from torch's global generator, which each worker process owns a copy of."""
    return image.flip(-1) if torch.rand(()) < 0.5 else image


def _digests(model: MLP, optimizer: torch.optim.Adam) -> dict[str, str]:
    tensors = {**dict(model.state_dict()), **checkpoint.join("adam", checkpoint.optimizer_tensors(optimizer))}
    return {name: checkpoint.tensor_digest({name: tensor})[:16] for name, tensor in tensors.items()}


def measured(data: str | Path, conditions: Sequence[Condition], steps: int) -> list[list[dict[str, str]]]:
    """A trajectory for each condition, each in a new process, two at a time.

    Raises:
        RunError: a process failed; carries its last line.
    """

    def one(condition: Condition) -> list[dict[str, str]]:
        environment = os.environ | ({"ATEN_CPU_CAPABILITY": condition.capability} if condition.capability else {})
        call = [sys.executable, "-m", "pcamlib.experiments.twins", str(data), json.dumps(asdict(condition)), str(steps)]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"trajectory {condition}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, conditions))


def first_difference(a: list[dict[str, str]], b: list[dict[str, str]]) -> tuple[int, str] | None:
    """(step, tensor) at which two trajectories part, or None when they are bitwise equal."""
    for step, (left, right) in enumerate(zip(a, b, strict=True)):
        for name in {**left, **right}:
            if left.get(name) != right.get(name):
                return step, name
    return None


def source_table(data: str | Path, steps: int = 12, report: Callable[[str], None] = print) -> pd.DataFrame:
    """Each source of non-determinism alone, without and with its control.

    Returns:
        Columns source, equal weights (without control), first differing step, first differing tensor, control,
        equal with control.
    """

    def asked(changes: tuple[dict[str, Any], ...]) -> tuple[tuple[Condition, int], ...]:
        a, b = (replace(BASE, **change) for change in changes)
        return (a, 0), (b, int(a == b))  # a condition against itself needs a second training

    wanted = list(dict.fromkeys(key for _, *pairs, _ in SOURCES for pair in pairs for key in asked(pair)))
    report(f"{len(wanted)} trainings of {steps} steps, each in a new process")
    found = dict(zip(wanted, measured(data, [condition for condition, _ in wanted], steps), strict=True))
    rows = []
    for source, loose, tight, control in SOURCES:
        without, controlled = (first_difference(*(found[key] for key in asked(pair))) for pair in (loose, tight))
        rows.append({
            "source": source,
            "equal weights": without is None,
            "first differing step": None if without is None else without[0],
            "first differing tensor": None if without is None else without[1],
            "control": control,
            "equal with control": controlled is None,
        })  # fmt: skip
    return pd.DataFrame(rows, dtype=object)  # None stays None: equal trajectories have no first difference


def twin_runs(data: str | Path, folder: Path, steps: int = 40) -> tuple[runs.Run, runs.Run]:
    """The same `pcam train` command in two new processes; older twins in `folder` are replaced."""
    settings = ["train.epochs=null", f"train.steps={steps}", f"train.evaluate_every={steps // 2}", "train.threads=1"]
    paths = [folder / f"twin-{name}" for name in "ab"]
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    for path in paths:
        call = [
            sys.executable,
            "-m",
            "pcamlib.cli",
            "train",
            "--recipe",
            "cnn",
            "--data",
            str(data),
            "--out",
            str(path),
        ]
        done = subprocess.run([*call, *settings], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"twin run {path}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return runs.open_run(paths[0]), runs.open_run(paths[1])


def twin_table(a: runs.Run, b: runs.Run) -> pd.DataFrame:
    """What each member ended with: steps, loss, validation scores, digest of the weights."""
    rows = []
    for run in (a, b):
        last, done = run.metrics()[-1], run.success or {}
        scores = {key: f"{last[key]:.6f}" for key in ("loss", "valid_auc", "valid_nll")}
        rows.append({"run": run.name, "steps": done["steps"], **scores, "weights": done["weights"][:16]})
    return pd.DataFrame(rows)


def twin_series(a: runs.Run, b: runs.Run) -> dict[str, list[float]]:
    """Loss of both members by step."""
    series: dict[str, list[float]] = {"step": [row["step"] for row in a.metrics()]}
    return series | {run.name: [row["loss"] for row in run.metrics()] for run in (a, b)}


def plot_twins(series: dict[str, list[float]]) -> Figure:
    """Both loss curves above, their difference below."""
    names = [name for name in series if name != "step"]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 3.6), sharex=True, height_ratios=(2, 1))
    top.plot(series["step"], series[names[0]], label=names[0], lw=4, alpha=0.35)
    top.plot(series["step"], series[names[1]], label=names[1], lw=1, ls="--", color="black")
    bottom.plot(series["step"], np.subtract(series[names[0]], series[names[1]]), color="firebrick")
    top.set_ylabel("loss")
    top.legend(frameon=False, fontsize=8)
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    return figure


def cost(data: str | Path, rounds: int = 11, steps: int = 3, batch_size: int = 32) -> dict[str, Any]:
    """Time of deterministic training as a ratio to non-deterministic, interleaved A B A in one process, one thread.

    Returns:
        dict: `ratio` (median of paired rounds), `interval` (95 % bootstrap of the median), `floor` (median deviation
        of A against A, below which no difference is claimed), `rounds`, and the `seconds` of every round.
    """
    patches = open_split(data, "train")
    config = parse(recipe("cnn"), ["train.steps=1"])
    model = build(config.model, channel_statistics(patches, 512))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = next(iter(Loader(patches, batch_size=batch_size, view=model.view)))

    def timed(deterministic: bool) -> float:
        torch.set_deterministic_debug_mode("error" if deterministic else "default")
        begun = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(model(batch.images), batch.labels).backward()
            optimizer.step()
        return time.perf_counter() - begun

    before = torch.get_deterministic_debug_mode()
    seconds = timing.interleaved([lambda: timed(True), lambda: timed(False)], rounds)
    torch.set_deterministic_debug_mode(before)
    ratio, interval = timing.ratio(seconds[:, 0], seconds[:, 1])
    floor = timing.floor(seconds)
    return {"ratio": ratio, "interval": interval, "floor": floor, "rounds": rounds, "seconds": seconds.tolist()}


if __name__ == "__main__":
    spec = Condition(**json.loads(sys.argv[2]))
    json.dump(trajectory(sys.argv[1], spec, int(sys.argv[3]) if len(sys.argv) > 3 else 12), sys.stdout)
