"""A run trained again from its folder alone: equal to the last bit, or told by name what stands in the way."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pcamlib.errors import RunError
from pcamlib.files import read_json, write_json
from pcamlib.training import loop, runs
from pcamlib.training.reproduce import reproduce, same


def quiet(line: str) -> None:
    """Reports nothing."""


@pytest.fixture(scope="module")
def original(data: Path, tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A finished run that names its data folder; nobody may change it."""
    config = tiny(f"data.dir={data}", "train.steps=6", "train.evaluate_every=3", "schedule.name=cosine")
    return loop.train(config, data, tmp_path_factory.mktemp("original") / "run", report=quiet)


@pytest.fixture
def run(original: runs.Run, tmp_path: Path) -> runs.Run:
    """A copy of it, to be changed."""
    return runs.Run(Path(shutil.copytree(original.path, tmp_path / "run")))


def changed(run: runs.Run, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit the provenance of a run and of its one attempt."""
    record = read_json(run.path / "provenance.json")
    for part in (record, *record["attempts"]):
        change(part)
    write_json(run.path / "provenance.json", record)


def test_the_folder_alone_suffices(run: runs.Run) -> None:
    said: list[str] = []
    again, found = reproduce(run, report=said.append)
    assert found == [] and same(found) and again.path == run.path.with_name("run-again")
    assert said[-1] == "REPRODUCED: metrics of all 6 steps and every tensor of the last checkpoint are equal"
    assert not any(line.startswith("differs") for line in said)
    assert (again.success or {})["best"] == (run.success or {})["best"]
    with pytest.raises(RunError, match="already holds a finished run; choose another --out"):
        reproduce(run, report=quiet)


@pytest.fixture
def limited(tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Run:
    """A run of about ten steps under a time limit, by a clock that goes faster and faster."""
    config = tiny("train.steps=null", "train.time_limit=1.0", "train.evaluate_every=7", "schedule.name=onecycle")
    ticks = (0.001 * tick**2 for tick in itertools.count())
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
        run = loop.train(config, data, tmp_path / "run", report=quiet)
    assert 8 < len(run.metrics()) < 30 and len({row["lr"] for row in run.metrics()}) > 8
    return run


def test_a_time_limit_is_repeated_by_the_progress_it_recorded(limited: runs.Run, data: Path) -> None:
    """The clock gave every step its learning rate; the copy takes them from the folder, and so does the copy's copy."""
    run = limited
    again, found = reproduce(run, folder=data, report=quiet)
    assert found == [] and again.config.train.time_limit is None
    assert again.config.train.steps == (run.success or {})["steps"] == len(again.replay)
    third, found = reproduce(again, folder=data, report=quiet)
    assert found == [] and runs.diff(again, third) == []


def test_a_killed_reproduction_resumes_on_the_recorded_progress(limited: runs.Run, data: Path, tmp_path: Path) -> None:
    shares = [row["progress"] for row in limited.metrics()]
    items = ("train.time_limit=null", f"train.steps={len(shares)}", "train.checkpoint_every=1")
    fixed = limited.config.override(*items)

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(fixed, data, tmp_path / "copy", replay=shares, report=quiet, on_step=stop)
    copy = loop.resume(tmp_path / "copy", data, report=quiet)
    assert (copy.path / "replay.json").exists() and same(runs.diff(limited, copy))


def test_a_resumed_run_is_repeated_in_one_piece(tiny: Any, data: Path, tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny("train.checkpoint_every=2"), data, tmp_path / "run", report=quiet, on_step=stop)
    run = loop.resume(tmp_path / "run", data, report=quiet)
    assert reproduce(run, folder=data, report=quiet)[1] == []


def test_threads_that_followed_the_machine_are_fixed(
    tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = loop.train(tiny("train.threads=null"), data, tmp_path / "run", report=quiet)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    again, found = reproduce(run, folder=data, report=quiet)
    assert found == [] and again.config.train.threads == 1 and torch.get_num_threads() == 1


def test_other_conditions_are_named_before_training(run: runs.Run) -> None:
    def change(record: dict[str, Any]) -> None:
        record["code"] |= {"digest": "another", "commit": "abcdef1234567890", "dirty": None}
        record["lock"], record["torch"], record["packages"]["numpy"] = "older", "2.0", "1.0"

    changed(run, change)
    said: list[str] = []
    _, found = reproduce(run, report=said.append)
    now = run.provenance
    assert [line.split(" was ")[0] for line in said[:4]] == [
        "differs: code.digest", "differs: torch", "differs: lock", "differs: packages.numpy"
    ]  # fmt: skip
    assert said[0].startswith("differs: code.digest was another, is ")
    assert said[0].endswith("(bitwise equality is promised for a fixed one only); it was commit abcdef1234")
    assert "make .venv" in said[1] and "make .venv" in said[2] and now["lock"] == "older"
    assert same(found) and found and all(entry.kind == "provenance" for entry in found), "equal all the same"
    assert said[-1].startswith("REPRODUCED")


def test_a_different_outcome_is_not_reproduced(run: runs.Run) -> None:
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[3])
    lines[3] = json.dumps(row | {"loss": row["loss"] + 1e-12})
    (run.path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    said: list[str] = []
    _, found = reproduce(run, report=said.append)
    assert not same(found) and said[-4:-2] == ["NOT REPRODUCED", f"first difference: {found[0]}"]
    assert found[0].what == "step 4 loss" and "the promise is broken" in said[-1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run.path / "SUCCESS").unlink(), "has not finished, so there is no end to compare with; `pcam re"),
        (lambda run: (run.path / "provenance.json").unlink(), "provenance.json: no such file"),
        (lambda run: changed(run, lambda record: record["data"].update(train="x")), "the train patches are not those"),
        (lambda run: changed(run, lambda record: record["data"].update(rows="x")), "the audit leaves out other patche"),
    ],
)
def test_what_cannot_be_repeated_is_refused(run: runs.Run, damage: Callable[[runs.Run], Any], message: str) -> None:
    damage(run)
    with pytest.raises(Exception, match=message):
        reproduce(run, report=quiet)
    assert not run.path.with_name("run-again").exists()


def test_a_data_folder_that_is_gone_or_another_is_named(
    run: runs.Run, tiny: Any, data: Path, make_split: Any, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(RunError, match=rf"{gone}: the data folder of .*run is not there; give --data DIR"):
        reproduce(run, folder=gone, report=quiet)
    make_split(gone, "train", np.arange(64) % 2, seed=5)
    make_split(gone, "valid", np.arange(32) % 2, seed=6)
    with pytest.raises(RunError, match="the train patches are not those that this run began with; give its data folde"):
        reproduce(run, folder=gone, report=quiet)
    nameless = loop.train(tiny(), data, tmp_path / "nameless", report=quiet)
    with pytest.raises(RunError, match="the run does not say where its data lie; give --data DIR"):
        reproduce(nameless, report=quiet)


def test_a_time_limit_without_recorded_progress_is_refused(limited: runs.Run, data: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "progress"} for row in limited.metrics()]
    (limited.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RunError, match=rf"train it again with train.steps={len(rows)} in place of the limit"):
        reproduce(limited, folder=data, report=quiet)
