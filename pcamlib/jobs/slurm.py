"""Slurm as this project uses it: a site's partitions, one sbatch call, and whether any node can serve it.

    slurm/sites/NAME.sh     the only file that knows a site
    slurm/*.sbatch          what runs on a node; `Request.command` is the call that submits one

A request that no node can serve would wait for ever, or be refused for no reason that helps: it is checked here first.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import ge
from pathlib import Path

from pcamlib.errors import PcamError, nearest
from pcamlib.jobs.scale import Resources, seconds
from pcamlib.sources import ROOT

SITES = ROOT / "slurm" / "sites"
PATIENCE = 120  # seconds for one Slurm command; a busy controller takes tens
_READ_SITE = """set -eu
source "$1"
declare -F pcam_modules > /dev/null || { echo "no function pcam_modules" >&2; exit 1; }
printf '%s\\n' "$PCAM_CPU_PARTITION" "$PCAM_GPU_PARTITION" """
_SILENT = re.compile(r"configuration source|[Uu]nable to contact|fetch config|timed out|Connection refused")


class SlurmError(PcamError):
    """A job that cannot be submitted, or a Slurm that does not answer."""


@dataclass(frozen=True)
class Site:
    """A cluster, as its file in slurm/sites describes it."""

    name: str
    cpu: str
    gpu: str

    def partition(self, gpus: int) -> str:
        """Where a job with so many GPUs goes."""
        return self.gpu if gpus else self.cpu


@dataclass(frozen=True)
class Node:
    """What one node of a partition offers: CPUs, MiB, GPUs, and the partition's longest job in seconds."""

    name: str
    cpus: int
    memory: int
    gpus: int
    limit: float


@dataclass(frozen=True)
class Request:
    """One job to be.

    Attributes:
        script: file in slurm/, which is given `arguments`.
        resources: of each of `nodes` nodes.
        logs: folder.
        asked: where the resources are set, for people.
        array: task numbers, as in `0-11`; empty for one job.
        afterok: ids of jobs that must succeed before.
        afterany: ids of jobs that must be over before.
        exports: further environment variables; a value with a comma cannot be passed.
    """

    script: str
    arguments: tuple[str, ...]
    name: str
    site: str
    partition: str
    resources: Resources
    logs: Path
    asked: str = "the options"
    nodes: int = 1
    array: str = ""
    afterok: tuple[str, ...] = ()
    afterany: tuple[str, ...] = ()
    exports: tuple[tuple[str, str], ...] = ()

    @property
    def call(self) -> tuple[str, ...]:
        """What the job does, whatever it is given to do it with."""
        return (*(f"{name}={value}" for name, value in self.exports), f"slurm/{self.script}", *self.arguments)

    @property
    def log(self) -> str:
        """Slurm's pattern of the log file."""
        return f"{str(self.logs).replace('%', '%%')}/%x-{'%A_%a' if self.array else '%j'}.out"

    def command(self) -> list[str]:
        """The sbatch call, to be made in the repository's root."""
        waits = [
            f"{how}:{':'.join(ids)}" for how, ids in (("afterok", self.afterok), ("afterany", self.afterany)) if ids
        ]
        wanted = self.resources
        options = {
            "job-name": self.name,
            "partition": self.partition,
            "nodes": str(self.nodes) if self.nodes > 1 else "",
            "cpus-per-task": str(wanted.cpus),
            "mem": wanted.memory,
            "time": wanted.time,
            "gpus-per-node": str(wanted.gpus or ""),
            "array": self.array,
            "dependency": ",".join(waits),
            "kill-on-invalid-dep": "yes" if waits else "",  # what cannot start any more leaves the queue
            "output": self.log,
            "export": ",".join(
                ["ALL", *(f"{name}={value}" for name, value in (("PCAM_SITE", self.site), *self.exports))]
            ),
        }
        given = [f"--{name}={value}" for name, value in options.items() if value]
        return ["sbatch", "--parsable", *given, f"slurm/{self.script}", *self.arguments]


