"""What is collected comes back whole, old files go, and a disk that fails ends the collecting, nothing else."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pcamlib.errors import PcamError
from pcamlib.serving import collect
from pcamlib.serving.collect import Collector

NAMES = ("a", "b")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 4 patches, 3 of them, a window of 6."""
    for name, value in (("ROWS", 4), ("KEEP", 3), ("WINDOW", 6)):
        monkeypatch.setattr(collect, name, value)


def fill(collector: Collector, count: int, first: int = 0) -> None:
    """`count` calls of two patches each."""
    for number in range(first, first + count):
        values = np.array([[number, 0], [number, 1]], np.float32)
        collector.add(values, np.array([0.25, 0.75]), np.full((2, 96, 96, 3), number, np.uint8))


def stored(folder: Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path, allow_pickle=False)) for path in sorted(folder.glob("*.npz"))]


def test_measurements_and_answers_come_back_without_pixels(tmp_path):
    collector = Collector(NAMES, tmp_path / "seen")
    fill(collector, 3)
    collector.close()
    first, second = stored(tmp_path / "seen")  # the second was begun, and closed
    assert sorted(first) == ["names", "probability", "time", "values"] and first["names"].tolist() == list(NAMES)
    assert first["values"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and len(second["values"]) == 2
    assert first["probability"].tolist() == [0.25, 0.75] * 2 and (np.diff(first["time"]) >= 0).all()
    assert (tmp_path / "seen").stat().st_mode & 0o077 == 0


def test_files_are_the_owners_alone_in_a_folder_that_was_open_to_all(tmp_path):
    tmp_path.chmod(0o755)
    collector, mask = Collector(NAMES, tmp_path), os.umask(0o022)
    try:
        fill(collector, 1)
        collector.close()
    finally:
        os.umask(mask)
    (path,) = tmp_path.glob("*.npz")
    assert path.stat().st_mode & 0o777 == 0o600


def test_pixels_are_kept_when_asked(tmp_path):
    collector = Collector(NAMES, tmp_path, pixels=True)
    fill(collector, 2)
    collector.close()
    assert stored(tmp_path)[0]["images"][:, 0, 0, 0].tolist() == [0, 0, 1, 1]


def test_the_oldest_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "_PENDING", 9)
    (tmp_path / "notes.npz").write_bytes(b"")
    collector = Collector(NAMES, tmp_path)
    for number in range(0, 10, 2):
        fill(collector, 2, number)
    collector.close()
    (tmp_path / "notes.npz").unlink()  # still there
    assert [one["values"][0, 0] for one in stored(tmp_path)] == [4, 6, 8]


def test_the_window_holds_the_newest_with_or_without_a_folder():
    collector = Collector(NAMES, None)
    values, probability = collector.window()
    assert values.shape == (0, 2) and probability.shape == (0,)
    fill(collector, 5)
    values, probability = collector.window()
    assert values[:, 0].tolist() == [2, 2, 3, 3, 4, 4] and probability.tolist() == [0.25, 0.75] * 3
    assert collector.total == 10 and collector.broken is None
    collector.close()


def full(*arguments: object, **columns: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def forgetful(*arguments: object, **columns: object) -> None:
    raise MemoryError("no room")


@pytest.mark.parametrize(("breaks", "told"), [(full, "the disk is full"), (forgetful, "no room")])
def test_a_disk_that_fails_ends_the_collecting_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: Callable, told: str
):
    failures: list[bool] = []
    collector = Collector(NAMES, tmp_path, failed=lambda: failures.append(True))
    monkeypatch.setattr(np, "savez", breaks)
    fill(collector, 8)
    collector.close()
    assert collector.broken and told in collector.broken and failures == [True]
    assert list(tmp_path.iterdir()) == [] and len(collector.window()[0]) == 6


def test_a_disk_that_hangs_holds_nobody_up(tmp_path, monkeypatch):
    free, write = threading.Event(), np.savez

    def slow(*arguments, **columns) -> None:
        assert free.wait(10)
        write(*arguments, **columns)

    monkeypatch.setattr(np, "savez", slow)
    collector = Collector(NAMES, tmp_path)
    fill(collector, 20)
    assert collector.broken and "slower than the requests" in collector.broken
    free.set()
    collector.close()
    assert len(stored(tmp_path)) == 3  # four were under way, the oldest has gone


def test_a_folder_that_cannot_be_made_is_told_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PcamError, match="cannot be written"):
        Collector(NAMES, tmp_path / "file" / "seen")
