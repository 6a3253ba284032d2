"""What notebook 00 shows of a data set: files, balance, examples, intensities, outliers, what the sampler changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pcamlib.data import convert, layout, sampling
from pcamlib.data.patches import Patches, open_split, sample
from pcamlib.training.runs import Run

CLASSES = ("normal", "tumour")
CHANNELS = ("red", "green", "blue")


def opened(folder: Path) -> dict[str, Patches]:
    """The splits of a folder that have an x file."""
    return {split: open_split(folder, split) for split in layout.present(folder)}


def split_table(splits: dict[str, Patches]) -> pd.DataFrame:
    """One row a split: patches, class counts, how the file stores them, flagged patches, fingerprint."""
    rows = []
    for split, patches in splits.items():
        positive = None if patches.labels is None else int(patches.labels.sum())
        rows.append({
            "split": split,
            "patches": len(patches),
            "positive": positive,
            "negative": None if positive is None else len(patches) - positive,
            "dtype": str(patches.stored.dtype),
            "storage": patches.stored.compression or ("chunked" if patches.stored.chunks else "contiguous"),
            "MiB": round(patches.stored.path.stat().st_size / 2**20, 1),
            "flagged": int((~patches.valid).sum()),
            "fingerprint": patches.fingerprint[:12],
        })  # fmt: skip
    return pd.DataFrame(rows, dtype=object)  # None stays None: a split without labels has no counts


def outlier_table(splits: dict[str, Patches]) -> pd.DataFrame:
    """Flagged patches of each kind, by split and class."""
    rows = []
    for split, patches in splits.items():
        for label, name in enumerate(CLASSES):
            inside = np.ones(len(patches), bool) if patches.labels is None else patches.labels == label
            counts = {kind: int(((patches.flags & bit) > 0)[inside].sum()) for kind, bit in convert.FLAGS.items()}
            rows.append({"split": split, "class": name, "patches": int(inside.sum()), **counts})
            if patches.labels is None:
                rows[-1]["class"] = "unlabelled"
                break
    return pd.DataFrame(rows)


def sampler_table(labels: np.ndarray, batch_size: int = 32, seed: int = 0) -> tuple[pd.DataFrame, dict[str, list[int]]]:
    """Positives in a batch, expected from the class mix and counted over one epoch, without and with balancing.

    Returns:
        A table with one row a sampler, and the count in each batch by sampler.
    """
    counts, rows = {}, []
    for kind, share in (("shuffle", float(labels.mean())), ("balanced", 0.5)):
        found = sampling.positives_per_batch(labels, sampling.order(kind, labels, seed, 0), batch_size)
        counts[kind] = found.tolist()
        low, high = np.percentile(found, [2.5, 97.5])  # of batches: the mean of a whole shuffled epoch has no spread
        mean = round(float(found.mean()), 2)
        rows.append({"sampler": kind, "expected": round(batch_size * share, 2), "counted": mean,
                     "95 % of batches": [float(low), float(high)], "batches": len(found)})  # fmt: skip
    return pd.DataFrame(rows), counts


def intensity_histogram(patches: Patches, most: int = 2000, bins: int = 64) -> dict[str, list[float]]:
    """Share of pixels in each of `bins` intensity bins, by class and channel, over up to `most` valid patches."""
    rows = sample(patches, most)
    assert patches.labels is not None
    series: dict[str, list[float]] = {}
    for label, name in enumerate(CLASSES):
        pixels = patches.images[rows[patches.labels[rows] == label]].reshape(-1, 3)
        for channel, colour in enumerate(CHANNELS):
            counts = np.bincount(pixels[:, channel] // (256 // bins), minlength=bins)
            series[f"{name} {colour}"] = (counts / max(counts.sum(), 1)).tolist()
    return series


def patch_means(patches: Patches) -> np.ndarray:
    """Mean stored intensity of each patch, before any clipping; (N,) float64, NaN where a patch holds NaN."""
    return np.concatenate(
        [rows.reshape(len(rows), -1).mean(1, dtype=np.float64) for _, rows in convert.blocks(patches.stored)]
    )


def plot_balance(counts: dict[str, Sequence[int]]) -> Figure:
    """Bars of normal and tumour patches for each named set."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    places = np.arange(len(counts))
    for label, (name, colour) in enumerate(zip(CLASSES, ("#4c78a8", "#c4447a"), strict=True)):
        bars = axes.bar(
            places + 0.4 * (label - 0.5), [c[label] for c in counts.values()], 0.38, label=name, color=colour
        )
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_xticks(places, [name.replace(", ", ",\n").replace("course ", "course\n") for name in counts], fontsize=9)
    axes.set_ylabel("patches")
    axes.margins(y=0.15)
    axes.legend(frameon=False, loc="upper right")
    return figure


