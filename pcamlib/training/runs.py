"""A run is one folder: configuration, provenance, metrics, predictions, checkpoints, and SUCCESS written last.

    RUN/config.yaml  provenance.json  metrics.jsonl  predictions_valid.npz  report_valid.json
        checkpoints/{last,best}.safetensors  SUCCESS

A folder without SUCCESS did not succeed. Two runs can be compared: the first thing that differs is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcamlib import locks, provenance
from pcamlib.config import Config, parse, read_yaml
from pcamlib.errors import RunError
from pcamlib.files import read_json, write_json, write_text
from pcamlib.training import checkpoint
from pcamlib.training.evaluate import Predictions
from pcamlib.training.tracking import read_metrics

#: Keys of a provenance record that may differ between equal runs.
#: `code.digest` and `packages` say what was used of the commit and the lock file.
HARMLESS = (
    "started", "command", "slurm", "machine.host", "attempts", "ended", "exit", "code.commit", "code.dirty", "lock",
)  # fmt: skip

#: Keys of a metrics row that follow the clock or tell how often a run was interrupted.
CLOCK = ("seconds", "progress", "attempt")


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.name

    @property
    def last(self) -> Path:
        """Checkpoint to resume from."""
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def best(self) -> Path:
        """Weights that won on validation."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def success(self) -> dict[str, Any] | None:
        """What SUCCESS holds (steps, weights digest, seconds), or None for a run that has not succeeded."""
        path = self.path / "SUCCESS"
        return read_json(path) if path.exists() else None

    @property
    def config(self) -> Config:
        """The configuration that the run was started with."""
        return parse(read_yaml(self.path / "config.yaml"))

    @property
    def provenance(self) -> dict[str, Any]:
        """The provenance record, with one entry an attempt."""
        return read_json(self.path / "provenance.json")

    @property
    def replay(self) -> list[float]:
        """Progress by step that the run follows instead of the clock; empty for all but repeated runs."""
        path = self.path / "replay.json"
        return read_json(path) if path.exists() else []

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl."""
        return read_metrics(self.path / "metrics.jsonl")

    def predictions(self, split: str = "valid") -> Predictions:
        """Stored predictions of a split."""
        return Predictions.load(self.path / f"predictions_{split}.npz")

    def save_predictions(self, predictions: Predictions, name: str, evaluations: int) -> dict[str, Any]:
        """Store predictions and the report computed from them under `name`; returns the report.

        `evaluations` is how often the weights were chosen from on this split: each look flatters the score a little.
        """
        predictions.save(self.path / f"predictions_{name}.npz")
        report = {**predictions.report(), "best_of": evaluations}
        write_json(self.path / f"report_{name}.json", report)
        return report

    @contextmanager
    def lock(self, report: Callable[[str], None] = print) -> Iterator[Callable[[], None]]:
        """Hold the folder for this process: two jobs never write the same run; yields and raises as `locks.held`."""
        with ExitStack() as stack:
            try:
                check = stack.enter_context(locks.held(self.path, report))
            except OSError as error:
                raise RunError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from None
            yield check


def open_run(path: str | Path) -> Run:
    """An existing run folder.

    Raises:
        RunError: no folder, or no run in it.
    """
    path = Path(path)
    if not (path / "config.yaml").is_file():
        raise RunError(f"{path}: no run here (no config.yaml); `pcam runs table` shows what there is")
    return Run(path)


def free(path: str | Path) -> Run:
    """A folder that no run has taken.

    Raises:
        RunError: the folder already holds a run.
    """
    run = Run(Path(path))
    if run.success:
        raise RunError(f"{path}: already holds a finished run; choose another --out")
    if run.last.exists():
        raise RunError(f"{path}: already holds an unfinished run; `pcam resume {path}` continues it")
    if run.path.is_dir() and any(run.path.iterdir()) and not any(run.path.glob(".lock*")):
        raise RunError(f"{path}: holds something else than a run; choose another --out")
    return run


def create(path: str | Path, config: Config, replay: Sequence[float] = ()) -> Run:
    """A new run folder holding its configuration and, where it repeats an earlier run, that one's progress by step.

    Raises:
        RunError: the folder already holds a run.
    """
    run = free(path)
    (run.path / "provenance.json").unlink(missing_ok=True)  # of an attempt killed before its first checkpoint
    (run.path / "replay.json").unlink(missing_ok=True)
    if replay:
        write_json(run.path / "replay.json", list(replay))
    write_text(run.path / "config.yaml", config.yaml())  # last: it makes the folder a run
    return run


def list_runs(folder: str | Path) -> list[Run]:
    """Every run below a folder, by name; wandb keeps a config.yaml of its own inside a run."""
    found = sorted(path.relative_to(folder) for path in Path(folder).rglob("config.yaml"))
    return [Run(Path(folder, path).parent) for path in found if "wandb" not in path.parts]


def begin(run: Run, record: dict[str, Any]) -> int:
    """Add an attempt to the provenance; returns its number from 0."""
    path = run.path / "provenance.json"
    whole = read_json(path) if path.exists() else {**record, "attempts": []}
    whole["attempts"].append({**record, "ended": None, "exit": None})
    write_json(path, whole)
    return len(whole["attempts"]) - 1


def end(run: Run, status: str) -> None:
    """Note how the latest attempt ended."""
    whole = run.provenance
    whole["attempts"][-1].update(ended=provenance.now(), exit=status)
    write_json(run.path / "provenance.json", whole)


@dataclass(frozen=True)
class Difference:
    """One thing that differs: `kind` is config, provenance, metrics or weights."""

    kind: str
    what: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}: {self.a} | {self.b}"


def diff(a: Run, b: Run) -> list[Difference]:
    """What differs between two runs, causes before effects; empty when they are bitwise equal.

    Causes: the configuration, then the six promised keys of provenance, then the rest of it. Effects: the first step
    whose metrics differ, then every tensor of the last checkpoint, worst first. A resumed attempt counts with the
    environment it ran in.
    """
    ignore = ("data.dir", "tracking")
    causes = provenance.difference(a.config.model_dump(), b.config.model_dump(), ignore)
    found = [Difference("config", *item) for item in causes]
    first, second = a.provenance["attempts"], b.provenance["attempts"]
    for number in range(max(len(first), len(second))):
        left, right = first[min(number, len(first) - 1)], second[min(number, len(second) - 1)]
        for item in provenance.difference(left, right, (*HARMLESS, "config")):
            if (entry := Difference("provenance", *item)) not in found:
                found.append(entry)
    return found + _metric_difference(a, b) + _weight_difference(a, b)


def verdict(found: list[Difference]) -> list[str]:
    """Differences as lines for people: the first thing that differs, what follows from it, where the promise ends."""
    if not found:
        return ["no difference: the metrics and, where there are any, all tensors of the last checkpoints are equal"]
    causes = [d for d in found if d.kind in ("config", "provenance")]
    effects = [d for d in found if d.kind in ("metrics", "weights")]
    lines = [f"first difference: {found[0]}"]
    promised = [d for d in causes if d.kind == "provenance" and d.what.startswith(provenance.PROMISE)]
    if promised:
        lines.append(f"bitwise equality is promised for a fixed {promised[0].what} only")
    lines += [f"  also {d}" for d in causes[1:]]
    lines += [f"  then {d}" for d in effects[:4]]
    if len(effects) > 4:
        lines.append(f"  and {len(effects) - 4} more tensors")
    if not causes:
        lines.append("no recorded cause differs: the promise is broken, please report it with both run folders")
    elif not effects:
        lines.append("metrics and weights are bitwise equal all the same")
    return lines


def _metric_difference(a: Run, b: Run) -> list[Difference]:
    left, right = ([{k: v for k, v in row.items() if k not in CLOCK} for row in r.metrics()] for r in (a, b))
    for one, other in zip(left, right, strict=False):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return [Difference("metrics", f"step {one['step']} {key}", one.get(key), other.get(key))]
    if len(left) != len(right):
        return [Difference("metrics", "rows", len(left), len(right))]
    return []


def _weight_difference(a: Run, b: Run) -> list[Difference]:
    if not (a.last.exists() or b.last.exists()):
        return []
    if not (a.last.exists() and b.last.exists()):
        there = ("there" if run.last.exists() else "missing" for run in (a, b))
        return [Difference("weights", "checkpoints/last.safetensors", *there)]
    left, right = (checkpoint.load(run.last)[0] for run in (a, b))  # weights, optimiser, generators
    found = []
    for name in dict.fromkeys([*left, *right]):
        one, other = left.get(name), right.get(name)
        if one is None or other is None or one.shape != other.shape:
            shapes = (None if tensor is None else tuple(tensor.shape) for tensor in (one, other))
            found.append((math.inf, Difference("weights", name, *shapes)))
        elif checkpoint.tensor_digest({"": one}) != checkpoint.tensor_digest({"": other}):  # bits: -0 is not 0 here
            gap = float((one.double() - other.double()).abs().max())
            found.append((gap, Difference("weights", f"{name} (largest gap {gap:.2g})", "differs", "differs")))
    return [entry for _, entry in sorted(found, key=lambda pair: -pair[0])]
