"""Data that many tests read; none may write to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcamlib.data.flaws import course_like
from pcamlib.data.synthetic import generate


@pytest.fixture(scope="session")
def synthetic_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated patches in the official layout: train 512, valid 256, test 256, seed 0."""
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, seed=0, sizes={"train": 512, "valid": 256, "test": 256}, report=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def course_dir(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The course's kind of spoiled float32 train file made of `synthetic_dir`; `truth.json` tells what was planted."""
    folder = tmp_path_factory.mktemp("course")
    course_like(synthetic_dir, folder, seed=0)
    return folder
