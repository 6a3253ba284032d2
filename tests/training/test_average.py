"""The moving average of weights: what it holds, that it is what is judged and kept, and that it comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pcamlib.config import Config
from pcamlib.training import checkpoint, loop, runs
from pcamlib.training.state import Training

AVERAGED = ("model.name=d4", "model.width=8", "optimizer.name=muon", "optimizer.lr=0.02", "train.ema=0.9")


def test_it_follows_the_weights_by_its_decay(data: Path, tiny: Callable[..., Config]) -> None:
    state = Training(tiny(*AVERAGED, "train.ema=0.5"), data)
    weight, mean = state.model.network.head.weight, state.average.network.head.weight
    expected = weight.detach().clone()
    for step, batch in enumerate(state.loader):
        state.step(batch, 0.5)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(mean.detach(), expected)
        state.progress.step += 1
    assert not torch.equal(mean, weight) and not state.average.training


def test_without_one_the_weights_themselves_are_judged(data: Path, tiny: Callable[..., Config]) -> None:
    state = Training(tiny(), data)
    assert state.average is None and state.judged is state.model


def test_the_average_is_kept_as_best(data: Path, tiny: Callable[..., Config], tmp_path: Path) -> None:
    run = loop.train(tiny(*AVERAGED), data, tmp_path / "run", report=lambda line: None)
    last, _ = checkpoint.load(run.last)
    best, _ = checkpoint.load(run.best)
    assert checkpoint.tensor_digest(checkpoint.split(best, "model")) == checkpoint.tensor_digest(
        checkpoint.split(last, "average")
    )
    key = "model.network.stem.weight"
    assert not torch.equal(best[key], last[key])


@pytest.mark.parametrize("stop", [1, 3, 8, 9])
def test_resumed_bit_by_bit(data: Path, tiny: Callable[..., Config], tmp_path: Path, stop: int) -> None:
    """The whole of the default recipe's machinery: group convolutions, Muon, the average."""
    config = tiny(*AVERAGED, "train.steps=12", "train.checkpoint_every=1", "loader.augment=[d4, stain]")
    whole = loop.train(config, data, tmp_path / "whole", report=lambda line: None)

    class Stopped(Exception):
        pass

    def stop_at(step: int) -> None:
        if step == stop:
            raise Stopped

    with pytest.raises(Stopped):
        loop.train(config, data, tmp_path / "parts", report=lambda line: None, on_step=stop_at)
    parts = loop.resume(tmp_path / "parts", data, report=lambda line: None)
    assert runs.diff(whole, parts) == []
    assert whole.success["best"] == parts.success["best"]
