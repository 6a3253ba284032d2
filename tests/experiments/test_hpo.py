"""Searches: exact, resumable after anything, and refused where they would mix what does not belong together."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from typer.testing import CliRunner

from pcamlib import cli, config
from pcamlib.config import validate
from pcamlib.data.synthetic import generate
from pcamlib.errors import ConfigError, DataError, DivergedError, RunError
from pcamlib.experiments import hpo
from pcamlib.experiments.space import Space
from pcamlib.training import loop, metrics, runs
from pcamlib.training.notice import Stopped


def small(**changes: Any) -> Space:
    """A search of three thousand weights, a few steps each."""
    given = {
        "base": "mlp",
        "set": {
            "model.crop": 32, "model.hidden_units": [1], "train.threads": 1, "train.precision": "fp32",
            "train.device": "cpu",
        },
        "metric": "auc",
        "sampler": {"name": "tpe", "startup": 2},
        "pruner": {"name": "none"},
        "phases": [{"trials": 4, "limit": 128, "samples": 128, "evaluations": 2}],
        "parameters": {
            "optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
            "loader.batch_size": {"type": "categorical", "choices": [16, 32]},
        },
    }  # fmt: skip
    return validate(Space, {**given, **changes})


def quiet(line: str) -> None:
    """Reports nothing."""


def inline(space: Space, data: Path, out: Path) -> hpo.Search:
    """A whole search in this process."""
    found = hpo.begin(space, data, out, quiet)
    hpo.work(found, data, quiet)
    return found


def test_a_search_tries_exactly_what_was_asked_and_keeps_its_evidence(synthetic_dir: Path, tmp_path: Path) -> None:
    found = inline(small(), synthetic_dir, tmp_path / "s")
    table = found.table()
    assert found.finished() and list(table["trial"]) == [1, 2, 3, 4] and set(table["state"]) == {"complete"}
    for row in table.to_dict("records"):
        run = runs.open_run(found.path / "trials" / row["run"])
        seen = run.predictions("valid")
        assert metrics.report(seen.label, seen.probability, resamples=2)["metrics"]["auc"]["value"] == row["value"]
        assert run.config.optimizer.lr == row["optimizer.lr"] and row["weights"] == (run.success or {})["best"]
        assert run.config.tracking.group == "s" and run.config.data.dir == str(synthetic_dir)
        assert (run.success or {})["steps"] * run.config.loader.batch_size == 128, "equal budgets in patches seen"
    best = table.loc[table["value"].astype(float).idxmax()]
    assert found.best() == {key: best[key] for key in found.space.parameters}
    assert found.champion().optimizer.lr == best["optimizer.lr"]
    before = (found.path / "journal.jsonl").read_bytes()
    again = hpo.open_search(found.path)
    hpo.work(again, synthetic_dir, quiet)
    assert again.table().equals(table) and (found.path / "journal.jsonl").read_bytes() == before


def test_a_second_phase_repeats_the_best_for_longer(synthetic_dir: Path, tmp_path: Path) -> None:
    space = small(phases=[{"trials": 3, "limit": 64, "samples": 64}, {"keep": 2, "samples": 256}])
    found = inline(space, synthetic_dir, tmp_path / "s")
    first, second = found.table(0), found.table(1)
    assert len(first) == 3 and len(second) == 2
    ranked = first.sort_values("value", ascending=False, key=lambda column: column.astype(float))
    assert list(second["optimizer.lr"]) == list(ranked["optimizer.lr"])[:2]
    run = runs.open_run(found.path / "trials" / second["run"][0])
    assert run.config.data.limit is None and run.config.train.steps == 256 // run.config.loader.batch_size
    assert found.table().equals(second) and found.champion().train.steps
    with pytest.raises(ConfigError, match="with later phases the number of trials is fixed at 3"):
        hpo.begin(space.sized(trials=5), synthetic_dir, found.path, quiet)


def test_pruning_ends_a_trial_at_an_evaluation(
    synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.user_attrs["place"] == 1)
    found = inline(small(phases=[{"trials": 2, "samples": 256, "evaluations": 2}]), synthetic_dir, tmp_path / "s")
    kept, ended = found.table().to_dict("records")
    assert kept["state"] == "complete" and kept["evaluations"] == 2 and kept["why"] is None
    assert ended["state"] == "pruned" and ended["evaluations"] == 1 and ended["why"] == "at evaluation 1 of 2"
    assert not runs.open_run(found.path / "trials" / ended["run"]).success
    assert found.best() == {key: kept[key] for key in found.space.parameters}


def test_what_the_settings_bring_about_is_a_result_and_what_the_disk_does_is_not(
    synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, faults = loop.train, iter([DivergedError("step 3: loss nan"), DataError("the disk went away"), None])

    def failing(*arguments: Any, **options: Any) -> runs.Run:
        if fault := next(faults, None):
            raise fault
        return train(*arguments, **options)

    monkeypatch.setattr(loop, "train", failing)
    space = small(phases=[{"trials": 3, "samples": 64}])
    with pytest.raises(DataError, match="the disk went away"):
        inline(space, synthetic_dir, tmp_path / "s")
    found = inline(space, synthetic_dir, tmp_path / "s")  # the next worker takes the place over
    rows = found.table().to_dict("records")
    assert [row["state"] for row in rows] == ["pruned", "complete", "complete"]
    assert rows[0]["why"] == "step 3: loss nan" and rows[0]["value"] is None
    assert rows[1]["attempts"] == 2 and rows[1]["run"] == "1-002-again1"


def test_a_result_of_one_taken_for_dead_is_not_used(
    synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, said = small(phases=[{"trials": 1, "samples": 64}]), []
    found = hpo.begin(space, synthetic_dir, tmp_path / "s", quiet)
    train = loop.train

    def slow(*arguments: Any, **options: Any) -> runs.Run:
        monkeypatch.setattr(loop, "train", train)
        found.round(0).study.tell(0, state=TrialState.FAIL)  # what another worker's reaper does
        return train(*arguments, **options)

    monkeypatch.setattr(loop, "train", slow)
    hpo.work(found, synthetic_dir, said.append)
    assert any("1-001: this process was silent for so long that it was taken for dead" in line for line in said)
    assert list(found.table()["run"]) == ["1-001-again1"]


def test_a_worker_told_to_stop_saves_its_trial_and_the_next_one_goes_on_with_it(
    synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = small(phases=[{"trials": 2, "samples": 256, "evaluations": 2}], sampler={"name": "random"})
    whole = inline(space, synthetic_dir, tmp_path / "whole").table()
    train, started = loop.train, list[bool]()

    def told(*arguments: Any, **options: Any) -> runs.Run:
        def on_step(step: int) -> None:
            if step == 1 + 2 * len(started) and len(started) < 3:
                os.kill(os.getpid(), signal.SIGUSR1)

        started.append(options["resume"])
        return train(*arguments, **options, on_step=on_step)

    monkeypatch.setattr(loop, "train", told)
    found = hpo.begin(space, synthetic_dir, tmp_path / "s", quiet)
    for _ in range(2):
        with pytest.raises(Stopped, match=r"1-001: told to stop \(SIGUSR1\), saved at step"):
            hpo.work(found, synthetic_dir, quiet)
    hpo.work(found, synthetic_dir, quiet)
    assert started == [False, True, True, False]
    rows = found.table()
    assert list(rows["attempts"]) == [3, 1] and list(rows["run"]) == ["1-001", "1-002"]
    same = ["state", "value", "evaluations", "weights", "optimizer.lr", "loader.batch_size", "why"]
    assert rows[same].equals(whole[same]), "bitwise what it would have been"
    assert [path.name for path in sorted((found.path / "trials").iterdir())] == ["1-001", "1-002"]
    assert not list((found.path / "workers").iterdir())


def test_no_completed_trial_is_no_champion(
    synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*_: Any, **__: Any) -> None:
        raise DivergedError("step 1: loss nan")

    monkeypatch.setattr(loop, "train", diverging)
    space = small(phases=[{"trials": 2, "samples": 64}])
    found = inline(space, synthetic_dir, tmp_path / "s")
    with pytest.raises(RunError, match="no trial completed; `why` in the table"):
        found.best()
    two = small(phases=[{"trials": 1, "samples": 64}, {"keep": 1, "samples": 64}])
    with pytest.raises(RunError, match="phase 1 has no completed trial to go on with"):
        inline(two, synthetic_dir, tmp_path / "t")
    with pytest.raises(RunError, match="phase 1 is not finished"):
        hpo.begin(two, synthetic_dir, tmp_path / "u", quiet).table()


def test_going_on_with_other_settings_is_refused(synthetic_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    hpo.begin(small(), synthetic_dir, out, quiet)
    wider = small().model_dump()
    wider["parameters"]["optimizer.lr"]["high"] = 0.5
    wider["parameters"]["optimizer.lr"]["why"] = "words may change"
    wider["seed"] = 3
    with pytest.raises(ConfigError, match=r"another space: .*parameters.optimizer.lr.high was 0.1, is 0.5.*another -"):
        hpo.begin(validate(Space, wider), synthetic_dir, out, quiet)
    with pytest.raises(ConfigError, match=r"sampler.name was tpe, is random"):
        hpo.begin(small().sized(sampler="random"), synthetic_dir, out, quiet)
    with pytest.raises(ConfigError, match=r"phases.1.samples was 128, is 64"):
        hpo.begin(small().sized(samples=64), synthetic_dir, out, quiet)
    with pytest.raises(ConfigError, match="begun with 4 trials, 3 are asked for"):
        hpo.begin(small().sized(trials=3), synthetic_dir, out, quiet)
    assert hpo.begin(small().sized(trials=6), synthetic_dir, out, quiet).round(0).total == 6
    assert hpo.open_search(out).round(0).total == 6
    data = tmp_path / "data"
    generate(data, seed=1, sizes={"train": 64, "valid": 64}, report=quiet)
    with pytest.raises(RunError, match=r"begun on other patches \(data.train was"):
        hpo.begin(small().sized(trials=6), data, out, quiet)
    with pytest.raises(RunError, match="no search here"):
        hpo.open_search(tmp_path)


def test_a_change_of_the_training_code_is_said(
    synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    hpo.begin(small(), synthetic_dir, tmp_path / "s", said.append)
    first = hpo.place(small(), synthetic_dir, tmp_path, "hpo")
    digests = hpo.sources.digests
    monkeypatch.setattr(hpo.sources, "digests", lambda entry: {**digests(entry), "pcamlib/training/loop.py": "edited"})
    hpo.begin(small(), synthetic_dir, tmp_path / "s", said.append)
    assert len(said) == 1 and "the training code changed" in said[0]
    assert hpo.place(small(), synthetic_dir, tmp_path, "hpo") != first


def test_the_command_refuses_what_the_search_refuses(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["hpo", "cn", "--out", str(tmp_path / "s")])
    assert isinstance(result.exception, ConfigError) and "did you mean 'cnn'" in str(result.exception)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_worker_processes_search_and_the_champion_is_a_recipe(synthetic_dir: Path, tmp_path: Path) -> None:
    path, space = tmp_path / "space.yaml", small(sampler={"name": "random"})
    path.write_text(yaml.safe_dump(space.model_dump(mode="json"), sort_keys=False))
    result = CliRunner().invoke(cli.app, ["hpo", str(path), "--data", str(synthetic_dir), "--out", str(tmp_path / "s")])
    assert not result.exception and result.output.count("complete  valid auc") == 4 and "best: " in result.output
    found = hpo.open_search(tmp_path / "s")
    assert len(found.table()) == 4
    assert config.parse(config.recipe(str(tmp_path / "s" / "champion.yaml"))) == found.champion()
    assert [path.suffix for path in (tmp_path / "s" / "workers").iterdir()] == [".log", ".log"], "no pulse is left"
    one, drop = inline(space, synthetic_dir, tmp_path / "r"), ["seconds"]
    assert one.table().drop(columns=drop).equals(found.table().drop(columns=drop)), "random search: whoever runs it"


@pytest.mark.slow
def test_workers_that_cannot_work_end_the_search_with_their_words(synthetic_dir: Path, tmp_path: Path) -> None:
    data, said = tmp_path / "data", []
    shutil.copytree(synthetic_dir, data)
    hpo.begin(small(), data, tmp_path / "s", quiet)
    (tmp_path / "s" / "trials").write_text("no folder")
    with pytest.raises(RunError, match="every worker ended before the search did; the same command goes on"):
        hpo.search(small(), data, tmp_path / "s", 1, said.append)
    assert any("a worker ended with code 2 (pcam: " in line and "trials" in line for line in said)


def until(what: Callable[[], bool], seconds: float = 200) -> None:
    """Wait for something to happen."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def workers(found: hpo.Search, data: Path, count: int) -> list[subprocess.Popen[bytes]]:
    call = [sys.executable, "-m", "pcamlib.cli", "hpo-worker", str(found.path), "--data", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(call, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(count)
    ]


def running(found: hpo.Search) -> list[optuna.trial.FrozenTrial]:
    return [t for held in found.round(0).places().values() for t in held if t.state == TrialState.RUNNING]


@pytest.mark.slow
@pytest.mark.timeout(600)  # three starts of two processes, on a busy machine
def test_killed_workers_cost_no_more_than_their_running_trials(synthetic_dir: Path, tmp_path: Path) -> None:
    """SIGKILL of one of two workers, then of all, then a torn journal; resumed, the count is exact."""
    space = small(phases=[{"trials": 6, "samples": 6400, "evaluations": 2}])
    found = hpo.begin(space, synthetic_dir, tmp_path / "s", quiet)
    pair = workers(found, synthetic_dir, 2)
    until(lambda: len(running(found)) == 2)
    pair[0].send_signal(signal.SIGKILL)
    pair[0].wait()
    until(lambda: len(found.round(0).final()) >= 2)  # the other goes on
    until(lambda: bool(running(found)))
    for process in pair:
        process.kill()
        process.wait()
    done = {t.number: t.value for t in found.round(0).final()}
    with open(found.path / "journal.jsonl", "ab") as file:
        file.write(b'{"op_code":6,"worker_id":"0b')
    lost = {t.user_attrs["place"]: t.params for t in running(found)}

    again = hpo.search(space, synthetic_dir, found.path, 2, quiet)
    trials = again.round(0).study.trials
    assert len(again.table()) == 6 and sum(t.state == TrialState.COMPLETE for t in trials) == 6
    assert sum(t.state == TrialState.FAIL for t in trials) <= 3, "one of the first kill, two of the second at most"
    assert not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in trials)
    assert done.items() <= {t.number: t.value for t in trials}.items(), "no finished trial is lost"
    for place, params in lost.items():
        assert again.round(0).final()[place].params == params, "what was running is given out again as it was"
