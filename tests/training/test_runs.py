"""Run folders: taken or free, finished or not, locked, compared."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcamlib.errors import ConfigError, PcamError, RunError
from pcamlib.files import write_json
from pcamlib.training import checkpoint, loop, runs
from pcamlib.training.evaluate import Predictions

RECORD = {
    "code": {"digest": "c", "commit": "1"},
    "data": {"train": "a", "valid": "b"},
    "torch": "2.13",
    "packages": {"numpy": "2.0"},
    "machine": {"host": "h", "capability": "AVX512", "threads": 2, "world_size": 1},
    "started": "then",
}


def quiet(line: str) -> None:
    """Reports nothing."""


@pytest.fixture
def run(tiny: Any, tmp_path: Path) -> runs.Run:
    """A run that has begun."""
    made = runs.create(tmp_path / "run", tiny())
    runs.begin(made, RECORD)
    return made


@pytest.fixture
def other(tiny: Any, tmp_path: Path) -> runs.Run:
    """Its twin."""
    made = runs.create(tmp_path / "other", tiny())
    runs.begin(made, RECORD)
    return made


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A run folder that another process writes, from before its first checkpoint on."""
    out = tmp_path / "locked"
    out.mkdir()
    (out / "config.yaml").write_text("seed: 123\n")
    code = "import sys; from pathlib import Path; from pcamlib.locks import Pulse; "
    code += "held = Pulse(Path(sys.argv[1])); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, out / ".lock-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stdout.readline(), "it holds the lock"
        yield out
        process.kill()


def test_a_folder_without_success_did_not_succeed(run: runs.Run) -> None:
    assert run.success is None
    write_json(run.path / "SUCCESS", {"steps": 4})
    assert run.success == {"steps": 4}


def test_the_configuration_comes_back(run: runs.Run, tiny: Any) -> None:
    assert run.config == tiny() and run.name == "run"
    assert (
        run.config.digest() == tiny("tracking.wandb=offline", "data.dir=elsewhere").digest() != tiny("seed=1").digest()
    )


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no run here \(no config.yaml\)"):
        runs.open_run(tmp_path)
    with pytest.raises(RunError, match="no run here"):
        runs.open_run(tmp_path / "nowhere")


def test_a_damaged_config_or_provenance_is_named(run: runs.Run) -> None:
    (run.path / "config.yaml").write_text("train: {epocs: 3}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'train.epocs'; did you mean 'train.epochs'"):
        _ = run.config
    (run.path / "provenance.json").write_text('{"data": ')
    with pytest.raises(PcamError, match="not valid JSON"):
        _ = run.provenance


def test_taken_folders_are_refused_with_the_way_out(tiny: Any, data: Path, tmp_path: Path) -> None:
    done = loop.train(tiny(), data, tmp_path / "done", report=quiet)
    before = (done.path / "SUCCESS").read_bytes(), (done.path / "config.yaml").read_bytes()
    for refuse in (runs.create, lambda out, config: loop.train(config, data, out, report=quiet)):
        with pytest.raises(RunError, match="already holds a finished run; choose another --out"):
            refuse(done.path, tiny("seed=1"))
        assert ((done.path / "SUCCESS").read_bytes(), (done.path / "config.yaml").read_bytes()) == before
    (done.path / "SUCCESS").unlink()
    with pytest.raises(RunError, match=r"already holds an unfinished run; `pcam resume .*/done` continues it"):
        loop.train(tiny("seed=1"), data, done.path, report=quiet)
    assert done.config == tiny()


def test_a_folder_left_before_the_first_checkpoint_may_be_taken_for_another_run(
    tiny: Any, data: Path, make_split: Any, tmp_path: Path
) -> None:
    """Of the attempt that was killed there nothing counts, above all not the data that it used."""

    def interrupt(step: int) -> None:
        raise KeyboardInterrupt

    elsewhere = tmp_path / "data"
    make_split(elsewhere, "train", np.arange(64) % 2, seed=5)
    make_split(elsewhere, "valid", np.arange(32) % 2, seed=6)
    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny("seed=1"), elsewhere, tmp_path / "run", report=quiet, on_step=interrupt)
    config = tiny("train.checkpoint_every=1")
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, data, tmp_path / "run", report=quiet, on_step=interrupt)
    run = loop.resume(tmp_path / "run", data, report=quiet)
    assert run.success and run.config == config and len(run.provenance["attempts"]) == 2
    whole = loop.train(config, data, tmp_path / "whole", report=quiet)
    assert run.success["weights"] == whole.success["weights"]


def test_two_processes_never_write_one_run(locked: Path, tiny: Any, data: Path) -> None:
    for attempt in (
        lambda: loop.train(tiny(), data, locked, report=quiet),
        lambda: loop.resume(locked, data, report=quiet),
    ):
        with pytest.raises(RunError, match="another process is writing this run; wait for it or choose --out"):
            attempt()
    assert (locked / "config.yaml").read_text() == "seed: 123\n", "the other's configuration is untouched"
    assert {path.name for path in locked.iterdir()} == {"config.yaml", ".lock-1"}


