"""Files that are whole or absent: write under a temporary name, flush to disk, then rename.

A kill or a full disk in mid-write leaves the old file as it was. What a killed writer left behind is removed by the
next writer of the same file on the same host.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pcamlib.errors import PcamError


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and belongs to somebody else
        return True
    return True


def _part_name(path: Path) -> Path:
    """`.NAME.HOST.PID.part` beside `path`; leftovers of dead writers on this host are removed."""
    host = socket.gethostname().split(".")[0]
    for left in path.parent.glob(f".{path.name}.{host}.*.part"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            left.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{host}.{os.getpid()}.part")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` when the block ends well, delete it when it does not.

    Raises:
        PcamError: the disk is full or the folder cannot be written; `path` is untouched.
    """
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = _part_name(path)
        try:
            yield part
            with open(part, "rb") as handle:
                os.fsync(handle.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the system says of a full or forbidden disk, as a `PcamError` that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PcamError(f"{path}: the disk is full or over quota; free some space and run again") from error
        if error.errno in (
            errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR
        ):  # fmt: skip
            raise PcamError(f"{path}: cannot be written ({error.strerror}); choose a folder you may write") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is refused, since no other reader accepts it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON written by `write_json`.

    Raises:
        PcamError: the file is missing or is no JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PcamError(f"{path}: no such file") from None
    except ValueError as error:
        raise PcamError(f"{path}: not valid JSON ({error})") from None


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
