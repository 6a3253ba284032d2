"""The training loop: one function that starts or resumes a run, bitwise the same either way.

    pcam train --recipe cnn --data DIR --out runs/first
    pcam resume runs/first

What a step computes depends on (seed, step) and the promised environment alone: order and augmentation are keyed,
the learning rate is a function of progress, dropout's generator is in the checkpoint. With `train.time_limit` the
schedule follows the clock, so such a run is repeatable only to within the seeds' spread; give `train.steps` to fix it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pcamlib import provenance, seeding
from pcamlib.config import Config
from pcamlib.data.patches import open_split
from pcamlib.errors import CheckpointError, DivergedError, PcamError, RunError
from pcamlib.files import write_json
from pcamlib.training import checkpoint, distributed, metrics, runs
from pcamlib.training.decision import inscribe
from pcamlib.training.evaluate import evaluate
from pcamlib.training.notice import Stopped, notice
from pcamlib.training.state import Training, choose_device, choose_precision, load_classifier, same_normalisation
from pcamlib.training.tracking import MetricsFile, NullTracker, wandb_tracker


def train(
    config: Config,
    folder: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    replay: Sequence[float] = (),
    report: Callable[[str], None] = print,
    on_step: Callable[[int], None] = lambda step: None,
    on_evaluation: Callable[[dict[str, Any]], None] = lambda row: None,
) -> runs.Run:
    """Train until the configured end and leave a finished run folder.

    Args:
        config: the whole configuration; on resume the run folder's own is used by the caller.
        folder: data folder in the official layout.
        out: run folder; new, or unfinished with `resume`.
        replay: progress at each step of an earlier run, to be followed instead of the clock (`reproduce`).
        report: receives a line at each evaluation.
        on_step: called after each step and whatever was saved for it.
        on_evaluation: called after `on_step` with the logged row of each evaluation; what it raises ends the run.

    Raises:
        RunError: `out` is taken, in use, or rests on other data; or the loss is not finite.
        Stopped: USR1 or TERM came; the step in progress is done and saved.
    """
    with distributed.join(choose_device(config.train.device)) as world:
        said = report if world.leads else lambda line: None
        out = world.gather(str(out))[0]  # a folder named by the clock may differ between processes
        return _train(config, folder, out, resume, replay, said, on_step, on_evaluation)


def _train(
    config: Config,
    folder: str | Path,
    out: str | Path,
    resume: bool,
    replay: Sequence[float],
    report: Callable[[str], None],
    on_step: Callable[[int], None],
    on_evaluation: Callable[[dict[str, Any]], None],
) -> runs.Run:
    """What each process does; process 0 alone writes."""
    started = time.monotonic()
    run = runs.open_run(out) if resume else runs.free(out)
    if run.success:
        report(f"{run.path}: already finished after {run.success['steps']} steps")
        return run
    state = Training(config, folder)  # before anything is written: bad data leave no run folder behind
    world, record = state.world, state.world.agreed(state.record())
    with run.lock(report) if world.leads else nullcontext(lambda: None) as check:
        # nobody looks before process 0 holds the folder: who held it may have gone on until now
        if world.gather(resume and run.success is not None)[0]:
            report(f"{run.path}: finished meanwhile")
            return run
        if resume:
            same_data(run, record)
            if run.last.exists():
                state.load(run.last)
        elif world.leads:
            runs.create(out, config, replay)
        attempt = runs.begin(run, record) if world.leads else 0
        world.gather(attempt)  # nobody goes on before the folder is there
        for key, before, after in provenance.difference(run.provenance["attempts"][0], record, runs.HARMLESS):
            if key.startswith(provenance.PROMISE):
                report(f"bitwise equality with the first attempt ends here: {key} was {before}, is {after}")
        report(_banner(state, run))
        with notice() as came:  # to the last line written: TERM often comes twice, from Slurm and from the job's script
            try:
                _steps(state, run, attempt, started, came, check, report, on_step, on_evaluation)
            except BaseException as error:
                with suppress(PcamError):  # a full disk is reported by what met it first
                    check()
                    if world.leads:
                        runs.end(run, "stopped" if isinstance(error, Stopped) else "failed")
                raise
            if world.leads:
                runs.end(run, "ok")
            world.gather(None)  # torchrun ends process 0 when another one crashes in leaving
        return run


def _banner(state: Training, run: runs.Run) -> str:
    kind = "SYNTHETIC data" if state.train.synthetic else "real data"
    weights = sum(p.numel() for p in state.model.parameters())
    place = f"{state.device} {state.precision}, {torch.get_num_threads()} threads"
    if state.world.size > 1:
        place = f"{state.world.size} processes of {place}"
    return (
        f"{run.path}: {state.config.model.name}, {weights:,} weights, {len(state.loader.rows):,} of "
        f"{len(state.train):,} train and {len(state.valid):,} valid patches ({kind}), {place}, "
        f"from step {state.progress.step}"
    )


def same_data(run: runs.Run, record: dict[str, Any]) -> None:
    """Raises RunError where a record's data are not those that the run began with."""
    path = run.path / "provenance.json"
    if not path.exists():  # killed before the first record: nothing rests on the data yet
        return
    for part, fingerprint in run.provenance["data"].items():
        if record["data"][part] != fingerprint and part == "rows":
            raise RunError(f"{run.path}: the audit leaves out other patches than when this run began; start a new run")
        if record["data"][part] != fingerprint:
            raise RunError(
                f"{run.path}: the {part} patches are not those that this run began with; give its data folder"
            )


