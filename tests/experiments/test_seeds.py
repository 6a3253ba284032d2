"""One configuration over several seeds: distinct runs, two kinds of intervals, a constant beside each score."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pcamlib.errors import ConfigError, RunError
from pcamlib.experiments import seeds
from pcamlib.training import metrics
from pcamlib.training.evaluate import Predictions
from pcamlib.training.runs import Run


def quiet(line: str) -> None:
    """Reports nothing."""


@pytest.fixture(scope="module")
def trained(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Three seeds of a tiny network, four steps each; nobody may change them."""
    from pcamlib.config import parse

    config = parse({
        "loader": {"batch_size": 32},
        "model": {"name": "mlp", "crop": 32, "hidden_units": [8]},
        "train": {"steps": 4, "threads": 1, "precision": "fp32", "device": "cpu"},
    })  # fmt: skip
    return seeds.train("mlp", config, [0, 1, 2], synthetic_dir, tmp_path_factory.mktemp("seeds"), quiet)


@pytest.fixture
def copies(trained: list[Run], tmp_path: Path) -> list[Run]:
    """The three runs, to be damaged."""
    return [Run(Path(shutil.copytree(run.path, tmp_path / run.name))) for run in trained]


@pytest.mark.parametrize(
    ("listed", "message"),
    [([0, 1, 1], r"seeds \[0, 1, 1\]: 1 is listed twice"), ([3], "at least two"), ([], "at least two")],
)
def test_a_seed_list_that_is_none_is_refused_before_training(
    listed: list[int], message: str, tiny: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        seeds.train("mlp", tiny(), listed, tmp_path / "nowhere", tmp_path, quiet)
    assert list(tmp_path.iterdir()) == []


def test_seeds_differ_in_the_seed_and_share_a_wandb_group(trained: list[Run]) -> None:
    assert [run.config.seed for run in trained] == [0, 1, 2]
    assert {run.config.tracking.group for run in trained} == {"mlp"}
    assert len(set(seeds.distinct(trained).values())) == 3
    assert [run.name.rpartition("-")[0] for run in trained] == ["mlp-seed0", "mlp-seed1", "mlp-seed2"]


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[list[Run]], None]:
    """A damage: the last run's file `name` read, changed and written."""

    def damage(runs: list[Run]) -> None:
        path = runs[-1].path / name
        read, write = (json.loads, json.dumps) if name == "SUCCESS" else (yaml.safe_load, yaml.safe_dump)
        path.write_text(write(change(read(path.read_text()))))

    return damage


def other_patches(runs: list[Run]) -> None:
    seen = runs[-1].predictions()
    Predictions("valid", "other", seen.index, seen.label, seen.probability).save(
        runs[-1].path / "predictions_valid.npz"
    )


def same_weights(runs: list[Run]) -> None:
    shutil.copy(runs[0].path / "SUCCESS", runs[-1].path / "SUCCESS")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (same_weights, "mlp-seed0-.* and mlp-seed2-.* are one run, their weights are equal; a mean would count"),
        (lambda runs: (runs[-1].path / "SUCCESS").unlink(), "mlp-seed2-.*: has not finished; `pcam resume"),
        (edited("config.yaml", lambda c: {**c, "optimizer": {**c["optimizer"], "lr": 0.5}}),
         r"differ in more than the seed: optimizer.lr: 0.001 \| 0.5"),
        (other_patches, "were judged on other patches"),
    ],
)  # fmt: skip
def test_runs_that_are_no_sample_of_seeds_are_refused(
    copies: list[Run], damage: Callable[[list[Run]], None], message: str
) -> None:
    assert len(seeds.reports(copies)) == 3
    damage(copies)
    with pytest.raises(RunError, match=message):
        seeds.reports(copies)


def test_mean_sd_and_t_interval_of_a_known_sample() -> None:
    found = seeds.spread([1.0, 2.0, 3.0])
    assert found["mean"] == 2 and found["sd"] == 1
    assert found["interval"] == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    assert seeds.spread([0.9, 0.95, 1.0], 0.0, 1.0)["interval"][1] == 1.0, "cut to what is possible"


