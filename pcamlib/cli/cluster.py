"""`pcam submit ...` and `pcam jobs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcamlib.cli.options import DataOption, Overrides, RootOption, ScaleOption
from pcamlib.sources import ROOT

commands = typer.Typer()
submit_app = typer.Typer(help="Submit jobs to Slurm; nothing is submitted twice.", no_args_is_help=True)
commands.add_typer(submit_app, name="submit")

SiteOption = Annotated[
    str, typer.Option("--site", envvar="PCAM_SITE", help="slurm/sites/SITE.sh: snellius, local, or one of yours.")
]
PartitionOption = Annotated[str | None, typer.Option("--partition", help="Instead of the site's own choice.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Print the sbatch calls, submit nothing.")]
CpusOption = Annotated[int, typer.Option("--cpus", help="Of each node.")]
MemoryOption = Annotated[str, typer.Option("--memory", help="Of each node, as in 28G or 900M.")]
TimeOption = Annotated[str, typer.Option("--time", help="[days-]hours:minutes:seconds.")]
GpusOption = Annotated[int, typer.Option("--gpus", help="Of each node.")]


@submit_app.command("journal")
def submit_journal(
    site: SiteOption = "snellius",
    scale: ScaleOption = "course",
    data: DataOption = None,
    root: RootOption = ROOT,
    partition: PartitionOption = None,
    dry_run: DryOption = False,
) -> None:
    """Submit what is stale of the journals: a job a notebook, each after those it needs, then one that renders."""
    from pcamlib.submit import graph
    from pcamlib.submit.journal import journal

    lines = journal(site, scale, root=root, data=data, partition=partition, dry_run=dry_run)
    print(graph.text(lines))


@submit_app.command("train")
def submit_train(
    out: Annotated[Path, typer.Option(help="Run folder; the same command goes on with it.")],
    overrides: Overrides = None,
    site: SiteOption = "snellius",
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or path of a YAML file.")] = "cnn",
    data: DataOption = None,
    nodes: Annotated[int, typer.Option(min=1, help="More than one train one model together.")] = 1,
    gpus: GpusOption = 0,
    cpus: CpusOption = 16,
    memory: MemoryOption = "28G",
    time: TimeOption = "01:00:00",
    partition: PartitionOption = None,
    root: RootOption = ROOT,
    force: Annotated[bool, typer.Option("--force", help="Also when the forecast says that it cannot fit.")] = False,
    dry_run: DryOption = False,
) -> None:
    """Submit a training run; at its time limit it saves itself, queues again and goes on."""
    from pcamlib.submit import graph, runs

    wanted = {"cpus": cpus, "memory": memory, "time": time, "gpus": gpus}
    lines = runs.train(
        site, recipe, overrides or [], out, wanted, nodes=nodes, root=root, data=data, partition=partition,
        force=force, dry_run=dry_run,
    )  # fmt: skip
    print(graph.text(lines))


@submit_app.command("hpo")
def submit_hpo(
    space: Annotated[str, typer.Argument(help="Name of a search space (cnn, smoke), or path of a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder; the same command goes on with its search.")],
    site: SiteOption = "snellius",
    data: DataOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Jobs of the array; each works on one trial at a time.")] = 12,
    trials: Annotated[int | None, typer.Option(min=1, help="Trials of the first phase, in all.")] = None,
    gpus: GpusOption = 0,
    cpus: CpusOption = 16,
    memory: MemoryOption = "28G",
    time: TimeOption = "01:00:00",
    partition: PartitionOption = None,
    root: RootOption = ROOT,
    dry_run: DryOption = False,
) -> None:
    """Submit a hyperparameter search: an array of workers, then a job that writes champion.yaml."""
    from pcamlib.submit import graph, runs

    wanted = {"cpus": cpus, "memory": memory, "time": time, "gpus": gpus}
    lines = runs.hpo(
        site, space, out, workers, wanted, trials=trials, root=root, data=data, partition=partition, dry_run=dry_run
    )
    print(graph.text(lines))


@submit_app.command("benchmark")
def submit_benchmark(
    site: SiteOption = "snellius",
    model: Annotated[str, typer.Option(help="small or large.")] = "small",
    data: DataOption = None,
    gpus: GpusOption = 0,
    cpus: CpusOption = 16,
    memory: MemoryOption = "28G",
    time: TimeOption = "00:15:00",
    partition: PartitionOption = None,
    root: RootOption = ROOT,
    dry_run: DryOption = False,
) -> None:
    """Submit an array that measures images a second at batch sizes 1 to 512; notebook 07 reads what it leaves."""
    from pcamlib.submit import graph, runs

    wanted = {"cpus": cpus, "memory": memory, "time": time, "gpus": gpus}
    print(graph.text(runs.benchmark(site, model, wanted, root=root, data=data, partition=partition, dry_run=dry_run)))


@commands.command("jobs")
def jobs(
    everything: Annotated[bool, typer.Option("--all", help="Also earlier jobs of the same thing.")] = False,
    root: RootOption = ROOT,
) -> None:
    """States of the jobs submitted from here; of a dead one why, its last words, and the command that goes on."""
    from pcamlib.jobs import board

    found, unable = board.rows(root.resolve() / "runs" / "slurm", everything)
    print(board.text(found) if found else f"no jobs were submitted from {root}")
    if unable:
        print(f"states are from the logs alone: {unable}")
