"""Runs that notebooks ask for: trained once, found again, trained anew when anything they rest on changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pcamlib.data.synthetic import generate
from pcamlib.experiments import study
from pcamlib.training import loop


def quiet(line: str) -> None:
    """Reports nothing."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_trained_once_and_found_again(
    tiny: Any, synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    run = study.run("mlp", tiny(), synthetic_dir, tmp_path, said.append)
    assert run.success and run.success["steps"] == 4 and run.path.name.startswith("mlp-") and said
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("it trained again"))
    again = study.run("mlp", tiny(), synthetic_dir, tmp_path, said.append)
    assert again == run and {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    same = tiny("data.dir=elsewhere", "tracking.project=other")
    assert study.run("mlp", same, synthetic_dir, tmp_path, quiet) == run, "where data lie and who is told do not count"


def test_a_change_trains_anew_and_removes_the_stale_sibling(
    tiny: Any, synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs"
    other = study.run("mlp-wide", tiny("train.steps=1"), synthetic_dir, folder, quiet)
    found = [study.run("mlp", tiny("train.steps=1"), synthetic_dir, folder, quiet)]
    found.append(study.run("mlp", tiny("train.steps=1", "seed=1"), synthetic_dir, folder, quiet))
    assert names(folder) == sorted([other.name, found[-1].name])

    data = tmp_path / "data"
    generate(data, seed=1, sizes={"train": 64, "valid": 64}, report=quiet)
    found.append(study.run("mlp", tiny("train.steps=1", "seed=1"), data, folder, quiet))
    assert names(folder) == sorted([other.name, found[-1].name])

    monkeypatch.setattr(study, "_CODE", {**study._CODE, "pcamlib/training/loop.py": "edited"})
    found.append(study.run("mlp", tiny("train.steps=1", "seed=1"), data, folder, quiet))
    assert names(folder) == sorted([other.name, found[-1].name])
    assert len({run.name for run in found}) == 4 and all(run.name.startswith("mlp-") for run in found)
    assert other.success, "a run of another name is left alone"


def test_the_thread_count_is_part_of_what_a_run_rests_on(
    tiny: Any, synthetic_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = study.run("mlp", tiny("train.steps=1"), synthetic_dir, tmp_path, quiet)
    monkeypatch.setattr(study.seeding, "set_threads", lambda threads: 64)
    assert study.run("mlp", tiny("train.steps=1"), synthetic_dir, tmp_path, quiet).name != asked.name


def test_what_a_killed_training_left_is_trained_again(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    run = study.run("mlp", tiny(), synthetic_dir, tmp_path, quiet)
    weights = (run.success or {})["weights"]
    (run.path / "SUCCESS").unlink()
    (run.path / "checkpoints" / "last.safetensors").write_bytes(b"half")
    again = study.run("mlp", tiny(), synthetic_dir, tmp_path, quiet)
    assert again == run and (again.success or {})["weights"] == weights
    assert len(again.provenance["attempts"]) == 1
