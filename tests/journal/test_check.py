"""Each kind of finding, shown by a planted fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from journal_evidence import data_evidence, notebook

from pcamlib.journal.check import Finding, check
from pcamlib.journal.draft import NAMES
from pcamlib.journal.evidence import Recorder
from pcamlib.journal.render import render
from pcamlib.sources import ROOT


@pytest.fixture
def rendered(complete: Path) -> Path:
    """A complete root with its JOURNAL.md."""
    render("assignment_2", complete)
    return complete


def faults(root: Path) -> list[Finding]:
    return [finding for finding in check(root) if finding.severity == "fault"]


def edit(root: Path, key: str, change: Callable[[dict[str, Any]], None], name: str = "00_data") -> None:
    """Change one entry of an evidence file by hand."""
    path = root / "journal" / "evidence" / f"{name}.json"
    record = json.loads(path.read_text())
    change(next(entry for entry in record["evidence"] if entry["key"] == key))
    path.write_text(json.dumps(record))


def test_a_complete_journal_has_only_the_expected_open_places(rendered: Path) -> None:
    found = check(rendered)
    assert {finding.severity for finding in found} == {"open"}
    assert [finding.what for finding in found if finding.kind == "group"] == [
        "number is empty", "repository is empty", "base is empty", "no member is named",
    ]  # fmt: skip
    places = [finding.where.split(" ")[1].rstrip(",") for finding in found if finding.kind == "question"]
    assert [places.count(str(q)) for q in range(1, 10)] == [0, 4, 0, 2, 11, 3, 4, 4, 1]
    assert any(finding.where == "Question 5, Part 2, 4. Thresholding Logic" for finding in found)
    assert any(finding.do == "write it in journal/prose/q4_1.md" for finding in found)
    assert [finding.where for finding in found if finding.kind == "draft"] == [
        "Question 1, 4. Twin Run Results", "Question 7, 3. CI Audit",
    ]  # fmt: skip


def test_an_answer_closes_its_place(rendered: Path) -> None:
    before = sum(finding.kind == "question" for finding in check(rendered))
    (rendered / "journal/prose/q6_3.md").write_text("A global mean hides a slice.")
    render("assignment_2", rendered)
    assert sum(finding.kind == "question" for finding in check(rendered)) == before - 1 and not faults(rendered)


def test_drafts_and_missing_ids_are_open(rendered: Path) -> None:
    (rendered / "journal/prose/q6_3.md").write_text("A thought.\n\nTODO: finish.")
    (rendered / "journal/group.yaml").write_text("number: 7\nmembers: [{name: Ada}]\nrepository: r\nbase: Ada\n")
    render("assignment_2", rendered)
    found = [str(finding) for finding in check(rendered) if finding.kind in ("draft", "group")]
    assert [line for line in found if "nobody approved" not in line] == [
        "open: journal/group.yaml: Ada has no id; fill it in",
        "open: journal/prose/q6_3.md:3: says TODO; finish it",
    ]


def test_a_misspelled_group_field(rendered: Path) -> None:
    (rendered / "journal/group.yaml").write_text("nmber: 7\n")
    (finding,) = faults(rendered)
    assert finding.kind == "group-file" and "did you mean 'number'" in finding.what


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(n=None), "'data.mlp.auc': a metric without n"),
        (lambda e: e.pop("interval"), "'data.mlp.auc': a metric without an interval"),
        (lambda e: e.update(seeds=[0, 1], runs={"a": "1", "b": "1"}), "2 seeds, but a and b are one run"),
        (lambda e: e.update(seeds=[0, 1, 2]), "3 seeds need as many runs; got 1"),
        (lambda e: e.update(value=0.99), "does not hold the value 0.99"),
        (lambda e: e.update(vlaue=1), "vlaue: Extra inputs are not permitted"),
        (lambda e: e.update(value=0.82), "edited by hand"),
    ],
)
def test_evidence_edited_by_hand(rendered: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    edit(rendered, "data.mlp.auc", change)
    finding = faults(rendered)[0]
    assert finding.kind == "evidence" and message in finding.what and finding.where == "journal/evidence/00_data.json"


@pytest.mark.parametrize("damage", ["", "[]", '{"evidence": []}', '{"evidence": 3}'])
def test_damaged_evidence(rendered: Path, damage: str) -> None:
    (rendered / "journal/evidence/00_data.json").write_text(damage)
    assert {finding.kind for finding in faults(rendered)} == {"evidence"}


def test_a_key_in_two_notebooks(rendered: Path) -> None:
    recorder = Recorder("01_reproducibility", rendered, data={}, synthetic=True)
    recorder.value("data.mlp.auc", 1)
    recorder.close()
    assert any("'data.mlp.auc' is also in journal/evidence/00_data.json" in f.what for f in faults(rendered))


def test_stale_evidence_names_the_file(rendered: Path) -> None:
    notebook(rendered, "00_data", "import pcamlib.seeding")
    (rendered / "requirements.lock").write_text("torch==2.14.0\n")
    found = {finding.what for finding in faults(rendered) if finding.kind == "stale"}
    assert found == {
        "00_data.ipynb changed since 00_data ran",
        "pcamlib/files.py is gone since 00_data ran",
        "pcamlib/errors.py is gone since 00_data ran",
        "pcamlib/seeding.py is new since 00_data ran",
        "requirements.lock changed since 00_data ran",
        "requirements.lock changed since 01_reproducibility ran",
    }


def test_evidence_of_a_notebook_that_is_gone_or_renamed(rendered: Path) -> None:
    path = notebook(rendered, "77_gone", "")
    Recorder("77_gone", rendered, data={}, synthetic=True).close()
    path.unlink()
    assert any("notebooks/77_gone.ipynb: no such notebook" in f.what for f in faults(rendered) if f.kind == "stale")
    (rendered / "journal/evidence/77_gone.json").unlink()
    notebook(rendered, "02_other", "")
    (rendered / "journal/evidence/00_data.json").rename(rendered / "journal/evidence/02_other.json")
    assert any(f.what == "is the evidence of 00_data" for f in faults(rendered) if f.kind == "evidence")


def test_evidence_that_no_job_made_is_a_fault_only_where_asked(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    data_evidence(complete, synthetic=True).close()
    assert [finding for finding in check(complete) if finding.kind == "job"] == []
    (only,) = (finding for finding in check(complete, jobs=True) if finding.kind == "job")
    assert only.severity == "fault" and "01_reproducibility.json" in only.where and "pcam submit journal" in only.do


def test_a_journal_edited_by_hand_names_the_line(rendered: Path) -> None:
    path = rendered / "JOURNAL.md"
    path.write_text(path.read_text().replace("2 changed the weights", "3 changed the weights"))
    (finding,) = faults(rendered)
    number = next(i for i, line in enumerate(path.read_text().splitlines(), 1) if "3 changed" in line)
    assert finding.kind == "journal" and finding.where == f"JOURNAL.md:{number}"
    assert "Of 3 sources, 3 changed" in finding.what and "Of 3 sources, 2 changed" in finding.what
    path.write_text(path.read_text().replace("3 changed the weights", "2 changed the weights") + "\nOne more line.\n")
    assert "One more line." in faults(rendered)[0].what
    path.write_text("# Assignment 2: MLOps & PCAM Pipeline Journal\n")
    assert "(nothing)" in faults(rendered)[0].what
    path.unlink()
    assert [finding.what for finding in faults(rendered)] == ["missing"]


def test_what_comes_from_git_may_differ(rendered: Path) -> None:
    path = rendered / "JOURNAL.md"
    path.write_text(path.read_text().replace("This copy of the project has no git history.", "A graph\nof commits."))
    assert not faults(rendered)


def test_images_missing_absolute_or_not_the_recorded_ones(rendered: Path) -> None:
    (rendered / "assets/data.balance.png").unlink()
    (rendered / "assets/data.sampler.json").unlink()
    (rendered / "assets/data.examples.png").write_bytes(b"another picture")
    prose = (
        "![a](/home/a.png) ![b](assets/none.png)\n![c](C:/c.png)\n<img src='https://example.org/d.png'>\n![e](../e.png)"
    )
    (rendered / "journal/prose/q2_3.md").write_text(prose)
    render("assignment_2", rendered)
    found = {(finding.kind, finding.what) for finding in faults(rendered)}
    assert found == {
        ("figure", "missing, but recorded by 00_data"),
        ("figure", "not the file that 00_data made"),
        ("image", "assets/data.balance.png is missing"),
        ("image", "assets/none.png is missing"),
        ("image", "/home/a.png is no path inside the repository"),
        ("image", "C:/c.png is no path inside the repository"),
        ("image", "https://example.org/d.png is no path inside the repository"),
        ("image", "../e.png is no path inside the repository"),
    }
    figures = {finding.where for finding in faults(rendered) if finding.kind == "figure"}
    assert figures == {"assets/data.balance.png", "assets/data.sampler.json", "assets/data.examples.png"}


def test_numbers_typed_by_hand(rendered: Path) -> None:
    (rendered / "journal/prose/q6_3.md").write_text(
        "We reach 0.91 and 91 %, 5% or 3 per cent.\n"
        "At 1e-3, 2.5e4, 3 × 10^-4 and .87; auch 0,93.\n"
        "Fine: 3 seeds, 32,768 patches, Q5.1, 1.2.3, 2026, `0.5`, {{ value('repro.cost') }}, [x](a/0.5.png).\n"
        "```\nlr = 0.1\n```\n"
        "At the end 0.5."
    )
    typed = [(f.where.rpartition(":")[2], f.what.split("'")[1]) for f in faults(rendered) if f.kind == "number"]
    assert typed == [
        ("1", "0.91"), ("1", "91 %"), ("1", "5%"), ("1", "3 per cent"),
        ("2", "1e-3"), ("2", "2.5e4"), ("2", "3 × 10^-4"), ("2", ".87"), ("2", "0,93"), ("7", "0.5"),
    ]  # fmt: skip
    template = rendered / "journal/templates/assignment_2.md.j2"
    template.write_text(template.read_text() + "The AUC is 0.99.\n")
    assert any(f.where.startswith("journal/templates/assignment_2.md.j2:") for f in faults(rendered))


def test_a_template_that_does_not_render(rendered: Path) -> None:
    (rendered / "journal/prose/q6_3.md").write_text("{{ nothing }}")
    assert [(f.kind, f.what) for f in faults(rendered)] == [
        ("template", "journal/prose/q6_3.md:1: 'nothing' is undefined")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_templates_type_no_numbers(rendered: Path, name: str) -> None:
    shutil.copy(ROOT / f"journal/templates/{name}.md.j2", rendered / "journal/templates")
    assert not [finding for finding in check(rendered, name) if finding.kind == "number"]
    template = rendered / f"journal/templates/{name}.md.j2"
    template.write_text(template.read_text() + "The AUC is 0.99.\n")
    assert len([finding for finding in check(rendered, name) if finding.kind == "number"]) == 1


def test_each_journal_is_compared_with_its_own_file(rendered: Path) -> None:
    missing = [f.where for name in NAMES for f in check(rendered, name) if f.kind == "journal"]
    assert missing == ["JOURNAL_assignment_1.md", "JOURNAL_dtu_exam.md"]
    written, page = render("dtu_exam", rendered)
    assert (written.name, page.name) == ("JOURNAL_dtu_exam.md", "JOURNAL_dtu_exam.html")
    assert [f for f in check(rendered, "dtu_exam") if f.severity == "fault"] == []
    written.write_text(written.read_text() + "One more line.\n")
    assert [f.where.partition(":")[0] for f in check(rendered, "dtu_exam") if f.severity == "fault"] == [written.name]


def test_what_a_person_began_elsewhere_is_no_matter_of_this_journal(rendered: Path) -> None:
    (rendered / "journal/prose/dtu_31.md").write_text("TODO: who did what.")
    assert not any("dtu_31" in finding.where for finding in check(rendered))
    assert any("prose/dtu_31.md:1" in finding.where for finding in check(rendered, "dtu_exam"))


def test_first_pages_ask_for_what_their_form_asks(rendered: Path) -> None:
    (rendered / "journal/group.yaml").write_text('members: [{name: Ada, id: "1"}]\n')
    asked = {name: [f.what for f in check(rendered, name) if f.kind == "group"] for name in NAMES}
    assert asked["assignment_1"] == ["repository is empty", "ta is empty", "skeleton is empty"]
    assert asked["dtu_exam"] == ["number is empty"]


@pytest.mark.parametrize(
    "name, prose, text, said",
    [
        ("assignment_2", "q4_1", "### Extra\n\nMore.", "'### Extra' stands where the form has "),
        ("assignment_2", "q4_1", "```bash\n# no heading\n```", ""),
        ("dtu_exam", "dtu_7", "Answer: they test everything.", "32 answers where the form has 31"),
    ],
)
def test_prose_may_change_no_form(rendered: Path, name: str, prose: str, text: str, said: str) -> None:
    (rendered / f"journal/prose/{prose}.md").write_text(text + "\n")
    render(name, rendered)
    found = [finding for finding in check(rendered, name) if finding.kind == "form"]
    assert all(finding.severity == "fault" for finding in found)
    assert [finding.what[: len(said)] for finding in found][:1] == ([said] if said else [])


def test_limits_and_boxes_of_the_form_are_open_or_noted(rendered: Path) -> None:
    found = check(rendered, "dtu_exam")
    limits = {finding.where: finding.what for finding in found if finding.kind == "limit"}
    assert limits["Question 19"] == "0 images, not 1-2" and limits["Question 2"] == "not answered"
    (access,) = (finding for finding in found if finding.where == "checklist, access")
    (bucket,) = (finding for finding in found if finding.where == "checklist, bucket")
    assert access.severity == "open" and "only a person can say" in access.what
    assert bucket.severity == "note" and bucket.what.startswith("not used, because no cloud account")
    assert not any("checklist, ci_lint" in finding.where for finding in found), "a ticked box is no finding"
    assert [f.severity for f in found] == sorted((f.severity for f in found), key=["fault", "open", "note"].index)
