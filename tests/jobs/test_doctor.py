"""`pcam doctor`: every fault that it looks for, planted; and nothing found where there is none."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pcamlib.cli.environment import commands
from pcamlib.jobs import doctor, kernelspec
from pcamlib.jobs import doctor_machine as machine
from pcamlib.jobs import doctor_python as python
from pcamlib.jobs.finding import Finding, Place, distributions, listed

CUDA_TORCH = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
CPU_TORCH = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n"
DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version: 11\n"
SLURM = ("sbatch", "squeue", "scontrol", "scancel")


def programs(folder: Path, *names: str, does: str = "exit 0") -> Path:
    """A folder of programs for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Place]:
    """`place(**changes)`: a project without a fault in an empty folder, and what a test changes of it."""
    root, home = tmp_path / "project", tmp_path / "home"
    packages = root / ".venv" / "lib" / "site-packages"
    for name in ("numpy-2.4.6", "torch-2.13.0+cpu", "ipykernel-7.4.0"):
        (packages / f"{name}.dist-info").mkdir(parents=True)
    (packages / "torch").mkdir()
    (packages / "torch" / "version.py").write_text(CPU_TORCH)
    (root / "requirements.lock").write_text(
        '# exact\nipykernel==7.4.0\nnumpy==2.4.6\ntorch==2.13.0\nold==1.0 ; python_version < "3"\n'
    )
    home.mkdir()
    subprocess.run(["git", "init", "-q", root], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", root, *author, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(home / "jupyter"))
    path = f"{programs(tmp_path / 'slurm', *SLURM)}:{os.environ['PATH']}"

    def make(env: dict[str, str] | None = None, **changes: Any) -> Place:
        base = {"root": root, "home": home, "prefix": root / ".venv", "packages": packages, "proc": tmp_path / "proc"}
        base |= {"user_site": None, "version": (3, 11, 7), "shm": tmp_path}
        return Place(**{**base, "env": {"PATH": path, "TMPDIR": str(tmp_path), **(env or {})}, **changes})

    return make


def test_no_fault_no_finding(place: Callable[..., Place]) -> None:
    found = doctor.examine(place())
    assert [str(one) for one in found if one.level != "ok"] == []
    assert len({one.what for one in found}) == len(doctor.CHECKS) == 15
    assert "torch: 2.13.0+cpu, CPU build, no GPU here" in doctor.report(found)


def expect(finding: Finding, level: str, detail: str, remedy: str) -> None:
    """The finding has this level, and says these words."""
    assert finding.level == level, finding
    assert detail in finding.detail, finding
    assert remedy in finding.remedy, finding


# Python and its packages


def test_the_wrong_python(place: Callable[..., Place], tmp_path: Path) -> None:
    expect(python.python(place(version=(3, 9, 2))), "FAIL", "3.9.2 is older than 3.11", "module load")
    expect(python.python(place(prefix=tmp_path)), "warn", "is not of", ".venv/bin/pcam")
    conda = {"CONDA_PREFIX": str(tmp_path)}
    assert python.python(place(conda, prefix=tmp_path)).level == "ok"
    assert python.conda(place(conda, prefix=tmp_path)).level == "ok"
    expect(python.conda(place(conda)), "warn", f"{tmp_path} is active", "conda deactivate")


def test_modules_that_leak(place: Callable[..., Place], tmp_path: Path) -> None:
    expect(python.python_path(place({"PYTHONHOME": "/sw/py"})), "FAIL", "PYTHONHOME=/sw/py", "module purge")
    expect(
        python.python_path(place({"PYTHONPATH": f"{tmp_path}/none"})), "warn", "goes before .venv", "unset PYTHONPATH"
    )
    (tmp_path / "bundle" / "numpy-1.26.4-py3.11.egg-info").mkdir(parents=True)
    bundle = {"PYTHONPATH": f":{tmp_path}:{tmp_path}/bundle"}
    expect(
        python.python_path(place(bundle)), "FAIL", f"puts {tmp_path}/bundle before .venv, with numpy", "module purge"
    )


@pytest.mark.parametrize(
    ("library", "level"),
    [("libtorch_cpu.so", "FAIL"), ("libcudnn_ops.so.9", "warn"), ("libcudart.so.12", "warn"), ("libhdf5.so", "ok")],
)
def test_libraries_that_leak(place: Callable[..., Place], tmp_path: Path, library: str, level: str) -> None:
    (tmp_path / library).touch()
    found = python.libraries(place({"LD_LIBRARY_PATH": f"/nowhere::{tmp_path}"}))
    assert found.level == level
    assert level == "ok" or f"{tmp_path}/{library}" in found.detail


@pytest.mark.parametrize(
    ("build", "driver", "given", "level", "detail", "remedy"),
    [
        (CPU_TORCH, None, "", "ok", "CPU build, no GPU here", ""),
        (CPU_TORCH, 580, "0", "warn", "CPU build, though this node has a GPU (driver 580)", "remove .venv"),
        (CUDA_TORCH, None, "", "ok", "2.13.0+cu130, CUDA 13 build, no GPU here", ""),
        (CUDA_TORCH, None, "0", "FAIL", "GPU 0 was given to this job, but no driver", "--exclude=$SLURMD_NODENAME"),
        (CUDA_TORCH, 535, "0", "FAIL", "CUDA 13 build, but the driver is 535", "driver 580 or newer"),
        (CUDA_TORCH, 580, "0", "ok", "driver 580", ""),
    ],
)
def test_torch_against_the_driver(
    place: Callable[..., Place], build: str, driver: int | None, given: str, level: str, detail: str, remedy: str
) -> None:
    here = place({"SLURM_JOB_GPUS": given} if given else {})
    (here.packages / "torch" / "version.py").write_text(build)
    if driver:
        (here.proc / "driver" / "nvidia").mkdir(parents=True)
        (here.proc / "driver" / "nvidia" / "version").write_text(DRIVER.format(driver))
    expect(python.torch(here), level, detail, remedy)


def test_no_torch(place: Callable[..., Place], tmp_path: Path) -> None:
    expect(python.torch(place(packages=tmp_path)), "FAIL", "not installed", "make .venv")


def test_a_stale_environment(place: Callable[..., Place]) -> None:
    here = place()
    assert python.lock(here).detail == "3 packages as locked"
    (here.packages / "numpy-2.4.6.dist-info").rename(here.packages / "numpy-1.26.4.dist-info")
    (here.packages / "ipykernel-7.4.0.dist-info").rmdir()
    found = python.lock(here)
    expect(found, "FAIL", "2 packages differ: ipykernel is missing, numpy 1.26.4 instead of 2.4.6", "make .venv")
    assert python.lock(place(prefix=here.home)).level == "warn"  # conda's own choice of what it needs
    expect(python.kernel(here), "FAIL", "ipykernel is not installed", "make .venv")
    (here.root / "requirements.lock").unlink()
    expect(doctor.examine(place(), [python.lock])[0], "FAIL", "could not be looked at: ", "")


def test_a_user_site_that_leaks(place: Callable[..., Place], tmp_path: Path) -> None:
    (tmp_path / "local" / "torch-1.13.1.dist-info").mkdir(parents=True)
    (tmp_path / "local" / "black-1.0.dist-info").mkdir()
    found = python.user_site(place(user_site=tmp_path / "local"))
    expect(found, "FAIL", f"{tmp_path}/local goes first, with torch", "export PYTHONNOUSERSITE=1")
    (tmp_path / "local" / "torch-1.13.1.dist-info").rmdir()
    assert python.user_site(place(user_site=tmp_path / "local")).level == "ok"
    assert python.user_site(place(user_site=tmp_path / "none")).level == "ok"


def test_the_kernel_of_another_environment(place: Callable[..., Place], tmp_path: Path) -> None:
    assert python.kernel(place()).level == "ok"  # not installed: nothing is wrong
    spec = kernelspec.install().folder / "kernel.json"
    assert python.kernel(place()).detail == f"{spec.parent} starts this environment"
    other = programs(tmp_path / "other", "python") / "python"
    spec.write_text(json.dumps({"argv": [str(other)]}))
    expect(python.kernel(place()), "warn", f"starts {other}, another environment", "kernel install")
    other.unlink()
    expect(python.kernel(place()), "FAIL", f"starts {other}, no Python", "kernel install")
    spec.write_text("{")
    expect(python.kernel(place()), "FAIL", "its kernel.json is broken", "kernel install")


# The machine


def test_folders_that_take_no_file(
    place: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = place({"PCAM_SCRATCH": str(tmp_path), "PCAM_CACHE": str(tmp_path / "new" / "cache")})
    assert machine.writable(here) == Finding("ok", "writable", "runs/, PCAM_CACHE, TMPDIR, PCAM_SCRATCH")
    assert not list((here.root / "runs").iterdir())
    (tmp_path / "file").touch()
    here = place({"PCAM_SCRATCH": str(tmp_path / "gone" / "deep"), "TMPDIR": str(tmp_path / "file")})
    found = machine.writable(here)
    expect(found, "FAIL", f"TMPDIR ({tmp_path}/file): File exists", "a folder of your own")
    assert f"PCAM_SCRATCH ({tmp_path}/gone/deep): No such file" in found.detail

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    expect(machine.writable(place()), "FAIL", "runs/ (", "free some space")


def test_a_place_without_locks(place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.locks(place()).level == "ok"

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    expect(machine.locks(place()), "FAIL", "runs: No locks available", "file system with locks")
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    expect(machine.locks(place()), "FAIL", "flock gave one lock to two holders", "file system with locks")
    real = os.open
    monkeypatch.setattr(machine.os, "open", lambda path, flags, *mode: real(path, flags & ~os.O_EXCL, *mode))
    expect(machine.locks(place()), "FAIL", "O_EXCL let two processes create one file", "one job at a time")


def test_little_room(place: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.room(place({"PIP_CACHE_DIR": "/dev/shm"}))
    assert "free for home, ~/.cache, wandb, triton, inductor, runs/" in found.detail  # pip's lies elsewhere
    over = programs(tmp_path / "quota", "quota", does="[ $1 = -q ] && echo '/home: 51G*' && exit 1")
    expect(machine.room(place({"PATH": str(over)})), "warn", "over quota: /home: 51G*", "PIP_CACHE_DIR")
    slow = programs(tmp_path / "slow", "quota", does="exec sleep 20")
    assert machine.room(place({"PATH": f"{slow}:/bin"})).level == "ok"
    status = os.statvfs(tmp_path)
    fields = {name: getattr(status, name) for name in dir(status) if name.startswith("f_")}
    kind = namedtuple("kind", fields)
    for name, value in (("f_bavail", 1000), ("f_favail", 0)):
        monkeypatch.setattr(os, "statvfs", lambda path, n=name, v=value: kind(**{**fields, "f_files": 10**6, n: v}))
        expect(machine.room(place()), "warn", "free for home, ~/.cache", "delete caches, or move them")


def test_slurm_commands(place: Callable[..., Place], tmp_path: Path) -> None:
    assert machine.slurm(place({"SLURM_JOB_ID": "7"})).detail == "sbatch is there; this is job 7"
    expect(machine.slurm(place({"PATH": ""})), "warn", "none on this machine", "pcam journal make")
    some = programs(tmp_path / "some", *SLURM[:2])
    expect(machine.slurm(place({"PATH": str(some)})), "FAIL", "scontrol, scancel not on PATH", "module load slurm")


def test_git(place: Callable[..., Place], tmp_path: Path) -> None:
    assert machine.git(place()).detail.startswith("at commit ")
    expect(machine.git(place({"PATH": ""})), "warn", "not on PATH", "module load git")
    (tmp_path / "bare").mkdir()
    expect(machine.git(place(root=tmp_path / "bare")), "warn", "not a git repository", "clone the project")


@pytest.mark.parametrize(
    ("env", "level", "words"),
    [
        ({"OMP_NUM_THREADS": "2", "SLURM_CPUS_PER_TASK": "3"}, "ok", "2 on 3 cores"),
        ({"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "3"}, "ok", "3 on 3 cores"),
        ({"OMP_NUM_THREADS": "64"}, "warn", "OMP_NUM_THREADS=64, but 4 cores"),
        ({"OMP_NUM_THREADS": "4", "SLURM_CPUS_PER_TASK": "1"}, "warn", "OMP_NUM_THREADS=4, but 1 cores"),
        ({"SLURM_JOB_ID": "1"}, "warn", "the job named no --cpus-per-task"),
        ({"OMP_NUM_THREADS": "all"}, "FAIL", "OMP_NUM_THREADS='all' is no number"),
        ({"OMP_NUM_THREADS": "0"}, "FAIL", "OMP_NUM_THREADS='0' is no number"),
    ],
)
def test_threads(
    place: Callable[..., Place], monkeypatch: pytest.MonkeyPatch, env: dict[str, str], level: str, words: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    found = machine.threads(place(env))
    assert found.level == level and words in found.detail
    assert level == "ok" or "export OMP_NUM_THREADS=" in found.remedy


def test_shared_memory(place: Callable[..., Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect(machine.shared_memory(place(shm=tmp_path / "none")), "warn", "no ", "one process")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(60 << 20))
    expect(machine.shared_memory(place()), "warn", "60 MiB free", "--shm-size=1g")


# The command


def test_the_command_says_it_in_lines_or_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = Finding("ok", "git", "at commit abc"), Finding("FAIL", "torch", "not installed", "make .venv")
    monkeypatch.setattr(doctor, "examine", lambda: [good, bad])
    result = CliRunner().invoke(commands, ["doctor"])
    assert (result.exit_code, result.stdout) == (
        1,
        "ok    git: at commit abc\nFAIL  torch: not installed; make .venv\n",
    )
    result = CliRunner().invoke(commands, ["doctor", "--json"])
    assert result.exit_code == 1 and json.loads(result.stdout)[1]["remedy"] == "make .venv"
    monkeypatch.setattr(doctor, "examine", lambda: [good, Finding("warn", "slurm", "none")])
    assert CliRunner().invoke(commands, ["doctor"]).exit_code == 0


def test_it_is_cheap_and_looks_at_this_process() -> None:
    code = "import sys; from pcamlib.jobs import doctor; doctor.examine(); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert Place().executable == sys.executable and Place().packages.is_dir()


def test_small_things(tmp_path: Path) -> None:
    assert listed(list("abcdefg"), 2) == "a, b and 5 more"
    for name in ("Jinja2-3.1.6.dist-info", "ml_dtypes-0.6.0.dist-info", "torch", "x.egg-link"):
        (tmp_path / name).mkdir()
    assert distributions(tmp_path) == {"jinja2": "3.1.6", "ml-dtypes": "0.6.0"}