def site(name: str) -> Site:
    """The site described by slurm/sites/NAME.sh; its modules are not loaded.

    Raises:
        SlurmError: no such file (names the nearest), or one that does not set what it must.
    """
    known = {path.stem: path for path in SITES.glob("*.sh")}
    if name not in known:
        raise SlurmError(f"unknown site '{name}'{nearest(name, known)}; a new one is a file in slurm/sites/")
    done = subprocess.run(["bash", "-c", _READ_SITE, "bash", known[name]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SlurmError(f"slurm/sites/{name}.sh: {_last(done.stderr)}; compare slurm/sites/local.sh")
    cpu, gpu = done.stdout.splitlines()[-2:]
    return Site(name, cpu, gpu)


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command in the repository's root.

    Raises:
        SlurmError: it is not installed, or no controller answers: says how to do without.
    """
    without = "; without Slurm: `make journal`, `pcam notebook run NAME`, `pcam train`"
    if shutil.which(command[0]) is None:
        raise SlurmError(f"no Slurm on this machine ({command[0]} not found){without}")
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=_environment(), capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"Slurm did not answer within {PATIENCE} s ({command[0]}); try again later{without}") from None
    if done.returncode and _SILENT.search(done.stderr):
        raise SlurmError(f"Slurm does not answer on this machine ({_last(done.stderr)}){without}")
    return done


def nodes(partition: str) -> list[Node]:
    """What the nodes of a partition offer.

    Raises:
        SlurmError: an unknown partition (names the nearest).
    """
    found = []
    for line in ask("sinfo", "-h", "-N", "-p", partition, "-o", "%N|%c|%m|%G|%l").stdout.splitlines():
        name, cpus, memory, devices, limit = line.split("|")
        gpus = sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:(\d+)", devices))
        whole = seconds(limit) if limit[0].isdigit() else float("inf")
        found.append(Node(name, int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus, whole))
    if not found:
        known = [name.rstrip("*") for name in ask("sinfo", "-h", "-o", "%P").stdout.split()]
        raise SlurmError(f"unknown partition '{partition}'{nearest(partition, known)}")
    return found


def refuse(request: Request, offered: Sequence[Node]) -> None:
    """Check a request against the nodes of its partition.

    Raises:
        SlurmError: no node, or not enough of them, can serve it; names the largest node.
    """
    for name, value in request.exports:
        if "," in value:
            raise SlurmError(f"{request.name}: {name}={value}: Slurm passes no comma in a variable; use another path")
    wanted, where = request.resources, request.partition
    limits: tuple[tuple[str, int, list[float], Callable[[float], str]], ...] = (
        ("memory", wanted.megabytes, [node.memory for node in offered], _size),
        ("cpus", wanted.cpus, [node.cpus for node in offered], str),
        ("gpus", wanted.gpus, [node.gpus for node in offered], str),
        ("time", wanted.seconds, [node.limit for node in offered], _clock),
    )
    for what, asked, have, shown in limits:
        best = max(have)
        if asked > best:
            largest = f"the largest node of {where}, {offered[have.index(best)].name}, has"
            raise SlurmError(
                f"{request.name}: asks for {what} {shown(asked)}, but "
                f"{f'the longest job of {where} may take' if what == 'time' else largest} {shown(best)}; "
                f"lower {what} in {request.asked}, or choose another --partition"
            )
    least = (wanted.cpus, wanted.megabytes, wanted.gpus, wanted.seconds)
    able = [n for n in offered if all(map(ge, (n.cpus, n.memory, n.gpus, n.limit), least))]
    if len(able) < request.nodes:
        raise SlurmError(
            f"{request.name}: {request.nodes} nodes with {wanted.cpus} cpus, {_size(wanted.megabytes)} and "
            f"{wanted.gpus} gpus each; {where} has {len(able)} of {len(offered)}; ask for less in {request.asked}"
        )


def starts(request: Request) -> str:
    """When Slurm would start a job that waits for no other: local time, ISO 8601.

    Raises:
        SlurmError: Slurm would not take it.
    """
    said = ask("sbatch", "--test-only", *request.command()[2:]).stderr
    found = re.search(r"to start at (\S+)", said)
    if not found:
        raise SlurmError(
            f"{request.name}: Slurm refuses it: {_last(said)}; the call was: {shlex.join(request.command())}"
        )
    return found[1]


def submit(request: Request) -> str:
    """Submit a job; returns its id.

    Raises:
        SlurmError: Slurm does not take it.
    """
    done = ask(*request.command())
    if done.returncode:
        raise SlurmError(
            f"{request.name}: Slurm refuses it: {_last(done.stderr)}; the call was: {shlex.join(request.command())}"
        )
    return done.stdout.strip().splitlines()[-1].split(";")[0]  # `id;cluster` where clusters are federated


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs that run or wait.

    Raises:
        SlurmError: some may go on.
    """
    done = ask("scancel", *ids)
    if done.returncode:
        raise SlurmError(f"could not cancel: {_last(done.stderr)}; do it by hand: scancel {' '.join(ids)}")


def _environment() -> dict[str, str]:
    """Ours without the variables of a job we may be in: sbatch would take its memory and CPUs for options."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name in kept}


def _last(text: str) -> str:
    """The last line of what a command said."""
    return (text.strip().splitlines() or ["it said nothing"])[-1].strip()


def _size(megabytes: float) -> str:
    return f"{megabytes / 1024:g}G" if megabytes % 1024 == 0 else f"{megabytes:g}M"


def _clock(total: float) -> str:
    hours, rest = divmod(int(total), 3600)
    return f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
