"""Data that many tests read; none may write to them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcamlib import cli
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


@pytest.fixture
def pcam(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Any]:
    """`pcam("train", ...)`: `main()` in this process, in an empty folder; returns exit code, stdout and stderr."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    for name in ("PCAM_DATA", "PCAM_COURSE", "PCAM_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pcam", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call
