"""What a result rests on, and which difference is named first."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pcamlib import provenance
from pcamlib.provenance import PROMISE, capture, difference, flatten, git, git_state


def test_record_holds_the_six_promised_facts() -> None:
    record = capture(data={"train": "abc"}, config="def")
    json.dumps(record, allow_nan=False)
    flat = dict(flatten(record))
    assert all(any(key == name or key.startswith(name + ".") for key in flat) for name in PROMISE)
    assert flat["machine.threads"] == torch.get_num_threads() and flat["machine.world_size"] == 1
    assert flat["torch"].startswith(torch.__version__) and record["config"] == "def"
    assert len(flat["code.digest"]) == 64 and "torch" in record["packages"]
    assert capture(data={"train": "abc"})["code"] == record["code"]


def test_slurm_and_capability_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_PARTITION", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    assert "job_id" not in provenance.slurm()
    plain = provenance.capability()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "thin_course")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert provenance.slurm()["job_id"] == "17" and provenance.slurm()["job_partition"] == "thin_course"
    assert provenance.capability() == f"{plain} ATEN_CPU_CAPABILITY=default"
    assert provenance.machine()["world_size"] == 4


def _record() -> dict[str, Any]:
    return {
        "started": "1",
        "packages": {"h5py": "3.16"},
        "machine": {"host": "a", "threads": 1, "capability": "AVX2", "world_size": 1},
        "torch": "2.13",
        "data": {"train": "x", "valid": "y"},
        "code": {"commit": "1", "digest": "d"},
    }


def test_promised_facts_are_named_first_and_in_order() -> None:
    other = {
        "code": {"digest": "e", "commit": "2"},
        "machine": {"host": "b", "threads": 2, "capability": "AVX512", "world_size": 2},
        "data": {"train": "x", "valid": "z"},
        "torch": "2.14",
        "packages": {"h5py": "3.17"},
        "started": "2",
    }
    found = difference(_record(), other)
    promised = ["code.digest", "data.valid", "torch", "machine.capability", "machine.threads", "machine.world_size"]
    assert [key for key, *_ in found] == [*promised, "started", "packages.h5py", "machine.host", "code.commit"]
    assert found[1] == ("data.valid", "y", "z")


def test_what_may_differ_is_left_out() -> None:
    other = _record() | {"started": "2"}
    other["machine"] = other["machine"] | {"host": "b", "threads": 2}
    assert difference(_record(), other, ("started", "machine.host")) == [("machine.threads", 1, 2)]
    assert difference(_record(), _record()) == []


def test_a_missing_key_reads_as_none() -> None:
    other = _record()
    del other["torch"]
    assert difference(_record(), other) == [("torch", "2.13", None)]
    assert difference(other, _record()) == [("torch", None, "2.13")]
    assert difference({"slurm": {}}, {"slurm": {"job_id": "1"}}) == [("slurm", {}, None), ("slurm.job_id", None, "1")]


def test_git_state(tmp_path: Path) -> None:
    def run(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.hooksPath=/dev/null"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path) == {"commit": None, "dirty": None} and git("status", root=tmp_path) is None
    run("init")
    (tmp_path / "JOURNAL.md").write_text("1")
    (tmp_path / "a.py").write_text("1")
    run("add", ".")
    run("commit", "-m", "first")
    clean = git_state(tmp_path)
    assert clean["commit"] and len(clean["commit"]) == 40 and clean["dirty"] is None
    (tmp_path / "JOURNAL.md").write_text("2")
    assert git_state(tmp_path) == clean, "the journal is made from the code, not part of it"
    (tmp_path / "a.py").write_text("2")
    first = git_state(tmp_path)["dirty"]
    (tmp_path / "a.py").write_text("3")
    assert first and git_state(tmp_path)["dirty"] not in (None, first)


def test_no_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git("status") is None
