"""One network, run in different ways: number formats, memory layouts, compiled, in ONNX Runtime; how fast, how equal.

A way that cannot be tried here (no compiler, no GPU) is a row that says why. A way that answers differently is no gain,
so each row also says how far its probabilities lie from those of eager float32.
"""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pcamlib.errors import PcamError
from pcamlib.experiments import roofline, timing
from pcamlib.experiments.networks import forward
from pcamlib.experiments.throughput import rate
from pcamlib.models import Classifier, onnx

Run = Callable[[], Any]
#: Runtime and precision of each way, the one that others are compared with first; all but `nchw` are channels_last.
WAYS = (
    ("eager", "fp32"), ("eager, nchw", "fp32"), ("eager", "bf16"), ("eager", "fp16"), ("torch.compile", "fp32"),
    ("torch.compile", "bf16"), ("ONNX Runtime", "fp32"), ("ONNX Runtime", "int8"),
)  # fmt: skip
UNMEASURED = "not measured at this scale"


class AbsentError(PcamError):
    """A way to run a network that this machine, or this call, does not offer."""


class Prepared:
    """Builds the ways of one network, and keeps what several of them share.

    Args:
        model: in eval mode; it stays as it is.
        calibration: (N, 3, 96, 96) uint8 patches that show int8 how large activations are.
        compiled: also compile, which takes half a minute a format.
    """

    def __init__(self, model: Classifier, calibration: torch.Tensor, compiled: bool) -> None:
        self.model, self.calibration, self.compiled = model, calibration.cpu().numpy(), compiled
        self.device = next(model.parameters()).device.type
        self._exported: bytes | None = None

    def way(self, runtime: str, precision: str) -> Callable[[torch.Tensor], Any]:
        """(B, 3, 96, 96) uint8 -> (B, 2) logits, as a tensor or an array.

        Raises:
            AbsentError: it cannot be had here.
        """
        if runtime == "ONNX Runtime":
            return self._onnx(precision)
        if runtime == "torch.compile":
            return forward(self._compiled(), precision)
        if runtime == "eager, nchw":
            plain = copy.deepcopy(self.model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            plain.network.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
            return forward(plain, precision)
        return forward(self.model, precision)

    def _compiled(self) -> Any:
        if not self.compiled:
            raise AbsentError(UNMEASURED)
        if self.device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise AbsentError("no C++ compiler here")
        return torch.compile(self.model)

    def _onnx(self, precision: str) -> Callable[[torch.Tensor], Any]:
        if self.device != "cpu":
            raise AbsentError("only ONNX Runtime's CPU build is among the packages")
        self._exported = self._exported or onnx.export(self.model)
        small = precision == "int8"
        chosen = onnx.quantize(self._exported, self.calibration) if small else self._exported
        session = onnx.session(chosen, torch.get_num_threads())
        return lambda images: onnx.logits(session, images.numpy())


def table(
    name: str, model: Classifier, images: torch.Tensor, *, sizes: tuple[int, ...] = (1, 64), rounds: int = 7,
    compiled: bool = False,
) -> tuple[list[dict[str, Any]], dict[int, float]]:  # fmt: skip
    """Every way at some batch sizes, in interleaved rounds.

    Args:
        name: of the model, for the rows.
        model: in eval mode.
        images: (N, 3, 96, 96) uint8 on the model's device, N at least the largest size; also used to calibrate int8.
        sizes: of a batch.
        rounds: of each way at each size.
        compiled: also try torch.compile.

    Returns:
        rows `model`, `batch size`, `runtime`, `precision`, `img/s`, `95 %`, `times eager fp32`, `its 95 %`, `shown`
        (above the floor), `off by` (largest difference of a probability), `ready after s`, `why` (not measured); and
        the A/A floor of each size.
    """
    prepared, ways, absent, ready, answers = Prepared(model, images, compiled), {}, {}, {}, {}
    for key in WAYS:
        begun = time.perf_counter()
        try:
            way = prepared.way(*key)
            way(images[: sizes[0]])  # compiles for this size, and below for any
            answers[key] = _probability(way(images))
            ways[key], ready[key] = way, time.perf_counter() - begun
        except AbsentError as error:
            absent[key] = str(error)
        except torch._dynamo.exc.TorchDynamoException as error:
            absent[key] = f"does not compile: {str(error).splitlines()[0]}"
    off = {key: float(np.abs(answer - answers[WAYS[0]]).max()) for key, answer in answers.items()}
    rows, floors = [], {}
    for size in sizes:
        some = images[:size]
        timed = {
            key: timing.Timed(lambda way=way, some=some: way(some), size, prepared.device)  # type: ignore[misc]
            for key, way in ways.items()
        }
        seconds = timing.alternating(list(timed.values()), rounds)
        floors[size] = timing.floor(seconds)
        column = dict(zip(timed, seconds.T, strict=False))
        for key in WAYS:
            row: dict[str, Any] = {"model": name, "batch size": size, "runtime": key[0], "precision": key[1]}
            if key in absent:
                blank = ("img/s", "95 %", "times eager fp32", "its 95 %", "shown", "off by", "ready after s")
                rows.append({**row, **dict.fromkeys(blank), "why": absent[key]})
                continue
            gain, interval = timing.ratio(column[WAYS[0]], column[key])
            measured = rate(timed[key], column[key])
            row |= {"img/s": measured["img/s"], "95 %": measured["95 %"]}
            if key == WAYS[0]:
                row |= {"times eager fp32": None, "its 95 %": None, "shown": None}
            else:
                shown = timing.shown(gain, interval, floors[size])
                row |= {"times eager fp32": gain, "its 95 %": interval, "shown": shown}
            rows.append({**row, "off by": off[key], "ready after s": ready[key], "why": ""})
    return rows, floors


def _probability(logits: Any) -> np.ndarray:
    """(B,) of tumour, float64."""
    tensor = torch.as_tensor(logits).double().cpu()
    return tensor.softmax(1)[:, 1].numpy()


def check(rows: list[dict[str, Any]], work: int, limits: roofline.Ceilings) -> None:
    """Hold every measured row against the ceilings.

    Raises:
        ImpossibleError: a rate that the device cannot reach, so the measurement is wrong.
    """
    for row in rows:
        if row["img/s"] is not None:
            roofline.check(roofline.Claim(row["img/s"], roofline.PATCH, work, row["precision"]), limits)
