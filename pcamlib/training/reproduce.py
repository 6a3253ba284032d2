"""A finished run trained once more from its folder alone, and compared with it bit by bit.

    pcam runs reproduce RUN [--out DIR] [--data DIR]

Configuration, data fingerprints and conditions come from the folder. Other data are refused; every other condition
that differs is named before training, since bitwise equality is promised for `provenance.PROMISE` only. A run of
several processes is repeated under torchrun with as many; process 0 compares.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pcamlib import provenance
from pcamlib.config import Config
from pcamlib.errors import RunError
from pcamlib.training import distributed, loop, runs
from pcamlib.training.state import Training, choose_device


def reproduce(
    run: runs.Run,
    out: str | Path | None = None,
    folder: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> tuple[runs.Run, list[runs.Difference]]:
    """Train `run` again into `out` and compare.

    A run with a time limit is repeated too: over the steps it took, with the learning rate following the progress that
    it recorded at each step instead of the clock.

    Args:
        run: a finished run.
        out: a new folder; None: RUN-again, beside it.
        folder: data folder; None: the one the run names.
        report: told what differs beforehand, how training goes, and the verdict.

    Returns:
        The new run, and what differs between the two, causes before effects (`same` judges by the effects).

    Raises:
        RunError: the run is unfinished, its data folder is gone or holds other patches, or it has a time limit and was
            trained before progress was recorded.
    """
    if not run.success:
        raise RunError(f"{run.path}: has not finished, so there is no end to compare with; `pcam resume {run.path}`")
    config, replay = _fixed(run)
    where = Path(loop.data_of(run, folder))
    if not where.is_dir():
        raise RunError(f"{where}: the data folder of {run.path} is not there; give --data DIR")
    with distributed.join(choose_device(config.train.device)) as world:
        said = report if world.leads else lambda line: None
        now = Training(config, where).record()
        loop.same_data(run, now)
        for key, before, after in _conditions(run, now):
            fixed = " (bitwise equality is promised for a fixed one only)" if key.startswith(provenance.PROMISE) else ""
            said(f"differs: {key} was {before}, is {after}{fixed}{_advice(run, key, before)}")
        again = loop.train(config, where, out or run.path.with_name(f"{run.name}-again"), replay=replay, report=report)
        pinned = {key for key, *_ in provenance.difference(run.config.model_dump(), config.model_dump())}
        # process 0 writes the copy, so nobody else knows when it is whole
        found = world.gather(runs.diff(run, again) if world.leads else [])[0]
        found = [entry for entry in found if entry.what not in pinned]
        for line in verdict(run, found):
            said(line)
    return again, found


def same(found: list[runs.Difference]) -> bool:
    """Whether the effects, metrics and weights, are equal to the last bit, whatever the causes."""
    return not any(entry.kind in ("metrics", "weights") for entry in found)


def verdict(run: runs.Run, found: list[runs.Difference]) -> list[str]:
    """The outcome as lines for people."""
    if same(found):
        done = run.success or {}
        return [f"REPRODUCED: metrics of all {done['steps']:,} steps and every tensor of the last checkpoint are equal"]
    return ["NOT REPRODUCED", *runs.verdict(found)]


def _fixed(run: runs.Run) -> tuple[Config, list[float]]:
    """The run's configuration with all that followed its surroundings fixed, and its progress by step if it must be."""
    config, first = run.config, run.provenance["attempts"][0]
    items = ["tracking.wandb=off", f"train.threads={first['machine']['threads']}"]
    if config.train.time_limit is None:
        return config.override(*items), run.replay
    rows = run.metrics()
    replay = [float(row["progress"]) for row in rows if "progress" in row]
    if len(replay) < len(rows):
        raise RunError(
            f"{run.path}: has a time limit and did not record its progress at each step, so its learning rates cannot "
            f"be repeated; train it again with train.steps={len(rows)} in place of the limit"
        )
    return config.override(*items, "train.time_limit=null", f"train.steps={len(replay)}"), replay


def _conditions(run: runs.Run, now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What differs between now and any attempt of the run, each key once."""
    ignore = ("config", *(key for key in runs.HARMLESS if key != "lock"))
    found: dict[str, tuple[str, Any, Any]] = {}
    for attempt in run.provenance["attempts"]:
        for entry in provenance.difference(attempt, now, ignore):
            found.setdefault(entry[0], entry)
    return list(found.values())


def _advice(run: runs.Run, key: str, before: Any) -> str:
    """How the old condition is had back, where that is one command."""
    code = run.provenance["code"]
    if key == "machine.world_size":
        start = "`pcam` without torchrun" if before == 1 else f"`torchrun --nproc-per-node={before} -m pcamlib.cli`"
        return f"; start it with {start}"
    if key == "code.digest" and code["commit"]:
        changes = ", but it had uncommitted changes" if code["dirty"] else ""
        return f"; it was commit {code['commit'][:10]}{changes}"
    return "; `make .venv` installs the versions of requirements.lock" if key in ("lock", "torch") else ""
