"""Told to stop by a signal, a run saves itself after the step in progress and goes on bitwise as if it never had."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcamlib import cli
from pcamlib.training import checkpoint, loop, runs
from pcamlib.training.notice import SIGNALS, Stopped, notice


def quiet(line: str) -> None:
    """Reports nothing."""


def signalled(number: signal.Signals, at: int) -> Callable[[int], None]:
    """An `on_step` after which this process gets a signal, `at` steps in."""

    def on_step(step: int) -> None:
        if step == at:
            os.kill(os.getpid(), number)

    return on_step


def attempts(run: runs.Run) -> list[str]:
    return [entry["exit"] for entry in run.provenance["attempts"]]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_are_put_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with notice() as came:
        with notice() as inner:
            os.kill(os.getpid(), number)
        assert came == inner == [number.name]
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with notice() as later:
        assert later == []


def test_in_another_thread_nothing_is_noted() -> None:
    found: list[Any] = []

    def elsewhere() -> None:
        with notice() as came:
            found.append((came, signal.getsignal(signal.SIGUSR1)))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [([], signal.getsignal(signal.SIGUSR1))]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_run_told_to_stop_ends_as_if_it_never_had(
    number: signal.Signals, tiny: Any, data: Path, tmp_path: Path
) -> None:
    config = tiny("train.steps=20", "model.dropout_rate=0.2", "loader.augment=[d4]", "schedule.name=onecycle")
    whole = loop.train(config, data, tmp_path / "whole", report=quiet)
    out = tmp_path / "run"
    for step in (3, 9):
        with pytest.raises(Stopped, match=rf"told to stop \({number.name}\), saved at step {step + 1}; `pcam resume"):
            loop.train(config, data, out, resume=out.exists(), report=quiet, on_step=signalled(number, step))
        assert checkpoint.load(runs.open_run(out).last)[1]["progress"]["step"] == step + 1
        assert [row["step"] for row in runs.open_run(out).metrics()] == list(range(1, step + 2))
    run = loop.resume(out, data, report=quiet)
    assert attempts(run) == ["stopped", "stopped", "ok"]
    found = [entry for entry in runs.diff(run, whole) if not entry.what.startswith("code.")]
    assert found == [] and run.success and whole.success
    assert {k: v for k, v in run.success.items() if k != "seconds"} == {
        k: v for k, v in whole.success.items() if k != "seconds"
    }
    assert run.predictions().probability.tobytes() == whole.predictions().probability.tobytes()


def test_a_signal_with_the_last_step_is_no_reason_to_stop(tiny: Any, data: Path, tmp_path: Path) -> None:
    config = tiny("train.steps=4")
    run = loop.train(config, data, tmp_path / "run", report=quiet, on_step=signalled(signal.SIGUSR1, 3))
    assert run.success and attempts(run) == ["ok"]


def test_with_the_clock_the_time_goes_on(
    tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(ticks) / 10)
    config = tiny("train.steps=null", "train.time_limit=3.0", "schedule.name=cosine")
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        loop.train(config, data, out, report=quiet, on_step=signalled(signal.SIGUSR1, 4))
    before = runs.open_run(out).metrics()[-1]["seconds"]
    run = loop.resume(out, data, report=quiet)
    seconds = [row["seconds"] for row in run.metrics()]
    assert 0 < before < seconds[5] and seconds == sorted(seconds) and 3.0 <= seconds[-1] < 3.5
    progress = [row["progress"] for row in run.metrics()]
    assert progress == sorted(progress), "the learning rate never goes back"


def test_the_command_ends_with_75(
    pcam: Any, tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: train(*a, **k, on_step=signalled(signal.SIGTERM, 1)))
    (tmp_path / "tiny.yaml").write_text(tiny().yaml())
    code, _, err = pcam("train", "--recipe", tmp_path / "tiny.yaml", "--data", data, "--out", tmp_path / "run")
    assert code == 75 == Stopped.exit_code and err.count("\n") == 1
    assert err.startswith(f"pcam: {tmp_path / 'run'}: told to stop (SIGTERM), saved at step 2; `pcam resume")
    assert cli.main.__doc__ and "75" in cli.main.__doc__


def test_who_lost_its_folder_writes_nothing_more(tiny: Any, data: Path, tmp_path: Path) -> None:
    """Another process took over, as a job does whose node was cut off and came back."""
    out, kept = tmp_path / "run", dict[str, bytes]()

    def taken(step: int) -> None:
        if step == 2:
            [held] = out.glob(".lock-*")
            held.rename(out / ".lock-9")
            kept.update({path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()})
            loop.time.sleep(0.1)

    beat = runs.locks.BEAT
    runs.locks.BEAT = 0.02
    try:
        with pytest.raises(runs.RunError, match=r"taken over by process .*writes nothing more"):
            loop.train(tiny("train.checkpoint_every=1"), data, out, report=quiet, on_step=taken)
    finally:
        runs.locks.BEAT = beat
    assert {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()} == kept
    assert attempts(runs.open_run(out)) == [None]


def test_finished_by_the_one_that_was_waited_for(
    tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = loop.train(tiny(), data, tmp_path / "run", report=quiet)
    success, said = done.success, list[str]()
    (done.path / "SUCCESS").unlink()
    real = runs.locks._take

    def slow(*place: Any) -> Any:
        runs.write_json(done.path / "SUCCESS", success)
        return real(*place)

    monkeypatch.setattr(runs.locks, "_take", slow)
    assert loop.resume(done.path, data, report=said.append).success == success
    assert said == [f"{done.path}: finished meanwhile"] and attempts(done) == ["ok"]
