"""Files are whole or absent."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from pcamlib import files
from pcamlib.errors import PcamError
from pcamlib.files import atomic_path, digest, read_json, sha256_file, write_json, write_text


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "first, and longer")
    write_text(path, "é")
    assert path.read_bytes() == "é".encode() and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic_path(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_forgetting_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass
    assert names(tmp_path) == []


def test_a_kill_leaves_the_old_file_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def dies() -> None:
        with atomic_path(path) as part:
            part.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=dies)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old" and len(names(tmp_path)) == 2
    write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_a_living_writer_on_this_host_and_any_on_another_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    mine = files._part_name(path)
    others = [mine.name.replace(f".{os.getpid()}.", ".1."), ".a.txt.elsewhere.999999999.part"]
    for name in others:
        (tmp_path / name).touch()
    write_text(path, "new")
    assert names(tmp_path) == sorted(["a.txt", *others])


def test_a_full_disk_is_said_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    files._part_name(path).symlink_to("/dev/full")
    with pytest.raises(PcamError, match=r"a\.txt: the disk is full or over quota") as caught:
        write_text(path, "new" * 10_000)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("number", "message"), [(errno.EDQUOT, "over quota"), (errno.EROFS, "cannot be written"),
                                                 (errno.EACCES, "cannot be written")])  # fmt: skip
def test_errors_of_the_disk_are_for_people(number: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(PcamError, match=message), atomic_path(tmp_path / "a.txt"):
        raise OSError(number, os.strerror(number))


def test_json(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "é"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": math.nan})
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(PcamError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(PcamError, match=r"b\.json: no such file"):
        read_json(tmp_path / "b.json")


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})
