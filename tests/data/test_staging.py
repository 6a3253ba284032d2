"""Copies on a node's own disk: made when they pay, once, whole; whatever is wrong with that disk, the file is read."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pcamlib.data import staging
from pcamlib.data.patches import open_split
from pcamlib.data.staging import Speeds, near, stage

FAST = Speeds(shared=10e6, copying=200e6, scratch=1000e6)
SLOW = Speeds(shared=900e6, copying=200e6, scratch=1000e6)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a megabyte is enough to measure."""
    monkeypatch.setattr(staging, "SAMPLE", 1 << 19)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One megabyte, of which no two patches are equal."""
    path = tmp_path / "shared" / "camelyonpatch_level_2_split_train_x.h5"
    path.parent.mkdir()
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder on another disk."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev or not os.access(memory, os.W_OK):
        pytest.skip("needs a second file system, /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Copying pays; lists what was measured."""
    measured: list[Path] = []
    monkeypatch.setattr(staging, "measure", lambda path, folder: measured.append(path) or FAST)
    return measured


def copies(scratch: Path) -> list[Path]:
    return [path for path in scratch.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_the_rule_is_what_it_says() -> None:
    assert FAST.pays() and not SLOW.pays()
    assert not Speeds(shared=100e6, copying=20e6, scratch=1000e6).pays(), "the copy costs more than three readings"
    assert Speeds(shared=100e6, copying=40e6, scratch=1000e6).pays()
    assert str(FAST) == "random patches at 10 MB/s where they lie, 1e+03 MB/s from scratch, 200 MB/s to copy"


def test_a_copy_that_pays_is_made_once_and_found_again(file: Path, scratch: Path, pays: list[Path]) -> None:
    said: list[str] = []
    copy = stage(file, scratch, said.append)
    assert copies(scratch) == [copy] and copy.read_bytes() == file.read_bytes()
    assert len(said) == 1 and "random patches at 10 MB/s where they lie" in said[0] and "copied to" in said[0]
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    before = copy.stat()
    assert stage(file, scratch, said.append) == copy and copy.stat().st_mtime_ns == before.st_mtime_ns
    assert len(pays) == 1 and len(said) == 1
    file.write_bytes(os.urandom(1 << 20))
    again = stage(file, scratch, said.append)
    assert again != copy and again.read_bytes() == file.read_bytes() and copy.exists(), "others may still read it"


def test_one_that_does_not_pay_is_not_made(file: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(staging, "measure", lambda path, folder: SLOW)
    assert stage(file, scratch, said.append) == file and copies(scratch) == []
    assert len(said) == 1 and said[0].endswith("read where it lies") and "900 MB/s" in said[0]


def test_the_speeds_are_measured_and_nothing_is_left(file: Path, scratch: Path) -> None:
    speeds = staging.measure(file, scratch)
    assert min(speeds.shared, speeds.copying, speeds.scratch) > 0 and list(scratch.iterdir()) == []


def test_small_files_and_one_disk_are_not_worth_the_question(
    file: Path, scratch: Path, tmp_path: Path, pays: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert stage(file, tmp_path, said.append) == file
    monkeypatch.setattr(staging, "SAMPLE", 1 << 30)
    assert stage(file, scratch, said.append) == file
    assert pays == said == []


def test_only_in_a_job_with_scratch(
    file: Path, scratch: Path, pays: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PCAM_SCRATCH", str(scratch))
    near.cache_clear()
    assert near(file) == file
    near.cache_clear()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert near(file) == near(file) != file and len(pays) == 1
    near.cache_clear()
    monkeypatch.setenv("PCAM_SCRATCH", "")
    assert near(file) == file


@pytest.mark.parametrize("kind", ["contiguous", "float32"])
def test_the_bytes_come_from_the_copy_and_all_else_from_where_they_lie(
    kind: str, images: np.ndarray, labels: np.ndarray, write: Callable[..., Path], tmp_path: Path, scratch: Path,
    pays: list[Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = write(tmp_path / "shared", images, labels, kind=kind)
    before = open_split(folder, "train")
    fingerprint, cached = before.fingerprint, sorted((folder / ".pcam-cache").iterdir())
    near.cache_clear()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("PCAM_SCRATCH", str(scratch))
    patches = open_split(folder, "train")
    near.cache_clear()
    [copy] = copies(scratch)
    assert str(patches.images.filename) == str(copy), "the map is of the copy"
    assert np.array_equal(patches.images, images) and patches.stored == before.stored
    assert patches.fingerprint == fingerprint and sorted((folder / ".pcam-cache").iterdir()) == cached, "found again"


# What can be wrong with scratch


def mounted(folder: Path, *options: str) -> Callable[[], object]:
    """A tiny disk at a folder; returns what takes it away."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("needs the right to mount a disk")
    return lambda: subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("size=64k",), "6.55e-05 GB of the 0.00105 it needs"),
        (("ro",), "Read-only file system"),
    ],
    ids=["full", "read-only"],
)
def test_a_full_or_read_only_scratch_is_one_line(
    file: Path, tmp_path: Path, pays: list[Path], options: tuple[str, ...], told: str
) -> None:
    said: list[str] = []
    away = mounted(tmp_path / "scratch", *options)
    try:
        assert stage(file, tmp_path / "scratch", said.append) == file
        assert (
            len(said) == 1
            and told in said[0]
            and "read where it lies" in said[0]
            and copies(tmp_path / "scratch") == []
        )
    finally:
        away()


def test_a_disk_that_fills_up_meanwhile_leaves_no_piece(
    file: Path, scratch: Path, pays: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr(staging.shutil, "copyfile", full)
    assert stage(file, scratch, said.append) == file and copies(scratch) == []
    assert len(said) == 1 and "the disk is full or over quota" in said[0]


def test_a_scratch_that_is_not_there_is_one_line(file: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert stage(file, tmp_path / "nowhere", said.append) == file
    assert len(said) == 1 and "No such file or directory" in said[0]


def test_somebody_else_s_folder_is_not_trusted(
    file: Path, scratch: Path, pays: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, me = list[str](), os.getuid()
    (scratch / f"pcam-{me + 1}").mkdir()
    monkeypatch.setattr(staging.os, "getuid", lambda: me + 1)
    assert stage(file, scratch, said.append) == file and "belongs to somebody else" in said[0]


def together(file: Path, scratch: Path, log: Path) -> None:
    copy = stage(file, scratch, lambda line: None)
    with open(log, "a") as out:
        out.write(f"{copy} {copy.read_bytes() == file.read_bytes()} {copy.stat().st_ino}\n")


def test_processes_of_one_node_make_one_copy(file: Path, scratch: Path, pays: list[Path], tmp_path: Path) -> None:
    several = [
        multiprocessing.get_context("fork").Process(target=together, args=(file, scratch, tmp_path / "log"))
        for _ in range(4)
    ]
    for process in several:
        process.start()
    for process in several:
        process.join(60)
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 4 and len(set(lines)) == 1 and " True " in lines[0] and len(copies(scratch)) == 1
