"""Memory is measured in another process, and running out of it is a result."""

from __future__ import annotations

import signal
import subprocess

import pytest
import torch

from pcamlib.errors import PcamError
from pcamlib.experiments import memory


def test_memory_rises_with_the_batch_and_runs_out_for_real():
    rows = memory.measure("small", [1, 64, 4096], limit=256)
    one, more, out = rows
    assert [row["batch size"] for row in rows] == [1, 64, 4096]
    assert 0 < one["MiB"] < more["MiB"] < 256 and one["result"] == more["result"] == "fits"
    assert out["MiB"] is None and out["result"] == "out of memory of 256 MiB"


def test_torch_itself_says_that_memory_ran_out():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert memory.exhausted(caught.value)
    assert memory.exhausted(torch.OutOfMemoryError("CUDA out of memory"))
    assert not memory.exhausted(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_killed_process_is_a_result_too(monkeypatch):
    line = '{"model": "small", "batch size": 1, "MiB": 3.0, "result": "fits"}\n'
    killed = subprocess.CompletedProcess([], -signal.SIGKILL, line, "")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: killed)
    assert memory.measure("small", [1, 8, 64])[1:] == [
        {"model": "small", "batch size": 8, "MiB": None, "result": "out of memory: killed"}
    ]


def test_any_other_end_is_an_error():
    with pytest.raises(PcamError, match=r"memory of model 'smal' could not be measured: .*did you mean 'small'"):
        memory.measure("smal", [1])


def test_the_process_counts_its_own_memory_only():
    ballast = b"x" * (300 << 20)  # of this process
    (row,) = memory.measure("small", [1])
    assert len(ballast) == 300 << 20 and row["MiB"] < 100
