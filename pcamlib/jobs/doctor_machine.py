"""Checks of `pcam doctor`: disks, locks, Slurm, git, threads and shared memory of this machine."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

from pcamlib.jobs.finding import Finding, Place, listed

GIB = 1 << 30
LEAST_FREE = 2 * GIB
LEAST_SHM = 64 << 20  # what containers have by default; a batch of 512 float patches takes 57 MB


def writable(here: Place) -> Finding:
    """runs/, and the folders that variables name: each really takes a file."""
    what, failed = "writable", []
    named = {name: Path(here.env[name]) for name in ("PCAM_CACHE", "TMPDIR", "PCAM_SCRATCH") if here.env.get(name)}
    for name, path in {"runs/": here.root / "runs", **named}.items():
        try:
            path.mkdir(parents=name in ("runs/", "PCAM_CACHE"), exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path) as handle:
                handle.write(bytes(4096))
                handle.flush()
                os.fsync(handle.fileno())  # a network disk says only now that it is full
        except OSError as error:
            failed.append(f"{name} ({path}): {error.strerror}")
    if failed:
        return Finding("FAIL", what, "; ".join(failed), "free some space, or name a folder of your own in the variable")
    return Finding("ok", what, listed(["runs/", *named]))


def room(here: Place) -> Finding:
    """What fills a quota unseen: where the caches lie, and how much the file systems under them still hold."""
    home = here.home
    cache = Path(here.env.get("XDG_CACHE_HOME") or home / ".cache")
    folders = {
        "home": home,
        "~/.cache": cache,
        "pip": Path(here.env.get("PIP_CACHE_DIR") or cache / "pip"),
        "wandb": Path(here.env.get("WANDB_CACHE_DIR") or cache / "wandb"),
        "triton": Path(here.env.get("TRITON_CACHE_DIR") or home / ".triton"),
        "inductor": Path(here.env.get("TORCHINDUCTOR_CACHE_DIR") or here.env.get("TMPDIR") or "/tmp"),
        "runs/": here.root / "runs",
    }
    disks: dict[int, list[str]] = defaultdict(list)
    some: dict[int, Path] = {}
    for name, path in folders.items():
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        disks[there.stat().st_dev].append(name)
        some[there.stat().st_dev] = there
    tight, said = [], []
    for disk, names in disks.items():
        status = os.statvfs(some[disk])
        free = status.f_bavail * status.f_frsize
        said.append(f"{free / GIB:.1f} GiB free for {', '.join(names)}")
        if free < LEAST_FREE or (status.f_files and status.f_favail < status.f_files / 100):
            tight.append(f"{said[-1]}, {status.f_favail} files")
    remedy = "delete caches, or move them: PIP_CACHE_DIR, WANDB_CACHE_DIR, TRITON_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR"
    if tight:
        return Finding("warn", "room", "; ".join(tight), remedy)
    if over := _over_quota(here):
        return Finding("warn", "room", f"over quota: {over}", remedy)
    return Finding("ok", "room", "; ".join(said))


def slurm(here: Place) -> Finding:
    """The commands that `pcam submit` and `pcam jobs` call."""
    missing = [name for name in ("sbatch", "squeue", "scontrol", "scancel") if not _program(here, name)]
    if not missing:
        job = here.env.get("SLURM_JOB_ID")
        return Finding("ok", "slurm", f"sbatch is there{f'; this is job {job}' if job else ''}")
    if len(missing) == 4:
        return Finding("warn", "slurm", "none on this machine", "pcam journal make runs the notebooks without it")
    return Finding(
        "FAIL", "slurm", f"{listed(missing)} not on PATH", "put Slurm's own folder on PATH: module load slurm"
    )


def locks(here: Place) -> Finding:
    """Two jobs in one run folder, and the workers of a study, are kept apart by these."""
    what, folder = "file locks", here.root / "runs"
    remedy = "put the project on a file system with locks, or use one job at a time"
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as first, open(first.name, "rb") as second:
            try:
                os.close(os.open(first.name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return Finding("FAIL", what, f"O_EXCL let two processes create one file in {folder}", remedy)
            except FileExistsError:
                fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return Finding("FAIL", what, f"flock gave one lock to two holders in {folder}", remedy)
            except BlockingIOError:
                return Finding("ok", what, "flock and O_EXCL hold in runs/")
    except OSError as error:
        return Finding("FAIL", what, f"none in {folder}: {error.strerror}", remedy)


def git(here: Place) -> Finding:
    """Provenance names the commit."""
    what, program = "git", _program(here, "git")
    if not program:
        return Finding("warn", what, "not on PATH: runs cannot say which commit made them", "module load git")
    done = subprocess.run(
        [program, "-C", str(here.root), "rev-parse", "--short", "HEAD"],
        check=False,
        capture_output=True,
        text=True,
        env=dict(here.env),
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no commit"])[0].removeprefix("fatal: ")
        return Finding("warn", what, f"{here.root}: {said}", "clone the project, so that runs can name their commit")
    return Finding("ok", what, f"at commit {done.stdout.strip()}")


def threads(here: Place) -> Finding:
    """Threads that torch will start against the cores of this job; too many make every one of them wait."""
    what, text = "threads", here.env.get("OMP_NUM_THREADS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = here.env.get("SLURM_CPUS_PER_TASK", "")
    cores = min(cores, int(given)) if given.isdigit() else cores
    remedy = f"export OMP_NUM_THREADS={cores}"
    if text and not (text.isdigit() and int(text)):
        return Finding("FAIL", what, f"OMP_NUM_THREADS='{text}' is no number", remedy)
    if not text and here.env.get("SLURM_JOB_ID") and not given:
        return Finding("warn", what, "OMP_NUM_THREADS is not set, and the job named no --cpus-per-task", remedy)
    count = int(text or cores)
    if count > cores:
        return Finding("warn", what, f"OMP_NUM_THREADS={count}, but {cores} cores", remedy)
    return Finding("ok", what, f"{count} on {cores} cores")


def shared_memory(here: Place) -> Finding:
    """/dev/shm: processes of a data loader or of a DDP training exchange tensors through it."""
    what = "shared memory"
    if not here.shm.is_dir():
        return Finding("warn", what, f"no {here.shm}", "train with one process and no loader workers")
    free = shutil.disk_usage(here.shm).free
    if free < LEAST_SHM:
        remedy = "remove what dead processes left there, or start the container with --shm-size=1g"
        return Finding("warn", what, f"{free / 2**20:.0f} MiB free in {here.shm}", remedy)
    return Finding("ok", what, f"{free / GIB:.1f} GiB free in {here.shm}")


def _program(here: Place, name: str) -> str | None:
    return shutil.which(name, path=here.env.get("PATH", ""))


def _over_quota(here: Place) -> str:
    """What `quota -q` says: nothing while all is below. A server that does not answer in 1 s says nothing too."""
    program = _program(here, "quota")
    if not program:
        return ""
    try:
        done = subprocess.run(
            [program, "-q"], check=False, capture_output=True, text=True, timeout=1, env=dict(here.env)
        )
    except subprocess.TimeoutExpired:
        return ""
    return " ".join(done.stdout.split())
