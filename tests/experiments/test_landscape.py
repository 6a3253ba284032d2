"""What a search saw: best so far, importance of a setting that matters, figures that can be drawn from any table."""

from __future__ import annotations

import optuna
import pandas as pd
import pytest
from optuna.trial import TrialState

from pcamlib.errors import RunError
from pcamlib.experiments import landscape, space

SPACE = space.read("smoke")


def study(trials: int, seed: int = 0) -> optuna.Study:
    """Random trials of which the learning rate alone decides the value; every fifth is pruned."""
    made = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=seed))
    for number in range(trials):
        trial = made.ask(SPACE.distributions())
        if number % 5 == 4:
            trial.report(0.5, 1)
            made.tell(trial, state=TrialState.PRUNED)
        else:
            made.tell(trial, 0.9 - abs(trial.params["optimizer.lr"] - 0.02))
    return made


def table(made: optuna.Study) -> pd.DataFrame:
    rows = [{"trial": t.number + 1, "state": t.state.name.lower(), "value": t.value, **t.params} for t in made.trials]
    return pd.DataFrame(rows, dtype=object)


def test_the_best_so_far_counts_completed_trials_only() -> None:
    found = pd.DataFrame({"state": ["pruned", "complete", "complete", "pruned", "complete"],
                          "value": [0.99, 0.7, 0.6, 0.9, 0.8]})  # fmt: skip
    assert landscape.best_so_far(found, "auc") == [None, 0.7, 0.7, 0.7, 0.8]
    assert landscape.best_so_far(found, "nll") == [None, 0.7, 0.6, 0.6, 0.6]
    shorter = found.iloc[:2]
    assert landscape.race({"a": found, "b": shorter}, "auc") == [
        {"trials": 1, "a": None, "b": None}, {"trials": 2, "a": 0.7, "b": 0.7}, {"trials": 5, "a": 0.8, "b": 0.7}
    ]  # fmt: skip


def test_the_setting_that_matters_is_found() -> None:
    rows = landscape.importance([study(15), study(15, seed=1)], resamples=2)
    assert rows[0]["setting"] == "optimizer.lr" and rows[0]["share"] > max(0.5, rows[1]["share"])
    assert 0 < sum(row["share"] for row in rows) < 1.001 and len(rows) == len(SPACE.parameters)
    assert all(row["interval"][0] <= row["share"] <= row["interval"][1] for row in rows)
    assert landscape.plot_importance(rows).axes[0].get_xlim() == (0, 1)


def test_importance_of_three_trials_is_refused() -> None:
    with pytest.raises(RunError, match="3 trials completed; importance needs 4"):
        landscape.importance([study(3)])


@pytest.mark.parametrize("trials", [1, 12])
def test_figures_of_any_table(trials: int) -> None:
    found = table(study(trials))
    series = landscape.history({"tpe": found, "random": table(study(trials, 1))}, "auc")
    assert len(series["tpe: best so far"]) == trials
    assert landscape.plot_history(series, "auc").axes[0].get_ylabel() == "valid auc"
    axes = landscape.plot_parallel(found, SPACE).axes[0]
    assert len(axes.get_xticks()) == len(SPACE.parameters) + 1
    nothing = found.assign(state="pruned")
    assert landscape.plot_parallel(nothing, SPACE)
