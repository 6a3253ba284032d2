"""What the repository promises about itself: pins, floors, size, names."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pcamlib"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: Files and folders of pcamlib, from the ground up. Those of one floor are strangers, but for the ground, one house.
FLOORS = (
    ("errors", "files", "locks", "sources", "config", "seeding", "provenance"),
    ("data", "models", "journal", "jobs"),
    ("training",),
    ("audit", "experiments", "serving"),
    ("make",),
    ("submit",),
    ("cli",),
    ("__init__",),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}


def name(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def lock() -> dict[str, str]:
    """Exact version by normalised name, from requirements.lock."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    found = [Requirement(line) for line in lines]
    assert len({name(requirement) for requirement in found}) == len(found), "a package is locked twice"
    return {name(requirement): str(requirement.specifier).removeprefix("==") for requirement in found}


def direct(*extras: str) -> list[Requirement]:
    """Dependencies that pyproject.toml names itself, at run time and in `extras`."""
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def tracked() -> list[Path]:
    """Files that are committed, or would be."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z"], capture_output=True
    )
    if listed.returncode:
        pytest.skip("no git repository here")
    paths = [ROOT / part.decode() for part in listed.stdout.split(b"\0") if part]
    return [path for path in paths if path.is_file()]


def imports(path: Path, root: Path) -> Iterator[str]:
    """Absolute dotted names that a module imports, anywhere in it; `from a import b` gives `a.b`."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [".".join(package[: len(package) - node.level + 1])] if node.level else []
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)


def breaches(root: Path) -> list[str]:
    """Imports in `root`/pcamlib that go up or sideways, as `importer -> imported`."""
    found = []
    for path in sorted((root / "pcamlib").rglob("*.py")):
        unit = path.relative_to(root / "pcamlib").parts[0].removesuffix(".py")
        if unit not in FLOOR:
            found.append(f"{path.relative_to(root)}: has no floor in tests/test_repository.py")
            continue
        for imported in imports(path, root):
            parts = imported.split(".")
            if parts[0] != "pcamlib":
                continue
            other = parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"
            same_house = other == unit or FLOOR[other] == FLOOR[unit] == 0
            if FLOOR[other] >= FLOOR[unit] and not same_house:
                found.append(f"{path.relative_to(root)} -> {imported}")
    return found


# Versions


def test_every_direct_dependency_is_locked_within_its_bound() -> None:
    versions = lock()
    for requirement in direct("dev", "serve", "docs"):
        assert name(requirement) in versions, f"{requirement.name} is missing in requirements.lock: make lock"
        assert requirement.specifier.contains(versions[name(requirement)], prereleases=True), requirement


def test_everything_locked_is_exact() -> None:
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in lock().values()), (
        "exact, and without a build like +cpu"
    )
    assert "pcamlib" not in lock()


def test_what_an_installed_dependency_needs_is_locked_too() -> None:
    versions, todo, seen = lock(), direct("dev", "serve", "docs"), set()
    while todo:
        requirement = todo.pop()
        if name(requirement) in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name(requirement))
        if re.match(r"nvidia-|cuda-|triton$", name(requirement)):  # torch pins its CUDA packages itself
            continue
        assert name(requirement) in versions, f"{requirement} is missing in requirements.lock: make lock"
        todo += map(Requirement, importlib.metadata.requires(requirement.name) or [])


def test_conda_users_get_the_same_versions() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "pcam"
    assert environment["dependencies"][:2] == ["python=3.11", "pip"]
    pins = [Requirement(line) for line in environment["dependencies"][2]["pip"]]
    assert [name(pin) for pin in pins] == [name(requirement) for requirement in direct("dev", "serve")]
    assert {name(pin): str(pin.specifier) for pin in pins} == {
        name(requirement): f"=={lock()[name(requirement)]}" for requirement in direct("dev", "serve")
    }


# Floors


