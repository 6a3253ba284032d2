"""Tiny notebooks for the tests of jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = """seed: int = 0
lr: float = 1e-3
split: str = "valid"
fast: bool = True
steps: list[int] = [1, 2]
limit: int | None = None
label: str | None = None
data_dir: str = ""
labels_file: str = ""  # one label a line
"""


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make("00_name", "cell", ...)` writes a notebook of a title, parameters and code cells; returns its path."""

    def written(stem: str, *cells: str, parameters: str | None = PARAMETERS, title: str = "# A title") -> Path:
        head = [new_markdown_cell(title)]
        if parameters is not None:
            head.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        path = tmp_path / f"{stem}.ipynb"
        nbformat.write(new_notebook(cells=[*head, *map(new_code_cell, cells)]), str(path))
        return path

    return written
