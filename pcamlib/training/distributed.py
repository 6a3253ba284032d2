"""The same training by several processes, one a GPU or a share of the cores, as torchrun starts them.

    torchrun --standalone --nproc-per-node=2 -m pcamlib.cli train --recipe cnn --data DIR --out runs/two

Each process holds the whole model and reads its share of every batch, so that together they see the patches that one
process would; loss, gradients and batch statistics are those of the whole batch. Process 0 alone writes the run.

Not DistributedDataParallel: after its first backward pass it sorts the gradients into other buckets, so that with more
than two processes a resumed run adds up in another order than one that never stopped. One message holding every
gradient always adds up in the same order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pcamlib import provenance
from pcamlib.errors import ConfigError, RunError
from pcamlib.seeding import counter_uniform

T = TypeVar("T")
#: How gloo, NCCL and the store say that the other side is gone; there is no class of error for it alone.
_LOST = re.compile(r"connection|socket closed|broken pipe|timed out|timeout|remoteerror|was aborted", re.I)
_SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(minutes=30)  # a first pass over a large file takes one process longer than another


@dataclass(frozen=True)
class World:
    """The processes of this training; alone, every method gives back what it was given."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the run folder and reports."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each process gave, by rank."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with _connected():
                dist.all_gather_object(found, value)
        return found

    def concat(self, values: np.ndarray) -> np.ndarray:
        """Arrays of all processes end to end."""
        return np.concatenate(self.gather(values)) if self.size > 1 else values

    def clock(self, seconds: float, stop: bool = False) -> tuple[float, bool]:
        """Process 0's time and whether it was told to stop, which all follow.

        Who stopped a step before the others would leave them waiting.
        """
        if self.size == 1:
            return seconds, stop
        told = torch.tensor(
            [seconds, stop], dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu"
        )
        with _connected():
            dist.broadcast(told, 0)
        return float(told[0]), bool(told[1])

    def agreed(self, record: dict[str, Any]) -> dict[str, Any]:
        """A provenance record, after a look at those of the others.

        Raises:
            RunError: the processes differ in code, data, torch, CPU capability or threads, so that their weights
                would drift apart.
        """
        for rank, other in enumerate(self.gather(record)):
            for key, here, there in provenance.difference(record, other):
                if key.startswith((*provenance.PROMISE, "config")):
                    raise RunError(
                        f"processes {self.rank} and {rank} of {self.size} differ in {key}: {here} and {there}; "
                        f"all must see the same code and data on machines of one kind"
                    )
        return record

    def add_up(self, loss: torch.Tensor, weights: Iterable[nn.Parameter]) -> torch.Tensor:
        """The loss summed over processes; so are the gradients of `weights`, in place."""
        if self.size == 1:
            return loss
        parts = [loss.detach().reshape(1), *(p.grad for p in weights if p.grad is not None)]
        flat = torch.cat([part.reshape(-1) for part in parts])
        with _connected():
            dist.all_reduce(flat)
        for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view(part.shape))
        return parts[0][0]

    def statistics(self) -> AbstractContextManager[Any]:
        """Within, batch normalisation is over all processes."""
        return GlobalStatistics() if self.size > 1 else nullcontext()

    def draw_apart(self, seed: int, step: int) -> None:
        """Key torch's generator by (seed, step, rank): dropout differs between processes, and a restart needs no state.

        One process keeps its running generator, so dropout is the one thing that two processes draw otherwise.
        """
        if self.size > 1:
            key = int(counter_uniform(seed, step, np.array([self.rank]), 1)[0, 0] * 2**53)
            (torch.cuda if torch.cuda.is_initialized() else torch.default_generator).manual_seed(key)


def world() -> World:
    """The processes that were joined; one alone where there are no others."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()


@contextmanager
def join(device: str) -> Iterator[World]:
    """Within, the processes that torchrun started are one training; nothing happens where it started none.

    Args:
        device: "cpu" (gloo), or "cuda" (nccl), where each process takes the GPU of its LOCAL_RANK.

    Raises:
        ConfigError: WORLD_SIZE is set, but not by torchrun; more processes than GPUs.
        RunError: the processes did not meet, or another one ended before its time.
    """
    if provenance.world_size() == 1 or dist.is_initialized():
        yield world()
        return
    if missing := [name for name in _SET_BY_TORCHRUN if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: start the processes with "
            f"torchrun, or unset WORLD_SIZE to train in one"
        )
    if device == "cuda":
        place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= count:
            raise ConfigError(f"{place + 1} or more processes on this machine, but {count} GPUs: one process each")
        torch.cuda.set_device(place)
    try:
        _meet("nccl" if device == "cuda" else "gloo")
        yield world()
    except BaseException:
        speaks()  # before the connections close: whoever notices that has no more to say
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str) -> None:
    try:
        dist.init_process_group(backend, timeout=_PATIENCE)
    except RuntimeError as error:
        raise RunError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {' '.join(str(error).split())}; start all of "
            f"them again with torchrun"
        ) from error


def speaks() -> bool:
    """Whether this process is the one to report an error: the first of its world that asks, and that one always."""
    if provenance.world_size() == 1 or any(name not in os.environ for name in _SET_BY_TORCHRUN):
        return True
    place, me = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), os.environ["RANK"]
    try:
        store = dist.TCPStore(*place, is_master=False, timeout=timedelta(seconds=5))
        key = "pcam/speaks/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return store.compare_set(key, "", me).decode() == me
    except RuntimeError:  # without torchrun's own store it ends with process 0
        return True


@contextmanager
def _connected() -> Iterator[None]:
    """Within, a connection that breaks is told as a lost process; every other error stays what it is."""
    try:
        yield
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            raise
        raise RunError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} lost another one, which was killed or ran out "
            f"of memory; `pcam resume` under torchrun goes on from the last checkpoint"
        ) from error


class GlobalStatistics(TorchFunctionMode):
    """Within, batch normalisation in training mode, by whatever module, uses the statistics of the global batch.

    torch's SyncBatchNorm knows GPUs and `nn.BatchNorm` only.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.batch_norm and kwargs["training"]:
            return _batch_norm(*args, **{name: value for name, value in kwargs.items() if name != "training"})
        return function(*args, **kwargs)


def _batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    mean, var, count = _global_moments(x)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
    weight = torch.ones_like(mean) if weight is None else weight
    bias = torch.zeros_like(mean) if bias is None else bias
    return _Normalise.apply(x, weight, bias, mean, var, count, eps)


def _global_moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean, biased variance and number of values of each channel over all processes (Chan et al. 1979)."""
    unused = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))  # bf16 in, float32 out
    mean, var = torch.batch_norm_update_stats(x.detach(), unused, unused.clone(), 0.0)
    mine = torch.cat([mean, var, mean.new_tensor([x.numel() / len(mean)])])
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    with _connected():
        dist.all_gather(each, mine)
    means, variances, counts = torch.stack(each).split([len(mean), len(mean), 1], 1)
    weights = counts / counts.sum()
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean) ** 2)).sum(0), float(counts.sum())


class _Normalise(Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, differentiated through the global mean and variance too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        count: float,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps = count, eps
        return functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """dx = weight / sd * (dy - mean(dy) - x' mean(dy x')), x' the normalised x, means over the global batch."""
        x, weight, mean, var = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        means = torch.cat([dweight, dbias]) / ctx.count
        with _connected():
            dist.all_reduce(means)
        slope, level = (weight * (var + ctx.eps).rsqrt() * part for part in means.chunk(2))
        dx -= functional.batch_norm(x, mean, var, slope, level, False, 0.0, ctx.eps)
        return dx, dweight, dbias, None, None, None, None
