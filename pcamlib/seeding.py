"""Where chance comes from: one seed, counter-based draws, and the switches that make torch repeat itself.

The promise is bitwise equality for a fixed (code, data, torch build, CPU capability, thread count, world size);
`provenance.capture` records all six. What is drawn for a patch depends on (seed, epoch, patch index) alone, so
neither the number of workers nor a restart can change it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), and ask for deterministic kernels."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # seeds every CUDA device too
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with a fixed workspace
    torch.backends.cudnn.benchmark = False  # the autotuner may pick another kernel in each process
    torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms(True), less its 1.8 s of imports
    # a debugging aid that writes every new tensor twice; a property, unknown to torch's stubs
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def cores() -> int:
    """Cores that this process may use; macOS knows only how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(threads: int | None) -> int:
    """Fix torch's intra-op threads (None: $OMP_NUM_THREADS, else the cores this process may use); returns the count.

    Sums split over another number of threads round differently: 1 and 2 threads give different weights.
    """
    count = threads or int(os.environ.get("OMP_NUM_THREADS") or cores())
    torch.set_num_threads(count)
    return count


@contextmanager
def one_thread() -> Iterator[None]:
    """One torch thread within, for what is small or shared out by `workers`.

    Beside a busy neighbour two threads that wait for each other were up to 40 times slower than one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """$OMP_NUM_THREADS threads, or one a core, eight at most, each with one torch thread, for independent work.

    What each computes does not depend on how many there are.
    """
    count = min(int(os.environ.get("OMP_NUM_THREADS") or cores()), 8)
    with one_thread(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of uint64 that avalanches every bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def counter_uniform(seed: int, epoch: int, index: np.ndarray, draws: int) -> np.ndarray:
    """Uniform numbers keyed by (seed, epoch, patch index, draw number), without any state.

    Args:
        seed: run seed.
        epoch: epoch number from 0.
        index: (B,) patch indices.
        draws: numbers wanted per patch.

    Returns:
        (B, draws) float64 in [0, 1).
    """
    with np.errstate(over="ignore"):  # uint64 arithmetic modulo 2**64 is the point
        key = _mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
        key = _mix(key + _GOLDEN * np.uint64(epoch + 1))
        rows = _mix(key + _GOLDEN * (np.asarray(index).astype(np.uint64) + np.uint64(1)))
        cells = _mix(rows[:, None] + _GOLDEN * np.arange(1, draws + 1, dtype=np.uint64))
    return (cells >> np.uint64(11)).astype(np.float64) * 2.0**-53


def rng_state() -> dict[str, torch.Tensor]:
    """torch's generator states as uint8 tensors, to store in a checkpoint (dropout draws from them)."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Put back what `rng_state` took."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
