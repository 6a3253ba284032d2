"""What each ingredient of the recipe `fast` gives: left out or exchanged, one at a time, over the same seeds.

    python benchmarks/ingredients.py --data DIR [--json FILE] [--steps 500] [--seeds 3] [--out DIR]

A row is `fast` with one thing changed, trained for --steps steps of 64 patches and judged once, at the end, on the
validation split; the average of weights and the eight views are left out of `fast`'s own runs. Learning rates are
those of docs/LOG.md, not tuned again. A finished run in --out is not run again while code, data and settings stay the
same, so this can be stopped and called again at any time (10 trainings a seed). Without --data the patches are
synthetic.

A difference is to `fast` with the same seed; its interval is that of t over the seeds and stands alone, "p (Holm)"
counts all rows. Images a second are those of training, and fall whenever a neighbour of this machine works.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from pcamlib.config import parse, recipe
from pcamlib.data.folder import data_folder
from pcamlib.data.patches import open_split
from pcamlib.experiments import compare, seeds, study
from pcamlib.files import write_json
from pcamlib.sources import ROOT
from pcamlib.training import metrics
from pcamlib.training.evaluate import Predictions, evaluate
from pcamlib.training.runs import Run
from pcamlib.training.state import choose_device, choose_precision, load_classifier

#: Trained: what is changed in `fast`, the first.
CHANGES: dict[str, tuple[str, ...]] = {
    "fast": (),
    "AdamW 2e-3 for Muon": ("optimizer.name=adamw", "optimizer.lr=2e-3", "optimizer.weight_decay=0.05"),
    "SGD-Nesterov 0.1 for Muon": ("optimizer.name=sgd", "optimizer.lr=0.1"),
    "no stain jitter": ("loader.augment=[d4]",),
    "no D4 augmentation": ("loader.augment=[stain]",),
    "shift 4 px, as in `best`": ("loader.augment=[d4, stain, shift]",),
    "constant rate after warm-up": ("schedule.name=constant",),
    "centre 64, not pooled": ("model.crop=64", "model.pool=1"),
    "32 channels": ("model.width=32",),
    "D4 network": ("model.name=d4", "model.views=1"),
}
#: Judged from the runs of `fast`: the average of weights (best) or the last weights, and how many views.
JUDGED = {"no average": ("last", 8), "no views": ("best", 1), "no average, no views": ("last", 1)}


def predicted(run: Run, data: Path, weights: str, views: int) -> Predictions:
    """What a run says of the validation split by other weights or views than its own; kept in its folder."""
    stored = run.path / f"predictions_valid-{weights}-{views}.npz"
    if not stored.exists():
        model, _ = load_classifier(run.path / "checkpoints" / f"{weights}.safetensors")
        model.views = views
        device = choose_device(run.config.train.device)
        precision = choose_precision(run.config.train.precision, device)
        evaluate(model.to(device), open_split(data, "valid"), precision=precision, device=device).save(stored)
    return Predictions.load(stored)


def judged(run: Run, predictions: Predictions) -> dict[str, float]:
    """AUC and NLL of predictions, and the images/s of the run's training after its first steps."""
    label, probability = predictions.label, predictions.probability
    point = metrics.scores(label, probability, np.ones((1, len(label))))
    seconds = [row["seconds"] for row in run.metrics()]
    warm = min(10, len(seconds) // 2)
    speed = run.config.loader.batch_size * (len(seconds) - warm) / (seconds[-1] - seconds[warm - 1])
    return {"auc": float(point["auc"][0]), "nll": float(point["nll"][0]), "images/s": speed}


def measure(data: Path, folder: Path, steps: int, count: int) -> dict[str, list[dict[str, float]]]:
    """Scores of each seed by row, seed by seed, so that what is there when it is stopped can be compared."""
    base = parse(recipe("fast"), [f"train.steps={steps}", f"train.evaluate_every={steps}"])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*CHANGES, *JUDGED)}
    for seed in range(count):
        for place, (name, changes) in enumerate(CHANGES.items()):
            config = base.override(*changes, f"seed={seed}")
            run = study.run(f"{place}-seed{seed}", config, data, folder, report=lambda line: None)
            found[name].append(judged(run, run.predictions()))
            if not changes:
                for other, how in JUDGED.items():
                    found[other].append(judged(run, predicted(run, data, *how)))
            scores = found[name][-1]
            told = f"AUC {scores['auc']:.4f}  NLL {scores['nll']:.4f}  {scores['images/s']:,.0f} images/s"
            print(f"  seed {seed}  {name:28s} {told}", flush=True)
    return found


def table(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row an ingredient: means, sd, and the paired difference in AUC with its verdict."""
    first, rows = found["fast"], []
    for name, own in found.items():
        row: dict[str, Any] = {"ingredient": name}
        for key in ("auc", "nll"):
            over = seeds.spread([each[key] for each in own])
            row |= {key: over["mean"], f"sd of {key}": over["sd"]}
        row["auc of each seed"] = [each["auc"] for each in own]
        gaps = [each["auc"] - reference["auc"] for each, reference in zip(own, first, strict=True)]
        over = seeds.spread(gaps)
        low, high = over["interval"]
        row |= {"minus fast": over["mean"], "low": low, "high": high, "p": float(stats.ttest_1samp(gaps, 0).pvalue)}
        row["verdict"] = "not shown" if low <= 0 <= high else "shown"
        rows.append({**row, "images/s": statistics.median(each["images/s"] for each in own)})
    itself, *others = rows
    itself |= dict.fromkeys(("minus fast", "low", "high", "p", "p (Holm)", "verdict"))
    for row, p in zip(others, compare.holm(np.array([row["p"] for row in others])), strict=True):
        row["p (Holm)"] = float(p)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with the PCam files; default $PCAM_DATA, else synthetic")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--steps", type=int, default=500, help="of 64 patches")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "ingredients", help="where the runs are kept")
    options = parser.parse_args()
    if options.seeds < 2 or options.steps < 2:
        parser.error("--seeds and --steps must be at least 2: one seed has no spread, one step no rate")
    data = data_folder(options.data)
    splits = [open_split(data, split) for split in ("train", "valid")]
    kind = "SYNTHETIC" if splits[0].synthetic else "real"
    print(f"{len(splits[0]):,} train and {len(splits[1]):,} valid patches ({kind}), {options.steps} steps, "
          f"{options.seeds} seeds, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")  # fmt: skip
    rows = table(measure(data, options.out, options.steps, options.seeds))
    shown = pd.DataFrame(rows).drop(columns=["auc of each seed", "p"])
    rounded = {"images/s": lambda value: f"{value:,.0f}", "p (Holm)": lambda value: f"{value:.2g}"}
    print(shown.to_string(index=False, float_format="{:.4f}".format, formatters=rounded, na_rep=""))
    if options.json:
        about = {"patches": kind, "steps": options.steps, "seeds": options.seeds, "threads": torch.get_num_threads()}
        write_json(options.json, [{**about, **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