def report(**values: float) -> dict[str, Any]:
    """A report with these values, and the constants of a balanced split."""
    labels = np.arange(100) % 2
    constants = metrics.baselines(labels)
    return {
        "metrics": {name: {"value": v, "interval": (v, v), "baseline": constants[name]} for name, v in values.items()}
    }


def test_a_constant_is_beaten_with_the_whole_interval_or_not_shown() -> None:
    found = seeds.summary([
        report(f2=0.70, auc=0.90, nll=0.5, accuracy=0.4, ece=0.1),
        report(f2=0.71, auc=0.91, nll=0.6, accuracy=0.7, ece=0.1),
        report(f2=0.72, auc=0.92, nll=0.55, accuracy=0.5, ece=0.1),
    ])  # fmt: skip
    rows = {row["metric"]: row for row in found}
    assert [row["metric"] for row in found] == ["accuracy", "f2", "auc", "nll", "ece"], "in the order of METRICS"
    assert (rows["f2"]["constant"], round(rows["f2"]["scores"], 4), rows["f2"]["beats it"]) == (
        "always tumour", 0.8333, False
    )  # fmt: skip
    assert (
        rows["auc"]["beats it"] is True and rows["nll"]["constant"] == "prevalence" and rows["nll"]["beats it"] is True
    )
    assert rows["accuracy"]["beats it"] == "not shown"
    assert (rows["ece"]["constant"], rows["ece"]["beats it"]) == (None, None), "the prevalence is calibrated: no rival"


def test_the_summary_is_computed_from_stored_predictions(trained: list[Run]) -> None:
    found = seeds.reports(trained)
    rows = {row["metric"]: row for row in seeds.summary(found)}
    assert set(rows) == set(metrics.METRICS)
    values = [run.predictions().report()["metrics"]["auc"]["value"] for run in trained]
    assert rows["auc"]["mean"] == pytest.approx(np.mean(values)) and rows["auc"]["sd"] == pytest.approx(
        np.std(values, ddof=1)
    )
    singles = seeds.each(trained, found)
    assert len(singles) == 3 * len(metrics.METRICS) and singles["seed"].unique().tolist() == [0, 1, 2]
    assert all(low <= value <= high for value, (low, high) in zip(singles["value"], singles["interval"], strict=True))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("beta", [1, 2])
def test_the_formula_of_always_tumour_is_what_the_metric_gives(share: float, beta: int) -> None:
    labels = (np.arange(1000) < 1000 * share).astype(int)
    constant = metrics.baselines(labels)[f"f{beta}"]["always tumour"]
    assert seeds.always_tumour(share, beta) == pytest.approx(constant)


def test_f2_by_threshold_begins_at_the_constant(trained: list[Run]) -> None:
    series = seeds.f2_series(trained, points=5)
    share = float(trained[0].predictions().label.mean())
    for seed in (0, 1, 2):
        assert series[f"seed {seed}"][0] == pytest.approx(seeds.always_tumour(share, 2)), "threshold 0 calls all tumour"
    left, right = seeds.plot_f2(series, share).axes
    assert len(left.lines) == 4 and [line.get_label() for line in right.lines[:3]] == ["seed 0", "seed 1", "seed 2"]


def test_figures_draw_what_the_tables_say(trained: list[Run]) -> None:
    found = seeds.reports(trained)
    rows, singles = seeds.summary(found), seeds.each(trained, found)
    panels = seeds.plot(rows, singles).axes
    assert [panel.get_title() for panel in panels] == [row["metric"] for row in rows]
    own = singles[singles["metric"] == "auc"]["value"].tolist()
    assert panels[3].containers[0].lines[0].get_ydata().tolist() == own
    series = seeds.curves(trained)
    assert series["seed 1 loss"] == [row["loss"] for row in trained[1].metrics()]
    assert series["seed 1 valid"][:-1] == [None] * 3 and series["seed 1 valid"][-1] is not None
    assert len(seeds.plot_curves(series).axes[0].lines) == 2 * 3 + 1
