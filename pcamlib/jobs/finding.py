"""What `pcam doctor` finds, and what it looks at."""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pcamlib.sources import ROOT

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line: how bad, what was looked at, what it is like, and what to do (empty: nothing)."""

    level: Level
    what: str
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.what}: {self.detail}{f'; {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True)
class Place:
    """What the checks look at: this process and machine, or others that a test makes up."""

    root: Path = ROOT
    env: Mapping[str, str] = field(default_factory=lambda: os.environ)
    home: Path = field(default_factory=Path.home)
    prefix: Path = Path(sys.prefix)
    executable: str = sys.executable
    version: tuple[int, ...] = sys.version_info[:3]
    packages: Path = Path(sysconfig.get_paths()["purelib"])
    user_site: Path | None = Path(site.getusersitepackages()) if site.ENABLE_USER_SITE else None
    proc: Path = Path("/proc")
    shm: Path = Path("/dev/shm")

    @cached_property
    def locked(self) -> dict[str, str]:
        """Version by package from requirements.lock, for this Python; without a build like +cpu."""
        lines = (self.root / "requirements.lock").read_text(encoding="utf-8").splitlines()
        found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
        return {
            canonicalize_name(one.name): str(one.specifier).removeprefix("==")
            for one in found
            if one.marker is None or one.marker.evaluate()
        }


def distributions(folder: Path) -> dict[str, str]:
    """Version by package in a site-packages folder, read from file names: 1 ms, where metadata takes 90."""
    pattern = re.compile(r"(?P<name>.+?)-(?P<version>\d[^-]*)(-.*)?\.(dist|egg)-info")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return {canonicalize_name(found["name"]): found["version"] for found in map(pattern.fullmatch, names) if found}


def listed(names: list[str], most: int = 5) -> str:
    """`a, b, c and 4 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
