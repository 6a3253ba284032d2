"""The parameters of a notebook: what its tagged cell declares, and whether given values fit, before a kernel starts.

papermill alone only warns on a misspelled name, runs on the default and exits 0.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pcamlib.config import scalar
from pcamlib.errors import NotebookError, nearest
from pcamlib.jobs.verdict import read
from pcamlib.sources import ROOT

_SCALARS = {"bool": bool, "int": int, "float": float, "str": str}


def declared_parameters(path: Path) -> dict[str, tuple[Any, Any]]:
    """Type and default of each `name: type = literal` in the cell tagged `parameters`, in order.

    Raises:
        NotebookError: no such cell or more than one, a line without a type, a type or default that cannot be checked.
    """
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(f"{path}: expected one cell tagged 'parameters', found {len(tagged)}")
    try:
        body = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise NotebookError(f"{path}: the parameters cell, line {error.lineno}: {error.msg}") from None
    found: dict[str, tuple[Any, Any]] = {}
    for line in body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            name, where = line.target.id, f"{path}: parameter {line.target.id}"
            kind = _kind(line.annotation, where)
            try:
                found[name] = kind, _checked(kind, ast.literal_eval(line.value), where)
            except ValueError:
                raise NotebookError(f"{where}: the default must be a literal") from None
        elif not isinstance(line, (ast.Import, ast.ImportFrom, ast.Expr)):
            raise NotebookError(
                f"{path}: the parameters cell, line {line.lineno}: write `name: type = value`, "
                f"not `{ast.unparse(line).splitlines()[0]}`"
            )
    return found


def validate_parameters(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, with every name known and every value of the declared type; an int may stand for a float.

    `data_dir` must be a folder and `*_file` a file, relative to the repository, unless empty.

    Raises:
        NotebookError: the first that does not fit, and the nearest valid name.
    """
    declared, checked = declared_parameters(path), {}
    for name, value in given.items():
        if name not in declared:
            raise NotebookError(f"{path.stem} has no parameter '{name}'{nearest(name, declared)}")
        checked[name] = _checked(declared[name][0], value, f"{path.stem}: parameter {name}")
        if name == "data_dir" and value and not (ROOT / value).is_dir():
            raise NotebookError(f"{path.stem}: data_dir={value}: no such folder (seen from {ROOT})")
        if name.endswith("_file") and value and not (ROOT / value).is_file():
            raise NotebookError(f"{path.stem}: {name}={value}: no such file (seen from {ROOT})")
    return checked


def parse_assignments(path: Path, items: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts as values: YAML scalars, but the bare text where the notebook declares a str (`split=007`).

    Raises:
        NotebookError: an item without `=`.
    """
    declared, values = declared_parameters(path), {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals:
            raise NotebookError(f"'{item}' is no parameter; write name=value, as in seed=1")
        kind, value = declared.get(name, (None, None))[0], scalar(text)
        keeps_text = kind is str or (str in get_args(kind) and value is not None)
        values[name] = text if keeps_text else value
    return values


def _kind(node: ast.expr, where: str) -> Any:
    """The type that an annotation names: a scalar, `list[...]`, or one of these `| None`."""
    match node:
        case ast.Name(id=name) if name in _SCALARS:
            return _SCALARS[name]
        case ast.Constant(value=None):
            return None
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _kind(left, where) | _kind(right, where)
        case ast.Subscript(value=ast.Name(id="list"), slice=item):
            return types.GenericAlias(list, (_kind(item, where),))
    raise NotebookError(f"{where}: type `{ast.unparse(node)}`; use bool, int, float, str, list[...] or one | None")


def _checked(kind: Any, value: Any, where: str) -> Any:
    try:
        return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
    wrong = first["input"]
    hint = ""
    if isinstance(wrong, str) and isinstance(scalar(wrong), float):
        hint = f" (YAML reads {wrong} as text; write {scalar(wrong)!r} or 1.0e-3)"
    raise NotebookError(f"{where}={value!r}: {first['msg'].lower()}{hint}")
