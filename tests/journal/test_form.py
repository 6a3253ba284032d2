"""A filled form held against the limits of its blank one: each rule, by a planted fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pcamlib.errors import EvidenceError
from pcamlib.journal.form import Judgement, judge, limits, read
from pcamlib.journal.render import markdown_text
from pcamlib.sources import ROOT

BLANK = (ROOT / "journal" / "templates" / "dtu_exam.md").read_text()
LIMITS = limits(BLANK)


def answer(number: int) -> str:
    """The shortest answer within the limits."""
    words, images = LIMITS[number]
    shown = ["![a](figures/a.png)"] * (images[0] if images else 0)
    return " ".join(shown + ["word"] * max((words[0] if words else 1) - len(shown), 0)) or "none"


@pytest.fixture
def fill() -> Callable[..., str]:
    """`fill({4: "text"})`: a form whose answers are all right, but for those given."""

    def filled(others: dict[int, str] | None = None) -> str:
        given = {number: answer(number) for number in LIMITS} | (others or {})
        return re.sub(r"^--- question (\d+) fill here ---$", lambda m: given[int(m[1])], BLANK, flags=re.MULTILINE)

    return filled


def problems(judgement: Judgement) -> dict[int, str]:
    return {v.question: "; ".join(v.problems) for v in judgement.questions if v.problems}


def test_the_limits_are_those_that_the_form_states() -> None:
    assert list(LIMITS) == list(range(1, 32))
    words = {number: pair for number, (pair, _) in LIMITS.items() if pair}
    assert {number for number in LIMITS if number not in words} == {1, 2, 19, 20, 21}
    assert (words[3], words[7], words[11], words[17], words[29], words[31]) == (
        (0, 200), (50, 100), (200, 300), (50, 200), (200, 400), (50, 300),
    )  # fmt: skip
    images = {number: pair for number, (_, pair) in LIMITS.items() if pair}
    assert images == {14: (1, 3), 19: (1, 2), 20: (1, 2), 21: (1, 2), 29: (1, 1)}
    more = BLANK.replace("50-100 words", "60-110 words")
    assert limits(more)[7][0] == (60, 110), "read, not known"


def test_forms_without_answers_state_none() -> None:
    assert limits((ROOT / "journal/templates/assignment_2.md").read_text()) == {}


def test_a_form_within_its_limits(fill: Callable[..., str]) -> None:
    judgement = judge(fill(), LIMITS)
    assert judgement.ok and judgement.answers == judgement.wanted == 31 and problems(judgement) == {}
    assert judgement.table().splitlines()[4] == "       4    100   100-200       0     any  ok"
    assert judgement.plain()["questions"][13]["images"] == 1


@pytest.mark.parametrize(
    ("number", "text", "problem"),
    [
        (4, "word " * 99, "99 words, not 100-200"),
        (4, "word " * 200, ""),
        (4, "word " * 201, "201 words, not 100-200"),
        (7, "word\n" * 101, "101 words, not 50-100"),
        (3, "", ""),  # 0 to 200 words
        (5, "", "empty"),
        (1, "  \n\n", "empty"),
        (12, "--- question 12 fill here ---", "not answered"),
        (12, "```--- question 12 fill here ---```", "not answered"),
        (12, "word " * 60 + "\n--- question 12 fill here ---", "not answered"),
        (14, "word " * 200, "0 images, not 1-3"),
        (14, "word " * 200 + "![a](a.png) " * 4, "4 images, not 1-3"),
        (14, "word " * 200 + "`![a](a.png)`", "0 images, not 1-3"),
        (14, "word " * 200 + "\n```\n![a](a.png)\n```", "0 images, not 1-3"),
        (14, "word " * 200 + "[a](a.png)", "0 images, not 1-3"),
        (14, "word " * 301, "301 words, not 200-300; 0 images, not 1-3"),
        (14, "word " * 200 + "![our runs](https://example.org/a.png)", ""),
        (19, "![a](a.png) ![b](b.png) ![c](c.png)", "3 images, not 1-2"),
        (21, "We used none.", "0 images, not 1-2"),
        (29, "word " * 200 + "![a](a.png) ![b](b.png)", "2 images, not 1"),
        (31, "word " * 49, "49 words, not 50-300"),
    ],
)
def test_one_answer_out_of_its_limits(fill: Callable[..., str], number: int, text: str, problem: str) -> None:
    judgement = judge(fill({number: text}), LIMITS)
    assert problems(judgement) == ({number: problem} if problem else {}) and judgement.problems == ()


def test_code_fences_hold_no_headings(fill: Callable[..., str]) -> None:
    code = "word " * 90 + "\n\n```bash\n# a comment, no heading\n### Question 30\n> Answer:\nfour words of code\n```\n"
    tildes = "~~~~\n# one\n```\n### two\n~~~~\n" + "word " * 45
    judgement = judge(fill({4: code, 12: tildes, 7: "```\n```bash\n# one\n```\n" + "word " * 48}), LIMITS)
    assert judgement.ok, judgement.table()
    assert next(v.words for v in judgement.questions if v.question == 4) == 90 + 16


def test_a_heading_ends_an_answer(fill: Callable[..., str]) -> None:
    split = judge(fill({4: "word " * 60 + "\n\n#### More\n\n" + "word " * 60}), LIMITS)
    assert problems(split) == {4: "60 words, not 100-200"}


@pytest.mark.parametrize("mark", ["Answer:", "> Answer:", ">Answer:", "> > **Answer:**", "> Answer: at once"])
def test_where_an_answer_begins(fill: Callable[..., str], mark: str) -> None:
    text = fill().replace("### Question 7\n", "### Question 7\n<!-- -->\n", 1)
    head, tail = text.split("<!-- -->", 1)
    judgement = judge(head + tail.replace("> Answer:", mark, 1), LIMITS)
    assert judgement.ok
    assert next(v.words for v in judgement.questions if v.question == 7) == 50 + 2 * mark.endswith("once")


def test_an_answer_may_speak_of_answers(fill: Callable[..., str]) -> None:
    assert judge(fill({7: "The form says Answer: and > Answer: in " + "word " * 60}), LIMITS).ok


def test_other_newlines_and_a_byte_order_mark(fill: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "filled.md"
    text = fill({4: "word\n" * 201})
    text = text[text.index("### Question 1\n") :].replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert problems(judge(read(path), LIMITS)) == {4: "201 words, not 100-200"}


def test_another_number_of_answers_is_an_error(fill: Callable[..., str]) -> None:
    text = fill()
    start, end = text.index("### Question 9\n"), text.index("### Question 10\n")
    gone = judge(text[:start] + text[end:], LIMITS)
    assert not gone.ok and gone.problems == ("30 answers where the form has 31",)
    assert problems(gone) == {9: "no heading `Question 9`"}
    twice = judge(text[:end] + text[start:], LIMITS)
    assert twice.problems == ("32 answers where the form has 31", "question 9 stands 2 times")
    more = judge(text + "\n### Question 32\n> Answer:\n\nyes\n", LIMITS)
    assert more.problems == ("32 answers where the form has 31", "question 32 is none of the form")
    unmarked = judge(text[:start] + text[start:].replace("> Answer:", ">", 1), LIMITS)
    assert problems(unmarked) == {9: "no `Answer:`"} and unmarked.answers == 30
    quoted = judge(fill({7: "word " * 60 + "\n> Answer: forty-two"}), LIMITS)
    assert quoted.problems == ("32 answers where the form has 31", "2 `Answer:` under question 7")


@pytest.mark.parametrize(
    "code",
    [
        "- ```bash\n  # install\n  pip install x\n  ```\n",
        "10.  ```bash\n     # install\n     ```\n",
        "-\t```bash\n\t# install\n\t```\n",
        "* a\n    - ~~~\n      # install\n      ~~~\n",
        "> ```bash\n># install\n>```\n",
        "> - ```bash\n>   # install\n>   ```\n",
        "- ```bash\n  # its item ends, and it with it\n\n",
        "> ```bash\n> # its quote ends\n\n",
        "```\n> ```\n# not yet closed\n```\n",
        "<!--\n# note\n> Answer:\n-->\n",
        "1. ```\n   # nor here\n\n\tand here\n\n   # nor here\n   ```\n",
        "- <!-- a\n  # note -->\n",
        "````\n```\n# a fence of four ends at one of four\n`````\n",
    ],
)
def test_fences_in_lists_and_quotes_and_comments_hold_no_headings(fill: Callable[..., str], code: str) -> None:
    judgement = judge(fill({4: "word " * 60 + f"\n\n{code}" + "word " * 60}), LIMITS)
    assert judgement.ok, judgement.table()


@pytest.mark.parametrize("opener", ["```bash", "~~~", "<!--"])
def test_what_is_never_closed_costs_one_answer(fill: Callable[..., str], opener: str) -> None:
    text = fill({12: f"{opener}\n  pcam train\n  " + "word " * 60, 15: "```\n# closed\n```\n" + "word " * 97})
    line = text[: text.index(f"{opener}\n  pcam")].count("\n") + 1
    judgement = judge(text, LIMITS)
    said = f"line {line} opens a code fence or comment that is never closed"
    assert judgement.answers == 31 and judgement.problems == () and problems(judgement) == {12: said}
    assert judge(fill({31: f"{opener}\n  " + "word " * 60}), LIMITS).ok, "Markdown closes it at the end of the file"
    gone = judge(text[: text.index("### Question 13\n")], LIMITS)
    assert gone.problems == ("12 answers where the form has 31", f"{said}, and hides what follows")


def test_an_underlined_heading_ends_an_answer(fill: Callable[..., str]) -> None:
    split = judge(fill({4: "word " * 60 + "\n\nMore\n====\n\n" + "word " * 60}), LIMITS)
    assert problems(split) == {4: "60 words, not 100-200"}
    for text in ("```\nMore\n====\n```\n", "\n====\n", "> quoted\n====\n", "a\n==== b\n"):
        assert judge(fill({4: "word " * 60 + f"\n\n{text}" + "word " * 60}), LIMITS).ok, text


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("![bucket [1]](figures/a.png)", 1),
        (r"![see \[2\]](a.png)", 1),
        (r"![see \] there](a.png)", 1),
        ("![a [b](c) d](a.png)", 1),
        ("![a]( figures/a.png )", 1),
        (r"a \` tick ![a](a.png) and \` tick", 1),
        ("``a ` b`` ![a](a.png) `x`", 1),
        ("one ` tick\n\n![a](a.png)\n\nand ` another", 1),
        (r"![a](a.png) \\![b](b.png)", 2),
        ("`<!--` ![a](a.png) `-->`", 1),
        ("<!-- ` --> ![a](a.png) `", 1),
        ('![a](a.png "title") ![b](<my image.png> "t")', 2),
        ("[![a](a.png)](https://example.org)", 1),
        ("![two\nlines](a.png)", 1),
        ("![`code`](a.png)", 1),
        ("<!-- ![a](a.png) -->", 0),
        ("a <!-- ![a](a.png)\n![b](b.png) --> b", 0),
        ("<!--\n![a](a.png)\n\n![b](b.png)\n-->", 0),
        (r"\![a](a.png)", 0),
        ("`` ![a](a.png) ` ![b](b.png) ``", 0),
        ("- ```\n  ![a](a.png)\n  ```", 0),
        ("![a]() ![b]( ) ![c](c", 0),
    ],
)
def test_what_counts_as_an_image(fill: Callable[..., str], text: str, images: int) -> None:
    assert judge(fill({14: f"{text}\n\n" + "word " * 200}), LIMITS).questions[13].images == images


@pytest.mark.timeout(60)  # 0.1 to 2 s; hours where a pattern goes back over what it read
@pytest.mark.parametrize(
    "part",
    [
        "![[[[", "`", "a`", "` `` ", "![a](", "![a", "![[a] ", "![a](a.png", "<!-- ", "<!-- a\n", "\\", "> ", "- ",
        pytest.param(" ".join("`" * n for n in range(1400)), id="code spans, none of them closed"),
    ],
)  # fmt: skip
def test_a_line_of_a_megabyte_is_read_at_once(fill: Callable[..., str], part: str) -> None:
    said = judge(fill({14: part * (1_000_000 // len(part))}), LIMITS)
    assert said.questions[13].images == 0


@pytest.mark.parametrize("text", ["", "no form at all", "# Question\n", "```\n", BLANK * 2])
def test_whatever_it_is_given(text: str) -> None:
    judgement = judge(text, LIMITS)
    assert not judgement.ok and len(judgement.questions) == 31 and judgement.table()


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvidenceError, match=r"a.md: is no UTF-8 text; save it as UTF-8"):
        read(tmp_path / "a.md")
    for name in ("b.md", "a.md/b.md", "."):
        with pytest.raises(EvidenceError, match=r"no such file; name a filled form"):
            read(tmp_path / name)
    with pytest.raises(EvidenceError, match=r"b.md: cannot be read \(File name too long\)"):
        read(tmp_path / ("b" * 300 + "b.md"))


def test_our_own_answers_keep_to_the_form() -> None:
    """What is left needs people (1, 2, 31) or images of services that were not used (19 to 21)."""
    text = markdown_text("dtu_exam", ROOT)
    judgement = judge(text, LIMITS)
    assert judgement.problems == () and set(problems(judgement)) <= {1, 2, 19, 20, 21, 31}, judgement.table()
    assert {19, 20, 21} <= set(problems(judgement)), "a bucket that does not exist has no picture"
