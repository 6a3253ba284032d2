"""The rendered journal: the form's order, open places, quoted code and evidence, and the page that stands alone."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from journal_evidence import DATA, data_evidence, reproducibility_evidence

from pcamlib.errors import ConfigError, EvidenceError, PcamError
from pcamlib.journal.draft import NAMES
from pcamlib.journal.evidence import Recorder
from pcamlib.journal.page import pdf
from pcamlib.journal.render import GIT, OPEN, markdown_text, render
from pcamlib.sources import ROOT

FORMS = ROOT / "journal" / "templates"


def prose(root: Path, name: str, text: str) -> None:
    (root / "journal" / "prose" / f"{name}.md").write_text(text)


def only(root: Path, text: str) -> str:
    """A journal whose template is `text`."""
    (root / "journal" / "templates" / "short.md.j2").write_text(text)
    return markdown_text("short", root)


def landmarks(text: str) -> list[str]:
    """Headings, numbered items up to the end of their label, group and checklist lines, table heads; as in the form."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for line in text.splitlines():
        if re.match(r"#|\*\*|\| (Partition|:---)|- \[", line):
            found.append(re.sub(r"^- \[x\]", "- [ ]", line.rstrip()))
        elif label := re.match(r"(\d+\.|\*) \*\*.+?\*\*", line):
            found.append(label[0])
    return found


@pytest.mark.parametrize("with_evidence", [False, True])
@pytest.mark.parametrize(("name", "number"), [("assignment_2", 68), ("assignment_1", 57)])
def test_every_landmark_of_the_form_stands_in_order(
    root: Path, complete: Path, with_evidence: bool, name: str, number: int
) -> None:
    rendered = iter(landmarks(markdown_text(name, complete if with_evidence else root)))
    wanted = landmarks((FORMS / f"{name}.md").read_text())
    assert len(wanted) == number
    for line in wanted:
        assert line in rendered, f"missing or out of order: {line}"  # consumes the iterator: order counts


