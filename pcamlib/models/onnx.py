"""A model as ONNX: exported with any number of patches a batch, halved or quantised to int8, run by ONNX Runtime.

    exported = onnx.export(model)
    half, small = onnx.half(exported), onnx.quantize(exported, images)      # images: (N, 3, 96, 96) uint8
    labelled = onnx.inscribe(small, {"threshold": 0.3})                     # read back by `onnx.inscription`
    onnx.logits(onnx.session(small, threads=2), images)

Crop, pooling and normalisation are part of the graph: raw uint8 patches go in, two logits come out.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pcamlib.errors import PcamError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession  # type: ignore[import-untyped]

    from pcamlib.models import Classifier

INPUT, OUTPUT = "images", "logits"
_CALIBRATION = 64  # patches a batch while calibrating


class OnnxError(PcamError):
    """A model that is no ONNX model of patches, or cannot become one."""


def export(model: Classifier) -> bytes:
    """The model in eval mode as one ONNX file: `images` (batch, 3, 96, 96) uint8 -> `logits` (batch, 2) float32.

    The model itself stays as it was; it must lie on the CPU.
    """
    was_training = model.training
    example = torch.zeros((2, 3, 96, 96), dtype=torch.uint8)  # two: a batch of one would be taken for a constant
    batch = torch.export.Dim("batch")
    try:
        with _quiet():
            program = torch.onnx.export(
                model.eval(), (example,), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False,
                dynamic_shapes=({0: batch},),
            )  # fmt: skip
    finally:
        model.train(was_training)
    assert program is not None  # without a file to write it is returned
    return program.model_proto.SerializeToString()


def quantize(model: bytes, images: np.ndarray) -> bytes:
    """An int8 model: weights by channel, activations in the range that they have on some patches.

    Args:
        model: of `export`.
        images: (N, 3, 96, 96) uint8, patches of the train split.

    Raises:
        OnnxError: no patches to calibrate on, or `model` is no ONNX model.
    """
    from onnxruntime.quantization import (  # type: ignore[import-untyped]
        CalibrationDataReader,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]

    if len(images) == 0:
        raise OnnxError("int8 needs patches that show how large activations are; give some of the train split")
    batches = (images[start : start + _CALIBRATION] for start in range(0, len(images), _CALIBRATION))

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(({INPUT: batch} for batch in batches), None)

    session(model)  # a damaged model is told in one line here
    with tempfile.TemporaryDirectory() as folder, _quiet():
        plain, folded, small = (Path(folder) / f"{name}.onnx" for name in ("plain", "folded", "small"))
        plain.write_bytes(model)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)  # folds each normalisation into its convolution
        quantize_static(
            folded, small, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
        )
        return small.read_bytes()


def half(model: bytes) -> bytes:
    """A model that holds weights and computes in float16; patches stay uint8, logits float32.

    Raises:
        OnnxError: `model` is no ONNX model.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16  # type: ignore[import-untyped]

    session(model)
    with _quiet():
        made: bytes = convert_float_to_float16(onnx.load_from_string(model), keep_io_types=True).SerializeToString()
    return made


def inscribe(model: bytes, about: dict[str, Any]) -> bytes:
    """The model with facts in its `metadata_props`, each value as JSON."""
    import onnx

    told = onnx.load_from_string(model)
    onnx.helper.set_model_props(told, {name: json.dumps(value, sort_keys=True) for name, value in about.items()})
    return told.SerializeToString()


def inscription(model: InferenceSession) -> dict[str, Any]:
    """What `inscribe` wrote into a model."""
    return {name: json.loads(value) for name, value in model.get_modelmeta().custom_metadata_map.items()}


def session(model: bytes, threads: int = 1) -> InferenceSession:
    """ONNX Runtime's session of a model on the CPU.

    Args:
        model: of `export` or `quantize`.
        threads: within an operator.

    Raises:
        OnnxError: the bytes are no ONNX model.
    """
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import (  # type: ignore[import-untyped]
        Fail,
        InvalidGraph,
        InvalidProtobuf,
    )

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads leave the core alone
    options.enable_mem_pattern = False  # one for each size of batch: 12 MiB, and 5 % slower where sizes vary
    options.log_severity_level = 3  # errors
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, InvalidProtobuf) as error:
        reason = " ".join(str(error).split())
        raise OnnxError(f"not a whole ONNX model ({reason}); export it again") from None


def logits(model: InferenceSession, images: np.ndarray) -> np.ndarray:
    """(B, 2) float32 for (B, 3, 96, 96) uint8 patches, in any memory order."""
    found: Any = model.run([OUTPUT], {INPUT: np.ascontiguousarray(images)})[0]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not there, and the quantiser's advice."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
