"""Memory that a batch takes, measured in a process of its own, which may die of it: that too is a result.

    python -m pcamlib.experiments.memory '{"model": "small", "sizes": [1, 512], "limit": null, ...}'

prints a line of JSON a batch size; `measure` starts it and reads them. On a CPU the rise of the resident peak is
counted, from before the first batch; sizes rise, so memory that the process keeps is used again and not counted twice.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pcamlib.errors import PcamError
from pcamlib.experiments import networks
from pcamlib.models import build

OUT = "out of memory"
STATUS = Path("/proc/self/status")


def exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or (a bare RuntimeError) on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(
        re.search(r"can't allocate memory|not enough memory|bad_alloc|could not create a memory", str(error))
    )


def measure(
    model: str, sizes: Sequence[int], *, precision: str = "fp32", device: str = "cpu", limit: int | None = None
) -> list[dict[str, Any]]:
    """Peak memory of a forward pass at each batch size, up to the first that does not fit.

    Args:
        model: a name of `networks.MODELS`.
        sizes: rising.
        precision: fp32, bf16 or fp16.
        device: "cpu" or "cuda".
        limit: MiB that batches may take beyond the loaded model; None: what the machine has.

    Returns:
        rows `model`, `batch size`, `MiB` (None where it ran out) and `result`.

    Raises:
        PcamError: the process ended for another reason.
    """
    asked = {"model": model, "sizes": list(sizes), "precision": precision, "device": device, "limit": limit}
    asked["threads"] = torch.get_num_threads()
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode == -9 and len(rows) < len(sizes):  # the kernel or Slurm killed it: no exception comes before
        rows.append({"model": model, "batch size": sizes[len(rows)], "MiB": None, "result": f"{OUT}: killed"})
    elif done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise PcamError(f"memory of model '{model}' could not be measured: {last}")
    return rows


def _peak(device: str) -> float:
    """MiB: peak of the GPU's allocator, or of this process's resident memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if not STATUS.exists():  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return _status("VmHWM")  # of this program: Linux hands ru_maxrss on from the one that started it


def _status(field: str) -> float:
    """MiB of one line of /proc/self/status."""
    lines = STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def _limit(device: str, mebibytes: int) -> None:
    """From here on, allocations beyond this much more fail."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (mebibytes << 20) / total))
        return
    if STATUS.exists():  # macOS knows no such limit
        most = int(_status("VmSize") + mebibytes) << 20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _pixels(size: int, device: str) -> torch.Tensor:
    return torch.full((size, 96, 96, 3), 128, dtype=torch.uint8, device=device).permute(0, 3, 1, 2)


def _child(asked: dict[str, Any]) -> None:
    torch.set_num_threads(asked["threads"])
    device = asked["device"]
    model = build(networks.settings(asked["model"]).model, {"mean": [128.0] * 3, "std": [64.0] * 3}).to(device).eval()
    run, before = networks.forward(model, asked["precision"]), _peak(device)
    run(_pixels(1, device))  # starts torch's threads: their stacks are no batch's memory
    if asked["limit"] is not None:
        _limit(device, asked["limit"])
    for size in asked["sizes"]:
        row: dict[str, Any] = {"model": asked["model"], "batch size": size}
        try:
            run(_pixels(size, device))
        except RuntimeError as error:
            if not exhausted(error):
                raise
            more = f" of {asked['limit']:,} MiB" if asked["limit"] is not None else ""
            print(json.dumps({**row, "MiB": None, "result": OUT + more}), flush=True)
            return
        print(json.dumps({**row, "MiB": round(_peak(device) - before, 1), "result": "fits"}), flush=True)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
