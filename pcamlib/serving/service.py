"""The work behind the routes: decode, predict, compare with the reference, collect; all of it off the event loop.

    service = Service(Predictor("best.safetensors"), Limits(), reference=Reference.load("reference.npz"))
    outcomes = await service.predict(uploads, heat=False)

The network runs in ONNX Runtime: the same float32 weights, probabilities within `PARITY` of the checkpoint's own
(checked at start), and batches of 1, 8 and 32 patches in .3, .5 and .7 of the time that torch takes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, logit

from pcamlib.data.layout import SIDE
from pcamlib.errors import CheckpointError
from pcamlib.models import onnx
from pcamlib.serving import drift, images
from pcamlib.serving.batching import Batcher
from pcamlib.serving.collect import Collector
from pcamlib.serving.images import ImageError
from pcamlib.serving.predict import BATCH, Predictor
from pcamlib.serving.telemetry import Telemetry
from pcamlib.serving.upload import Limits, Refusal, Upload

PARITY = 1e-4  # largest difference of a probability from the checkpoint's own
GRID = 8  # squares a side that are hidden for a heat map: 64 patches, a batch
HEATED = 4  # images a request that may be heated: each costs as much as 64 others
_SQUARE = SIDE // GRID
_FRESH = 100  # patches that must be new before they are compared again by themselves


class Job(NamedTuple):
    """What one request asks."""

    uploads: Sequence[Upload]
    heat: bool


@dataclass
class Outcome:
    """What is said of one image: an error, or all the rest; `heat` and `outlying` only where asked and known."""

    error: ImageError | None = None
    probability: float = float("nan")
    outlying: bool | None = None
    heat: np.ndarray | None = None


def engine(predictor: Predictor, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """(N, 96, 96, 3) uint8 -> (N,) float64 of tumour, by ONNX Runtime.

    Raises:
        CheckpointError: the exported network answers otherwise than the checkpoint.
    """
    session = onnx.session(onnx.export(predictor.model), threads)

    def run(patches: np.ndarray) -> np.ndarray:
        cut = range(0, len(patches), BATCH)  # a larger batch is no quicker, and its memory is never given back
        found = [onnx.logits(session, patches[at : at + BATCH].transpose(0, 3, 1, 2)) for at in cut]
        return expit(np.diff(np.concatenate(found).astype(np.float64))[:, 0])

    squares = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3), np.uint8).repeat(24, 1).repeat(24, 2)
    squares[32:] = squares[32:] // 8 + 170  # pale ones, more like tissue
    off = float(np.abs(run(squares) - predictor.probability(squares)).max())
    if not off <= PARITY:
        raise CheckpointError(f"{predictor.path}: as ONNX its probabilities differ by {off:.1e}; it cannot be served")
    return run


def occluded(image: np.ndarray) -> np.ndarray:
    """(96, 96, 3) -> (64, 96, 96, 3): each with one square of 12 pixels in the patch's mean colour, row by row."""
    hidden = np.repeat(image[None], GRID * GRID, 0)
    for one, (y, x) in zip(hidden, np.ndindex(GRID, GRID), strict=True):
        one[y * _SQUARE : (y + 1) * _SQUARE, x * _SQUARE : (x + 1) * _SQUARE] = image.mean((0, 1)).round()
    return hidden


