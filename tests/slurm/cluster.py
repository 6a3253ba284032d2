"""A real Slurm on one host: a controller and two nodes with partitions of the course's names, in a folder of its own.

    python tests/slurm/cluster.py start DIR        # prints the line that makes sbatch and squeue talk to it
    python tests/slurm/cluster.py stop DIR

Ports, sockets, keys and state are its own; a Slurm that the host may run already is left alone. What it lacks of a
cluster: accounting (no sacct), cgroups (memory is watched, not fenced) and GPUs.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2")
PATIENCE = 60.0  # seconds for the nodes to come up
SLACK = 3  # a busy machine may take so many times longer than a test allows for
#: cred_expire is 120 s by default, for which a requeued job is held back.
#: KillWait and SlurmdTimeout are 30 and 300 s by default; MinJobAge, 300 s, is how long a finished job is known.
#: OverMemoryKill stands for the fence that cgroups put around a job's memory.
CONFIG = """
ClusterName=pcamtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
SlurmdTimeout=20
SlurmctldTimeout=20
MinJobAge=86400
ReturnToService=2
JobRequeue=1
DefMemPerNode=1000
{nodes}
PartitionName=thin_course Nodes=ALL Default=YES MaxTime=02:00:00 PriorityTier=1
PartitionName=gpu_course Nodes=ALL MaxTime=02:00:00 PriorityTier=1
PartitionName=urgent_course Nodes=ALL MaxTime=02:00:00 PriorityTier=10 PreemptMode=OFF
"""


class Cluster:
    """The cluster in a folder; `environment` is what its commands need."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def call(self, *command: str | Path, check: bool = True, cwd: Path | None = None) -> str:
        """Standard output of a command that talks to this cluster."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise AssertionError(f"{command} left with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def start(self, cpus: int = 1, memory: int = 8000) -> None:
        """Start every daemon and wait until both nodes are idle; `cpus` and `memory` (MB) of each node."""
        if lacking := missing():
            raise RuntimeError(f"{', '.join(lacking)} not found: `make slurm` installs a local Slurm, on Debian")
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        ports = _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory}"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIG.format(
            host=host, ctld=ports[0], user=getpass.getuser(), folder=self.folder, nodes="\n".join(nodes)
        )
        (self.folder / "slurm.conf").write_text(text)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", f"--key-file={key}",
            f"--pid-file={self.folder / 'munged.pid'}", f"--log-file={self.folder / 'munged.log'}",
            f"--seed-file={self.folder / 'munge.seed'}", "--num-threads=2",
        )  # fmt: skip
        self._wait((self.folder / "munge.socket").exists, "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self._wait(lambda: self.call("sinfo", "-h", "-N", "-o", "%T", check=False).split().count("idle") >= 6, "nodes")

    def start_node(self, node: str) -> None:
        """Start one slurmd (again)."""
        self._daemon("slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """SIGKILL the slurmd of a node, as a crash would; its jobs' processes live on, as on a node cut off."""
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)

    def state(self, job: str | int) -> str:
        """Slurm's word for a job: PENDING, RUNNING, COMPLETED, FAILED, TIMEOUT, ..."""
        shown = self.call("scontrol", "show", "job", "-o", str(job))
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)["JobState"]

    def wait(self, jobs: Sequence[str | int], seconds: float, states: Sequence[str] = ()) -> list[str]:
        """Wait until each job is in one of `states` (default: ended); returns their states."""
        wanted = states or ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL")
        found: list[str] = []

        def reached() -> bool:
            found[:] = [self.state(job) for job in jobs]
            return all(state in wanted for state in found)

        self.until(reached, seconds, f"jobs {jobs} in {wanted}")
        return found

    def until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait until something is true; the queue is shown where it does not come."""
        deadline = time.monotonic() + SLACK * seconds
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"not after {SLACK * seconds:g} s: {what}; {self.call('squeue', '--states=all')}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Cancel what runs, end every daemon."""
        self.call("scancel", "--user", getpass.getuser(), check=False)
        self._wait(lambda: not self.call("squeue", "-h", check=False), "jobs", fail=False, seconds=15)
        names = [*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"]
        for path in [self.folder / f"{name}.pid" for name in names]:
            if path.exists() and path.read_text().strip():
                _end(int(path.read_text()))

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            subprocess.Popen(
                [_find(name), *arguments], env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def _wait(self, ready: object, what: str, fail: bool = True, seconds: float = PATIENCE) -> None:
        assert callable(ready)
        deadline = time.monotonic() + SLACK * seconds
        while not ready():
            if time.monotonic() > deadline:
                if not fail:
                    return
                logs = "\n".join(f"{path.name}: {path.read_text()[-800:]}" for path in self.folder.glob("*.log"))
                raise AssertionError(f"{what}: not ready after {SLACK * seconds:g} s\n{logs}")
            time.sleep(0.2)


def missing() -> list[str]:
    """Programs of a Slurm that this machine lacks."""
    return [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not _find(name)]


def _find(name: str) -> str:
    """Path of a program; daemons lie where a user's PATH may not reach."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _end(process: int) -> None:
    """SIGTERM, and SIGKILL for what is still there after 10 s."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(process, sign)
            for _ in range(100):
                with suppress(ChildProcessError):  # `cluster.py stop` did not start it
                    os.waitpid(process, os.WNOHANG)  # a child that ended is there until it is waited for
                os.kill(process, 0)
                time.sleep(0.1)
        except ProcessLookupError:
            return


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        print(__doc__)
        return 2
    cluster = Cluster(Path(sys.argv[2]).resolve())
    if sys.argv[1] == "start":
        cluster.start()
        print(f"export SLURM_CONF={cluster.folder / 'slurm.conf'}")
    else:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
