"""Search: after how many trials does TPE reach what random search reaches with all of its own?

    python benchmarks/hpo.py [--json FILE] [--rounds 5] [--trials 60]
    python benchmarks/hpo.py --measure DIR        # train the table of trials again (some minutes)

The objective is a surrogate: a Gaussian process fitted to benchmarks/hpo_trials.json, 100 random trials of the space
`smoke` (8-channel CNN, 1,536 samples each, synthetic patches), of which it explains the share that is printed
(10-fold). The sampler has the settings of the space `cnn` and is drawn as a search draws it. A round is one search of
each kind, with seeds of its own; a search that never gets there counts as one trial more than it had.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from _rows import arguments, finish, row
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.model_selection import cross_val_predict

from pcamlib.experiments import hpo
from pcamlib.experiments.landscape import height
from pcamlib.experiments.space import Space, read
from pcamlib.files import read_json, write_json

TABLE = Path(__file__).with_name("hpo_trials.json")


def measure(data: Path) -> None:
    """Train the trials of the table."""
    budget = {"trials": 100, "sampler": "random", "evaluations": 1}
    with tempfile.TemporaryDirectory() as folder:
        table = hpo.search(read("smoke").sized(**budget), data, Path(folder) / "hpo").table()
    table = table[table["state"] == "complete"]
    write_json(TABLE, table[[*read("smoke").parameters, "value"]].to_dict("records"))


def surrogate(space: Space) -> tuple[Callable[[dict[str, Any]], float], float]:
    """The fitted objective (logit of the AUC) and the share of the variance it explains out of fold."""
    trials = read_json(TABLE)

    def point(parameters: dict[str, Any]) -> list[float]:
        return [height(space, key, parameters[key]) for key in space.parameters]

    x, auc = np.array([point(trial) for trial in trials]), np.array([trial["value"] for trial in trials])
    y = np.log(auc / (1 - auc))
    kernel = ConstantKernel() * Matern([1.0] * x.shape[1], nu=2.5) + WhiteKernel(0.01)
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a setting without effect has no finite length
        left = y - cross_val_predict(process, x, y, cv=10)
        process.fit(x, y)
    return lambda parameters: float(process.predict([point(parameters)])[0]), 1 - float(left.var() / y.var())


def best_so_far(space: Space, objective: Callable[[dict[str, Any]], float], trials: int) -> np.ndarray:
    """The best value after each trial of one search, (trials,)."""
    study, distributions = optuna.create_study(direction="maximize"), space.distributions()
    for place in range(trials):
        study.sampler = space.draw(place)
        trial = study.ask(distributions)
        study.tell(trial, objective(trial.params))
    return np.maximum.accumulate([trial.value or -np.inf for trial in study.trials])


def reached(space: Space, objective: Callable[[dict[str, Any]], float], trials: int, rounds: int) -> list[int]:
    """Trials after which each round's search had what random search had after all of its own."""
    found = []
    for number in range(rounds):
        kinds = {"random": 2 * number, space.sampler.name: 2 * number + 1}
        tpe, random = (
            best_so_far(space.model_copy(update={"seed": seed}).sized(sampler=name), objective, trials)
            for name, seed in sorted(kinds.items(), reverse=True)
        )
        found.append(int(np.argmax(tpe >= random[-1])) + 1 if tpe[-1] >= random[-1] else trials + 1)
        print(f"  round {number + 1}: after {found[-1]} of {trials}", flush=True)
    return found


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=60, help="of each search")
    parser.add_argument("--measure", type=Path, metavar="DIR", help="train the table of trials again, on this data")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.measure:
        measure(options.measure)
    space = read("smoke").model_copy(update={"sampler": read("cnn").sampler})
    objective, explained = surrogate(space)
    print(f"surrogate of {len(read_json(TABLE))} trials explains {explained:.2f} of their variance (10-fold)")
    rows = []
    for trials, bar in ((20, ""), (options.trials, "RATIO>=2")):  # twenty are few: half of them are the random start
        found = reached(space, objective, trials, options.rounds)
        half = sum(number <= trials / 2 for number in found)
        print(f"  sorted: {sorted(found)}; within half the trials in {half} of {options.rounds}")
        what, middle = f"TPE reaches the best of {trials} random trials", statistics.median(found)
        against = f"random search, all {trials}"
        rows.append(row(what, middle, "trials", n=options.rounds, against=against, ratio=trials / middle, bar=bar))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
