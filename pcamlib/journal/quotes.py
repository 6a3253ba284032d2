"""What the journal quotes from the repository as it is now: source code, settings, README headings, git history."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pcamlib import provenance
from pcamlib.errors import EvidenceError, nearest
from pcamlib.journal.evidence import find


def code(root: Path, file: str, name: str) -> str:
    """The source of a function, class, `Class.method` or top-level name, as it is now, with file and line.

    Raises:
        EvidenceError: no such file, or no such name in it.
    """
    path = find(root, file)
    if not path.is_file():
        raise EvidenceError(f"{file}: no such file to quote")
    text = path.read_text(encoding="utf-8")
    found = dict(_definitions(ast.parse(text)))
    if name not in found:
        raise EvidenceError(f"{file}: nothing named '{name}'{nearest(name, found)}")
    first, last = found[name]
    quoted = textwrap.dedent("\n".join(text.splitlines()[first - 1 : last]))
    return f"```python\n{quoted}\n```\n\n<sub>[{file}:{first}]({file}#L{first}) `{name}`</sub>"


def found(root: Path, file: str, pattern: str, between: str = ", ") -> str:
    """What the first group of a pattern matches in a file as it is now, each once; for settings that a text quotes.

    Raises:
        EvidenceError: no such file, or nothing in it matches.
    """
    path = find(root, file)
    if not path.is_file():
        raise EvidenceError(f"{file}: no such file to quote")
    matches = re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if not matches:
        raise EvidenceError(f"{file}: nothing matches '{pattern}'")
    return between.join(dict.fromkeys(matches))


def heading(root: Path, word: str) -> str:
    """The first heading of README.md that contains `word`, or nothing."""
    path = root / "README.md"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and word in line.lower()), "")


def git_graph(root: Path) -> str:
    """The last 15 commits of all branches as a graph, in a fence; nothing outside a repository."""
    graph = provenance.git("log", "--graph", "--oneline", "--all", "--max-count=15", root=root)
    return f"```text\n{graph}\n```" if graph else ""


def git_facts(root: Path) -> dict[str, Any]:
    """`commits`, `merges`, `branches`, `authors` (numbers) and `linear`; empty outside a repository."""
    log = provenance.git("log", "--all", "--format=%P|%aN", root=root)
    branches = provenance.git("branch", "--all", "--format=%(refname:short)", root=root)
    if not log or branches is None:
        return {}
    entries = [line.partition("|") for line in log.splitlines()]
    merges = sum(len(parents.split()) > 1 for parents, _, _ in entries)
    authors = len({author for _, _, author in entries})
    facts = {"commits": len(entries), "merges": merges, "branches": len(branches.splitlines()), "authors": authors}
    return {**facts, "linear": merges == 0}


def _definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """Dotted names defined at the top level of a module or class, with first (decorators included) and last line."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield prefix + node.name, (first, node.end_lineno or first)
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    yield prefix + target.id, (node.lineno, node.end_lineno or node.lineno)
