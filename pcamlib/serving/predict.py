"""One checkpoint that answers: patches in, probabilities and calls out.

    answers = Predictor("best.safetensors").answer(patches)       # (N, 96, 96, 3) uint8
    python inference.py --checkpoint best.safetensors INPUT...    # files and folders of any size; calls `run`

Torch in batches of 64, a thread a core, each with batches of its own: two threads on one batch were no faster, and
beside a busy neighbour up to ten times slower. With the small CNN a core of a Xeon with AMX answers about 3,500
patches/s in bf16, 1,150 in float32 (2026-11-30); ONNX Runtime's 1,800 in float32 would first take seconds to export.
"""

from __future__ import annotations

import csv
import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from pcamlib import seeding
from pcamlib.config import validate
from pcamlib.data.layout import SIDE
from pcamlib.errors import ConfigError, PcamError, nearest
from pcamlib.files import atomic_path
from pcamlib.serving import inputs
from pcamlib.serving.heat import Heat
from pcamlib.serving.inputs import Piece
from pcamlib.training import metrics
from pcamlib.training.decision import Decision, scaled
from pcamlib.training.state import choose_precision, load_classifier

log = logging.getLogger(__name__)

BATCH = 64  # patches at once
COLUMNS = ("file", "row", "x", "y", "probability", "confidence", "tumour", "label")


@dataclass(frozen=True)
class Answers:
    """What a checkpoint says about N patches.

    Attributes:
        probability: (N,) float64 of tumour, as the network gives it.
        confidence: (N,) float64 of tumour, calibrated.
        tumour: (N,) bool, probability >= threshold.
        threshold: of the probability.
    """

    probability: np.ndarray
    confidence: np.ndarray
    tumour: np.ndarray
    threshold: float


