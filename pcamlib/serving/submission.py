"""The final submission checklist, ticked by checks alone.

pcam checklist

A box is ticked because something was tried and held, or it stays open with the reason. Order and names are those of the
assignment.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from pcamlib.errors import PcamError
from pcamlib.jobs import slurm
from pcamlib.journal.check import check
from pcamlib.journal.group import read_group
from pcamlib.provenance import git
from pcamlib.serving import registry
from pcamlib.serving.predict import Predictor

PATIENCE = 300  # seconds for inference.py on one patch; importing torch from a slow disk takes most of it
TOLERANCE = 0.02  # of a probability: inference.py answers in bf16 where the CPU multiplies it, off by up to .007


@dataclass(frozen=True)
class Box:
    """One line of the checklist: ticked, or open for a reason."""

    name: str
    ticked: bool
    reason: str

    def __str__(self) -> str:
        return f"- [{'x' if self.ticked else ' '}] {self.name}  ({self.reason})"


def boxes(root: Path, data: str | None = None) -> list[Box]:
    """The checklist of the repository `root`; `data` as for `registry.verify`."""
    return [box(name, root, data) for name in CHECKS]


def box(name: str, root: Path, data: str | None = None) -> Box:
    """One line of it, by its name in `CHECKS`."""
    held: list[str] = []
    try:
        wrong = list(CHECKS[name](root, data, held))
    except (PcamError, OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
        wrong = [" ".join(str(error).split())]
    return Box(name, not wrong, "; ".join(wrong or held))


# Each yields what is wrong; what was tried and held goes into `held`.


def _link(root: Path, data: str | None, held: list[str]) -> Iterator[str]:
    link = read_group(root).repository
    if not re.fullmatch(r"https?://[^/\s]+/\S+", link):
        yield f"'{link}' in journal/group.yaml is no address" if link else "repository is empty in journal/group.yaml"
    held.append(link)


def _uncommitted(root: Path, *files: str) -> Iterator[str]:
    """What HEAD lacks or has otherwise: the index may hold what no commit does, and changes elsewhere do not count."""
    stored = {file: git("rev-parse", f"HEAD:./{file}", root=root) for file in files}  # None: no git, commit or file
    lacks = [file for file, blob in stored.items() if not blob or blob != git("hash-object", "--", file, root=root)]
    if lacks:
        yield f"not committed as it is now: {', '.join(lacks)}"


def _checkpoint(root: Path, data: str | None, held: list[str]) -> Iterator[str]:
    rows = registry.verify(root, data)
    if not rows:
        yield f"no model in {registry.INDEX}; `pcam register` adds one"
    for row in rows:
        if not row.passed:
            yield f"{row.model}, {row.check}: {row.reason}"
        elif row.check == "score":
            held.append(f"{row.model}: {row.reason}")
    if not read_group(root).repository:
        yield "repository is empty in journal/group.yaml, so nobody can tell where to it was pushed"
    if rows:
        yield from _uncommitted(root, registry.INDEX, *(entry.file for entry in registry.entries(root)))


def _inference(root: Path, data: str | None, held: list[str]) -> Iterator[str]:
    """One patch as a PNG, against the checkpoint's own answer."""
    known = registry.entries(root)
    if not (root / "inference.py").is_file() or not known:
        yield f"no model in {registry.INDEX} to try it with" if not known else "inference.py is missing"
        return
    yield from _uncommitted(root, "inference.py")
    model, patch = root / known[-1].file, np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        image, table = Path(folder) / "patch.png", Path(folder) / "predictions.csv"
        Image.fromarray(patch).save(image)
        call = [sys.executable, str(root / "inference.py"), "--checkpoint", str(model), str(image), "--out", str(table)]
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False)
        if done.returncode:
            yield f"inference.py: exit code {done.returncode}: {(done.stderr.strip() or 'silent').splitlines()[-1]}"
            return
        found = pd.read_csv(table)["probability"].tolist() if table.is_file() else []
    expected = float(Predictor(model).probability(patch[None])[0])
    if len(found) != 1 or not abs(found[0] - expected) <= TOLERANCE:
        yield f"inference.py answers one patch with {found or 'nothing'}, the checkpoint with {expected:.4f}"
    held += [f"answers one patch with {answer:.4f}, as the checkpoint does ({model.name})" for answer in found]


def _scripts(root: Path, data: str | None, held: list[str]) -> Iterator[str]:
    jobs = sorted(root.glob("slurm/*.sbatch"))
    if not jobs:
        yield "no slurm/*.sbatch"
    try:
        slurm.ask("sinfo", "-h")
        how = "sbatch --test-only"
    except PcamError:
        how = "bash -n: there is no Slurm here"
    scripts = [*jobs, *sorted(root.glob("slurm/**/*.sh"))]
    for path in scripts:
        tried = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
        if not tried.returncode and path.suffix == ".sbatch" and how.startswith("sbatch"):
            tried = slurm.ask("sbatch", "--test-only", str(path))
        if tried.returncode:
            yield f"{path.relative_to(root)}: {(tried.stderr.strip() or 'refused').splitlines()[-1]}"
    yield from _uncommitted(root, *(path.relative_to(root).as_posix() for path in scripts))
    held.append(f"{len(jobs)} scripts, {how}")


def _images(root: Path, data: str | None, held: list[str]) -> Iterator[str]:
    if not (root / "JOURNAL.md").is_file():
        yield "JOURNAL.md is missing; `make journal` writes it"
    yield from (f"{found.where}: {found.what}" for found in check(root) if found.kind == "image")
    held.append("every image of JOURNAL.md is there, by a path inside the repository")


def _members(root: Path, data: str | None, held: list[str]) -> Iterator[str]:
    named = [member for member in read_group(root).members if member.name]
    if not named:
        yield "no member is named in journal/group.yaml"
    journal = root / "JOURNAL.md"
    first = journal.read_text(encoding="utf-8").partition("## Question 1")[0] if journal.is_file() else ""
    for member in named:
        if not member.id:
            yield f"{member.name} has no id in journal/group.yaml"
        elif f"{member.name} ({member.id})" not in first:
            yield f"{member.name} ({member.id}) is not on the first page of JOURNAL.md; `make journal` writes it"
    held.append(f"{len(named)} members")


CHECKS: dict[str, Callable[[Path, str | None, list[str]], Iterator[str]]] = {
    "Group repository link provided?": _link,
    "Best model checkpoint pushed to GitHub?": _checkpoint,
    "inference.py script included and functional?": _inference,
    "All Slurm scripts included in the repository?": _scripts,
    "All images use relative paths (assets/)?": _images,
    "Names and IDs of all members on the first page?": _members,
}
