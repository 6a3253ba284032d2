"""Requests that gather are answered together, each with its own result; too many are refused, none is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from pcamlib.serving.batching import Batcher
from pcamlib.serving.upload import Limits, Refusal


class Held:
    """Doubles numbers, once `gate` is open; refuses 13; remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate, self.entered = threading.Event(), threading.Event()

    def __call__(self, jobs: Sequence[int]) -> list[int]:
        self.batches.append(list(jobs))
        self.entered.set()
        assert self.gate.wait(10)
        if 13 in jobs:
            raise ValueError("thirteen")
        return [2 * job for job in jobs]


@pytest.fixture
def held() -> Iterator[Held]:
    work = Held()
    yield work
    work.gate.set()


def submitted(batcher: Batcher, work: Held, jobs: Sequence[int], weight: int = 1) -> list:
    """Results of jobs of which the first occupies the worker while all others gather."""

    async def go() -> list:
        tasks = [asyncio.create_task(batcher.submit(jobs[0], weight))]
        await asyncio.sleep(0)
        await asyncio.to_thread(work.entered.wait, 10)
        tasks += [asyncio.create_task(batcher.submit(job, weight)) for job in jobs[1:]]
        await asyncio.sleep(0)
        work.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(go())
    batcher.close()
    return found


def batcher(work: Callable, **limits: float) -> Batcher:
    return Batcher(work, Limits(**limits), lambda weight: None)


def test_what_gathers_is_one_batch_in_order(held):
    assert submitted(batcher(held, batch=4), held, range(8)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert held.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_a_batch_is_weighed_not_counted(held):
    seen: list[int] = []
    submitted(Batcher(held, Limits(batch=4), seen.append), held, range(5), weight=2)
    assert held.batches == [[0], [1, 2], [3, 4]] and seen == [2, 4, 4]


def test_a_full_queue_refuses_at_once_and_answers_the_rest(held):
    found = submitted(batcher(held, room=3), held, range(6))
    assert found[:4] == [0, 2, 4, 6]
    assert [(type(one), one.status, dict(one.headers)) for one in found[4:]] == [
        (Refusal, 503, {"Retry-After": "1"})
    ] * 2


def test_a_heavy_job_passes_an_empty_queue_only(held):
    found = submitted(batcher(held, room=3), held, range(3), weight=9)
    assert found[:2] == [0, 2] and isinstance(found[2], Refusal)


def test_what_would_wait_too_long_is_refused_by_the_pace_seen(held):
    slow = batcher(held, patience=0.5)
    slow._pace = 0.2  # seconds a patch: two may wait
    found = submitted(slow, held, range(5))
    assert found[:3] == [0, 2, 4] and all(isinstance(one, Refusal) for one in found[3:])


def test_one_job_that_breaks_spoils_no_other(held):
    found = submitted(batcher(held), held, [1, 2, 13, 4])
    assert found[:2] == [2, 4] and str(found[2]) == "thirteen" and found[3] == 8


def test_closing_answers_what_waits_and_takes_no_more(held):
    work = batcher(held)

    async def go() -> tuple[list[int], bool]:
        tasks = [asyncio.create_task(work.submit(job)) for job in range(3)]
        await asyncio.to_thread(held.entered.wait, 10)
        closing = asyncio.create_task(asyncio.to_thread(work.close))
        while not work._closed:
            await asyncio.sleep(0.01)
        with pytest.raises(Refusal):
            await work.submit(9)
        held.gate.set()
        await closing
        return await asyncio.gather(*tasks), work.alive

    assert asyncio.run(go()) == ([0, 2, 4], False)


def test_a_client_that_left_is_passed_over(held):
    work = batcher(held)

    async def go() -> int:
        tasks = [asyncio.create_task(work.submit(job)) for job in (1, 2)]
        await asyncio.to_thread(held.entered.wait, 10)
        tasks[0].cancel()
        held.gate.set()
        return await tasks[1]

    assert asyncio.run(go()) == 4
    work.close()