def test_a_number_carries_its_job_and_node(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Slurm:" not in markdown_text("assignment_2", complete)
    for name, text in {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "thin_course", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, text)
    data_evidence(complete, synthetic=True).close()
    assert "> Slurm: job 7 on n1 (thin_course)." in markdown_text("assignment_2", complete)
    line = only(complete, '{{ table("data.splits") }}').splitlines()[-1]
    assert line.startswith("<sub>evidence: `data.splits`") and "job 7 on n1 (thin_course)" in line


@pytest.mark.parametrize("name", NAMES)
def test_no_heading_is_added(complete: Path, name: str) -> None:
    text = re.sub(r"^```[a-z]*\n.*?^```$", "", markdown_text(name, complete), flags=re.MULTILINE | re.DOTALL)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [line for line in (FORMS / f"{name}.md").read_text().splitlines() if line.startswith("#")]
    assert not re.search(r"^[^\n|]+\n---$", text, flags=re.MULTILINE), "a text above --- would be a heading"


@pytest.mark.parametrize("with_evidence", [False, True])
def test_only_marks_and_boxes_of_the_dtu_form_are_filled(root: Path, complete: Path, with_evidence: bool) -> None:
    """Any other change may have unwanted consequences, it says."""
    text = markdown_text("dtu_exam", complete if with_evidence else root)
    rendered = iter(re.sub(r"^\* \[x\]", "* [ ]", text, flags=re.MULTILINE).splitlines())
    for line in (FORMS / "dtu_exam.md").read_text().splitlines():
        if line.strip() and not re.fullmatch(r"--- question \d+ fill here ---", line):
            assert line in rendered, f"missing or out of order: {line}"
    assert f"* [x] {'Create a git repository (M5)'}" in text and "* [ ] Create a data storage in GCP" in text


def test_without_evidence_the_questions_are_open(root: Path) -> None:
    text = markdown_text("assignment_2", root)
    assert text.count(OPEN) > 40 and "SYNTHETIC" not in text and "![" not in text


def test_the_complete_journal(complete: Path) -> None:
    markdown_file, html_file = render("assignment_2", complete)
    text = markdown_file.read_text()
    assert "**SYNTHETIC DATA.**" in text.split("## Group Information")[0]
    assert "train `aaaaaaaaaaaa`, valid `bbbbbbbbbbbb`" in text
    assert "Of 3 sources, 2 changed the weights and 1 did not." in text
    assert "gave the same weights, bit for bit" in text
    assert "0.81 (95 % interval 0.79 to 0.83; n = 3,000; seeds 0; baseline prevalence 0.5)<!-- data.mlp.auc -->" in text
    assert "20,000<!-- data.splits --> patches" in text
    assert "| split | patches | positive | negative | dtype | fingerprint |" in text
    assert "![The balance of the data.](assets/data.balance.png)" in text
    assert re.search(
        r"evidence: `data.mlp.auc`, `data.mlp.epochs` · notebook \[00_data\]\(.*?\)"
        r" · \*\*synthetic patches\*\* · runs mlp-0 · (commit|no com)",
        text,
    )
    first = next(
        i for i, s in enumerate((ROOT / "pcamlib/seeding.py").read_text().splitlines(), 1) if "def seed_e" in s
    )
    assert "# type: ignore[attr-defined]\n```" in text and f"[pcamlib/seeding.py:{first}]" in text
    assert not re.search(r"\n\n\n", re.sub(r"```.*?```", "code", text, flags=re.DOTALL))
    assert str(complete) not in text
    page = html_file.read_text()
    assert "<style>" in page and 'class="open"' in page and "☐ Best model" in page and "<table>" in page
    assert not re.search(r'(src|href)="(?!#|data:|notebooks/|pcamlib/|README.md)', page), "needs no other file"
    assert page.count("data:image/png;base64,") == text.count("](assets/") == 7


def test_prose_follows_the_measured_value(root: Path) -> None:
    data_evidence(root, synthetic=False).close()
    reproducibility_evidence(root, synthetic=False, equal=False).close()
    text = markdown_text("assignment_2", root)
    assert "did **not** give the same weights" in text and "bit for bit" not in text.split("Twin Run Results")[1]
    assert "SYNTHETIC" not in text and "Veeling" in text


def test_a_screenshot_is_inlined_with_its_own_type(complete: Path) -> None:
    (complete / "assets" / "pull_request.jpg").write_bytes(b"jpeg")
    prose(complete, "q7_2", "![the pull request](assets/pull_request.jpg)")
    assert 'src="data:image/jpeg;base64,anBlZw=="' in render("assignment_2", complete)[1].read_text()


def test_synthetic_and_real_evidence_together_are_named(root: Path) -> None:
    data_evidence(root, synthetic=False).close()
    reproducibility_evidence(root, synthetic=True).close()
    assert "SYNTHETIC DATA in 01_reproducibility" in markdown_text("assignment_2", root)


def test_what_people_wrote_is_included_and_may_quote(complete: Path) -> None:
    prose(complete, "q2_3", 'One split is enough; the MLP has {{ metric("data.mlp.auc") }}.')
    prose(complete, "q4_1", "   ")
    text = markdown_text("assignment_2", complete)
    answer = text.split("**Cross-Validation Reflection:**")[1].split("4. **")[0]
    assert "One split is enough; the MLP has 0.81 (95 %" in answer and "evidence: `data.mlp.auc`" in answer
    assert OPEN not in answer and OPEN in text.split("**Internal Dynamics:**")[1].split("2. **")[0]


def test_a_missing_key_is_an_open_place(root: Path) -> None:
    text = only(root, '{{ value("a.b") }} {{ metric("a.b") }} {{ cell("a.b", "x", "y", 1) }} {{ count("a.b") }}')
    assert text.count("**[not answered yet: no evidence `a.b`]**") == 3
    assert only(root, '{{ table("a.b") }}\n{{ figure("a.b") }}{{ note("a.b") }}{{ raw("a.b") }}').count(OPEN) == 2
    assert only(root, '{{ has("a.b") }} {{ bounds("a.b") }} {{ evidence("a.b") }}') == "False None\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\n{{ nothing }}", "journal/templates/short.md.j2:2: 'nothing' is undefined"),
        ("a\n\n{% if %}", "journal/templates/short.md.j2:3: Expected an expression"),
        ('{{ value("data.mlp.auc") }}', r"no {{ evidence\(\) }} follows after quoting data.mlp.auc"),
        ('{{ value("a", b=1) }}', "short.md.j2:1: .*unexpected keyword"),
        ('{{ metric("data.splits") }}', "'data.splits' is a table, no metric"),
        ('{{ count("data.mlp.auc") }}', "'data.mlp.auc' is a metric, no table"),
        ('{{ table("data.splits", ["patchs"]) }}', "unknown column 'patchs'; did you mean 'patches'"),
        ('{{ cell("data.splits", "patches", "split", "tset") }}', "no row whose split is tset"),
        ('{{ code("pcamlib/seeding.py", "seed_everythin") }}', "nothing named .*did you mean 'seed_everything'"),
        ('{{ code("pcamlib/nothing.py", "x") }}', "pcamlib/nothing.py: no such file to quote"),
    ],
)
def test_a_template_fault_is_one_line_with_its_place(complete: Path, template: str, message: str) -> None:
    with pytest.raises(EvidenceError, match=message) as error:
        only(complete, template)
    assert "\n" not in str(error.value) and "short.md.j2" in str(error.value)


def test_a_fault_in_prose_names_the_prose(complete: Path) -> None:
    prose(complete, "q2_3", "one\ntwo {{ nothing }}")
    with pytest.raises(EvidenceError, match=r"^journal/prose/q2_3.md:2: 'nothing' is undefined"):
        markdown_text("assignment_2", complete)
    (complete / "journal/prose/q2_3.md").write_bytes("é".encode("latin-1"))
    with pytest.raises(EvidenceError, match=r"^journal/.*utf-8"):
        markdown_text("assignment_2", complete)


def test_an_unknown_form_is_a_clear_error(root: Path) -> None:
    with pytest.raises(EvidenceError, match=r"journal/templates/assignment_9.md.j2: no such template"):
        render("assignment_9", root)


