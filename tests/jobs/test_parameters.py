"""Parameters: everything that does not fit is an error before a kernel starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcamlib.errors import NotebookError
from pcamlib.jobs.parameters import declared_parameters, parse_assignments, validate_parameters


@pytest.fixture
def path(make) -> Path:
    return make("01_twins", "print(seed)")


def test_declared_types_and_defaults(path):
    declared = declared_parameters(path)
    assert list(declared)[:3] == ["seed", "lr", "split"]
    assert declared["seed"] == (int, 0)
    assert declared["lr"] == (float, 1e-3)
    assert declared["steps"] == (list[int], [1, 2])
    assert declared["limit"] == (int | None, None)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "expected one cell tagged 'parameters', found 0"),
        ("seed = 0", "write `name: type = value`, not `seed = 0`"),
        ("seed: int = '0'", "parameter seed='0': input should be a valid integer"),
        ("seed: int = int('0')", "the default must be a literal"),
        ("seed: complex = 0", "type `complex`; use bool, int"),
        ("seed: int = = 0", "the parameters cell, line 1"),
    ],
)
def test_a_bad_declaration_is_an_error(make, cell, message):
    with pytest.raises(NotebookError) as caught:
        declared_parameters(make("01_twins", "1", parameters=cell))
    assert message in str(caught.value)


def test_imports_and_docstrings_may_stand_in_the_parameters_cell(make):
    assert declared_parameters(make("a", parameters='"""Doc."""\nimport os\nseed: int = -1')) == {"seed": (int, -1)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sed": 1}, "01_twins has no parameter 'sed'; did you mean 'seed'?"),
        ({"seed": "1"}, "01_twins: parameter seed='1': input should be a valid integer"),
        ({"seed": 1.0}, "valid integer"),
        ({"seed": True}, "valid integer"),
        ({"lr": True}, "valid number"),
        ({"lr": float("nan")}, "finite number"),
        ({"lr": "1e-3"}, "YAML reads 1e-3 as text; write 0.001 or 1.0e-3"),
        ({"split": 7}, "valid string"),
        ({"fast": 1}, "valid boolean"),
        ({"steps": [1, "2"]}, "valid integer"),
        ({"data_dir": "no/such/folder"}, "data_dir=no/such/folder: no such folder"),
        ({"labels_file": "no_such.csv"}, "labels_file=no_such.csv: no such file"),
        ({"labels_file": "pcamlib"}, "labels_file=pcamlib: no such file"),
    ],
)
def test_what_does_not_fit_is_named(path, given, message):
    with pytest.raises(NotebookError) as caught:
        validate_parameters(path, given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_fits_passes_with_its_type(path, tmp_path):
    given = {"lr": 1, "seed": 3, "split": "007", "limit": None, "data_dir": str(tmp_path), "labels_file": ""}
    checked = validate_parameters(path, given)
    assert checked == given
    assert type(checked["lr"]) is float
    assert validate_parameters(path, {"data_dir": "pcamlib", "labels_file": "pcamlib/errors.py"})  # at the repository


def test_assignments_from_the_command_line(path):
    items = ["split=007", "lr=1e-3", "seed=5", "fast=false", "steps=[3, 4]", "limit=null", "label=null", "sed=1"]
    assert parse_assignments(path, items) == {
        "split": "007",  # not 7
        "lr": 0.001,  # not the text that YAML makes of it
        "seed": 5,
        "fast": False,
        "steps": [3, 4],
        "limit": None,
        "label": None,
        "sed": 1,  # refused by validate_parameters
    }
    assert parse_assignments(path, ["label=1e-3", "split=a=b", "split=null"]) == {"label": "1e-3", "split": "null"}
    with pytest.raises(NotebookError, match="'seed' is no parameter; write name=value"):
        parse_assignments(path, ["seed"])