def _steps(
    state: Training,
    run: runs.Run,
    attempt: int,
    started: float,
    came: list[str],
    check: Callable[[], None],
    report: Callable[[str], None],
    on_step: Callable[[int], None],
    on_evaluation: Callable[[dict[str, Any]], None],
) -> None:
    """Steps, evaluations and checkpoints until the end, then predictions and SUCCESS; or until a signal `came`."""
    settings, progress = state.config.train, state.progress
    evaluate_every = settings.evaluate_every or len(state.loader)
    checkpoint_every = settings.checkpoint_every or evaluate_every
    earlier, limit, replay = progress.elapsed, settings.time_limit or math.inf, run.replay
    state.model.train()
    over, leads = _over(state), state.world.leads
    with (
        closing(MetricsFile(run.path / "metrics.jsonl", progress.step) if leads else NullTracker()) as log,
        closing(wandb_tracker(state.config, run.path, attempt) if leads else NullTracker()) as copy,
    ):
        while not over:
            for batch in state.loader:
                elapsed, _ = state.world.clock(earlier + time.monotonic() - started)
                share = max(progress.step / state.total if state.total else 0.0, elapsed / limit)
                share = replay[progress.step] if replay else min(share, 1.0)
                row = state.step(batch, share)
                progress.step += 1
                progress.elapsed, stop = state.world.clock(earlier + time.monotonic() - started, bool(came))
                row = {"step": progress.step, **row, "epoch": state.loader.epoch}
                row |= {"progress": share, "seconds": progress.elapsed, "attempt": attempt}
                over = _over(state)
                better = False
                if progress.step % evaluate_every == 0 or over:
                    row |= _evaluate(state, run, check)
                    better = progress.best_step == progress.step
                    report(_line(row, state))
                    over = _over(state)
                check()
                log.log(row)
                copy.log(row)
                due = progress.step % checkpoint_every == 0 or over or stop
                # by the clock no step comes again: the best weights must not outlive the steps that led to them
                if leads and (due or (better and settings.time_limit)):
                    state.save(run.last)
                on_step(progress.step)
                if "valid_auc" in row:
                    on_evaluation(row)
                if over:
                    break
                if stop:
                    cause = came[0] if came else "process 0"
                    raise Stopped(
                        f"{run.path}: told to stop ({cause}), saved at step {progress.step}; "
                        f"`pcam resume {run.path}` goes on"
                    )
    if leads:
        check()
        _finish(state, run, report)


def _over(state: Training) -> bool:
    """Whether steps, time or patience are used up; asked again on resume, so that an end reached stays the end."""
    settings, progress = state.config.train, state.progress
    return (
        progress.step >= (state.total or math.inf)
        or progress.elapsed >= (settings.time_limit or math.inf)
        or progress.since_best >= (settings.patience or math.inf)
    )


