"""Training, search and benchmark as Slurm jobs; the same command goes on with what was interrupted.

pcam submit train --site snellius --recipe best --data DIR --out runs/best --time 04:00:00
pcam submit hpo cnn --site snellius --workers 12 --data DIR --out runs/hpo
pcam submit benchmark --site snellius --partition gpu_course --gpus 1
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pcamlib import config, seeding
from pcamlib.data.folder import data_folder
from pcamlib.experiments import hpo as searching
from pcamlib.experiments import space as spaces
from pcamlib.jobs import slurm
from pcamlib.jobs.scale import Resources
from pcamlib.jobs.slurm import Request
from pcamlib.sources import ROOT
from pcamlib.submit.graph import Line, Report, Step, logs_of, submit
from pcamlib.training.probe import probe


def train(
    site: str, recipe: str, overrides: Sequence[str], out: Path, resources: dict[str, Any], *, nodes: int = 1,
    root: Path = ROOT, data: str | None = None, partition: str | None = None, force: bool = False,
    dry_run: bool = False, report: Report = print,
) -> list[Line]:  # fmt: skip
    """Submit one training run; interrupted by its time limit it goes on by itself.

    Of a run of one process on CPUs time and memory are forecast here; every other is forecast on its node, by its job.

    Args:
        site: as in slurm/sites.
        recipe: name, or path of a YAML file.
        overrides: `key=value`.
        out: run folder; one that was begun is gone on with.
        resources: cpus, memory, time and gpus of each of `nodes` nodes.
        force: forecast nothing, and refuse nothing for it.

    Raises:
        PcamError: unknown site or partition, a configuration that does not fit, a request that no node can serve or
            into which the run cannot fit, no Slurm, or a job with other settings that writes `out`.
    """
    wanted, out = config.validate(Resources, resources), out.resolve()
    goes = _partition(site, partition, wanted.gpus)
    settings = config.parse(config.recipe(recipe), overrides)
    if (out / "SUCCESS").exists():
        report(f"{out}: this run is finished; nothing to submit")
        return []
    folder = data_folder(data or settings.data.dir).resolve()
    named = str(Path(recipe).resolve()) if recipe.endswith((".yaml", ".yml")) else recipe
    call = ("--recipe", named, "--data", str(folder), *overrides)
    again = ["pcam", "submit", "train", "--site", site, "--out", str(out)]
    again += [*_options(root, partition, wanted, nodes), *(["--force"] if force else []), *call]
    script = Request(
        "train_ddp.sbatch", (str(out), *call), _name("train", out), site, goes, wanted, logs_of(root),
        "the options of `pcam submit train`", nodes, exports=(("PCAM_FORCE", "1"),) if force else (),
    )  # fmt: skip

    def fits() -> None:
        threads = settings.train.threads or min(wanted.cpus, seeding.cores())
        forecast = probe(settings.override(f"train.threads={threads}"), folder)
        report(f"forecast: {forecast.text()}")
        forecast.refuse(wanted.seconds, wanted.megabytes * 2**20)

    elsewhere = force or nodes > 1 or wanted.gpus or (out / "config.yaml").exists()
    step = Step(script, out, queues=False, fits=None if elsewhere else fits)
    return submit([step], logs_of(root), shlex.join(again), dry_run, report)


def hpo(
    site: str, space: str, out: Path, workers: int, resources: dict[str, Any], *, trials: int | None = None,
    root: Path = ROOT, data: str | None = None, partition: str | None = None, dry_run: bool = False,
    report: Report = print,
) -> list[Line]:  # fmt: skip
    """Submit a search: an array of workers on one study, then a job that writes its champion and prints its table.

    Raises:
        PcamError: as `train`, or the folder holds a search of another space or other data.
    """
    wanted, out = config.validate(Resources, resources), out.resolve()
    goes = _partition(site, partition, wanted.gpus)
    searched = spaces.read(space).sized(trials=trials)
    folder = data_folder(data).resolve()
    found = None if dry_run else searching.begin(searched, folder, out, report)
    if found and found.finished() and (out / "champion.yaml").exists():
        report(f"{out}: this search is finished; nothing to submit")
        return []
    named = str(Path(space).resolve()) if space.endswith((".yaml", ".yml")) else space
    call = [named, "--data", str(folder), "--out", str(out), *(["--trials", str(trials)] if trials else [])]
    again = ["pcam", "submit", "hpo", *call, "--site", site, "--workers", str(workers)]
    again += _options(root, partition, wanted)
    asked, logs = "the options of `pcam submit hpo`", logs_of(root)
    tasks = Request(
        "hpo_worker.sbatch", (str(out), str(folder)), _name("hpo", out), site, goes, wanted, logs, asked,
        array=f"0-{workers - 1}",
    )  # fmt: skip
    end = Request(
        "pcam.sbatch", ("hpo", *call, "--workers", "1"), _name("hpo-end", out), site, goes, wanted, logs, asked
    )
    steps = [Step(tasks, out / "trials", queues=False), Step(end, out / "champion.yaml", (tasks.name,), anyhow=True)]
    return submit(steps, logs, shlex.join(again), dry_run, report)


def benchmark(
    site: str, model: str, resources: dict[str, Any], *, sizes: Sequence[int] = (1, 8, 32, 128, 512), root: Path = ROOT,
    data: str | None = None, partition: str | None = None, dry_run: bool = False, report: Report = print,
) -> list[Line]:  # fmt: skip
    """Submit an array that measures images a second, a task a batch size, one after the other.

    Raises:
        PcamError: as `train`.
    """
    wanted = config.validate(Resources, resources)
    goes, folder = _partition(site, partition, wanted.gpus), data_folder(data).resolve()
    exports = {"PCAM_BATCH_SIZES": " ".join(map(str, sizes)), "PCAM_MODEL": model, "PCAM_DATA": str(folder)}
    again = ["pcam", "submit", "benchmark", "--site", site, "--model", model, "--data", str(folder)]
    again += _options(root, partition, wanted)
    measured = Request(
        "benchmark.sbatch", (), f"benchmark-{goes}", site, goes, wanted, logs_of(root),
        "the options of `pcam submit benchmark`", array=f"0-{len(sizes) - 1}%1", exports=tuple(exports.items()),
    )  # fmt: skip
    writes = ROOT / "runs" / "benchmarks" / f"{goes}-{model}"
    return submit([Step(measured, writes)], logs_of(root), shlex.join(again), dry_run, report)


def _partition(site: str, given: str | None, gpus: int) -> str:
    """Where a job goes; that there is such a partition is known before data or a study are made."""
    place = slurm.site(site)
    partition = given or place.partition(gpus)
    slurm.nodes(partition)
    return partition


def _name(kind: str, out: Path) -> str:
    return f"{kind}-{re.sub(r'[^A-Za-z0-9_.-]', '-', out.name)}"


def _options(root: Path, partition: str | None, wanted: Resources, nodes: int = 1) -> list[str]:
    """The options that ask for these resources again."""
    given = {"cpus": wanted.cpus, "memory": wanted.memory, "time": wanted.time, "gpus": wanted.gpus}
    more = {"nodes": nodes if nodes > 1 else None, "partition": partition, "root": root if root != ROOT else None}
    return [
        word for name, value in {**given, **more}.items() if value is not None for word in (f"--{name}", str(value))
    ]
