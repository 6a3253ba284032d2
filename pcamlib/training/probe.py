"""What a training will take, from half a minute of it: time with an interval, memory, and whether a job has room.

    pcam probe --recipe cnn --data DIR            # the options of `pcam train`
    pcam probe --job --recipe cnn --data DIR      # inside a Slurm job: refuses what does not fit its limits

The training's own steps, evaluation, checkpoint and report are timed, each as often as `seconds` allow; nothing is
kept. Under torchrun the processes probe together, as they would train.
"""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pcamlib import provenance
from pcamlib.config import Config
from pcamlib.data.loader import Batch, Loader
from pcamlib.errors import RunError
from pcamlib.jobs.scale import seconds as slurm_seconds
from pcamlib.training import distributed, metrics
from pcamlib.training.evaluate import predict
from pcamlib.training.state import Training, choose_device

NOTICE = 150.0  # seconds before its end when a job may be told to leave: --signal=B:USR1@120, and Slurm looks every 30
WARM = 3  # steps that are counted with the start: kernels are chosen and memory is grown
BLOCKS = 10  # of steps, between whose mean times the interval is taken


@dataclass(frozen=True)
class Forecast:
    """A run's needs.

    Attributes:
        seconds, low, high: of the whole run, start and final report included; the interval is that of 10 to 90 % of
            blocks of steps.
        start: seconds before the first step, and what the first ones take longer.
        turn: seconds of one step with an evaluation and a checkpoint: the least that is done in one go.
        memory: bytes of host memory on one node, at most; mapped files are not counted, they can be given back.
        device_memory: bytes on a GPU; 0 without.
        place: where this was measured.
    """

    seconds: float
    low: float
    high: float
    start: float
    turn: float
    memory: int
    device_memory: int
    place: str

    def text(self) -> str:
        """For people: `about 12 min (11 to 14) and 2.1 GiB on 16 threads of NAME`."""
        unit, name = next((u, n) for u, n in ((3600, "h"), (60, "min"), (1, "s")) if self.high >= 2 * u or u == 1)
        about, low, high = (f"{value / unit:.2g}" if value < 10 * unit else f"{value / unit:.0f}"
                            for value in (self.seconds, self.low, self.high))  # fmt: skip
        gpu = f", {self.device_memory / 2**30:.2g} GiB of the GPU" if self.device_memory else ""
        return f"about {about} {name} ({low} to {high}) and {self.memory / 2**30:.2g} GiB{gpu} on {self.place}"

    def allocations(self, time_s: float) -> int:
        """Jobs of `time_s` seconds that the run takes, each of which starts and leaves in time to save itself."""
        return math.ceil(self.seconds / max(time_s - self.start - NOTICE, 1e-9)) if self.seconds > time_s else 1

    def refuse(self, time_s: float | None, memory_bytes: int | None, *, requeues: bool = True) -> None:
        """Raise RunError where a job of this size cannot do it: by how much, and which option to change.

        Args:
            time_s: seconds that the job has; None: no limit.
            memory_bytes: bytes of each node; None: no limit.
            requeues: the job saves itself and goes on in another one, so that a step with its evaluation must fit, not
                the whole run.
        """
        if memory_bytes is not None and self.memory > memory_bytes:
            raise RunError(
                f"needs {self.memory / 2**30:.1f} GiB of memory, the job has {memory_bytes / 2**30:.1f}: ask for "
                f"--mem={math.ceil(1.25 * self.memory / 2**30)}G or more, or set a smaller loader.batch_size"
            )
        if requeues:
            _enough(self.start + self.turn, time_s)
        elif time_s is not None and self.low > time_s:
            raise RunError(
                f"takes {self.low:.0f} s at least, the job has {time_s:.0f}: ask for --time={_clock(self.high)} or "
                f"more, or train less (train.steps, train.epochs, --time-limit)"
            )


def _enough(seconds: float, time_s: float | None) -> None:
    """Raise RunError where a job's time is over before anything can be saved."""
    if time_s is not None and seconds + NOTICE > time_s:
        raise RunError(
            f"to start, make one step, evaluate and save takes {seconds:.0f} s, and {NOTICE:.0f} s before its end a "
            f"job is told to leave; this one has {time_s:.0f}: ask for --time={_clock(seconds + NOTICE)} or more"
        )


