"""What wandb wrote offline below a folder, and sending it: on the login node, since compute nodes have no internet.

    pcam runs sync [FOLDER]            # prints what it would send
    pcam runs sync [FOLDER] --send

Nothing is sent unless asked for. Steps are read from wandb's own files, also from those that a kill cut off.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pcamlib.errors import RunError

_BLOCK, _IDENT, _HEADER = 1 << 15, 7, 7  # of the LevelDB log that a .wandb file is: blocks, file and record heads


@dataclass(frozen=True)
class Offline:
    """One wandb run on disk.

    Attributes:
        path: its folder, `.../wandb/offline-run-TIME-ID`.
        group: the study it belongs to.
        name: its name there, RUN-ATTEMPT.
        size: bytes of its .wandb file.
        rows: metrics rows in it.
        last: step of the last of them.
        sent: wandb has sent it before.
    """

    path: Path
    group: str
    name: str
    size: int
    rows: int
    last: int
    sent: bool

    @property
    def command(self) -> list[str]:
        """The command that sends it."""
        return ["wandb", "sync", str(self.path)]

    def __str__(self) -> str:
        return f"{self.group}/{self.name}  {self.rows:,} rows to step {self.last:,}  {self.size / 1024:,.0f} KiB"


def offline(folder: str | Path) -> list[Offline]:
    """Every offline wandb run below `folder`, in order of group, name and time."""
    found = [_read(path) for path in Path(folder).rglob("wandb/offline-run-*/run-*.wandb")]
    return sorted(found, key=lambda one: (one.group, one.name, one.path.name))


def sync(folder: str | Path, send: bool = False, report: Callable[[str], None] = print) -> list[Offline]:
    """Print what would be sent, with the commands; with `send`, run them.

    Returns:
        The runs that were or would be sent: those that hold rows and that wandb has not sent before.

    Raises:
        RunError: the folder is missing, or wandb could not send a run; what was sent before stays sent.
    """
    if not Path(folder).is_dir():
        raise RunError(f"{folder}: no such folder; name the one that holds the runs")
    found = offline(folder)
    todo = [one for one in found if one.rows and not one.sent]
    for one in todo:
        report(f"{one}\n  {' '.join(one.command)}")
        if send and subprocess.run([sys.executable, "-m", *one.command], check=False).returncode:
            raise RunError(f"{one.path}: wandb could not send it; is there internet here, and did `wandb login` run?")
    total = sum(one.size for one in todo) / 1024
    line = f"{len(todo)} wandb runs, {total:,.0f} KiB, {'sent' if send else 'to be sent; --send sends them'}"
    before, empty = sum(one.sent for one in found), sum(not one.rows for one in found)
    line += f"; {before} sent before" if before else ""
    report(line + (f"; {empty} empty (killed before wandb wrote a row)" if empty else ""))
    return todo


def _read(path: Path) -> Offline:
    from wandb.proto import wandb_internal_pb2

    group, name, rows, last = "", path.stem, 0, 0
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)  # type: ignore[attr-defined]  # generated
        if record.HasField("run"):
            group, name = record.run.run_group, record.run.display_name
        elif record.HasField("history"):
            rows, last = rows + 1, record.history.step.num
    sent = path.with_name(f"{path.name}.synced").exists()
    return Offline(path.parent, group, name, path.stat().st_size, rows, last, sent)


def _records(data: bytes) -> Iterator[bytes]:
    """Whole records of a .wandb file; what a kill tore off is left out."""
    at, whole = _IDENT, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # no head fits into the rest of a block: it is padding
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + _HEADER : at + _HEADER + length]
        at += _HEADER + length
        if kind == 0 or len(part) < length:
            return
        whole = part if kind in (1, 2) else whole + part  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            yield whole
