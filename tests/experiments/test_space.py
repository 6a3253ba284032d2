"""Search spaces: what they promise Optuna and the configuration, and every way to write one wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pcamlib.errors import ConfigError
from pcamlib.experiments import space as spaces
from pcamlib.experiments.space import Space

LR = {"type": "float", "low": "1e-4", "high": 1.0e-2, "log": True}
GOOD: dict[str, Any] = {
    "base": "mlp",
    "set": {"train.threads": 1},
    "metric": "auc",
    "sampler": {"name": "tpe", "startup": 3, "multivariate": True, "candidates": 24},
    "pruner": {"name": "median", "startup": 3, "warmup": 1},
    "phases": [{"trials": 6, "limit": 100, "samples": 640, "evaluations": 2}, {"keep": 2, "steps": 40}],
    "parameters": {
        "optimizer.lr": LR,
        "loader.batch_size": {"type": "categorical", "choices": [16, 64]},
        "model.hidden_units": {"type": "categorical", "choices": [[8], [16, 8]]},
    },
}


def written(folder: Path, **changes: Any) -> str:
    """A space file with some entries replaced."""
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return str(path)


@pytest.mark.parametrize("path", sorted(spaces.SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_spaces_that_come_with_the_package_are_sound(path: Path) -> None:
    space = spaces.read(path.stem)
    assert space == spaces.read(str(path)) and space.phases[0].trials
    assert space.sampler.name == "tpe" and space.metric == "auc"


def test_a_trial_is_a_configuration_with_the_budget_in_patches_seen(tmp_path: Path) -> None:
    space = spaces.read(written(tmp_path))
    assert space.direction == "maximize" and space.total(0) == 6 and space.total(1) == 2
    drawn = {"optimizer.lr": 0.001234, "loader.batch_size": 16, "model.hidden_units": "[16, 8]"}
    first, second = space.config(drawn, 0), space.config(drawn, 1)
    assert first.optimizer.lr == 0.001234 and first.model.hidden_units == [16, 8] and first.train.threads == 1
    assert (first.train.steps, first.train.evaluate_every, first.data.limit) == (40, 20, 100)
    assert space.config({**drawn, "loader.batch_size": 64}, 0).train.steps == 10, "as many patches in larger batches"
    assert (second.train.steps, second.data.limit, second.train.select) == (40, None, "auc")
    timed = space.sized(seconds=3.0, evaluations=1).config(drawn, 0)
    assert timed.train.time_limit == 3.0 and timed.train.steps is None and timed.train.epochs is None


def test_draws_are_keyed_by_place() -> None:
    space = spaces.check(Space(**{**GOOD, "parameters": {"optimizer.lr": {**LR, "low": 1e-4}}}), "here")
    kinds = [space.draw(place)._rng.rng.random() for place in (0, 1, 0)]  # type: ignore[attr-defined]
    assert kinds[0] == kinds[2] != kinds[1]
    assert type(space.sized(sampler="random").draw(0)).__name__ == "RandomSampler"
    assert space.sized(trials=9).total(0) == 9 and space.total(0) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f2"}, "always tumour.*search on auc or nll"),
        ({"metric": "accuracy"}, "threshold of 0.5 that nobody chose"),
        ({"parameters": {"optimiser.lr": LR}}, "unknown setting 'optimiser.lr'; did you mean 'optimizer.lr'"),
        ({"set": {"model.widht": 8}}, "unknown setting 'model.widht'; did you mean 'model.width'"),
        ({"parameters": {"seed": {"type": "int", "low": 0, "high": 9}}}, "'seed' is decided by the phases and the"),
        ({"set": {"train.steps": 8}}, "'train.steps' is decided"),
        ({"parameters": {"optimizer.lr": {**LR, "low": -1.0, "log": False}}}, "optimizer.lr=-1.0: Input should be gr"),
        ({"parameters": {"model.dropout_rate": {"type": "float", "low": 0.0, "high": 1.0}}}, "less than 1"),
        ({"parameters": {"optimizer.lr": {**LR, "low": 0.1}}}, "optimizer.lr: .*low <= high"),
        ({"parameters": {"loader.batch_size": {"type": "float", "low": 8.0, "high": 9.5}}}, "loader.batch_size.*int"),
        (
            {
                "parameters": {
                    "model.crop": {"type": "categorical", "choices": [96, 64]},
                    "model.pool": {"type": "int", "low": 1, "high": 3},
                }
            },
            "model.crop with model.pool: .*model.pool=3 does not divide model.crop=64",
        ),
        ({"parameters": {"optimizer.lr": {**LR, "type": "flaot"}}}, "'flaot'.*'float', 'int', 'categorical'"),
        ({"parameters": {}}, "at least 1 item"),
        ({"sampler": {"name": "tpee"}}, "sampler.name='tpee'"),
        ({"pruner": {}}, "pruner.name"),
        ({"phases": [{"trials": 3}]}, "one budget for each trial"),
        ({"phases": [{"trials": 3, "steps": 4, "samples": 9}]}, "one budget for each trial"),
        ({"phases": [{"trials": 3, "seconds": 4.0, "evaluations": 2}]}, "has one evaluation"),
        ({"phases": [{"keep": 3, "steps": 4}]}, "first phase names trials"),
        ({"phases": [{"trials": 3, "steps": 4}, {"keep": 4, "steps": 9}]}, r"at most what the one before.*\[3, 4\]"),
        ({"base": "cmn"}, "unknown recipe 'cmn'; did you mean 'cnn'"),
        ({"pases": []}, "unknown key 'pases'; did you mean 'phases'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_trial(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        spaces.read(written(tmp_path, **changes))
    assert str(caught.value).startswith(str(tmp_path / "space.yaml")) and "\n" not in str(caught.value)


def test_a_space_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="unknown search space 'cn'; did you mean 'cnn'"):
        spaces.read("cn")
    with pytest.raises(ConfigError, match="no such configuration file"):
        spaces.read("nowhere/space.yaml")