def _clock(seconds: float) -> str:
    """HH:MM:SS in whole minutes, a quarter longer than `seconds`."""
    minutes = math.ceil(1.25 * seconds / 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:00"


def probe(config: Config, data: str | Path, seconds: float = 30.0) -> Forecast:
    """Train, evaluate and save for about `seconds` and tell what the whole run will take; leaves nothing behind.

    Raises:
        PcamError: as `loop.train` at its start.
    """
    with distributed.join(choose_device(config.train.device)) as world, tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        state = Training(config, data)
        state.record()  # a first pass over new data is part of the start
        start = time.monotonic() - began
        steps = _steps(state, 0.6 * seconds)
        warm, steps = np.split(steps, [min(WARM, len(steps) - 1)])
        evaluation = _evaluation(state, 0.3 * seconds)
        saving = _timed(lambda: state.save(Path(folder) / "last.safetensors"))
        labels = state.valid.labels
        assert labels is not None
        report = _timed(lambda: metrics.report(labels, np.linspace(0, 1, len(labels))))
        peak = torch.cuda.max_memory_reserved() if state.device == "cuda" else 0
        memory = sum(world.gather(_resident())) // max(1, world.size // _local())
        middle, low, high = world.gather(_spread(steps))[0]
        start += max(0.0, float(warm.sum()) - len(warm) * middle)

    settings = config.train
    every = settings.evaluate_every or len(state.loader)
    turn = high + evaluation + 2 * saving  # the last checkpoint, and the best one

    def whole(step: float) -> float:
        count = state.total or math.inf
        each = step + evaluation / every + saving / every + saving / (settings.checkpoint_every or every)
        ends = evaluation * (bool(count % every) if math.isfinite(count) else 1)
        return start + min(count * each + ends, (settings.time_limit or math.inf) + turn) + evaluation + report

    threads = f"{torch.get_num_threads()} threads of {provenance.machine(state.device)['device_name']}"
    many = f"{world.size} times " if world.size > 1 else ""
    return Forecast(whole(middle), whole(low), whole(high), start, turn, memory, peak, many + threads)


def tell(
    config: Config, data: str | Path, seconds: float, time_s: float | None, memory_bytes: int | None,
    report: Callable[[str], None] = print,
) -> Forecast:  # fmt: skip
    """`probe`, and say what was found and in how many jobs of `time_s` seconds; process 0 says it for all.

    Raises:
        RunError: a job of this size cannot do it.
    """
    _enough(0.0, time_s)  # it would be told to leave in the middle of the probe
    found = probe(config, data, seconds)
    if os.environ.get("RANK", "0") == "0":
        count = found.allocations(time_s) if time_s else 1
        more = f", in {count} jobs of the {time_s / 60:.0f} min that this one has" if time_s and count > 1 else ""
        report(f"forecast: {found.text()}{more}")
    found.refuse(time_s, memory_bytes)
    return found


def _steps(state: Training, seconds: float) -> np.ndarray:
    """Seconds of each step, its batch included; all processes stop with process 0."""
    ends = [time.monotonic()]
    for batch in _endless(state.loader):
        state.step(batch, min(state.progress.step / 1000, 1.0))
        state.progress.step += 1
        ends.append(time.monotonic())
        enough = len(ends) > WARM + 1 and ends[-1] - ends[0] > seconds
        if state.world.clock(0.0, enough or state.progress.step >= (state.total or math.inf))[1]:
            break
    return np.diff(ends)


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _evaluation(state: Training, seconds: float) -> float:
    """Seconds of an evaluation by all processes, from as many batches as there is time for."""
    count, size, part = len(state.valid), 250, 250

    def some() -> None:
        rows = np.arange(min(part, count))
        loader = Loader(
            state.valid, rows, batch_size=size, sampler="sequential", view=state.judged.view, device=state.device
        )
        predict(state.judged, loader, precision=state.precision, device=state.device)

    while True:
        took = _timed(some)
        if part >= count or 3 * took > seconds:
            return took * count / min(part, count) / state.world.size
        part *= 2


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _spread(times: np.ndarray) -> tuple[float, float, float]:
    """Median, 10 and 90 % of the mean seconds of a step over consecutive blocks: single steps jitter, blocks drift."""
    means = [block.mean() for block in np.array_split(times, min(BLOCKS, len(times)))]
    low, middle, high = np.percentile(means, [10, 50, 90])
    return float(middle), float(low), float(high)


def _local() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _resident() -> int:
    """Bytes of this process that no file backs; where the system does not tell them apart, the most it ever had."""
    try:
        found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
    return 1024 * sum(map(int, found))


def allocation() -> tuple[float | None, int | None]:
    """Seconds that this Slurm job has left and bytes of memory that it has on each node; None: no limit, or no job."""
    memory = os.environ.get("SLURM_MEM_PER_NODE")
    if memory is None and "SLURM_MEM_PER_CPU" in os.environ:
        memory = str(int(os.environ["SLURM_MEM_PER_CPU"]) * int(os.environ.get("SLURM_CPUS_ON_NODE", "1")))
    left = ""
    if "SLURM_JOB_ID" in os.environ and shutil.which("squeue"):
        call = ["squeue", "-h", "-j", os.environ["SLURM_JOB_ID"], "-o", "%L"]
        left = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False).stdout.strip()
    return span(left), int(memory) * 2**20 if memory and int(memory) else None


def span(text: str) -> float | None:
    """Seconds of Slurm's `[D-][[HH:]MM:]SS`; None for UNLIMITED, INVALID and nothing."""
    if not re.fullmatch(r"(\d+-)?(\d+:){0,2}\d+", text):
        return None
    return float(slurm_seconds(text))
