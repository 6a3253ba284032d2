"""Checkpoints: one safetensors file each, written whole or not at all, with a digest over every byte that matters.

`last.safetensors` holds weights, optimiser and generators and resumes a run bitwise; `best.safetensors` holds the
weights that won on validation, with the configuration in its header, and suffices for inference.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn

from pcamlib.errors import CheckpointError, nearest
from pcamlib.files import atomic_path


def tensor_digest(tensors: dict[str, torch.Tensor], meta: str = "") -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names, and a text."""
    total = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return total.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: equal digests mean bitwise equal weights."""
    return tensor_digest(dict(model.state_dict()))


def save(path: str | Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    """Write tensors and JSON-able metadata atomically."""
    text = json.dumps(meta, sort_keys=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as part:
        # not save_file, which reports a full disk as a SafetensorError
        part.write_bytes(serialize(plain, metadata={"meta": text, "digest": tensor_digest(plain, text)}))


def load(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and metadata of a checkpoint.

    Raises:
        CheckpointError: missing, empty, truncated, a changed byte, or another format (pickles are never read).
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: empty file; the writer never finished, use another checkpoint")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: no whole safetensors file ({error}); pickled .pt files are not read") from None
    if set(header) != {"meta", "digest"}:
        raise CheckpointError(f"{path}: not written by pcamlib (no digest in its header)")
    if tensor_digest(tensors, header["meta"]) != header["digest"]:
        raise CheckpointError(f"{path}: damaged: its bytes do not match the digest in its header; copy it again")
    return tensors, json.loads(header["meta"])


def split(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors under `prefix.`, without it."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def join(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with `prefix.` put before each name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy weights into a model of the same architecture.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected, or of another shape.
    """
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in weights:
            raise CheckpointError(f"{path}: a checkpoint of another model: it has no '{name}'{nearest(name, weights)}")
        if name not in own:
            raise CheckpointError(f"{path}: a checkpoint of another model: '{name}' has no place here")
        if own[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, expected {tuple(own[name].shape)}"
            raise CheckpointError(f"{path}: a checkpoint of another model: '{name}' is {shapes}")
    model.load_state_dict(weights)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of an optimiser as flat tensors, `PARAMETER_NUMBER.NAME`."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Put back `optimizer_tensors`, in each parameter's own memory layout.

    The fused kernels walk raw memory: state in another layout than its channels_last parameter would be paired with
    the wrong weights.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        same = value.shape == parameter.shape
        state.setdefault(int(number), {})[name] = torch.empty_like(parameter).copy_(value) if same else value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