def test_imports_go_down_never_up_never_sideways() -> None:
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data/layout.py", "from pcamlib.training.loop import train"),  # up
        ("data/layout.py", "from pcamlib.models import build"),  # sideways
        ("journal/render.py", "import pcamlib.data.layout"),
        ("jobs/notebook.py", "from ..journal import evidence"),
        ("models/cnn.py", "from pcamlib import data"),
        ("experiments/hpo.py", "def late():\n    from pcamlib.audit import report"),
        ("files.py", "from pcamlib import training"),
        ("training/loop.py", "from pcamlib import MLP"),  # through the roof
        ("audit/report.py", "from pcamlib.cli import main"),
        ("helpers.py", "x = 1"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / "pcamlib" / module
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert len(breaches(tmp_path)) == 1


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("provenance.py", "from pcamlib.sources import ROOT"),
        ("data/loader.py", "from . import layout\nfrom .layout import Split\nfrom pcamlib.seeding import generator"),
        ("training/loop.py", "from pcamlib.data import loader\nimport pcamlib.models.cnn, torch"),
        ("cli.py", "from pcamlib import serving, journal"),
    ],
)
def test_a_proper_import_is_none(tmp_path: Path, module: str, line: str) -> None:
    path = tmp_path / "pcamlib" / module
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert breaches(tmp_path) == []


def test_nothing_rests_on_torchvision() -> None:
    code = {path: path.read_text() for path in tracked() if path.suffix == ".py"}
    for path in (path for path in tracked() if path.suffix == ".ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code[path] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    statement = re.compile(r"^\s*(import|from)\s+(torchvision|timm)\b", re.MULTILINE)
    assert [str(path) for path, text in code.items() if statement.search(text)] == []


# Size and names


def code_lines(text: str) -> int:
    """Lines that hold code: blank lines, comments and docstrings are free, so that nobody saves on them."""
    tree = ast.parse(text)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, owners) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code = [line.strip() for number, line in enumerate(text.splitlines(), 1) if number not in prose]
    return sum(bool(line) and not line.startswith("#") for line in code)


def test_lines_of_code_are_counted_without_prose() -> None:
    assert code_lines('"""Doc.\n\nMore."""\n\n# why\nx = 1\n\ndef f():\n    """What."""\n    return "#"\n') == 3


def test_the_library_stays_thin() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name: len(text.splitlines()) for name, text in files.items() if len(text.splitlines()) > 320} == {}
    assert sum(map(code_lines, files.values())) < 17_500


@pytest.mark.parametrize(
    "path",
    ["notebooks", "pcamlib", "papermill_jobs", "slurm", "assets", "tests", "environment.yml", "README.md", "Makefile",
     "JOURNAL.md", "pyproject.toml", "requirements.lock", "LICENSE", "CITATION.cff", "CONTRIBUTING.md"],
)  # fmt: skip
def test_the_top_level_is_that_of_the_design(path: str) -> None:
    assert (ROOT / path).exists()


def test_no_file_names_a_package_host_or_this_checkout() -> None:
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"),
                                           ("deb", "debian", "org"), ("conda", "anaconda", "org"))]  # fmt: skip
    words = [word.encode() for word in [*hosts, f"{ROOT}/"]]
    assert [(str(path), word) for path in tracked() for word in words if word in path.read_bytes()] == []


def test_no_patches_are_committed() -> None:
    data = [path for path in tracked() if path.name.endswith((".h5", ".h5.gz", ".npy", ".npz", ".safetensors"))]
    index = ROOT / "models/index.yaml"
    registered = [entry["file"] for entry in yaml.safe_load(index.read_text())["models"]] if index.is_file() else []
    assert all(re.fullmatch(r"models/[^/]+\.safetensors", file) for file in registered)
    allowed = {ROOT / file for file in registered}
    assert [str(path) for path in set(data) - allowed if not path.is_relative_to(ROOT / "tests" / "data")] == []


def test_ci_goes_through_the_makefile() -> None:
    targets = set(re.findall(r"^([.a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert {"lint", "test", "notebooks", "journal"} <= jobs.keys()
    for job in jobs.values():
        assert job["timeout-minutes"] <= 30
        commands = [step["run"].split() for step in job["steps"] if "run" in step]
        assert commands and all(make == "make" and targets >= set(rest) for make, *rest in commands)
