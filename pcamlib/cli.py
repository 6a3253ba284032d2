"""`pcam`: parse, call, print. No logic lives here; heavy imports wait until a command needs them.

pcam --help
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from pcamlib.errors import PcamError
from pcamlib.sources import ROOT

app = typer.Typer(help="The PCam research journal.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)
data_app = typer.Typer(help="Fetch, generate and describe patches.", no_args_is_help=True)
runs_app = typer.Typer(help="List, compare, repeat and send runs.", no_args_is_help=True)
notebook_app = typer.Typer(help="Execute notebooks headlessly.", no_args_is_help=True)
journal_app = typer.Typer(help="Make, render and check the journal.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(runs_app, name="runs")
app.add_typer(notebook_app, name="notebook")
app.add_typer(journal_app, name="journal")

DataOption = Annotated[
    str | None, typer.Option("--data", help="Folder with the PCam files; default $PCAM_DATA, else synthetic.")
]
ScaleOption = Annotated[str, typer.Option("--scale", help="papermill_jobs/SCALE.yaml: smoke, course or full.")]
RootOption = Annotated[Path, typer.Option("--root", help="Where journal/, assets/ and JOURNAL.md are written.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As in optimizer.lr=1e-3.")]


@data_app.command("fetch")
def data_fetch(folder: Path) -> None:
    """Download the nine official files (7.5 GiB packed), verified, resumed where a download broke off."""
    from pcamlib.data.fetch import fetch

    fetch(folder)


@data_app.command("synthetic")
def data_synthetic(
    folder: Path,
    train: int = 4000,
    valid: int = 1000,
    test: int = 1000,
    seed: int = 0,
    course: Annotated[Path | None, typer.Option(help="Also write the course's flawed kind of files there.")] = None,
) -> None:
    """Generate H&E-like patches in the official layout."""
    from pcamlib.data.flaws import course_like
    from pcamlib.data.synthetic import generate

    generate(folder, seed=seed, sizes={"train": train, "valid": valid, "test": test})
    if course:
        course_like(folder, course, seed=seed)


@data_app.command("info")
def data_info(data: DataOption = None) -> None:
    """Splits, class counts, storage and flagged patches of a folder."""
    from pcamlib.data.folder import data_folder
    from pcamlib.experiments import explore

    splits = explore.opened(data_folder(data))
    print(explore.split_table(splits).to_string(index=False))
    print(explore.outlier_table(splits).to_string(index=False))


@app.command("audit")
def audit(
    folder: Annotated[
        str | None, typer.Argument(help="Folder with the PCam files; default $PCAM_DATA, else synthetic.")
    ] = None,
    labels: Annotated[bool, typer.Option(help="Also look for wrong labels: trains small networks, minutes.")] = True,
    models: Annotated[bool, typer.Option(help="Also look for backdoors in a trained network.")] = False,
    ids: Annotated[Path | None, typer.Option(help="List of tile ids (SHA-1) to authenticate the patches by.")] = None,
    run: Annotated[Path | None, typer.Option(help="A run whose normalisation is checked against these splits.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the whole report there, every row number included.")] = None,
) -> None:
    """Size, integrity, duplicates, leakage, labels, poisoning; exit code 1 when anything is found, 2 when unreadable.

    The rows to leave out are kept beside the data: train on the rest with data.clean=true.
    """
    from pcamlib.audit import report
    from pcamlib.audit.stages import Options
    from pcamlib.data.folder import data_folder
    from pcamlib.files import write_json

    where = data_folder(folder)
    if json:
        write_json(json, {"folder": str(where), "findings": None})  # a place that cannot be written is told now
    found = report.audit(where, Options(labels=labels, models=models, ids=ids, run=run))
    print(found.text())
    if json:
        write_json(json, found.json())
    raise typer.Exit(1 if found.findings else 0)


@app.command("train")
def train(
    overrides: Overrides = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or path of a YAML file.")] = "cnn",
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE-TIME.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Seconds; the schedule then follows the clock.")] = None,
) -> None:
    """Train a model into a run folder."""
    from pcamlib import config
    from pcamlib.data.folder import data_folder
    from pcamlib.provenance import now
    from pcamlib.training import loop

    items = list(overrides or [])
    if time_limit is not None:  # instead of the recipe's length, not of one given here
        items = ["train.epochs=null", "train.steps=null", f"train.time_limit={float(time_limit)}", *items]
    settings = config.parse(config.recipe(recipe), items)  # before any data are made
    folder = data_folder(data or settings.data.dir)
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"dir": str(folder.resolve())})})
    loop.train(settings, folder, out or Path("runs") / f"{Path(recipe).stem}-{now().replace(':', '')[:17]}")


@app.command("hpo")
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


@app.command("resume")
def resume(run: Path, data: DataOption = None) -> None:
    """Continue an unfinished run: the same weights as if it had never stopped."""
    from pcamlib.training import loop

    loop.resume(run, data)


@app.command("evaluate")
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


@notebook_app.command("run")
def notebook_run(
    name: str,
    scale: ScaleOption = "smoke",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="name=value, checked before the kernel starts.")
    ] = None,
    data: DataOption = None,
    root: RootOption = ROOT,
    force: Annotated[bool, typer.Option(help="Run also when nothing changed.")] = False,
) -> None:
    """Execute one notebook; its evidence goes into the journal under --root."""
    from pcamlib import make

    make.notebook(name, scale, root=root, data=data, assignments=parameter or [], force=force)


@journal_app.command("make")
def journal_make(
    scale: ScaleOption = "smoke", data: DataOption = None, root: RootOption = ROOT, name: str = "assignment_2"
) -> None:
    """Execute what is stale, render JOURNAL.md and its HTML page, say what is still open."""
    from pcamlib import make

    make.journal(scale, root=root, data=data, name=name)


@journal_app.command("render")
def journal_render(name: str = "assignment_2", root: RootOption = ROOT) -> None:
    """Render JOURNAL.md and JOURNAL.html from the evidence as it is."""
    from pcamlib.journal.render import render

    for path in render(name, root.resolve()):
        print(path)


@journal_app.command("check")
def journal_check(
    name: str = "assignment_2",
    root: RootOption = ROOT,
    strict: Annotated[bool, typer.Option(help="Open places count as faults.")] = False,
) -> None:
    """List what is open, stale, missing or typed by hand; exit code 1 when something is wrong."""
    from pcamlib.journal.check import check

    found = check(root.resolve(), name)
    for finding in found:
        print(finding)
    faults = sum(f.severity == "fault" for f in found)
    print(f"{faults} faults, {len(found) - faults} open places")
    raise typer.Exit(1 if faults or (strict and found) else 0)


def main() -> None:
    """Entry point: a `PcamError` becomes one line and exit code 2; what nobody foresaw keeps its traceback, code 3."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it tells at length how it was loaded
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # progress is visible through a pipe too
    try:
        app()
    except PcamError as error:
        if _speaks():
            print(f"pcam: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `pcam runs table | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        sys.exit(3)  # 1 is the answer of `audit`, `runs diff`, `runs reproduce` and `journal check`


def _speaks() -> bool:
    """Of several processes that torchrun started, one tells of an error."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from pcamlib.training import distributed

    return distributed.speaks()


if __name__ == "__main__":
    main()
