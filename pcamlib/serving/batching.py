"""Requests that come together are answered together: a bounded queue and one worker thread.

    batcher = Batcher(answer, limits, observe)      # answer: jobs -> results, in the thread
    result = await batcher.submit(job, weight=3)

Nobody waits for a batch to fill: while one is computed the next gathers. What could not be answered in time is refused
at once, by the rate that the last batches had: on a machine that is busy with other things less is taken in.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from pcamlib.serving.upload import Limits, Refusal

Job = TypeVar("Job")
Result = TypeVar("Result")


class _Waiting(NamedTuple):
    job: object
    weight: int
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future


def _settle(pairs: list[tuple[_Waiting, object]]) -> None:
    for one, result in pairs:
        if one.future.done():  # its client has left
            continue
        if isinstance(result, Exception):
            one.future.set_exception(result)
        else:
            one.future.set_result(result)


class Batcher(Generic[Job, Result]):
    """A queue between the event loop and one worker thread.

    Args:
        answer: one result a job, in their order; called in the worker thread with at least one job.
        limits: `batch`, the weight after which a batch takes no further job, `room` and `patience`. A job that is
            heavier than all room passes only an empty queue.
        observe: told each batch's weight.

    Attributes:
        waiting: weight in the queue.
    """

    def __init__(
        self, answer: Callable[[Sequence[Job]], Sequence[Result]], limits: Limits, observe: Callable[[int], None]
    ) -> None:
        self._answer, self._limits, self._observe = answer, limits, observe
        self._queue: deque[_Waiting] = deque()
        self._ready, self._closed = threading.Condition(), False
        self.waiting = 0
        self._pace = 0.0  # seconds a unit of weight, moving average over batches
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether anybody works on the queue."""
        return self._thread.is_alive()

    async def submit(self, job: Job, weight: int = 1) -> Result:
        """The job's result.

        Raises:
            Refusal: 503, too much waits already, or the service is leaving.
            Exception: whatever `answer` raised for this job.
        """
        loop = asyncio.get_running_loop()
        one = _Waiting(job, weight, loop, loop.create_future())
        with self._ready:
            after = self.waiting + weight
            late = after > self._limits.room or after * self._pace > self._limits.patience
            if self._closed or (self.waiting and late):
                message = "more patches wait than can be answered soon; ask again in a second"
                raise Refusal(503, message, {"Retry-After": "1"})
            self._queue.append(one)
            self.waiting = after
            self._ready.notify()
        return await one.future

    def close(self) -> None:
        """Take nothing more, answer what waits, end the thread."""
        with self._ready:
            self._closed = True
            self._ready.notify()
        self._thread.join()

    def _run(self) -> None:
        while self._turn():  # whose names go with it: while nothing comes, no image is held
            pass

    def _turn(self) -> bool:
        """Answer one batch; False once closed and empty."""
        batch: list[_Waiting] = []
        weight = 0
        with self._ready:
            self._ready.wait_for(lambda: self._queue or self._closed)
            while self._queue and weight < self._limits.batch:
                batch.append(self._queue.popleft())
                weight += batch[-1].weight
            self.waiting -= weight
        if not batch:
            return False
        self._observe(weight)
        began = time.monotonic()
        pairs = list(zip(batch, self._results([one.job for one in batch]), strict=True))
        pace = (time.monotonic() - began) / weight
        self._pace = 0.8 * self._pace + 0.2 * pace if self._pace else pace
        batch[0].loop.call_soon_threadsafe(_settle, pairs)  # one wake-up a batch, not one a job
        return True

    def _results(self, jobs: list) -> Sequence[object]:
        """One result or error a job: one that breaks a batch is found by asking again, one by one."""
        try:
            return self._answer(jobs)
        except Exception as error:
            if len(jobs) == 1:
                logging.exception("a job failed")
                return [error]
            return [self._results([job])[0] for job in jobs]
