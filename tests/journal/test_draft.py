"""Drafts: shown as such, taken over once, never overwritten; and checklists that tick themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from journal_evidence import reproducibility_evidence

from pcamlib.errors import ConfigError, EvidenceError
from pcamlib.journal.boxes import boxes
from pcamlib.journal.check import check
from pcamlib.journal.draft import MARK, NAMES, SHOWN, drafts, take, template, written
from pcamlib.journal.render import markdown_text, render
from pcamlib.sources import ROOT


def answer(root: Path, after: str = "**Twin Run Results:**", name: str = "assignment_2") -> str:
    return markdown_text(name, root).split(after)[1].split("\n---\n")[0]


def test_a_draft_is_shown_as_one_and_listed_as_open(complete: Path) -> None:
    text = answer(complete)
    assert f"> {SHOWN} To change or approve it: `pcam journal draft q1_4`.\n\nSo the twins agree." in text
    assert text.rstrip().endswith("</sub>") and "`repro.twins.equal`" in text.rsplit("<sub>", 1)[1]
    render("assignment_2", complete)
    (found,) = (finding for finding in check(complete) if "pcam journal draft q1_4" in finding.do)
    assert found.severity == "open" and found.where == "Question 1, 4. Twin Run Results"
    render("dtu_exam", complete)  # whose questions are quotes too, just above
    page = (complete / "JOURNAL_dtu_exam.html").read_text()
    assert page.count('<blockquote class="draft">') == page.count("To change or approve it") > 25


def test_a_draft_follows_what_was_measured(complete: Path) -> None:
    assert "So the twins agree." in answer(complete) and "So the twins differ" not in answer(complete)
    take(complete, "q1_4", approve=True)
    reproducibility_evidence(complete, synthetic=True, equal=False).close()
    text = answer(complete)
    assert "So the twins differ" in text and "So the twins agree" not in text, "also after it was taken over"
    assert SHOWN not in text


def test_taken_over_it_is_open_until_somebody_approves(complete: Path) -> None:
    path = take(complete, "q1_4")
    assert path == complete / "journal/prose/q1_4.md" and path.read_text().startswith(f"{MARK}\n\n{{%")
    assert MARK in answer(complete) and SHOWN not in answer(complete)
    open_places = [finding.where for finding in check(complete) if "q1_4" in f"{finding.where} {finding.do}"]
    assert open_places == ["journal/prose/q1_4.md:1"]
    path.write_text(path.read_text() + "\nAda ran it too.\n")
    assert take(complete, "q1_4", approve=True) == path
    assert "Ada ran it too." in answer(complete) and MARK not in answer(complete)
    assert not any("q1_4" in f"{finding.where} {finding.do}" for finding in check(complete))


def test_a_draft_cites_its_own_evidence_only(complete: Path) -> None:
    block = '{{ value("repro.cost") }}\n{% call draft("x") %}\n{{ value("data.mlp.epochs") }}\n{% endcall %}\n\n'
    template(complete, "assignment_1").write_text(block + "{{ evidence() }}")
    lines = [line for line in markdown_text("assignment_1", complete).splitlines() if line.startswith("<sub>")]
    assert ["repro.cost" in line for line in lines] == [False, True]
    assert ["data.mlp.epochs" in line for line in lines] == [True, False]


def test_what_is_written_is_never_overwritten(complete: Path) -> None:
    path = complete / "journal/prose/q7_3.md"
    path.write_text("Our own words.")
    for approve in (False, True):
        with pytest.raises(EvidenceError, match=r"journal/prose/q7_3.md: is there already; edit it"):
            take(complete, "q7_3", approve)
    assert path.read_text() == "Our own words."
    with pytest.raises(EvidenceError, match=r"no draft is named 'q7_33'; did you mean 'q7_3'"):
        take(complete, "q7_33")


def test_every_draft_of_the_committed_forms_can_be_found() -> None:
    known = drafts(ROOT)
    offered = sum(template(ROOT, name).read_text().count("{% call draft(") for name in NAMES)
    assert len(known) == offered > 50, "each has a name of its own"


@pytest.mark.parametrize("name", NAMES)
def test_all_drafts_taken_over_say_what_they_said(complete: Path, name: str) -> None:
    """A draft that leaned on its template's variables would break here."""
    before = markdown_text(name, complete)
    for draft in drafts(complete):
        take(complete, draft, approve=True)
    after = markdown_text(name, complete)
    assert SHOWN in before and SHOWN not in after
    kept = [line for line in before.splitlines() if SHOWN not in line and line.strip()]
    assert kept == [line for line in after.splitlines() if line.strip()]
    assert {path.stem for path in written(complete, name)} <= set(drafts(complete)) and written(complete, name)


@pytest.fixture
def rules(complete: Path) -> Path:
    """A form of a few boxes, in a root that is its own repository."""
    (complete / "pyproject.toml").write_text("[project]\n")
    (complete / "ci.yml").write_text("run: make lint\n")
    path = complete / "journal/templates/short.yaml"
    path.write_text(
        "lint: {has: {'*.yml': make lint}}\n"
        "tests: {has: {ci.yml: make unit, pyproject.toml: project, none.toml: ''}}\n"
        "sweep: {evidence: hpo.trials}\n"
        "twins: {evidence: repro.twins.equal}\n"
        "bucket: {unused: nobody has one}\n"
        "access: {person: who may write}\n"
        "said: {has: {none: ''}, why: nothing is there}\n"
    )
    return complete


def test_a_box_is_ticked_by_a_check_or_says_why_not(rules: Path) -> None:
    found = boxes(rules, "short", {"repro.twins.equal"})
    assert {name for name, box in found.items() if box.ticked} == {"lint", "twins"}
    assert {name: box.why for name, box in found.items() if not box.ticked} == {
        "tests": "no ci.yml holds `make unit`; no none.toml",
        "sweep": "no evidence `hpo.trials`",
        "bucket": "not used, because nobody has one",
        "access": "only a person can say who may write",
        "said": "nothing is there",
    }
    assert [name for name, box in found.items() if box.decided] == ["bucket"]


def test_a_template_asks_for_boxes_by_name(rules: Path) -> None:
    (rules / "journal/templates/short.md.j2").write_text('* [{{ box("lint") }}] lint\n* [{{ box("bucket") }}] bucket\n')
    assert markdown_text("short", rules) == "* [x] lint\n* [ ] bucket\n"
    (rules / "journal/templates/short.md.j2").write_text('{{ box("lnt") }}')
    with pytest.raises(EvidenceError, match=r"short.md.j2:1: no box is named 'lnt'; did you mean 'lint'"):
        markdown_text("short", rules)
    (rules / "journal/templates/short.yaml").write_text("lint: {why: forgotten}\n")
    with pytest.raises(ConfigError, match=r"journal/templates/short.yaml: .*give one of has, evidence, unused, person"):
        markdown_text("short", rules)
    (rules / "journal/templates/short.yaml").write_text("lint: {hs: {}}\n")
    with pytest.raises(ConfigError, match=r"journal/templates/short.yaml: .*'hs'; did you mean 'has'"):
        markdown_text("short", rules)


def test_every_rule_of_the_committed_forms_has_its_box() -> None:
    for name in ("assignment_1", "dtu_exam"):
        text = template(ROOT, name).read_text()
        found = boxes(ROOT, name, set())
        assert found and all(f'box("{box}")' in text for box in found) and text.count('{{ box("') == len(found)
    clouds = [box for box, state in boxes(ROOT, "dtu_exam", set()).items() if "no cloud account" in state.why]
    assert len(clouds) >= 6, "and none of them is ticked"
