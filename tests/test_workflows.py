"""Workflows: what starts them, that they go through the Makefile, and that none may do more than it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([.a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def read(path: Path) -> dict[str, Any]:
    found = yaml.safe_load(path.read_text())
    return {**found, "on": found.get("on", found.get(True))}  # YAML 1.1 reads `on` as true


def every_step() -> list[Any]:
    return [
        pytest.param(step, job, id=f"{path.stem}-{name}-{number}")
        for path in WORKFLOWS
        for name, job in read(path)["jobs"].items()
        for number, step in enumerate(job["steps"])
    ]


def test_all_are_there() -> None:
    assert {path.stem for path in WORKFLOWS} == {"ci", "data", "model", "docs"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_each_is_bounded_and_reads_only(path: Path) -> None:
    found = read(path)
    assert found["permissions"] == {"contents": "read"} and found["concurrency"]["cancel-in-progress"]
    assert found["name"] == path.stem and "workflow_dispatch" in found["on"]
    assert all(job["timeout-minutes"] <= 30 for job in found["jobs"].values())
    assert found["env"] == read(ROOT / ".github/workflows/ci.yml")["env"]
    assert "pull_request_target" not in found["on"], "it would run a stranger's code with this repository's rights"


@pytest.mark.parametrize(("step", "job"), every_step())
def test_steps_go_through_the_makefile(step: dict[str, Any], job: dict[str, Any]) -> None:
    assert ("run" in step) != ("uses" in step)
    if "run" in step:
        make, *targets = step["run"].split()
        assert make == "make" and targets and set(targets) <= TARGETS
    else:
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step["uses"]), "a named version, which dependabot raises"
        assert "secrets" not in str(step)


@pytest.mark.parametrize(("name", "paths"), [("data", ["data.lock"]), ("model", ["models/**"])])
def test_what_starts_them(name: str, paths: list[str]) -> None:
    started = read(ROOT / f".github/workflows/{name}.yml")["on"]
    assert started["push"] == {"branches": ["main"], "paths": paths} and started["pull_request"] == {"paths": paths}


def test_only_main_is_published_and_only_by_the_job_that_does() -> None:
    jobs = read(ROOT / ".github/workflows/docs.yml")["jobs"]
    assert jobs["publish"]["needs"] == "build" and "refs/heads/main" in jobs["publish"]["if"]
    assert jobs["publish"]["permissions"] == {"pages": "write", "id-token": "write"}
    assert not any("permissions" in job for name, job in jobs.items() if name != "publish")
    upload = next(step for step in jobs["build"]["steps"] if "upload" in step.get("uses", ""))
    assert upload["with"]["path"] == yaml.safe_load((ROOT / "mkdocs.yml").read_text())["site_dir"]


def test_dependabot_watches_packages_and_actions() -> None:
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}
