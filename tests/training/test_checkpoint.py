"""Checkpoints: what goes in comes out, and nothing damaged, foreign or pickled is taken for one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pcamlib import files
from pcamlib.config import Model
from pcamlib.errors import CheckpointError, PcamError
from pcamlib.models import build
from pcamlib.training import checkpoint

STATISTICS = {"mean": [120.0, 130.0, 140.0], "std": [20.0, 30.0, 40.0]}
META = {"progress": {"step": 3, "best": None}, "split": "train", "rate": 0.1 + 0.2, "text": "größer ≥ 0"}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "float": torch.randn(2, 3),
        "bf16": torch.randn(5).bfloat16(),
        "half": torch.randn(3).half(),
        "double": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.float64),
        "int": torch.arange(4),
        "uint8": torch.get_rng_state()[:32],
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7.0),
        "nothing": torch.empty(0, 3),
        "channels_last": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
        "slice": torch.randn(4, 4)[:, 1],
    }


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return build(Model(name="cnn", crop=32, width=width), STATISTICS)


def test_round_trip(tmp_path: Path) -> None:
    before = tensors()
    checkpoint.save(tmp_path / "new folder" / "a.safetensors", before, META)
    after, meta = checkpoint.load(tmp_path / "new folder" / "a.safetensors")
    assert meta == META
    assert list(after) == sorted(before) or set(after) == set(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        raw = [t.contiguous().view(-1).view(torch.uint8) for t in (after[name], tensor)]
        assert raw[0].equal(raw[1]), f"{name}: bits, NaN among them"


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", tensors(), META)
    checkpoint.save(tmp_path / "b", dict(reversed(tensors().items())), dict(reversed(META.items())))
    digests = [checkpoint.tensor_digest(checkpoint.load(tmp_path / name)[0]) for name in "ab"]
    assert digests[0] == digests[1]


def test_the_digest_sees_names_types_shapes_bits_and_text() -> None:
    base = {"a": torch.zeros(4), "b": torch.ones(2)}
    others: list[tuple[dict[str, torch.Tensor], str]] = [
        (base, "text"),
        ({"a": torch.zeros(4), "c": torch.ones(2)}, ""),
        ({"a": torch.zeros(2, 2), "b": torch.ones(2)}, ""),
        ({"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)}, ""),
        ({"a": -torch.zeros(4), "b": torch.ones(2)}, ""),
        ({"a": torch.zeros(4)}, ""),
    ]
    digests = {checkpoint.tensor_digest(base), *(checkpoint.tensor_digest(*other) for other in others)}
    assert len(digests) == len(others) + 1


def test_the_digest_does_not_see_the_memory_layout() -> None:
    model = network()
    assert checkpoint.weights_digest(model) == checkpoint.weights_digest(
        model.to(memory_format=torch.contiguous_format)
    )


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    """Header and body, each byte of a small file: all bits, and each bit alone every seventh byte."""
    path = tmp_path / "small.safetensors"
    checkpoint.save(path, {"weight": torch.arange(6.0), "bias": torch.ones(2, dtype=torch.bfloat16)}, {"step": 3})
    whole = path.read_bytes()
    assert len(whole) < 500
    survived = []
    for offset in range(len(whole)):
        for mask in (0xFF, *(1 << bit for bit in range(8) if offset % 7 == 0)):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ mask]) + whole[offset + 1 :])
            try:
                checkpoint.load(path)
                survived.append((offset, mask))
            except CheckpointError as error:
                assert str(path) in str(error) and "\n" not in str(error)
    assert survived == []


def test_a_flipped_byte_in_a_real_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "cnn.safetensors"
    checkpoint.save(path, checkpoint.join("model", network().state_dict()), META)
    whole = path.read_bytes()
    for offset in range(5, len(whole), len(whole) // 200):
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        with pytest.raises(CheckpointError):
            checkpoint.load(path)


def test_truncated_anywhere_or_with_a_tail(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    checkpoint.save(path, tensors(), META)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 23), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="empty file" if size == 0 else "no whole safetensors"):
            checkpoint.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError):
        checkpoint.load(path)


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.path,)


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for name in ("model.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=r"pickled \.pt files are not read"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert (tmp_path / "sprung").exists(), "the trap works"


def test_missing_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not written by pcamlib"):
        checkpoint.load(tmp_path / "plain.safetensors")


def test_a_checkpoint_of_another_model_names_the_tensor(tmp_path: Path) -> None:
    path, model = tmp_path / "a", network(4)
    wider = network(8).state_dict()
    with pytest.raises(CheckpointError, match=r"'network.stem.weight' is \(8, 3, 4, 4\), expected \(4, 3, 4, 4\)"):
        checkpoint.load_weights(model, wider, path)
    renamed = {name.replace("head", "heat"): tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"no 'network.head.weight'; did you mean 'network.heat.weight'"):
        checkpoint.load_weights(model, renamed, path)
    with pytest.raises(CheckpointError, match="'extra' has no place here"):
        checkpoint.load_weights(model, {**model.state_dict(), "extra": torch.ones(1)}, path)
    mlp = build(Model(name="mlp", crop=32, hidden_units=[4]), STATISTICS)
    before = checkpoint.weights_digest(model)
    with pytest.raises(CheckpointError, match="another model"):
        checkpoint.load_weights(model, mlp.state_dict(), path)
    assert checkpoint.weights_digest(model) == before, "a refused checkpoint changes nothing"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    """The temporary file is a link to the device that is always full."""
    path = tmp_path / "last.safetensors"
    checkpoint.save(path, {"a": torch.zeros(3)}, META)
    files._part_name(path).symlink_to("/dev/full")
    with pytest.raises(PcamError, match="the disk is full"):
        checkpoint.save(path, {"a": torch.ones(100_000)}, META)
    assert checkpoint.load(path)[0]["a"].equal(torch.zeros(3))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True, fused=True),
    "sgd without momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_if_never_saved(name: str, tmp_path: Path) -> None:
    """Also for channels_last weights, whose state the fused kernels walk in raw memory order."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        many = [p for p in model.parameters() if p.ndim > 1]
        return [{"params": many, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim <= 1]}]

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            torch.manual_seed(seed)
            images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8).to(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(images), torch.arange(8) % 2)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    straight = network()
    assert straight.network.stem.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]
    optimizer = OPTIMIZERS[name](groups(straight))
    steps(straight, optimizer, range(3))
    saved = {
        **checkpoint.join("model", straight.state_dict()),
        **checkpoint.join("optimizer", checkpoint.optimizer_tensors(optimizer)),
    }
    checkpoint.save(tmp_path / "a", saved, {})
    steps(straight, optimizer, range(3, 6))

    tensors, _ = checkpoint.load(tmp_path / "a")
    resumed = network()
    again = OPTIMIZERS[name](groups(resumed))
    checkpoint.load_weights(resumed, checkpoint.split(tensors, "model"), "a")
    checkpoint.load_optimizer(again, checkpoint.split(tensors, "optimizer"))
    for parameter in resumed.parameters():
        for value in again.state[parameter].values():
            if value is not None and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()
    steps(resumed, again, range(3, 6))
    assert checkpoint.weights_digest(resumed) == checkpoint.weights_digest(straight)


def test_split_undoes_join() -> None:
    inner = {"a.b": torch.ones(1), "c": torch.zeros(1)}
    mixed = {**checkpoint.join("model", inner), **checkpoint.join("models", {"d": torch.ones(1)})}
    assert checkpoint.split(mixed, "model") == inner
