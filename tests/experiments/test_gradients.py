"""Gradient norms by step and layer, the spike rule, and what epoch averages hide."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pcamlib.config import parse
from pcamlib.errors import RunError
from pcamlib.experiments import gradients, seeds
from pcamlib.training import checkpoint
from pcamlib.training.runs import Run
from pcamlib.training.state import Training


def quiet(line: str) -> None:
    """Reports nothing."""


@pytest.fixture(scope="module")
def runs(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two seeds of three epochs of eight steps, the norms of layers logged."""
    mapping = {
        "data": {"limit": 250},
        "loader": {"batch_size": 32},
        "model": {"name": "mlp", "crop": 32, "hidden_units": [8]},
        "train": {"epochs": 3, "threads": 1, "precision": "fp32", "device": "cpu", "layer_norms": True},
    }
    config = parse(mapping)
    return seeds.train("base", config, [0, 1], synthetic_dir, tmp_path_factory.mktemp("runs"), quiet)


# Logging


def test_layers_are_logged_at_every_step_and_square_to_the_global_norm(runs: list[Run]) -> None:
    for row in runs[0].metrics():
        layers = {key: value for key, value in row.items() if key.startswith(gradients.LAYER)}
        assert list(layers) == ["grad_norm/layers.0", "grad_norm/layers.3"]
        assert math.hypot(*layers.values()) == pytest.approx(row["grad_norm"], rel=1e-5)


def test_norms_are_those_before_clipping_and_logging_them_changes_no_weight(tiny: Any, synthetic_dir: Path) -> None:
    found, digests = [], []
    for items in (("train.grad_clip=0.01",), ("train.grad_clip=0.01", "train.layer_norms=true")):
        state = Training(tiny(*items), synthetic_dir)
        found.append([state.step(batch, 0.0) for batch, _ in zip(state.loader, range(3), strict=False)])
        digests.append(checkpoint.weights_digest(state.model))
    assert digests[0] == digests[1]
    assert not any(key.startswith(gradients.LAYER) for key in found[0][0]), "only when asked for"
    for plain, rich in zip(*found, strict=True):
        assert plain.items() <= rich.items() and rich["grad_norm"] > 0.01
        assert math.hypot(*(rich[key] for key in rich.keys() - plain.keys())) == pytest.approx(
            rich["grad_norm"], rel=1e-5
        )


# The rule


def test_a_planted_spike_is_found_and_later_ones_are_not_hidden_by_it() -> None:
    norms = np.exp(np.random.default_rng(0).normal(0, 0.3, 200))
    norms[[60, 61, 150]] *= 30
    found = gradients.spikes(norms)
    assert [each.step for each in found] == [61, 62, 151], "steps count from 1"
    for each in found:
        assert each.norm == norms[each.step - 1] and 0.5 < each.usual < 2 and each.deviations > gradients.LIMIT
    assert gradients.strongest(norms, 2) == sorted(
        each.step for each in sorted(found, key=lambda each: -each.deviations)[:2]
    )


def test_noise_alone_rarely_spikes_whatever_its_scale_and_slow_change_never_does() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.05, 0.3, 1.0):
        assert len(gradients.spikes(np.exp(rng.normal(0, scale, 5000)))) < 10, "below 0.2 % of the steps"
    assert gradients.spikes(np.exp(np.linspace(3, -3, 500))) == [] == gradients.spikes(np.exp(np.linspace(-1, 1, 500)))


def test_the_first_steps_and_tiny_rises_are_no_spikes() -> None:
    flat = np.ones(50)
    assert gradients.spikes(np.where(np.arange(50) < gradients.FEWEST, 100.0, 1.0)) == []
    flat[30] = math.exp(gradients.LIMIT * gradients.FLOOR) * 0.99
    assert gradients.spikes(flat) == [] and gradients.strongest(flat, 3) == [31], "the step that comes closest"
    flat[30] *= 1.02
    assert [each.step for each in gradients.spikes(flat)] == [31]
    flat[20] = 0.0
    assert [each.step for each in gradients.spikes(flat)] == [31], "a step without gradient is no error"


# What averages hide


def test_epoch_means_are_those_of_whole_epochs(runs: list[Run]) -> None:
    ends, means = gradients.epoch_means(runs[0])
    norms = [row["grad_norm"] for row in runs[0].metrics()]
    assert ends.tolist() == [8, 16, 24] and len(norms) == 24
    assert means == pytest.approx([np.mean(norms[:8]), np.mean(norms[8:16]), np.mean(norms[16:])])


def test_a_run_that_ends_within_an_epoch_keeps_its_rest(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    (run, _) = seeds.train("part", tiny("train.steps=21", "data.limit=300"), [0, 1], synthetic_dir, tmp_path, quiet)
    ends, means = gradients.epoch_means(run)
    assert ends.tolist() == [10, 20, 21] and means[-1] == run.metrics()[-1]["grad_norm"]


def test_the_table_says_how_far_a_step_lies_above_its_epoch(runs: list[Run]) -> None:
    table = gradients.hidden(runs)
    assert [row["seed"] for row in table] == [0, 1]
    for row, run in zip(table, runs, strict=True):
        norms = np.array([each["grad_norm"] for each in run.metrics()]).reshape(3, 8)
        ratios = norms / norms.mean(1, keepdims=True)
        assert row["largest step / its epoch mean"] == pytest.approx(ratios.max(), abs=0.005)
        assert row["at step"] == ratios.argmax() + 1 and (row["steps"], row["epochs"]) == (24, 3)
        assert row["steps range"][0] <= row["epoch means"][0] <= row["epoch means"][1] <= row["steps range"][1]


def test_the_figure_draws_every_step_on_log_axes(runs: list[Run]) -> None:
    shown = gradients.series(runs)
    assert shown["step"] == list(range(1, 25)) and len(shown["seed 1"]) == 24
    assert shown["seed 0 epoch end"] == [8, 16, 24]
    top, bottom = gradients.plot(shown).axes
    assert top.get_yscale() == bottom.get_yscale() == "log"
    assert list(top.lines[0].get_ydata()) == shown["seed 0"]
    assert {line.get_label() for line in bottom.lines} == {"layers.0", "layers.3"}


def test_layers_that_were_not_logged_are_asked_for(tiny: Any, synthetic_dir: Path, tmp_path: Path) -> None:
    found = seeds.train("plain", tiny("train.steps=2"), [0, 1], synthetic_dir, tmp_path, quiet)
    with pytest.raises(RunError, match=r"logged no layers; train it with train.layer_norms=true"):
        gradients.series(found)


def test_the_layers_of_a_cnn_are_named_by_module(synthetic_dir: Path, tiny: Any) -> None:
    state = Training(tiny("model.name=cnn", "model.width=4", "train.layer_norms=true"), synthetic_dir)
    row = state.step(next(iter(state.loader)), 0.0)
    layers = [key.removeprefix(gradients.LAYER) for key in row if key.startswith(gradients.LAYER)]
    assert layers[:2] == ["stem", "norm"] and layers[-1] == "head" and "stages.1.shortcut" in layers
    weights = {name.rpartition(".")[0] for name, _ in state.model.named_parameters()}
    assert (
        len(layers) == len(weights) and torch.isfinite(torch.tensor([row[gradients.LAYER + k] for k in layers])).all()
    )