def test_a_lock_ends_with_its_process(run: runs.Run) -> None:
    with run.lock(), pytest.raises(RunError), run.lock():
        pass
    with run.lock():
        pass


def test_attempts_are_counted_and_ended(run: runs.Run) -> None:
    assert [entry["exit"] for entry in run.provenance["attempts"]] == [None]
    runs.end(run, "failed")
    assert runs.begin(run, {**RECORD, "started": "now"}) == 1
    runs.end(run, "ok")
    first, second = run.provenance["attempts"]
    assert (first["exit"], first["started"], second["exit"], second["started"]) == ("failed", "then", "ok", "now")
    assert run.provenance["started"] == "then"


def test_list_finds_runs_and_nothing_else(run: runs.Run, other: runs.Run, tmp_path: Path) -> None:
    inside = run.path / "wandb" / "offline-run-1" / "files"
    inside.mkdir(parents=True)
    (inside / "config.yaml").write_text("wandb_version: 1\n")
    assert [found.path for found in runs.list_runs(tmp_path)] == [other.path, run.path]
    assert runs.list_runs(tmp_path / "empty") == []


def test_predictions_are_stored_with_their_report(run: runs.Run) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50).astype(np.uint8)
    report = run.save_predictions(Predictions("test", "f", np.arange(50), labels, rng.random(50)), "test", 0)
    assert {**run.predictions("test").report(), "best_of": 0} == report
    assert (run.path / "report_test.json").is_file()


# diff


def save(run: runs.Run, **tensors: torch.Tensor) -> None:
    checkpoint.save(run.last, checkpoint.join("model", tensors), {})


def test_nothing_differs(run: runs.Run, other: runs.Run) -> None:
    """Not even between runs killed so early that they hold no metrics and no checkpoint."""
    assert runs.diff(run, other) == []
    assert runs.verdict([]) == [
        "no difference: the metrics and, where there are any, all tensors of the last checkpoints are equal"
    ]


def test_causes_come_before_effects_and_promised_ones_first(tiny: Any, run: runs.Run, tmp_path: Path) -> None:
    other = runs.create(tmp_path / "changed", tiny("seed=3", "data.dir=elsewhere", "tracking.project=x"))
    machine = {**RECORD["machine"], "host": "another", "threads": 1, "capability": "AVX2"}  # type: ignore[dict-item]
    changed = {"started": "now", "machine": machine, "packages": {"numpy": "2.1"}, "torch": "2.12", "extra": 1}
    runs.begin(other, {**RECORD, **changed})
    for one, loss in ((run, 0.5), (other, 0.25)):
        rows = [
            {"step": 1, "loss": 0.7, "seconds": loss},
            {"step": 2, "loss": loss, "lr": loss},
            {"step": 3, "loss": loss},
        ]
        (one.path / "metrics.jsonl").write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    save(run, a=torch.zeros(2), b=torch.zeros(3), c=torch.ones(1), d=torch.ones(2))
    save(other, a=torch.tensor([0.0, 1e-7]), b=torch.tensor([0, 0.5, 0.25]), c=torch.ones(1), d=torch.ones(3))
    found = runs.diff(run, other)
    assert [str(entry) for entry in found] == [
        "config: seed: 0 | 3",
        "provenance: torch: 2.13 | 2.12",
        "provenance: machine.capability: AVX512 | AVX2",
        "provenance: machine.threads: 2 | 1",
        "provenance: packages.numpy: 2.0 | 2.1",
        "provenance: extra: None | 1",
        "metrics: step 2 loss: 0.5 | 0.25",
        "weights: model.d: (2,) | (3,)",
        "weights: model.b (largest gap 0.5): differs | differs",
        "weights: model.a (largest gap 1e-07): differs | differs",
    ]
    lines = runs.verdict(found)
    assert lines[:2] == ["first difference: config: seed: 0 | 3", "bitwise equality is promised for a fixed torch only"]


def test_the_environment_of_a_later_attempt_counts(run: runs.Run, other: runs.Run) -> None:
    runs.begin(other, {**RECORD, "machine": {**RECORD["machine"], "threads": 8}})  # type: ignore[dict-item]
    assert [str(entry) for entry in runs.diff(run, other)] == ["provenance: machine.threads: 2 | 8"]
    runs.begin(run, {**RECORD, "slurm": {"job_id": "7"}})
    assert [str(entry) for entry in runs.diff(run, other)] == ["provenance: machine.threads: 2 | 8"]


def test_a_shorter_run_is_said_to_be_shorter(run: runs.Run, other: runs.Run) -> None:
    (run.path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
    (other.path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert [str(entry) for entry in runs.diff(run, other)] == ["metrics: rows: 2 | 1"]


def test_a_broken_promise_is_admitted(run: runs.Run, other: runs.Run) -> None:
    save(run, a=torch.zeros(2))
    save(other, a=torch.tensor([0.0, -0.0]))
    found = runs.diff(run, other)
    assert [entry.what for entry in found] == ["model.a (largest gap 0)"], "minus zero is another bit pattern"
    assert "the promise is broken" in runs.verdict(found)[-1]
