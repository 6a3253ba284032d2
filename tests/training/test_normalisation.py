"""A checkpoint of patches with other colours is refused, where it would be used and where it would be gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pcamlib.config import Config
from pcamlib.errors import CheckpointError
from pcamlib.training import checkpoint, loop


@pytest.fixture
def redder(tmp_path: Path, make_split: Callable[..., None]) -> Path:
    for split, count in (("train", 256), ("valid", 64)):
        make_split(tmp_path / "redder", split, np.arange(count) % 2, seed=3, gap=60.0)
    return tmp_path / "redder"


def test_the_best_weights_of_another_run(data: Path, redder: Path, tiny: Callable[..., Config], tmp_path: Path) -> None:
    mine, other = (
        loop.train(tiny(), folder, tmp_path / name, report=lambda line: None)
        for name, folder in (("mine", data), ("other", redder))
    )
    assert loop.evaluate_run(mine, folder=data)["n"] == 128
    shutil.copy(other.best, mine.best)
    with pytest.raises(CheckpointError, match=r"best.safetensors: trained on another normalisation: mean of the chan"):
        loop.evaluate_run(mine, folder=data)


def test_going_on_from_it(data: Path, tiny: Callable[..., Config], tmp_path: Path) -> None:
    def stop(step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(tiny("train.checkpoint_every=1"), data, tmp_path / "run", report=lambda line: None, on_step=stop)
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    tensors, meta = checkpoint.load(last)
    meta["normalisation"]["std"] = [value * 1.1 for value in meta["normalisation"]["std"]]
    checkpoint.save(last, tensors, meta)
    with pytest.raises(CheckpointError, match=r"last.safetensors: trained on another normalisation: std of the chan"):
        loop.resume(tmp_path / "run", data, report=lambda line: None)