def plot_examples(patches: Patches, each: int = 8) -> tuple[Figure, dict[str, list[int]]]:
    """The first valid patches of each class with the centre 32x32 that decides the label; and their rows."""
    figure, axes = plt.subplots(2, each, figsize=(1.15 * each, 2.7))
    rows = patches.rows()
    assert patches.labels is not None
    shown = {name: rows[patches.labels[rows] == label][:each].tolist() for label, name in enumerate(CLASSES)}
    for line, (name, chosen) in zip(axes, shown.items(), strict=True):
        for axis in line:
            axis.axis("off")
        for axis, row in zip(line, chosen, strict=False):
            axis.imshow(patches.images[row])
            axis.add_patch(plt.Rectangle((31.5, 31.5), 32, 32, fill=False, color="white", lw=0.8))
            axis.set_title(f"{name} {row}", size=7)
    figure.tight_layout(pad=0.3)
    return figure, shown


def plot_intensity(series: dict[str, list[float]]) -> Figure:
    """One panel a channel, both classes."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
    for axis, colour in zip(axes, CHANNELS, strict=True):
        for name, style in zip(CLASSES, ("-", "--"), strict=True):
            values = series[f"{name} {colour}"]
            axis.plot(np.linspace(0, 255, len(values)), values, style, color=f"tab:{colour}", label=name)
        axis.set_xlabel(f"{colour} (0 to 255)")
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("share of pixels")
    figure.tight_layout()
    return figure


def plot_outliers(means: dict[str, np.ndarray], bins: int = 60) -> tuple[Figure, dict[str, list[float]]]:
    """Histogram of patch means for each named set on a log count axis; and the plotted counts."""
    figure, axes = plt.subplots(figsize=(8, 3.2))
    finite = {name: m[np.isfinite(m)] for name, m in means.items()}
    top = max(300.0, *(float(m.max()) for m in finite.values()))
    edges = np.linspace(0, top, bins + 1)
    series = {"edge": edges.tolist()}
    for name, values in finite.items():
        counts = np.histogram(values, edges)[0]
        missing = len(means[name]) - len(values)
        label = f"{name}: {len(values):,} patches" + (f", {missing:,} more hold NaN" if missing else "")
        axes.stairs(counts, edges, label=label, lw=1.6)
        series[name] = counts.tolist()
    axes.axvspan(255, top, color="firebrick", alpha=0.08, lw=0)
    axes.set_yscale("symlog", linthresh=1)
    axes.set_xlabel("mean intensity of a patch as stored (above 255: impossible for a picture)")
    axes.set_ylabel("patches")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure, series


def plot_sampler(counts: dict[str, list[int]], batch_size: int = 32) -> Figure:
    """Distribution of positives per batch for each sampler."""
    figure, axes = plt.subplots(figsize=(6, 2.8))
    edges = [place - 0.5 for place in range(batch_size + 2)]
    for name, values in counts.items():
        axes.hist(values, edges, alpha=0.6, label=f"{name}: mean {np.mean(values):.1f}")
    axes.axvline(batch_size / 2, color="black", lw=0.8, ls=":")
    axes.set_xlabel(f"tumour patches in a batch of {batch_size}")
    axes.set_ylabel("batches")
    axes.legend(frameon=False)
    return figure


def loss_curves(run: Run) -> dict[str, list[float]]:
    """Mean training loss of each epoch, and the validation NLL at its end."""
    rows = pd.DataFrame(run.metrics())
    per_epoch = rows[rows["valid_nll"].notna()]
    starts = [0, *per_epoch["step"].tolist()]
    train = [rows[(rows["step"] > a) & (rows["step"] <= b)]["loss"].mean() for a, b in itertools.pairwise(starts)]
    series: dict[str, Any] = {
        "step": rows["step"].tolist(), "loss": rows["loss"].tolist(),
        "epoch end": per_epoch["step"].tolist(), "train": train, "valid": per_epoch["valid_nll"].tolist(),
    }  # fmt: skip
    return series


def plot_loss(series: dict[str, list[float]]) -> Figure:
    """Loss per step, its epoch means, and the validation loss, with ln 2 as the line of having learned nothing."""
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.plot(series["step"], series["loss"], color="0.8", lw=0.8, label="train, each step")
    axes.plot(series["epoch end"], series["train"], "o-", color="#4c78a8", label="train, epoch mean")
    axes.plot(series["epoch end"], series["valid"], "s-", color="#c4447a", label="validation")
    axes.axhline(np.log(2), color="black", lw=0.8, ls=":")
    axes.annotate("ln 2: nothing learned", (0, np.log(2)), textcoords="offset points", xytext=(2, 3), size=7)
    axes.set_ylim(0, min(2.0, 1.05 * max(series["loss"])))
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy")
    axes.legend(frameon=False, fontsize=8)
    return figure