class Predictor:
    """A checkpoint, loaded once.

    Attributes:
        path: of the checkpoint.
        meta: its metadata: `model`, `normalisation`, `synthetic`, `recorded`, `provenance`, ...
        decision: threshold and temperature chosen on validation; None in a checkpoint of an unfinished run.
        model: in eval mode, on the CPU.
        precision: "fp32" or "bf16". Probabilities in float32 depend by 1e-7 on how patches are batched; in bf16 not at
            all, and they were within .007 of float32 on 2,048 real patches. Scores and threshold of a checkpoint
            that was trained with AMX are of bf16 themselves.

    Args:
        precision: "auto" is bf16 where the CPU multiplies it (AMX): three times as fast there.

    Raises:
        CheckpointError: missing, damaged, a pickle, or not one of ours.
        ConfigError: unknown precision.
    """

    def __init__(self, path: str | Path, precision: str = "fp32") -> None:
        if precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"precision '{precision}'{nearest(precision, ('auto', 'fp32', 'bf16'))}")
        self.path, self.precision = Path(path), choose_precision(precision, "cpu")
        self.model, self.meta = load_classifier(path)
        stored: dict[str, Any] | None = self.meta.get("decision")
        self.decision = validate(Decision, stored) if stored else None

    def threshold(self, wanted: str | float = "chosen") -> float:
        """A threshold as a number; "chosen" is the checkpoint's own.

        Raises:
            ConfigError: no number from 0 to 1, or none was chosen.
        """
        if wanted == "chosen":
            if self.decision is None:
                raise ConfigError(f"{self.path}: carries no threshold: its run did not finish; give --threshold 0.5")
            return self.decision.threshold
        try:
            value = float(wanted)
        except ValueError:
            value = float("nan")
        if not 0 <= value <= 1:
            raise ConfigError(f"threshold '{wanted}': give a number from 0 to 1, or 'chosen'")
        return value

    def probability(self, images: np.ndarray) -> np.ndarray:
        """(N, 96, 96, 3) uint8 -> (N,) float64 of tumour, in batches of at most `BATCH`."""
        parts = [self._batch(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return np.concatenate(parts) if parts else np.empty(0)

    def _batch(self, images: np.ndarray) -> np.ndarray:
        bf16 = self.precision == "bf16"
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            plain = np.require(images, requirements=("C", "W"))  # torch warns of patches that nobody may write
            logits = self.model(torch.from_numpy(plain).permute(0, 3, 1, 2))
        return logits.double().softmax(1)[:, 1].numpy()

    def calibrated(self, probability: np.ndarray) -> np.ndarray:
        """Probabilities that mean what they say; unchanged where no temperature was fitted."""
        return scaled(probability, self.decision.temperature) if self.decision else probability

    def answer(self, images: np.ndarray, threshold: str | float = "chosen") -> Answers:
        """Everything about (N, 96, 96, 3) uint8 patches."""
        cut, probability = self.threshold(threshold), self.probability(images)
        return Answers(probability, self.calibrated(probability), probability >= cut, cut)

    def about(self) -> str:
        """Where the checkpoint comes from and what it scored, for people, in one line."""
        kind = "SYNTHETIC patches: it knows nothing of tissue" if self.meta.get("synthetic") else "real patches"
        parts = [f"{self.path}: {self.meta['model']['name']} trained on {kind}"]
        if recorded := self.meta.get("recorded"):
            low, high = recorded["metrics"]["auc"]["interval"]
            parts.append(f"AUC {recorded['metrics']['auc']['value']:.3f} (95 % interval {low:.3f} to {high:.3f}, "
                         f"{recorded['n']:,} {recorded['split']} patches, {recorded['precision']})")  # fmt: skip
        if origin := self.meta.get("provenance"):
            parts.append(f"commit {(origin['code']['commit'] or 'unknown')[:7]}")
        return ", ".join(parts)


@dataclass
class Result:
    """What `run` did.

    Attributes:
        threshold: at which patches were called.
        patches, tumour, odd: how many were answered, called tumour, are not like patches (see `inputs.Piece`).
        seconds: it took.
        refused: a line for each file that could not be answered, or not to its end.
        reports: `metrics.report` by file, of those with labels.
    """

    threshold: float
    patches: int = 0
    tumour: int = 0
    odd: int = 0
    seconds: float = 0.0
    refused: list[str] = field(default_factory=list)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)

    def text(self) -> str:
        """For a terminal: how many, which not, and the scores of files with labels."""
        rate = self.patches / max(self.seconds, 1e-9)
        lines = [f"{self.patches:,} patches, {self.tumour:,} called tumour at {self.threshold:.4g} and above; "
                 f"{self.seconds:.1f} s, {rate:,.0f} patches/s"]  # fmt: skip
        if self.odd:
            lines.append(f"{self.odd:,} patches hold NaN or values out of 0..255, or are all black or white")
        for file, report in self.reports.items():
            lines += [f"{file}:", metrics.text(report)]
        return _printable("\n".join([*lines, *(f"not answered: {line}" for line in self.refused)]))


def run(
    predictor: Predictor,
    files: Sequence[Path],
    *,
    out: Path | None = None,
    threshold: str | float = "chosen",
    how: str = "refuse",
    step: int = SIDE,
    heat: Path | None = None,
) -> Result:
    """Answer files and folders, some patches at a time, into a CSV with `COLUMNS`; memory does not grow with them.

    Args:
        predictor: of the checkpoint.
        files: pictures, H5 files, folders of both.
        out: the CSV, written whole or not at all; None: standard output.
        threshold: a number or "chosen", as `Predictor.threshold`.
        how: what becomes of pictures of another size, as `images.patch`.
        step: pixels from tile to tile.
        heat: a PNG of the one picture's probabilities; needs `how` "tile".

    Raises:
        PcamError: nothing could be answered, or nothing written. A bad file among good ones is in `Result.refused`.
    """
    result, began = Result(predictor.threshold(threshold)), time.monotonic()
    paths = inputs.find(files, log.info, result.refused)
    if heat and (len(paths) > 1 or paths[0].name.lower().endswith(inputs.H5)):
        raise ConfigError(f"a heat map is of one picture, not of {len(paths):,} files or an H5; leave out --heat")
    drawn = Heat(step)
    scored: dict[str, list[tuple[np.ndarray, np.ndarray, bool]]] = {}
    with _sheet(out) as sheet, seeding.workers() as pool:
        sheet.writerow(COLUMNS)
        waiting: deque[tuple[list[Piece], Future[np.ndarray]]] = deque()
        told = began

        def settle() -> None:
            pieces, future = waiting.popleft()
            probability = future.result()
            confidence, called = predictor.calibrated(probability), probability >= result.threshold
            at = 0
            for piece in pieces:
                part = slice(at, at := at + len(piece.images))
                sheet.writerows(_lines(piece, probability[part], confidence[part], called[part]))
                if piece.labels is not None:
                    scored.setdefault(piece.file, []).append((piece.labels, probability[part], piece.synthetic))
                if heat:
                    drawn.add(piece, confidence[part])
                result.odd += piece.odd
            result.patches, result.tumour = result.patches + len(called), result.tumour + int(called.sum())

        for batch in _batches(_pieces(paths, how, step, result.refused)):
            stacked = np.concatenate([piece.images for piece in batch]) if len(batch) > 1 else batch[0].images
            waiting.append((batch, pool.submit(predictor.probability, stacked)))
            while len(waiting) > pool._max_workers + 2:  # bounds the patches in memory
                settle()
            if time.monotonic() - told > 5:
                told = time.monotonic()
                log.info("%s patches, at %s, %.0f s", f"{result.patches:,}", batch[-1].file, told - began)
        while waiting:
            settle()
        if not result.patches:
            rest = f" (the first of {len(result.refused):,} files, all refused)" if len(result.refused) > 1 else ""
            raise PcamError(f"{result.refused[0]}{rest}")
    if heat:
        drawn.draw(heat, predictor.calibrated(np.array([result.threshold]))[0], predictor.about())
    for file, parts in scored.items():
        label, probability = (np.concatenate(column) for column in list(zip(*parts, strict=True))[:2])
        name = f"{file} (synthetic patches)" if parts[0][2] else file
        result.reports[name] = metrics.report(label, probability, threshold=result.threshold)
    result.seconds = time.monotonic() - began
    return result


def _pieces(paths: Iterable[Path], how: str, step: int, refused: list[str]) -> Iterator[Piece]:
    """Pieces of at most `BATCH` patches; what a file lacks goes to `refused`, and the next one follows."""
    for path in paths:
        done = 0
        try:
            for piece in inputs.pieces(path, how, step):
                for first in range(0, len(piece.images), BATCH):
                    part = slice(first, first + BATCH)
                    labels = None if piece.labels is None else piece.labels[part]
                    yield replace(
                        piece, where=piece.where[part], images=piece.images[part], labels=labels,
                        odd=0 if first else piece.odd,
                    )  # fmt: skip
                    done += len(piece.images[part])
        except Exception as error:  # h5py, Pillow and NumPy raise anything on damaged bytes: the other files go on
            reason = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
            line = f"{path}: cannot be read ({reason}); look at it, or save or copy it again"
            rest = f"; its first {done:,} patches are answered" if done else ""
            refused.append((str(error) if isinstance(error, PcamError) else line) + rest)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Consecutive pieces, together at most `BATCH` patches: single pictures are answered together."""
    held: list[Piece] = []
    for piece in pieces:
        if sum(len(one.images) for one in [*held, piece]) > BATCH:
            yield held
            held = []
        held.append(piece)
    if held:
        yield held


def _lines(
    piece: Piece, probability: np.ndarray, confidence: np.ndarray, called: np.ndarray
) -> Iterator[tuple[Any, ...]]:
    """Rows of the CSV; what does not apply is empty."""
    file, labels = _printable(piece.file), [""] * len(called) if piece.labels is None else piece.labels.tolist()
    for where, p, c, tumour, label in zip(
        piece.where.tolist(), probability.tolist(), confidence.tolist(), called.tolist(), labels, strict=True
    ):
        yield (file, *("" if at < 0 else at for at in where), f"{p:.6f}", f"{c:.6f}", int(tumour), label)


def _printable(text: str) -> str:
    r"""Names that are not UTF-8 as `M\xe4rz.png`: written as they are they would end the run; two stay two."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


@contextmanager
def _sheet(out: Path | None) -> Iterator[Any]:
    """A CSV writer into a file that appears when all is written, or to standard output."""
    if out is None:
        yield csv.writer(sys.stdout, lineterminator="\n")
        return
    if out.is_dir():
        raise PcamError(f"{out}: is a folder; give the name of a file in it")
    with atomic_path(out) as part:
        handle: TextIO
        with open(part, "w", encoding="utf-8", newline="") as handle:
            yield csv.writer(handle, lineterminator="\n")
