"""A checkpoint made smaller or faster, and what each way costs in accuracy: number formats, zeros, fewer channels.

    rows = compress.table("best.safetensors", open_split(DIR, "valid"), open_split(DIR, "train"))
    compress.plot(rows)

Zeros strewn among the weights make no kernel quicker: they show in the compressed size alone. Channels taken out do.
Nothing is trained again; after weights are taken out only batch statistics are measured anew. Times are of one patch a
call on one thread, every way once in each round, so that a busy neighbour meets all of them.
"""

from __future__ import annotations

import copy
import gzip
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from pcamlib.data.patches import Patches, sample, take
from pcamlib.models import Classifier, onnx
from pcamlib.models.cnn import CNN
from pcamlib.seeding import one_thread
from pcamlib.serving.export import CALIBRATION, planes, probability, same_kind
from pcamlib.serving.predict import BATCH, Predictor
from pcamlib.training import metrics

EAGER = "eager fp32"  # what every way is compared with


def zeroed(model: Classifier, share: float) -> Classifier:
    """A copy without its smallest weights: this share of all, biases and normalisation aside, is zero."""
    small = copy.deepcopy(model)
    weights = [p for p in small.parameters() if p.ndim > 1]
    sizes = torch.cat([p.detach().abs().flatten() for p in weights])
    cut = sizes.sort().values[min(int(share * len(sizes)), len(sizes) - 1)]
    with torch.no_grad():
        for p in weights:
            p.mul_(p.abs() >= cut)
    return small


def narrowed(model: Classifier, share: float) -> Classifier | None:
    """A copy of a CNN whose blocks have this share fewer channels between their two convolutions; None of others.

    Those go whose filter, as the normalisation scales it, is smallest. What a block adds to stays as wide as it was.
    """
    if not isinstance(model.network, CNN) or type(model.network.stages[0].conv1) is not nn.Conv2d:
        return None
    small = copy.deepcopy(model)
    for block in small.network.stages:  # type: ignore[union-attr]
        before, norm, after = block.conv1, block.norm1, block.conv2
        gain = norm.weight.abs() / (norm.running_var + norm.eps).sqrt()
        size = before.weight.flatten(1).norm(dim=1) * gain
        kept = size.topk(max(1, round((1 - share) * len(size)))).indices.sort().values
        before.weight = nn.Parameter(before.weight.detach()[kept])
        after.weight = nn.Parameter(after.weight.detach()[:, kept])
        before.out_channels = after.in_channels = norm.num_features = len(kept)
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(norm, name).data = getattr(norm, name).data[kept]
    return small.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def settle(model: Classifier, images: np.ndarray) -> Classifier:
    """The model with batch statistics of (N, 96, 96, 3) uint8 patches, the mean over batches, in eval mode."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    model.train()
    with torch.no_grad():
        for at in range(0, len(images), BATCH):
            model(torch.from_numpy(planes(images[at : at + BATCH])))
    return model.eval()


def latency(calls: Mapping[str, Callable[[], object]], rounds: int, threads: int = 1) -> dict[str, np.ndarray]:
    """(rounds,) seconds of each call, all of them in turn in every round, after some rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with one_thread():
        torch.set_num_threads(threads)
        for _ in range(10 + rounds):
            for name, call in calls.items():
                begun = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - begun)
    return {name: np.array(each[10:]) for name, each in seconds.items()}


def table(
    checkpoint: str | Path, patches: Patches, calibration: Patches, *, levels: Sequence[float] = (0.25, 0.5, 0.75),
    most: int = 1000, rounds: int = 100,
) -> list[dict[str, Any]]:  # fmt: skip
    """Every way to run a checkpoint, side by side.

    Args:
        checkpoint: best.safetensors of a finished run.
        patches: labelled, of the valid split.
        calibration: the train split, for int8 and for batch statistics.
        levels: shares of weights, and of channels, that are taken out.
        most: patches to compare on, evenly spaced.
        rounds: calls of each way whose time is taken.

    Returns:
        rows `way`, `n`, `patches` ("real" or "synthetic"), `AUC`, `95 %`, `off by` (largest difference of a probability
        from eager float32), `p50 ms`, `p90 ms`, `times eager` (median of paired ratios), `MB`, `MB gzipped`.

    Raises:
        DataError: patches of another kind than the checkpoint learned from.
    """
    predictor = Predictor(checkpoint)
    same_kind(predictor, patches)
    assert patches.labels is not None  # a valid split is not opened without
    rows = sample(patches, most)
    images, labels = take(patches.images, rows), patches.labels[rows]
    shown = take(calibration.images, sample(calibration, CALIBRATION))
    whole = onnx.export(predictor.model)
    files = {"ONNX fp32": whole, "ONNX fp16": onnx.half(whole), "ONNX int8": onnx.quantize(whole, planes(shown))}
    for make, what in ((zeroed, "weights zero"), (narrowed, "channels out")):
        for level in levels:
            small = make(predictor.model, level)
            if small is not None:
                files[f"ONNX fp32, {100 * level:.0f} % {what}"] = onnx.export(settle(small, shown))
    sessions = {name: onnx.session(model) for name, model in files.items()}
    answers = {EAGER: predictor.probability(images)}
    answers |= {name: probability(session, images) for name, session in sessions.items()}
    one = np.ascontiguousarray(planes(images[:1]))
    calls: dict[str, Callable[[], object]] = {EAGER: lambda: predictor.model(torch.from_numpy(one))}
    calls |= {name: lambda s=session: onnx.logits(s, one) for name, session in sessions.items()}  # type: ignore[misc]
    with torch.inference_mode():
        seconds = latency(calls, rounds)
    stored = {EAGER: predictor.path.read_bytes(), **files}
    kind, found = "synthetic" if patches.synthetic else "real", []
    for name, answer in answers.items():
        score = metrics.report(labels, answer)["metrics"]["auc"]
        row = {"way": name, "n": len(rows), "patches": kind, "AUC": score["value"], "95 %": tuple(score["interval"])}
        row |= {"off by": float(np.abs(answer - answers[EAGER]).max())}
        row |= {f"p{q} ms": 1000 * float(np.percentile(seconds[name], q)) for q in (50, 90)}
        row |= {"times eager": float(np.median(seconds[EAGER] / seconds[name]))}
        row |= {"MB": len(stored[name]) / 1e6, "MB gzipped": len(gzip.compress(stored[name])) / 1e6}
        found.append(row)
    return found


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """AUC with its 95 % interval over the median time of one patch; whiskers to the right reach the 90th percentile."""
    figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
    for number, row in enumerate(rows):
        low, high = row["95 %"]
        marker = "s" if row["way"] == EAGER else "v" if "zero" in row["way"] else "^" if "out" in row["way"] else "o"
        axes.errorbar(
            row["p50 ms"], row["AUC"], yerr=[[row["AUC"] - low], [high - row["AUC"]]],
            xerr=[[0], [max(0.0, row["p90 ms"] - row["p50 ms"])]], fmt=marker, color=plt.get_cmap("tab20")(number % 20),
            ms=6, lw=0.8, capsize=2, label=row["way"],
        )  # fmt: skip
    axes.set(xlim=(0, None), xlabel="one patch, one thread (ms)", ylabel="AUC")
    axes.set_title(f"n = {rows[0]['n']:,} {rows[0]['patches']} patches", loc="left", size=9)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure
