"""Spikes traced to patches: the rows of a step from the configuration, replays bit by bit, each patch's own pull."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from pcamlib.data.patches import open_split
from pcamlib.errors import RunError
from pcamlib.experiments import culprits
from pcamlib.training import checkpoint, loop
from pcamlib.training.state import Training


def quiet(line: str) -> None:
    """Reports nothing."""


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, str]]:
    """Rows of the batch and digest of the weights before each step of a live loop."""
    seen: list[tuple[np.ndarray, str]] = []
    step = Training.step

    def noted(self: Training, batch: Any, progress: float) -> dict[str, float]:
        seen.append((batch.rows.copy(), checkpoint.weights_digest(self.model)))
        return step(self, batch, progress)

    monkeypatch.setattr(Training, "step", noted)
    return seen


HARD = ("loader.augment=[d4, stain]", "model.dropout_rate=0.3", "schedule.name=onecycle", "model.name=cnn")


@pytest.mark.parametrize(
    "items", [(), ("loader.sampler=balanced", "data.limit=100", "seed=7"), (*HARD, "model.width=4")]
)
def test_rows_and_weights_of_a_step_are_those_of_the_live_loop(
    tiny: Any, synthetic_dir: Path, tmp_path: Path, watched: list[tuple[np.ndarray, str]], items: tuple[str, ...]
) -> None:
    config = tiny("train.steps=9", "loader.batch_size=24", "train.evaluate_every=4", *items)
    run = loop.train(config, synthetic_dir, tmp_path / "run", report=quiet)
    live, patches = list(watched), open_split(synthetic_dir, "train")
    assert len(live) == 9
    for number, (rows, _) in enumerate(live, start=1):
        assert culprits.batch_rows(config, patches, number).tolist() == rows.tolist()
    for number, state, batch in culprits.replay(run, synthetic_dir, [9, 3, 4]):
        assert (batch.rows.tolist(), checkpoint.weights_digest(state.model)) == (
            live[number - 1][0].tolist(),
            live[number - 1][1],
        )
    traced = culprits.trace(run, synthetic_dir, [2, 9])  # raises where looking changed what follows
    assert [each.step for each in traced] == [2, 9]


def test_a_step_that_does_not_repeat_is_no_replay(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    run = loop.train(tiny("train.steps=3"), synthetic_dir, tmp_path / "run", report=quiet)
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1].replace('"loss": ', '"loss": 1'), lines[2]]) + "\n")
    assert [number for number, *_ in culprits.replay(run, synthetic_dir, [1])] == [1]
    with pytest.raises(RunError, match=r"step 2 gave a loss of 1\d.* now: other code, threads or machine"):
        list(culprits.replay(run, synthetic_dir, [3]))
    with pytest.raises(RunError, match="steps 0 to 4 asked for; it has 1 to 3"):
        list(culprits.replay(run, synthetic_dir, [0, 4]))
    assert list(culprits.replay(run, synthetic_dir, [])) == []


def test_a_run_that_followed_the_clock_is_refused(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    run = loop.train(tiny("train.time_limit=60"), synthetic_dir, tmp_path / "run", report=quiet)
    with pytest.raises(RunError, match="followed the clock"):
        list(culprits.replay(run, synthetic_dir, [1]))


def test_own_gradients_are_those_of_each_patch_alone(tiny: Any, synthetic_dir: Path) -> None:
    state = Training(tiny("loader.batch_size=6"), synthetic_dir)
    batch = next(iter(state.loader))
    losses, own = culprits.own_gradients(state.model, batch)
    state.model.eval()
    whole = functional.cross_entropy(state.model(batch.images), batch.labels)
    assert whole.item() == pytest.approx(losses.mean(), rel=1e-5)
    weights = list(state.model.parameters())
    for place in range(6):
        loss = functional.cross_entropy(state.model(batch.images[[place]]), batch.labels[[place]])
        pulled = torch.autograd.grad(loss, weights)
        expected = sum(float(each.double().square().sum()) for each in pulled) ** 0.5
        assert own[place] == pytest.approx(expected, rel=1e-4)
    assert culprits.batch_norm_of(state.model, batch) <= own.mean() * 1.0001, "the norm of a mean"


def test_a_gallery_without_a_spike_says_so(synthetic_dir: Path) -> None:
    figure, shown = culprits.gallery([], open_split(synthetic_dir, "train"))
    assert shown == {"no spike": []} and figure.axes[0].texts[0].get_text() == "no spike"
