"""A checkpoint as ONNX files that carry what it carries, refused where they answer otherwise than it does.

    pcam export runs/first/checkpoints/best.safetensors --out onnx --data ~/pcam

Raw uint8 patches go in, two logits come out; any number of patches a batch; ONNX Runtime alone runs them. What the
checkpoint knows of itself (threshold, temperature, recorded scores, origin) is JSON in each file's `metadata_props`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pcamlib.data.patches import Patches, open_split, sample, take
from pcamlib.errors import DataError, PcamError
from pcamlib.files import atomic_path, write_json
from pcamlib.models import onnx
from pcamlib.serving.predict import BATCH, Predictor
from pcamlib.training import metrics
from pcamlib.training.checkpoint import weights_digest

FILES = {"fp32": "model.onnx", "fp16": "model-fp16.onnx", "int8": "model-int8.onnx"}
#: Largest difference of a probability, and of the AUC, from the checkpoint in float32. Seen on 1,000 real patches with
#: the small CNN: 3e-7, .0009 and .047; of the AUC 0, 2e-5 and 2e-4.
TOLERANCE = {"fp32": (1e-4, 1e-4), "fp16": (0.02, 0.002), "int8": (0.2, 0.01)}
CALIBRATION = 256  # patches of the train split that show int8 how large activations are


class ParityError(PcamError):
    """A file that answers otherwise than its checkpoint."""


def planes(images: np.ndarray) -> np.ndarray:
    """(N, 96, 96, 3) -> (N, 3, 96, 96), a view."""
    return images.transpose(0, 3, 1, 2)


def probability(session: Any, images: np.ndarray) -> np.ndarray:
    """By ONNX Runtime: (N, 96, 96, 3) uint8 -> (N,) float64 of tumour, in batches of at most `BATCH`."""
    parts = [onnx.logits(session, planes(images[at : at + BATCH])) for at in range(0, len(images), BATCH)]
    logits = np.concatenate(parts).astype(np.float64)
    return 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))


def auc(labels: np.ndarray, probability: np.ndarray) -> float:
    """Area under the ROC curve; NaN where there is one class only."""
    return float(metrics.scores(labels, probability, np.ones((1, len(labels))))["auc"][0])


def carried(predictor: Predictor) -> dict[str, Any]:
    """What a checkpoint knows of itself, with the digest of its weights."""
    names = ("model", "normalisation", "synthetic", "decision", "recorded", "provenance")
    return {name: predictor.meta.get(name) for name in names} | {"weights": weights_digest(predictor.model)}


def same_kind(predictor: Predictor, patches: Patches) -> None:
    """Raises DataError where a checkpoint learned from real patches and these are synthetic, or the reverse."""
    kinds = ["synthetic" if which else "real" for which in (predictor.meta["synthetic"], patches.synthetic)]
    if kinds[0] != kinds[1]:
        raise DataError(
            f"{patches.stored.path}: {kinds[1]} patches, but {predictor.path} learned from {kinds[0]} ones; "
            f"give --data, the folder with patches of its kind"
        )


def build(
    predictor: Predictor, valid: Patches, rows: np.ndarray, calibration: np.ndarray | None
) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The files in memory, by precision, each held against the checkpoint.

    Args:
        predictor: the checkpoint.
        valid: labelled patches.
        rows: of `valid` that are compared on.
        calibration: (N, 96, 96, 3) uint8 of the train split, for int8; None: no int8, no fp16.

    Returns:
        bytes by precision; rows `file`, `precision`, `MB`, `n`, `patches`, `off by` (largest difference of a
        probability), `calls changed` (at the checkpoint's threshold), `AUC`, `AUC of the checkpoint`.

    Raises:
        DataError: the rows hold one class only.
        ParityError: an answer further off than `TOLERANCE`.
    """
    assert valid.labels is not None
    images, labels = take(valid.images, rows), valid.labels[rows]
    if len(set(labels.tolist())) < 2:
        raise DataError(f"{valid.stored.path}: {len(rows):,} patches of one class; comparing the AUC needs both")
    truth, cut = predictor.probability(images), predictor.threshold()
    whole = onnx.export(predictor.model)
    made = {"fp32": whole}
    if calibration is not None:
        made |= {"fp16": onnx.half(whole), "int8": onnx.quantize(whole, planes(calibration))}
    table, about = [], carried(predictor)
    for precision, model in made.items():
        answers = probability(onnx.session(model), images)
        row: dict[str, Any] = {"n": len(rows), "patches": "synthetic" if valid.synthetic else "real"}
        row |= {"off by": float(np.abs(answers - truth).max())}
        row |= {"calls changed": int(((answers >= cut) != (truth >= cut)).sum())}
        row |= {"AUC": auc(labels, answers), "AUC of the checkpoint": auc(labels, truth)}
        _hold(f"{predictor.path} as ONNX {precision}", row, *TOLERANCE[precision])
        made[precision] = onnx.inscribe(model, {**about, "precision": precision, "parity": row})
        about_file = {"file": FILES[precision], "precision": precision, "MB": len(made[precision]) / 1e6}
        table.append({**about_file, **row})
    return made, table


def _hold(what: str, row: dict[str, Any], most: float, most_auc: float) -> None:
    """Raises ParityError where a row is further off than it may be; NaN is."""
    gap = abs(row["AUC"] - row["AUC of the checkpoint"])
    if not (row["off by"] <= most and gap <= most_auc):
        raise ParityError(
            f"{what}: answers otherwise than the checkpoint and is not written: on {row['n']:,} {row['patches']} "
            f"patches a probability is off by {row['off by']:.2g} (at most {most:g}), the AUC by {gap:.2g} (at most "
            f"{most_auc:g}); export in another precision, or train again"
        )


def export(
    checkpoint: str | Path, out: str | Path, folder: str | Path, *, most: int = 3000,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:  # fmt: skip
    """Write `FILES` and `parity.json` (the rows of `build`) into `out`, or nothing.

    Args:
        checkpoint: best.safetensors of a finished run.
        out: folder.
        folder: data: valid to compare on, train to calibrate int8.
        most: valid patches to compare on.
        report: told one line a file.

    Raises:
        CheckpointError: damaged, or not one of ours.
        ConfigError: of a run that did not finish.
        DataError: data of another kind than the checkpoint learned from, or without labels.
        ParityError: a file that would answer otherwise.
    """
    predictor, valid, train = Predictor(checkpoint), open_split(folder, "valid"), open_split(folder, "train")
    same_kind(predictor, valid)
    calibration = take(train.images, sample(train, CALIBRATION))
    made, table = build(predictor, valid, sample(valid, most), calibration)
    for row in table:
        with atomic_path(Path(out) / row["file"]) as part:
            part.write_bytes(made[row["precision"]])
        report(
            f"{Path(out) / row['file']}: {row['MB']:.2f} MB; on {row['n']:,} {row['patches']} patches off by at most "
            f"{row['off by']:.2g}, {row['calls changed']} calls changed, AUC {row['AUC']:.4f} "
            f"(checkpoint {row['AUC of the checkpoint']:.4f})"
        )
    write_json(Path(out) / "parity.json", table)
    return table
