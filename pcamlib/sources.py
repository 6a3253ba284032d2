"""Which source files a notebook or module rests on: its imports inside `pcamlib`, followed to the end.

The digests are what makes a result stale: a notebook is run again only when one of these files changed, and
`pcam journal check` names the file.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent


def notebook_code(path: Path) -> str:
    """The code cells of a notebook as one text, IPython magics left out, outputs ignored."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    lines = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


def _lazy() -> dict[str, str]:
    """Where the names that the package loads on first use live; read from its text, since importing it goes up."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_COURSE":
            return ast.literal_eval(node.value)
    return {}


def _module_files(name: str) -> Iterator[Path]:
    """Files that importing `name` executes: each package's `__init__.py` on the way, then the module."""
    package, _, attribute = name.rpartition(".")
    if package == PACKAGE.name:  # `from pcamlib import MLP` loads pcamlib.models.mlp
        name = _lazy().get(attribute, name)
    path = PACKAGE.parent
    for part in name.split("."):
        path = path / part
        if (path / "__init__.py").is_file():
            yield path / "__init__.py"
        elif path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")


def _imported(tree: ast.AST) -> Iterator[str]:
    """Names of pcamlib modules that a syntax tree imports, anywhere in it (also inside functions)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE.name:
            yield f"{PACKAGE.name}.{node.attr}"


@cache
def _parsed(path: Path, stamp: tuple[int, int]) -> tuple[str, ...]:
    """Modules imported by the file `path`; `stamp` (mtime, size) keeps the cache honest in a live kernel."""
    text = notebook_code(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return tuple(_imported(ast.parse(text, str(path))))


def closure(entry: Path) -> list[Path]:
    """Every pcamlib file that `entry` (a .py or .ipynb) reaches by imports, sorted; `entry` itself not included."""
    seen: set[Path] = set()
    todo = [Path(entry).resolve()]
    while todo:
        path = todo.pop()
        status = path.stat()
        for name in _parsed(path, (status.st_mtime_ns, status.st_size)):
            for file in _module_files(name):
                if file not in seen:
                    seen.add(file)
                    todo.append(file)
    return sorted(seen)


def digests(entry: Path) -> dict[str, str]:
    """SHA-256 of `entry` and of each file it reaches, by path relative to the repository (the package's parent).

    A notebook counts by its code cells and parameters only, so re-running it does not make itself stale.
    """
    entry = Path(entry).resolve()
    own = notebook_code(entry).encode() if entry.suffix == ".ipynb" else entry.read_bytes()
    result = {_relative(entry): hashlib.sha256(own).hexdigest()}
    for file in closure(entry):
        result[_relative(file)] = hashlib.sha256(file.read_bytes()).hexdigest()
    return result


def package_digest() -> str:
    """One SHA-256 over every Python file and recipe of the package: `code` in a run's provenance."""
    total = hashlib.sha256()
    for file in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.yaml")]):
        total.update(file.relative_to(PACKAGE).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
