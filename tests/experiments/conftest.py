"""What the tests of experiments leave behind them: closed figures, and torch's switches as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt

from pcamlib.config import Config, parse

#: A network of 25 thousand weights on a small square, four steps, one thread.
TINY: dict[str, Any] = {
    "loader": {"batch_size": 32},
    "model": {"name": "mlp", "crop": 32, "hidden_units": [8]},
    "train": {"steps": 4, "threads": 1, "precision": "fp32", "device": "cpu"},
}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, mode = torch.get_num_threads(), torch.get_deterministic_debug_mode()
    yield
    plt.close("all")
    torch.set_num_threads(threads)
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """`tiny("key=value", ...)`: the tiny configuration with overrides."""
    return lambda *items: parse(TINY, items)