class Service:
    """One checkpoint that answers many.

    Args:
        predictor: the checkpoint.
        limits: of requests, queue and batches.
        reference: what patches are compared with; without one `outlying` is None and there is no drift.
        collect: folder to keep requests in.
        pixels: keep the patches too.
        threads: of the network.

    Attributes:
        about: what answers, as it stands in every answer.
    """

    def __init__(
        self, predictor: Predictor, limits: Limits, reference: drift.Reference | None = None,
        collect: Path | None = None, pixels: bool = False, threads: int = 1,
    ) -> None:  # fmt: skip
        self.predictor, self.limits, self.reference, self._collects = predictor, limits, reference, bool(collect)
        origin = predictor.meta.get("provenance", {})
        self.about: dict[str, Any] = {
            "run": origin.get("run", predictor.path.name), "commit": origin.get("code", {}).get("commit"),
            "synthetic": bool(predictor.meta["synthetic"]),
        }  # fmt: skip
        self.telemetry = counts = Telemetry({key: str(value) for key, value in self.about.items()})
        self.collector = Collector(drift.NAMES, collect, pixels, counts.failures.inc)
        self._engine, self._judging = engine(predictor, threads), threading.Lock()
        self._batcher: Batcher[Job, list[Outcome]] = Batcher(self._answer, limits, counts.batches.observe)
        self._held = 0  # bytes of images that wait: 512 of 4 MB would be 2 GB
        counts.waiting.set_function(lambda: self._batcher.waiting)
        counts.collecting.set_function(lambda: self._collects and not self.collector.broken)

    @property
    def state(self) -> tuple[str, list[str]]:
        """ "ok", "degraded" or "down", and what is wrong."""
        if not self._batcher.alive:
            return "down", ["the worker has ended; start the service again"]
        broken = self.collector.broken
        return ("degraded", [f"collecting has ended: {broken}"]) if broken else ("ok", [])

    async def predict(self, uploads: Sequence[Upload], heat: bool = False) -> list[Outcome]:
        """One outcome an image.

        Raises:
            Refusal: 503, too much waits.
        """
        size = sum(len(upload.data) for upload in uploads)
        self._held += size
        try:
            if self._held > self.limits.flight:
                raise Refusal(503, "more images wait than there is memory for; ask again soon", {"Retry-After": "1"})
            return await self._batcher.submit(Job(uploads, heat), len(uploads) * (1 + GRID * GRID * heat))
        except Refusal:
            self.telemetry.full.inc()
            raise
        finally:
            self._held -= size

    def drift(self, uploads: Sequence[Upload] | None = None) -> dict[str, Any]:
        """A report on some images, or on the newest patches that were asked about; those also go into the metrics.

        Raises:
            Refusal: 409 there is no reference, 503 another comparison is under way.
            ImageError: an image cannot be read.
            DriftError: too few patches to say anything.
        """
        if not self.reference:
            raise Refusal(409, "no reference; make one with `pcam drift reference`, and `pcam serve --reference` it")
        if not self._judging.acquire(blocking=False):
            raise Refusal(503, "another comparison is under way; ask again", {"Retry-After": "2"})
        try:
            values, probability = self.collector.window()
            if uploads is not None:
                patches = np.stack([self._patch(upload) for upload in uploads])
                values, probability = drift.measure(patches), self._engine(patches)
            report = self.reference.compare(values[:, : len(drift.PIXELS)], probability)
        finally:
            self._judging.release()
        if uploads is None:
            for name, one in report.features.items():
                self.telemetry.statistic.labels(name).set(one["statistic"])
            self.telemetry.drifted.set(report.drifted)
        return report.json()

    async def watch(self, seconds: float) -> None:
        """For ever: compare the newest patches every so often; the metrics then know of drift without being asked."""
        seen = 0
        while self.reference:
            await asyncio.sleep(seconds)
            if self.collector.total - seen >= _FRESH:
                seen = self.collector.total
                try:
                    await asyncio.to_thread(self.drift)
                except Exception as error:  # whatever it was, the next minute is another
                    logging.warning("drift was not measured: %s", error)

    def close(self) -> None:
        """Answer what waits, write what was collected."""
        self._batcher.close()
        self.collector.close()

    def _patch(self, upload: Upload) -> np.ndarray:
        image = images.decode(upload.data, upload.name, self.limits.pixels)
        return images.patch(image, upload.name, "refuse")[0]

    def _answer(self, jobs: Sequence[Job]) -> list[list[Outcome]]:
        """The worker's part: every image of every job in one batch."""
        answers = [[Outcome() for _ in job.uploads] for job in jobs]
        good, found, heated = [], [], []
        for job, outcomes in zip(jobs, answers, strict=True):
            for upload, outcome in zip(job.uploads, outcomes, strict=True):
                try:
                    found.append(self._patch(upload))
                    good.append(outcome)
                    heated += [len(good) - 1] * job.heat
                except ImageError as error:
                    outcome.error = error.with_traceback(None)  # whose frames hold this batch, which holds the error
                    error.__context__ = None  # has such frames too, also where it was raised `from None`
                    self.telemetry.errors.labels(str(error.status)).inc()
        if not good:
            return answers
        patches = np.stack(found)
        probability = self._engine(patches)
        for outcome, p in zip(good, probability.tolist(), strict=True):
            outcome.probability = p
        for at in heated:  # by how much the logit of tumour falls when a square is hidden
            seen = np.append(self._engine(occluded(patches[at])), probability[at])
            seen = logit(np.clip(seen, 1e-7, 1 - 1e-7))
            good[at].heat = (seen[-1] - seen[:-1]).reshape(GRID, GRID)
        if self.reference or self._collects:
            values = drift.joined(drift.measure(patches), probability)
            self.collector.add(values, probability, patches)
            flags = self.reference.outlying(values).tolist() if self.reference else []
            self.telemetry.outlying.inc(sum(flags))
            for outcome, flag in zip(good, flags, strict=False):
                outcome.outlying = flag
        return answers
