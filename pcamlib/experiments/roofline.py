"""What a device can do at most, measured, and whether a claimed throughput is possible at all.

Images a second times the bytes and the arithmetic of an image are a rate of memory and a rate of arithmetic. No code
beats the rates that the device reaches at its best on a plain copy and a plain matrix product (Williams, Waterman,
Patterson 2009), so a claim that implies more is refused, and so is one whose inputs were no patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pcamlib.data.layout import PATCH_BYTES, PATCH_SHAPE
from pcamlib.errors import PcamError
from pcamlib.experiments import timing

PATCH = (PATCH_SHAPE[2], *PATCH_SHAPE[:2])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
_BLOCKS = {"cache": 1 << 20, "memory": 256 << 20}  # bytes
#: Counted products for one that is done: what Winograd's 3x3 kernels spare at most (Lavin & Gray 2016, F(4x4, 3x3)).
WINOGRAD = 4.0


class ImpossibleError(PcamError):
    """A throughput that the device cannot reach, or that was not reached on patches."""


@dataclass(frozen=True)
class Ceilings:
    """The best rates of a device.

    Attributes:
        device: "cpu" or "cuda".
        threads: of torch.
        moved: bytes a second, read and written bytes both counted, of copying a block in `cache` and in `memory`.
        flops: FLOP/s (a product and a sum are two) of a square matrix product, by precision.
    """

    device: str
    threads: int
    moved: dict[str, float]
    flops: dict[str, float]

    def table(self) -> list[dict[str, Any]]:
        """A row a ceiling: `what`, `best`, `unit`."""
        moved = [{"what": f"copy in {where}", "best": rate / 1e9, "unit": "GB/s"} for where, rate in self.moved.items()]
        return moved + [
            {"what": f"matrix product in {name}", "best": rate / 1e9, "unit": "GFLOP/s"}
            for name, rate in self.flops.items()
        ]


@dataclass(frozen=True)
class Claim:
    """A throughput that somebody states.

    Attributes:
        rate: images a second.
        fed: shape of one input as it was fed, without the batch.
        flops: of one image.
        precision: a key of `Ceilings.flops`.
        moved: bytes of one image that are read at least: its pixels.
    """

    rate: float
    fed: tuple[int, ...]
    flops: int
    precision: str = "fp32"
    moved: int = PATCH_BYTES


def ceilings(device: str = "cpu", rounds: int = 3, side: int | None = None) -> Ceilings:
    """Measure a device's ceilings with as many threads as are set: the best of some rounds, since noise only slows.

    Args:
        device: "cpu" or "cuda".
        rounds: of each.
        side: of the matrices; None: enough to keep every thread, or a whole GPU, busy.
    """
    side = side or (8192 if device == "cuda" else 1024 if torch.get_num_threads() < 4 else 4096)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True  # convolutions may use it by default, so the ceiling must
    try:
        calls = {where: _copy(size, device) for where, size in _BLOCKS.items()}
        calls |= {name: _product(side, dtype, device) for name, dtype in DTYPES.items()}
        timed = {name: timing.Timed(call, device=device) for name, call in calls.items()}
        timing.alternating(list(timed.values()), rounds)  # a busy moment does not hit all samples of one kind
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    moved = {where: 2 * size / min(timed[where].each) for where, size in _BLOCKS.items()}
    flops = {name: 2 * side**3 / min(timed[name].each) for name in DTYPES}
    return Ceilings(device, torch.get_num_threads(), moved, flops)


def _copy(size: int, device: str) -> Callable[[], object]:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(side: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    square = torch.ones((side, side), device=device).to(dtype)
    product = torch._int_mm if dtype == torch.int8 else torch.mm
    return lambda: product(square, square)


def flops(model: torch.nn.Module, images: torch.Tensor) -> int:
    """FLOPs of one image: those of convolutions and matrix products in a forward pass over `images` (B, ...)."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(images)
    return counter.get_total_flops() // len(images)


def implied(claim: Claim, device: Ceilings) -> dict[str, float]:
    """What a throughput means: `GB/s` of pixels, `GFLOP/s`, and their `share of copy` and `share of product`."""
    moved, done = claim.rate * claim.moved, claim.rate * claim.flops
    return {
        "GB/s": moved / 1e9,
        "share of copy": moved / max(device.moved.values()),
        "GFLOP/s": done / 1e9,
        "share of product": done / device.flops[claim.precision],
    }


def check(claim: Claim, device: Ceilings) -> dict[str, float]:
    """`implied` of a claim that can be true.

    Raises:
        ImpossibleError: the inputs were no patches, or the implied rates lie above the device's ceilings.
    """
    said = f"{claim.rate:,.0f} images/s cannot be"
    if tuple(claim.fed) != PATCH:
        raise ImpossibleError(
            f"{said}: each input fed was {_counted(claim.fed)}, while a patch is {_counted(PATCH)}; feed patches"
        )
    found = implied(claim, device)
    if found["share of copy"] > 1:
        raise ImpossibleError(
            f"{said}: their pixels alone are {_short(found['GB/s'])} GB/s, and this device copies "
            f"{_short(max(device.moved.values()) / 1e9)} GB/s at its best; measure again, waiting for the device"
        )
    if found["share of product"] > WINOGRAD:
        raise ImpossibleError(
            f"{said}: {_short(claim.flops / 1e6)} MFLOP an image make {_short(found['GFLOP/s'])} GFLOP/s, and this "
            f"device reaches {_short(device.flops[claim.precision] / 1e9)} GFLOP/s in {claim.precision} at its best; "
            f"measure again, waiting for the device"
        )
    return found


def refusal(claim: Claim, device: Ceilings) -> str:
    """The sentence by which `check` refuses a claim; empty where it does not."""
    try:
        check(claim, device)
    except ImpossibleError as error:
        return str(error)
    return ""


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _counted(shape: Sequence[int]) -> str:
    return f"{math.prod(shape):,} number{'s' * (math.prod(shape) != 1)} of shape {tuple(shape)}"
