"""Predictions: one row a patch, whole or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcamlib.config import Model
from pcamlib.data.patches import channel_statistics, open_split
from pcamlib.errors import DataError
from pcamlib.models import build
from pcamlib.training import metrics
from pcamlib.training.distributed import World
from pcamlib.training.evaluate import Predictions, evaluate


@pytest.fixture
def predictions() -> Predictions:
    rng = np.random.default_rng(0)
    return Predictions("valid", "f" * 64, np.arange(40), rng.integers(0, 2, 40).astype(np.uint8), rng.random(40))


def network(patches: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return build(Model(name="cnn", crop=32, width=4, dropout_rate=0.5, **more), channel_statistics(patches))


def test_round_trip(predictions: Predictions, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "predictions_valid.npz"
    predictions.save(path)
    read = Predictions.load(path)
    assert (read.split, read.fingerprint) == ("valid", "f" * 64)
    for name in ("index", "label", "probability"):
        before, after = getattr(predictions, name), getattr(read, name)
        assert after.dtype == before.dtype and after.tobytes() == before.tobytes()


def test_missing_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such predictions; `pcam evaluate"):
        Predictions.load(tmp_path / "predictions_test.npz")


def test_damaged_is_an_error_for_people_or_nothing_changed(predictions: Predictions, tmp_path: Path) -> None:
    """Truncated anywhere, or a byte flipped anywhere: refused, unless the zip never looks at that byte."""
    path = tmp_path / "predictions_valid.npz"
    predictions.save(path)
    whole, refused = path.read_bytes(), 0
    damaged = [whole[:size] for size in range(0, len(whole), 97)]
    damaged += [
        whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :] for i in range(0, len(whole), 11) for mask in (1, 255)
    ]
    for content in damaged:
        path.write_bytes(content)
        try:
            read = Predictions.load(path)
        except DataError as error:
            assert "damaged predictions" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            for name in ("index", "label", "probability"):
                assert getattr(read, name).tobytes() == getattr(predictions, name).tobytes(), name
            assert (read.split, read.fingerprint) == (predictions.split, predictions.fingerprint)
    assert refused > 0.7 * len(damaged)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"<html>", b"\x80\x04K\x01."], ids=["empty", "0", "page", "pickle"]
)
def test_something_else_under_this_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "predictions_valid.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged predictions"):
        Predictions.load(path)


def test_an_array_or_other_fields_under_this_name(tmp_path: Path) -> None:
    path = tmp_path / "predictions_valid.npz"
    with open(path, "wb") as out:
        np.save(out, np.zeros(3))
    with pytest.raises(DataError, match="damaged predictions"):
        Predictions.load(path)
    np.savez(path, split="valid", index=np.arange(3))
    with pytest.raises(DataError, match="damaged predictions"):
        Predictions.load(path)


def test_report(predictions: Predictions) -> None:
    assert predictions.report() == metrics.report(predictions.label, predictions.probability)
    assert predictions.report(threshold=0.2)["threshold"] == 0.2


def test_every_patch_of_the_split_is_predicted(make_split: Any, tmp_path: Path) -> None:
    """Black and white patches too, that training drops: nobody may choose what is easy."""
    import h5py

    labels = np.arange(21) % 2
    make_split(tmp_path, "valid", labels, seed=0)
    with h5py.File(tmp_path / "camelyonpatch_level_2_split_valid_x.h5", "r+") as file:
        file["x"][3], file["x"][20] = 0, 255
    patches = open_split(tmp_path, "valid")
    assert len(patches.rows()) == 19
    found = evaluate(network(patches), patches, batch_size=4)
    assert found.index.tolist() == list(range(21)) and found.label.tolist() == labels.tolist()
    assert found.probability.dtype == np.float64 and ((found.probability > 0) & (found.probability < 1)).all()
    assert (found.split, found.fingerprint) == ("valid", patches.fingerprint)


def test_evaluation_is_neither_training_nor_chance(data: Path) -> None:
    patches = open_split(data, "valid")
    model = network(patches).train()
    state, before = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    first, second = evaluate(model, patches), evaluate(model, patches)
    assert first.probability.tobytes() == second.probability.tobytes(), "no dropout"
    assert model.training, "handed back as it came"
    assert torch.get_rng_state().equal(state), "dropout's generator has not moved"
    assert all(t.equal(before[name]) for name, t in model.state_dict().items()), "batch statistics are as they were"
    model.eval()
    evaluate(model, patches)
    assert not model.training


def test_the_batch_size_hardly_matters_and_bf16_not_much(data: Path) -> None:
    patches = open_split(data, "valid")
    model = network(patches)
    whole, small = evaluate(model, patches), evaluate(model, patches, batch_size=7)
    np.testing.assert_allclose(small.probability, whole.probability, atol=1e-5)
    half = evaluate(model, patches, precision="bf16")
    np.testing.assert_allclose(half.probability, whole.probability, atol=0.05)


def test_a_split_without_labels_is_refused(make_split: Any, tmp_path: Path) -> None:
    make_split(tmp_path, "test", np.arange(4) % 2, seed=0)
    (tmp_path / "camelyonpatch_level_2_split_test_y.h5").unlink()
    patches = open_split(tmp_path, "test")
    with pytest.raises(DataError, match="no labels"):
        evaluate(network(patches), patches)


@dataclass(frozen=True)
class Deaf(World):
    """One of several processes, which hears nothing of the others."""

    def concat(self, values: np.ndarray) -> np.ndarray:
        return values


@pytest.mark.parametrize("size", [2, 5])
def test_processes_share_whole_batches(data: Path, size: int) -> None:
    """The same batches as in one process, so the same bits; 128 patches in batches of 40 leave one of five idle."""
    valid = open_split(data, "valid")
    model = network(valid)
    whole = evaluate(model, valid, batch_size=40)
    parts = [evaluate(model, valid, batch_size=40, world=Deaf(rank, size)) for rank in range(size)]
    assert np.concatenate([part.index for part in parts]).tolist() == whole.index.tolist()
    assert np.concatenate([part.probability for part in parts]).tobytes() == whole.probability.tobytes()
    assert [len(part.index) for part in parts].count(0) == (1 if size == 5 else 0)
