"""Who hands the journals in: journal/group.yaml."""

from __future__ import annotations

from pathlib import Path

from pcamlib.config import Strict, read_yaml, validate
from pcamlib.errors import ConfigError
from pcamlib.journal.evidence import find

#: What each journal's first page asks for, beside names and ids.
ASKED = {"assignment_2": ("number", "repository", "base"), "assignment_1": ("repository", "ta", "skeleton"),
         "dtu_exam": ("number",)}  # fmt: skip


class Member(Strict):
    """A student."""

    name: str = ""
    id: str = ""


class Group(Strict):
    """`journal/group.yaml`; an empty string is a place still to be filled.

    The first member hands in assignment 1, with `ta`, the teaching assistant, and the `skeleton` that it began as.
    """

    number: str | int = ""
    members: list[Member] = []  # noqa: RUF012  # pydantic copies it
    repository: str = ""
    base: str = ""
    ta: str = ""
    skeleton: str = ""

    @property
    def first(self) -> Member:
        """Who hands in what is handed in alone."""
        return self.members[0] if self.members else Member()


def read_group(root: Path) -> Group:
    """The group of `root`.

    Raises:
        ConfigError: an unknown key or a wrong type in journal/group.yaml.
    """
    try:
        return validate(Group, read_yaml(find(root, "journal/group.yaml")))
    except ConfigError as error:
        raise ConfigError(f"journal/group.yaml: {error}") from None
