"""Checklists that tick themselves: each box is a check over the repository, or says why it stays empty.

`journal/templates/NAME.yaml` holds the boxes of a form by name, each of one kind:

    lint: {has: {.github/workflows/ci.yml: "make lint"}}      ticked where each file (a glob) holds its pattern
    sweep: {evidence: hpo.trials}                             ticked where a notebook recorded it
    bucket: {unused: "no cloud account belongs to it"}        never ticked: a decision, with its reason
    access: {person: "who may write to the repository"}       never ticked here: only a person knows
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from pcamlib.config import Strict, read_yaml, validate
from pcamlib.errors import ConfigError
from pcamlib.journal.evidence import find


class Rule(Strict):
    """When a box is ticked, and `why` not where the conditions do not say it well enough themselves."""

    has: dict[str, str] = Field({})
    evidence: str = ""
    unused: str = ""
    person: str = ""
    why: str = ""

    @model_validator(mode="after")
    def _conditional(self) -> Rule:
        if not (self.has or self.evidence or self.unused or self.person):
            raise ValueError("no condition; give one of has, evidence, unused, person")
        return self


@dataclass(frozen=True)
class Box:
    """A box of a checklist; `why` it is empty, and whether that is `decided` or still open."""

    ticked: bool
    why: str = ""
    decided: bool = False


def boxes(root: Path, name: str, evidence: Collection[str]) -> dict[str, Box]:
    """Every box of the form `name`, judged on the repository at `root` and the keys of its evidence; none without any.

    Raises:
        ConfigError: the file is no list of rules.
    """
    path = find(root, f"journal/templates/{name}.yaml")
    if not path.is_file():
        return {}
    try:
        rules = {box: validate(Rule, rule) for box, rule in read_yaml(path).items()}
    except ConfigError as error:
        raise ConfigError(f"journal/templates/{path.name}: {error}") from None
    base = find(root, "pyproject.toml").parent
    return {box: _judged(rule, base, evidence) for box, rule in rules.items()}


def _judged(rule: Rule, base: Path, evidence: Collection[str]) -> Box:
    if rule.unused:
        return Box(False, f"not used, because {rule.unused}", decided=True)
    if rule.person:
        return Box(False, f"only a person can say {rule.person}")
    if rule.evidence and rule.evidence not in evidence:
        return Box(False, f"no evidence `{rule.evidence}`")
    lacking = [file for file, pattern in rule.has.items() if not _holds(base, file, pattern)]
    says = [f"no {file}" + (f" holds `{rule.has[file]}`" if rule.has[file] else "") for file in lacking]
    return Box(not says, (rule.why or "; ".join(says)) if says else "")


def _holds(base: Path, file: str, pattern: str) -> bool:
    """Whether a file that matches the glob holds the pattern; an empty pattern asks for the file alone."""
    found = base.glob(file)
    if not pattern:
        return any(found)
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in found if path.is_file())
    return any(re.search(pattern, text, re.MULTILINE) for text in texts)
