"""Forecasts: what they are made of, what they say, and what they refuse."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcamlib.errors import ConfigError, RunError
from pcamlib.training import probe
from pcamlib.training.probe import Forecast

GIB = 2**30
HOUR = Forecast(
    seconds=3600, low=3300, high=4200, start=10, turn=20, memory=2 * GIB, device_memory=0, place="16 threads of NAME"
)


def test_a_probe_leaves_nothing_behind(tiny: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(data.glob("*.h5"))
    found = probe.probe(tiny("train.steps=400", "train.ema=0.9"), data, seconds=0.3)
    assert list(tmp_path.glob("tmp*")) == [] and sorted(data.glob("*.h5")) == before
    assert 0 < found.low <= found.seconds <= found.high and found.turn > 0 and 0 < found.start < found.seconds
    assert GIB / 20 < found.memory < 4 * GIB and found.device_memory == 0
    assert found.place.startswith("1 threads of ")


def test_the_forecast_is_the_sum_of_its_parts(tiny: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start 1 s; 0.1 s a step; an evaluation, a checkpoint and the report 2 s each; 8 steps an epoch."""
    monkeypatch.setattr(probe, "_steps", lambda state, seconds: np.full(20 + probe.WARM, 0.1))
    monkeypatch.setattr(probe, "_evaluation", lambda state, seconds: 2.0)
    monkeypatch.setattr(probe, "_timed", lambda work: 2.0)
    ticks = iter(range(10))
    monkeypatch.setattr(probe.time, "monotonic", lambda: next(ticks))

    def seconds(*items: str) -> float:
        nonlocal ticks
        ticks = iter(range(10))
        return probe.probe(tiny(*items), data).seconds

    last = 2 + 2  # predictions of the best weights, and their report
    assert seconds("train.steps=16") == pytest.approx(1 + 1.6 + 2 * 2 + 2 * 4 + last)
    assert seconds("train.epochs=2") == pytest.approx(seconds("train.steps=16"))
    assert seconds("train.steps=16", "train.checkpoint_every=4") == pytest.approx(1 + 1.6 + 2 * 2 + 6 * 2 + last)
    assert seconds("train.steps=16", "train.evaluate_every=16") == pytest.approx(1 + 1.6 + 2 + 2 * 2 + last)
    assert seconds("train.steps=null", "train.time_limit=60") == pytest.approx(1 + 60 + 0.1 + 2 + 4 + last)
    assert probe.probe(tiny("train.steps=16"), data).turn == pytest.approx(0.1 + 2 + 4)


def test_the_spread_is_between_blocks_of_steps() -> None:
    jitter = np.tile([0.1, 0.3], 500)
    assert probe._spread(jitter) == pytest.approx((0.2, 0.2, 0.2)), "single steps differ, their blocks do not"
    middle, low, high = probe._spread(np.repeat([0.1, 0.2, 0.3], 100))
    assert low < middle < high and middle == pytest.approx(0.2)
    assert probe._spread(np.array([0.5])) == (0.5, 0.5, 0.5)


def test_it_speaks_to_people() -> None:
    assert HOUR.text() == "about 60 min (55 to 70) and 2 GiB on 16 threads of NAME"
    assert replace(HOUR, seconds=8.6, low=8, high=9).text().startswith("about 8.6 s (8 to 9) and")
    assert replace(HOUR, seconds=30000, low=25000, high=40000).text().startswith("about 8.3 h (6.9 to 11) and")
    assert "and 2 GiB, 1.5 GiB of the GPU on" in replace(HOUR, device_memory=3 * GIB // 2).text()
    assert HOUR.allocations(7200) == 1 and HOUR.allocations(1800) == 3


def test_what_cannot_fit_is_refused_with_the_option_to_change() -> None:
    HOUR.refuse(None, None)
    HOUR.refuse(600, 2 * GIB)  # it goes back into the queue as often as it takes
    HOUR.refuse(3400, 2 * GIB, requeues=False)
    with pytest.raises(RunError, match=r"needs 2.0 GiB of memory, the job has 1.5: ask for --mem=3G or more"):
        HOUR.refuse(600, 3 * GIB // 2)
    with pytest.raises(RunError, match=r"one step, evaluate and save takes 30 s, .* has 170: ask for --time=00:04:00"):
        HOUR.refuse(170, None)
    with pytest.raises(RunError, match=r"takes 3300 s at least, the job has 3000: ask for --time=01:28:00 or more, or"):
        HOUR.refuse(3000, None, requeues=False)


def test_it_is_told_with_the_jobs_it_takes(tiny: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(probe, "probe", lambda *_: HOUR)
    probe.tell(tiny(), data, 30, 1800, None, said.append)
    assert said == [f"forecast: {HOUR.text()}, in 3 jobs of the 30 min that this one has"]
    monkeypatch.setenv("RANK", "1")
    probe.tell(tiny(), data, 30, None, None, said.append)
    assert len(said) == 1
    monkeypatch.setattr(probe, "probe", lambda *_: pytest.fail("there is no time for it"))
    with pytest.raises(RunError, match="150 s before its end a job is told to leave; this one has 60"):
        probe.tell(tiny(), data, 30, 60, None, said.append)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("59", 59),
        ("1:30", 90),
        ("2:00:01", 7201),
        ("1-02:00:00", 93600),
        ("UNLIMITED", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_spans_of_slurm(text: str, seconds: float | None) -> None:
    assert probe.span(text) == seconds


def test_the_limits_of_this_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert probe.allocation() == (None, None)
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\n[ "$*" = "-h -j 7 -o %L" ] && echo 9:30\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    assert probe.allocation() == (570, 4 * GIB)
    monkeypatch.delenv("SLURM_MEM_PER_NODE")
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "512")
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "4")
    assert probe.allocation()[1] == 2 * GIB


def test_the_command_has_the_options_of_train(pcam: Any, tiny: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny().yaml())
    code, out, err = pcam("probe", "--recipe", tmp_path / "tiny.yaml", "--data", data, "--seconds", "0.1", "seed=3")
    assert code == 0 and err == "" and out.startswith("forecast: about ") and out.count("\n") == 1
    assert list(Path().iterdir()) == []
    code, _, err = pcam("probe", "--recipe", tmp_path / "tiny.yaml", "--data", data, "train.stepz=3")
    assert code == 2 and "did you mean 'train.steps'" in err
    with pytest.raises(ConfigError):
        probe.probe(tiny("train.device=cuda"), data) if not probe.torch.cuda.is_available() else tiny("seed=-1")
