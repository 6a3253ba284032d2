"""`pcam train`, `probe`, `hpo`, `hpo-worker`, `resume`, `evaluate` and `pcam runs ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pcamlib.cli.options import DataOption, Overrides

if TYPE_CHECKING:
    from pcamlib.config import Config

commands = typer.Typer()
runs_app = typer.Typer(help="List, compare, repeat and send runs.", no_args_is_help=True)
commands.add_typer(runs_app, name="runs")
Recipe = Annotated[str, typer.Option("--recipe", help="Name of a recipe, or path of a YAML file.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds; the schedule then follows the clock.")]


def _settings(recipe: str, overrides: list[str] | None, time_limit: float | None, data: str | None) -> Config:
    """The configuration that `train` and `probe` are given, with its data folder, which may be made first."""
    from pcamlib import config
    from pcamlib.data.folder import data_folder

    items = list(overrides or [])
    if time_limit is not None:  # instead of the recipe's length, not of one given here
        items = ["train.epochs=null", "train.steps=null", f"train.time_limit={float(time_limit)}", *items]
    settings = config.parse(config.recipe(recipe), items)  # before any data are made
    folder = data_folder(data or settings.data.dir).resolve()
    return settings.model_copy(update={"data": settings.data.model_copy(update={"dir": str(folder)})})


@commands.command("train")
def train(
    overrides: Overrides = None,
    recipe: Recipe = "cnn",
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE-TIME.")] = None,
    time_limit: TimeLimit = None,
) -> None:
    """Train a model into a run folder; told to stop (USR1, TERM) it saves itself, exit code 75."""
    from pcamlib.provenance import now
    from pcamlib.training import loop

    settings = _settings(recipe, overrides, time_limit, data)
    out = out or Path("runs") / f"{Path(recipe).stem}-{now().replace(':', '')[:17]}"
    loop.train(settings, str(settings.data.dir), out)


@commands.command("probe")
def probe(
    overrides: Overrides = None,
    recipe: Recipe = "cnn",
    data: DataOption = None,
    time_limit: TimeLimit = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to try.")] = 30.0,
    job: Annotated[bool, typer.Option("--job", help="Refuse what does not fit the limits of this Slurm job.")] = False,
) -> None:
    """Say how long a training will take and how much memory; the options are those of `train`."""
    from pcamlib.training import probe as probing

    settings = _settings(recipe, overrides, time_limit, data)
    probing.tell(settings, str(settings.data.dir), seconds, *(probing.allocation() if job else (None, None)))


@commands.command("hpo")
def hpo(
    space: Annotated[str, typer.Argument(help="Name of a search space (cnn, smoke), or path of a YAML file.")],
    data: DataOption = None,
    out: Annotated[Path, typer.Option(help="Folder; the same command goes on with its search.")] = Path("runs/hpo"),
    workers: Annotated[int, typer.Option(min=1, help="Processes started here; more may join from other hosts.")] = 2,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials of the first phase, in all.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Random search within the same budget.")] = False,
) -> None:
    """Search hyperparameters; killed or stopped, the same command goes on, and the number of trials stays exact."""
    from pcamlib.data.folder import data_folder
    from pcamlib.experiments import hpo as searching
    from pcamlib.experiments import space as spaces

    wanted = spaces.read(space).sized(trials=trials, sampler="random" if random else None)
    found = searching.search(wanted, data_folder(data), out, workers)
    print(found.table().drop(columns=["weights"]).to_string(index=False))
    print(f"best: {', '.join(f'{key}={value}' for key, value in found.best().items())}")
    print(f"`pcam train --recipe {out / 'champion.yaml'}` trains it again")


@commands.command("hpo-worker")
def hpo_worker(study: Path, data: DataOption = None) -> None:
    """One worker of a search that `pcam hpo` or `pcam submit hpo` has begun, on this host or another."""
    from pcamlib.data.folder import data_folder
    from pcamlib.experiments import hpo as searching

    searching.work(searching.open_search(study), data_folder(data))


@commands.command("resume")
def resume(run: Path, data: DataOption = None) -> None:
    """Continue an unfinished run: the same weights as if it had never stopped."""
    from pcamlib.training import loop

    loop.resume(run, data)


@commands.command("evaluate")
def evaluate(run: Path, split: str = "valid", data: DataOption = None) -> None:
    """Predict a split with a run's best weights, store the predictions, print every metric with its interval."""
    from pcamlib.training import loop, metrics, runs

    finished = runs.open_run(run)
    print(metrics.text(loop.evaluate_run(finished, split, data)))
    print(f"stored: {finished.path / f'predictions_{split}.npz'}")


@runs_app.command("table")
def runs_table(
    folder: Annotated[Path, typer.Argument()] = Path("runs"),
    by: Annotated[str | None, typer.Option(help="'config': one row a configuration, mean and sd over seeds.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table there too.")] = None,
) -> None:
    """Every run below a folder: model, seed, steps, seconds, validation scores, weights, state."""
    from pcamlib.experiments import overview

    print(overview.text(overview.table(folder, by), csv))


@runs_app.command("diff")
def runs_diff(a: Path, b: Path) -> None:
    """What differs between two runs, causes first; exit code 1 when anything does."""
    from pcamlib.training import runs

    found = runs.diff(runs.open_run(a), runs.open_run(b))
    for line in runs.verdict(found):
        print(line)
    raise typer.Exit(1 if found else 0)


@runs_app.command("reproduce")
def runs_reproduce(
    run: Path,
    out: Annotated[Path | None, typer.Option(help="Folder of the new run; default RUN-again.")] = None,
    data: DataOption = None,
) -> None:
    """Train a finished run again from its folder alone, compare bit by bit; exit code 0 equal, 1 different."""
    from pcamlib.training import reproduce, runs

    _, found = reproduce.reproduce(runs.open_run(run), out, data)
    raise typer.Exit(0 if reproduce.same(found) else 1)


@runs_app.command("sync")
def runs_sync(
    folder: Annotated[Path, typer.Argument()] = Path("runs"),
    send: Annotated[bool, typer.Option("--send", help="Send them; without, nothing leaves this machine.")] = False,
) -> None:
    """Print which offline wandb runs would be sent, with size, steps and command."""
    from pcamlib.training.sync import sync

    sync(folder, send)
