"""What a result rests on: code, packages, machine, job; and which of it differs between two results.

Bitwise equality is promised for a fixed `PROMISE`; where two runs differ in one of these, that is the reason, and
`difference` names it before anybody says "floating point".
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pcamlib.files import sha256_file
from pcamlib.seeding import cores
from pcamlib.sources import ROOT, package_digest

#: Dotted keys of a provenance record that together fix the result, in the order in which a difference is reported.
PROMISE = ("code.digest", "data", "torch", "machine.capability", "machine.threads", "machine.world_size")

PACKAGES = ("torch", "numpy", "h5py", "safetensors", "pandas", "scikit-learn", "matplotlib", "papermill", "pydantic")


def now() -> str:
    """UTC time to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """Output of a git command in `root`, or None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def git_state(root: Path = ROOT) -> dict[str, Any]:
    """`commit`, and `dirty`: SHA-256 of the uncommitted changes to tracked files (None when clean or without git)."""
    changes = git("diff", "HEAD", "--", ".", ":!JOURNAL*.md", ":!assets", ":!journal/evidence", root=root)
    return {
        "commit": git("rev-parse", "HEAD", root=root),
        "dirty": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def has_amx() -> bool:
    """Whether the CPU multiplies bf16 tiles in hardware (AMX); without it bf16 is slower than float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def capability() -> str:
    """Instruction sets that kernels choose by: torch's own, AMX, and the variables that override them."""
    overrides = [
        f"{k}={os.environ[k]}" for k in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR") if k in os.environ
    ]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *(["AMX"] if has_amx() else []), *overrides])


def world_size() -> int:
    """Processes of this training, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def machine(device: str = "cpu") -> dict[str, Any]:
    """Host, processor, capability, threads, world size and device, as this process sees them."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name()
    return {
        "host": socket.gethostname(),
        "device": device,
        "device_name": name,
        "cores": cores(),
        "capability": capability(),
        "threads": torch.get_num_threads(),
        "world_size": world_size(),
    }


def slurm() -> dict[str, str]:
    """Slurm's identifiers of this job; empty outside a job."""
    names = ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_PARTITION", "SLURMD_NODENAME", "SLURM_RESTART_COUNT")
    return {name.removeprefix("SLURM_").lower(): os.environ[name] for name in names if name in os.environ}


def capture(device: str = "cpu", **more: Any) -> dict[str, Any]:
    """The provenance record of this process: JSON-able; `more` adds what the caller knows (data, config digest).

    Returns:
        dict with `code` (commit, dirty, digest), `lock` (digest of requirements.lock, None where there is none),
        `python`, `torch` (build), `packages`, `machine`, `slurm`, `command`, `started`, and `more`.
    """
    lock = ROOT / "requirements.lock"
    installed = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "code": {**git_state(), "digest": package_digest()},
        "lock": sha256_file(lock) if lock.is_file() else None,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} cuda {torch.version.cuda}" if torch.version.cuda else torch.__version__,
        "packages": installed,
        "machine": machine(device),
        "slurm": slurm(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": now(),
        **more,
    }


def flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of a nested dict, in order."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference(a: dict[str, Any], b: dict[str, Any], ignore: tuple[str, ...] = ()) -> list[tuple[str, Any, Any]]:
    """Every dotted key whose value differs, promised keys first; a missing key reads as None.

    Args:
        a: a nested record.
        b: the other one.
        ignore: prefixes of keys that may differ without meaning (`started`, `machine.host`).
    """
    left, right = dict(flatten(a)), dict(flatten(b))
    keys = [k for k in {**left, **right} if left.get(k) != right.get(k) and not k.startswith(ignore or ("\0",))]
    rank = {key: place for place, key in enumerate(PROMISE)}
    keys.sort(key=lambda k: min((rank[p] for p in rank if k == p or k.startswith(p + ".")), default=len(rank)))
    return [(k, left.get(k), right.get(k)) for k in keys]
