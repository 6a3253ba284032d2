"""The checklist: every box ticked by something that was tried, and open for each planted fault."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcamlib.jobs import slurm
from pcamlib.serving import registry, submission
from pcamlib.sources import ROOT

NAMES = list(submission.CHECKS)
GROUP = 'number: "7"\nmembers: [{name: Ada, id: "01"}, {name: "", id: ""}]\nrepository: https://git.example/g/r\n'
#: Stands for inference.py: answers as the real one does, so that this file tests the checklist alone.
INFERENCE = """
import argparse, sys
import numpy as np
from PIL import Image
from pcamlib.serving.predict import Predictor
parser = argparse.ArgumentParser()
for name in ("--checkpoint", "--out", "image"):
    parser.add_argument(name)
given = parser.parse_args()
p = Predictor(given.checkpoint).probability(np.array(Image.open(given.image))[None])[0]
with open(given.out, "w") as out:
    print(f"file,probability\\n{given.image},{p}", file=out)
"""


def git(root: Path, *arguments: str) -> None:
    who = ("-c", "user.name=Ada", "-c", "user.email=ada@git.example", "-c", "commit.gpgsign=false")
    subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose every box is ticked; nobody may change it."""
    root = tmp_path_factory.mktemp("submission") / "root"
    shutil.copytree(ROOT / "slurm", root / "slurm")
    (root / "journal").mkdir()
    (root / "journal/group.yaml").write_text(GROUP)
    (root / "assets").mkdir()
    (root / "assets/a.png").write_bytes(b"png")
    (root / "JOURNAL.md").write_text("* **Team Members:** Ada (01)\n\n## Question 1\n\n![a](assets/a.png)\n")
    (root / "inference.py").write_text(INFERENCE)
    registry.register(checkpoint, "small", root)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "all")
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole` to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "root"))


@pytest.fixture(autouse=True)
def _without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*command: str) -> Any:
        raise slurm.SlurmError("no Slurm on this machine")

    monkeypatch.setattr(slurm, "ask", ask)


@pytest.fixture
def openly(root: Path, synthetic_dir: Path) -> Callable[..., dict[int, str]]:
    """`openly(1, 2)`: reason by number, from 1, of those boxes that are open."""

    def reasons(*numbers: int) -> dict[int, str]:
        found = {n: submission.box(NAMES[n - 1], root, str(synthetic_dir)) for n in numbers}
        return {n: box.reason for n, box in found.items() if not box.ticked}

    return reasons


def test_names_and_order_are_those_of_the_assignment() -> None:
    template = (ROOT / "journal/templates/assignment_2.md.j2").read_text().partition("## Final Submission Checklist")[2]
    assert all(name in template for name in NAMES)
    assert sorted(NAMES, key=template.index) == NAMES


def test_a_whole_repository_has_every_box_ticked(whole: Path, synthetic_dir: Path) -> None:
    found = submission.boxes(whole, str(synthetic_dir))
    assert [(box.name, box.ticked) for box in found] == [(name, True) for name in NAMES], found
    assert "n = 256 valid patches (synthetic)" in found[1].reason and "answers one patch with 0." in found[2].reason
    assert re.fullmatch(r"\d+ scripts, bash -n: there is no Slurm here", found[3].reason)


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    found = submission.boxes(tmp_path)
    assert not any(box.ticked for box in found) and all(box.reason and "\n" not in box.reason for box in found)


def test_group_and_members(root: Path, openly: Callable[..., dict[int, str]]) -> None:
    group = root / "journal/group.yaml"
    group.write_text(GROUP.replace("https://git.example/g/r", "somewhere").replace('"01"', '""'))
    assert openly(1, 6) == {
        1: "'somewhere' in journal/group.yaml is no address", 6: "Ada has no id in journal/group.yaml"
    }  # fmt: skip
    group.write_text(GROUP.replace("Ada", "Bob"))
    assert openly(1, 6)[6].startswith("Bob (01) is not on the first page")
    group.write_text("nmber: 7\n")
    assert {1, 6} == set(openly(1, 6)) and "did you mean 'number'" in openly(1)[1]


def test_a_checkpoint_that_is_wrong(root: Path, openly: Callable[..., dict[int, str]]) -> None:
    index = root / "models/index.yaml"
    index.write_text(re.sub("value: .*", "value: 0.999", index.read_text(), count=1))
    assert openly(2)[2].startswith("small, index: metric.value 0.999 in the index, ")
    assert openly(2)[2].endswith("; not committed as it is now: models/index.yaml")


def test_without_a_repository_nothing_was_pushed(root: Path, openly: Callable[..., dict[int, str]]) -> None:
    (root / "journal/group.yaml").write_text(GROUP.replace("https://git.example/g/r", '""'))
    assert openly(2) == {2: "repository is empty in journal/group.yaml, so nobody can tell where to it was pushed"}


def test_what_is_added_but_not_committed(root: Path, openly: Callable[..., dict[int, str]]) -> None:
    shutil.rmtree(root / ".git")
    for step in (["init", "-q"], ["add", "."]):
        git(root, *step)
        found, lacks = openly(2, 3, 4), "not committed as it is now: "
        assert found[2] == f"{lacks}models/index.yaml, models/small.safetensors" and found[3] == f"{lacks}inference.py"
        assert found[4].startswith(f"{lacks}slurm/benchmark.sbatch, ") and "slurm/common.sh, slurm/sites/" in found[4]
    git(root, "commit", "-qm", "all")
    assert not openly(2, 3, 4)


def test_what_was_changed_since_the_commit(root: Path, openly: Callable[..., dict[int, str]]) -> None:
    (root / "JOURNAL.md").write_text("changed, as when the journal is being written\n")
    (root / "inference.pyc").touch()
    assert not openly(2, 3, 4), "local changes elsewhere leave a box as it is"
    for file in ("inference.py", "slurm/common.sh"):
        with open(root / file, "a") as script:
            script.write("# changed\n")
    git(root, "add", ".")
    lacks = "not committed as it is now: "
    assert openly(2, 3, 4) == {3: f"{lacks}inference.py", 4: f"{lacks}slurm/common.sh"}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nothing_of_that_name", "exit code 1: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("pass", "answers one patch with nothing"),
        (INFERENCE.replace("{p}", "0.123"), "answers one patch with [0.123], the checkpoint with"),
        (INFERENCE.replace("{p}", "nan"), "answers one patch with [nan], the checkpoint with"),
        (INFERENCE.replace("file,probability", "file,p"), "'probability'"),
    ],
)
def test_an_inference_script_that_does_not_answer(
    root: Path, openly: Callable[..., dict[int, str]], code: str, reason: str
) -> None:
    (root / "inference.py").write_text(code)
    assert reason in openly(3)[3]


def test_a_job_script_with_a_syntax_error(root: Path, openly: Callable[..., dict[int, str]]) -> None:
    (root / "slurm/broken.sbatch").write_text("#!/usr/bin/env bash\nif true; then\n")
    assert openly(4)[4].startswith("slurm/broken.sbatch: ") and "syntax error" in openly(4)[4]


def test_where_slurm_is_it_is_asked(
    root: Path, openly: Callable[..., dict[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask(*command: str) -> subprocess.CompletedProcess[str]:
        asked.append(command[:2])
        bad = command[-1].endswith("pcam.sbatch")
        return subprocess.CompletedProcess(command, int(bad), "", "allocation failure: Invalid partition\n" * bad)

    monkeypatch.setattr(slurm, "ask", ask)
    assert openly(4) == {4: "slurm/pcam.sbatch: allocation failure: Invalid partition"}
    assert asked.count(("sbatch", "--test-only")) == len(list(root.glob("slurm/*.sbatch")))


@pytest.mark.parametrize("image", ["/home/ada/a.png", "../a.png", "https://x.example/a.png", "assets/gone.png"])
def test_an_image_from_elsewhere(root: Path, openly: Callable[..., dict[int, str]], image: str) -> None:
    with open(root / "JOURNAL.md", "a") as journal:
        journal.write(f"\n![b]({image})\n")
    assert openly(5)[5].startswith("JOURNAL.md:7: ") and image in openly(5)[5]


def test_the_command(pcam: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = pcam("checklist", "--root", tmp_path)
    assert code == 1 and "- [ ] Group repository link provided?  (repository is empty" in out
    monkeypatch.setattr(submission, "boxes", lambda root, data: [submission.Box("a", True, "tried")])
    assert pcam("checklist") == (0, "- [x] a  (tried)\n", "")