def _evaluate(state: Training, run: runs.Run, check: Callable[[], None]) -> dict[str, float]:
    """Point metrics on the validation split; keeps the weights when they are the best so far."""
    world = state.world
    if world.size > 1 and len(set(world.gather(checkpoint.weights_digest(state.model)))) > 1:
        raise RunError(f"step {state.progress.step}: the processes' weights drifted apart; please report it")
    predictions = evaluate(state.judged, state.valid, precision=state.precision, device=state.device, world=world)
    if not np.isfinite(predictions.probability).all():
        step = state.progress.step
        raise DivergedError(f"step {step}: the weights give NaN; lower optimizer.lr or set train.grad_clip")
    point = metrics.scores(predictions.label, predictions.probability, np.ones((1, len(predictions.label))))
    found = {f"valid_{name}": float(point[name][0]) for name in ("auc", "nll", "accuracy")}
    score = found["valid_auc"] if state.config.train.select == "auc" else -found["valid_nll"]
    progress = state.progress
    progress.evaluations += 1
    progress.since_best += 1
    if score > progress.best:
        progress.best, progress.best_step, progress.since_best = score, progress.step, 0
        meta = {**state.header(), "step": progress.step, "valid": found, "fingerprint": state.train.fingerprint}
        check()
        if world.leads:
            checkpoint.save(run.best, checkpoint.join("model", state.judged.state_dict()), meta)
    return found


def _line(row: dict[str, Any], state: Training) -> str:
    end = f"/{state.total}" if state.total else ""
    return (
        f"  {row['seconds']:7.1f} s  step {row['step']}{end}  epoch {row['epoch']}  loss {row['loss']:.4f}  "
        f"valid AUC {row['valid_auc']:.4f}  NLL {row['valid_nll']:.4f}"
    )


def _finish(state: Training, run: runs.Run, report: Callable[[str], None]) -> None:
    """Predictions of the best weights, the report computed from them, SUCCESS."""
    final = checkpoint.weights_digest(state.model)
    model = load_classifier(run.best)[0].to(state.device)
    progress = state.progress
    predictions = evaluate(model, state.valid, precision=state.precision, device=state.device)
    result = run.save_predictions(predictions, "valid", progress.evaluations)
    inscribe(run, predictions, result, state.precision)
    for sentence in result["alarms"]:
        report(f"  ALARM {sentence}")
    digests = {"weights": final, "best": checkpoint.weights_digest(model), "best_step": progress.best_step}
    lengths = {"steps": progress.step, "seconds": progress.elapsed, "evaluations": progress.evaluations}
    write_json(run.path / "SUCCESS", {**lengths, **digests})
    if auc := result["metrics"].get("auc"):
        low, high = auc["interval"]
        report(f"{run.path}: valid AUC {auc['value']:.4f} ({low:.4f} to {high:.4f}, n = {result['n']:,}), "
               f"best of {progress.evaluations} evaluations")  # fmt: skip


def resume(out: str | Path, folder: str | Path | None = None, **options: Any) -> runs.Run:
    """Continue an unfinished run with its own configuration and, unless given, its own data folder."""
    run = runs.open_run(out)
    return train(run.config, data_of(run, folder), out, resume=True, **options)


def evaluate_run(run: runs.Run, split: str = "valid", folder: str | Path | None = None) -> dict[str, Any]:
    """Predict a split with the run's best weights, store predictions and report in the run folder.

    Patches other than those the run was trained and validated on go under a name with their fingerprint.

    Args:
        run: a run with a best checkpoint.
        split: "train", "valid" or "test".
        folder: data folder; None: the one the run was trained on.

    Returns:
        The report, as `metrics.report`.

    Raises:
        RunError: the run does not say where its data lie.
        CheckpointError: there is no best checkpoint, or it is damaged.
        DataError: the split is missing or has no labels.
    """
    config = run.config
    patches = open_split(data_of(run, folder), split)
    device = choose_device(config.train.device)
    seeding.set_threads(config.train.threads)
    model, meta = load_classifier(run.best)
    if meta["model"] != config.model.model_dump():
        raise CheckpointError(f"{run.best}: a checkpoint of another model than the one in the run's config.yaml")
    same_normalisation(run.best, meta, run.provenance["normalisation"])
    precision = choose_precision(config.train.precision, device)
    predictions = evaluate(model.to(device), patches, precision=precision, device=device)
    own = run.provenance["data"].get(split, predictions.fingerprint) == predictions.fingerprint
    chosen_on = (run.success or {}).get("evaluations", 0) if own and split == "valid" else 0
    with run.lock():
        name = split if own else f"{split}-{predictions.fingerprint[:8]}"
        return run.save_predictions(predictions, name, chosen_on)


def data_of(run: runs.Run, given: str | Path | None = None) -> str | Path:
    """The data folder given, else the one the run was trained on; RunError where it names none."""
    where = given or run.config.data.dir
    if where is None:
        raise RunError(f"{run.path}: the run does not say where its data lie; give --data DIR")
    return where
