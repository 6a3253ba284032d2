"""What a notebook rests on is followed to the end, and nothing else makes it stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pcamlib import sources


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of a few modules in place of ours: a -> b -> c, and a stranger d."""
    package = tmp_path / "pcamlib"
    (package / "sub").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "a": "from pcamlib import b\n",
        "b": "def late():\n    import pcamlib.sub.c\n",
        "d": "import numpy\n",
        "sub/__init__": "",
        "sub/c": "from pcamlib.a import x\nX = 1\n",
    }.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(sources, "PACKAGE", package)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    return tmp_path


def notebook(path: Path, *cells: str, **extra: Any) -> Path:
    """A notebook of code cells."""
    body = [{"cell_type": "code", "source": cell.splitlines(keepends=True), **extra} for cell in cells]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "import pcamlib.d"}, *body]}))
    return path


def test_imports_are_followed_to_the_end(tree: Path) -> None:
    entry = notebook(tree / "n.ipynb", "%matplotlib inline\n!ls\nimport numpy", "from pcamlib.a import x")
    found = [path.relative_to(tree / "pcamlib").as_posix() for path in sources.closure(entry)]
    assert found == ["__init__.py", "a.py", "b.py", "sub/__init__.py", "sub/c.py"]
    assert list(sources.digests(entry)) == ["n.ipynb", *(f"pcamlib/{name}" for name in found)]


def test_only_what_it_reaches_makes_it_stale(tree: Path) -> None:
    entry = notebook(tree / "n.ipynb", "from pcamlib import b", outputs=[])
    before = sources.digests(entry)
    notebook(entry, "from pcamlib import b", outputs=[{"text": "42"}], execution_count=7)
    assert sources.digests(entry) == before, "its outputs do not count"
    (tree / "pcamlib" / "d.py").write_text("changed = 1\n")
    assert sources.digests(entry) == before
    (tree / "pcamlib" / "sub" / "c.py").write_text("X = 2\n")
    after = sources.digests(entry)
    assert [name for name in before if after.get(name) != before[name]] == ["pcamlib/a.py", "pcamlib/sub/c.py"]
    notebook(entry, "from pcamlib import b  # 2")
    assert sources.digests(entry)["n.ipynb"] != before["n.ipynb"]


def test_package_digest_covers_modules_and_recipes(tree: Path) -> None:
    found = {sources.package_digest()}
    (tree / "pcamlib" / "r.yaml").write_text("a: 1\n")
    found.add(sources.package_digest())
    (tree / "pcamlib" / "d.py").rename(tree / "pcamlib" / "e.py")
    found.add(sources.package_digest())
    (tree / "pcamlib" / "notes.txt").write_text("no code")
    assert sources.package_digest() in found and len(found) == 3


@pytest.mark.parametrize("cell", ["from pcamlib import MLP", "import pcamlib\nmodel = pcamlib.MLP((3, 96, 96), [64])"])
def test_names_that_load_on_first_use_count(cell: str, tmp_path: Path) -> None:
    found = sources.closure(notebook(tmp_path / "n.ipynb", cell))
    assert sources.PACKAGE / "models" / "mlp.py" in found
    assert sources.PACKAGE / "data" / "loader.py" not in found


def test_our_own_modules() -> None:
    names = sources.digests(sources.PACKAGE / "data" / "loader.py")
    assert {"pcamlib/data/augment.py", "pcamlib/data/layout.py", "pcamlib/seeding.py"} <= set(names)
    assert "pcamlib/training/loop.py" not in names