def test_code_is_quoted_exactly(root: Path) -> None:
    source = 'class A:\n    """Doc."""\n\n    @property\n    def b(self) -> int:\n        return 1\n\n\n'
    source += "LIMIT: int = (\n    3\n)\n"
    (root / "some.py").write_text(source)
    assert only(root, '{{ code("some.py", "A.b") }}').startswith(
        "```python\n@property\ndef b(self) -> int:\n    return 1\n```\n\n<sub>[some.py:4](some.py#L4) `A.b`"
    )
    assert "```python\nLIMIT: int = (\n    3\n)\n```" in only(root, '{{ code("some.py", "LIMIT") }}')


def test_cells_that_would_break_a_table_do_not(root: Path) -> None:
    recorder = Recorder("00_data", root, data=DATA, synthetic=True)
    recorder.table("data.x", [{"a": "x|y\nz", "b": [0.1, 0.2]}, {"a": None, "b": None}], n=7, caption="A caption.")
    recorder.close()
    text = only(root, '{{ table("data.x") }}')
    assert text.startswith(
        "| a | b |\n| :--- | :--- |\n| x\\|y z | 0.1 to 0.2 |\n|  |  |\n\n*A caption. n = 7.*\n\n<sub>ev"
    )


def test_group_data_fill_the_first_page(root: Path) -> None:
    (root / "journal/group.yaml").write_text(
        'number: 7\nmembers: [{name: Ada, id: "0123"}, {name: Bo}]\nrepository: https://example.org/r\nbase: Ada\n'
    )
    text = markdown_text("assignment_2", root)
    assert "* **Group Number:** 7\n* **Team Members:** Ada (0123), Bo (no id)\n" in text
    assert "- [x] Group repository link provided?" in text and "- [ ] Names and IDs" in text
    assert "1. **README Link:** [README.md](https://example.org/r/blob/main/README.md)" in text
    (root / "journal/group.yaml").write_text("nmber: 7\n")
    with pytest.raises(ConfigError, match=r"journal/group.yaml: unknown key 'nmber'; did you mean 'number'"):
        markdown_text("assignment_2", root)


def test_git_facts_come_from_the_repository(root: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "first")
    linear = markdown_text("assignment_2", root)
    assert "The history is linear: none of its commits (1) is a merge." in linear
    git("checkout", "-b", "feature")
    git("commit", "--allow-empty", "-m", "second")
    git("checkout", "-")
    git("merge", "--no-ff", "feature", "-m", "third")
    text = markdown_text("assignment_2", root)
    assert "not linear: merges make up 1 of its 3 commits" in text and "Authors: 1." in text and "|\\" in text
    inside = text.split(GIT[0])[1].split(GIT[1])[0]
    assert "Branches, remote ones included: 2." in inside and "third" in inside
    assert text.replace(inside, "") == linear.replace(linear.split(GIT[0])[1].split(GIT[1])[0], "")


def test_settings_are_quoted_as_they_are_now(root: Path) -> None:
    (root / "some.yml").write_text("on: [a, b]\n  one:\n  two:\n  one:\n")
    assert only(root, r'{{ found("some.yml", "^  ([a-z]+):") }}') == "one, two\n"
    with pytest.raises(EvidenceError, match=r"some.yml: nothing matches 'three'"):
        only(root, '{{ found("some.yml", "three") }}')
    with pytest.raises(EvidenceError, match=r"none.yml: no such file to quote"):
        only(root, '{{ found("none.yml", "one") }}')


def test_a_text_may_read_what_a_figure_was_drawn_from(complete: Path) -> None:
    text = '{% set s = series("data.mlp.loss") %}from {{ show(s["train"][0]) }} to {{ show(s["train"][-1]) }} '
    assert only(complete, text + "{{ evidence() }}").startswith("from 0.7 to 0.5 <sub>evidence: `data.mlp.loss`")
    assert only(complete, '{{ series("a.b") }}') == "{}\n"


@pytest.fixture
def chromium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only program in the path; a script that a test writes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder / "chromium"


def test_a_pdf_is_whole_or_absent(complete: Path, chromium: Path) -> None:
    page = render("assignment_2", complete)[1]
    with pytest.raises(PcamError, match=r"no Chromium here to print JOURNAL.html; `make chromium` installs it"):
        pdf(page)
    chromium.write_text("#!/bin/sh\necho gone wrong >&2\nexit 3\n")
    chromium.chmod(0o755)
    with pytest.raises(PcamError, match=r"did not print JOURNAL.html \(exit code 3\): gone wrong"):
        pdf(page)
    assert not list(complete.glob("*.pdf")) and not list(complete.glob(".JOURNAL*"))
    chromium.write_text('#!/bin/sh\nfor a; do case "$a" in --print-to-pdf=*) echo "$@" > "${a#*=}";; esac; done\n')
    printed = pdf(page)
    assert printed == complete / "JOURNAL.pdf"
    call = printed.read_text()
    assert (
        "--headless" in call
        and call.rstrip().endswith(page.as_uri())
        and ("--no-sandbox" in call) == (not os.geteuid())
    )
