"""Is a filled form within its own limits? Words and images of each answer, as the blank form states them.

    pcam journal check FILE --template dtu_exam [--json]

An answer is what stands between `Answer:` and the next heading; words are separated by white space; images are
Markdown image links. Code fences and comments hold neither headings nor images. Nothing is changed here.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcamlib.errors import EvidenceError

Limits = tuple[int, int]
Marked = list[tuple[str, int]]  # lines, as `_mark` gives them

# what hides the lines after it: markers of the lists and quotes that it stands in, then a code fence or a comment
OPENER = re.compile(r"((?:\s*(?:>|(?:[-*+]|\d{1,9}[.)])(?=\s)))*+) {0,3}(`{3,}(?=[^`]*$)|~{3,}|<!--(?!.*-->))")
# of a line and the next: a title after hashes, or one underlined by `=` (`---` is as often meant as a rule)
HEADING = re.compile(r" {0,3}(?:#{1,6}(?:[^\S\n]+(.*)|$)|(?![-+>#|<=`~]|\* )\S.*\n {0,3}=+\s*\Z)", re.MULTILINE)
NEXT = re.compile(r"### Question (\d+)\b")
QUESTION = re.compile(r"Question\s+(\d+)\b")
ANSWER = re.compile(r"\s*(?:>\s*)*[*_]*Answer:[*_]*")
UNFILLED = re.compile(r"-{2,}\s*question\s+\d+\s+fill\s+here\s*-{2,}", re.IGNORECASE)
# What shows no image: escapes, comments, code. Each pattern takes what it has read even where the end is missing (and
# IMAGE then has no `)`), lest a long line be read again from every place in it.
PLAIN = re.compile(r"\\.|<!--(?:.|\n(?!\n))*?(?:-->|\n\n|\Z)|(`++)(?:(?:[^`\n]++|(?!\1(?!`))`++)*+\1)?")
IMAGE = re.compile(r"!\[(?:[^\[\]]|\[[^\[\]]*+\])*+\]\(\s*+[^)\s][^)]*+(\)?)")
WORDS = re.compile(r"(\d+)\s*(?:-|–|to)\s*(\d+)\s+words")
IMAGES = re.compile(r"(\d+)\s*(?:-|–|to)\s*(\d+)\s+(?:images|screenshots)")
UNCLOSED = "line {} opens a code fence or comment that is never closed"


@dataclass(frozen=True)
class Verdict:
    """One answer held against its limits; without problems it is within them."""

    question: int
    line: int
    words: int
    words_wanted: Limits | None
    images: int
    images_wanted: Limits | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Judgement:
    """A filled form: its answers against their number, a verdict a question, and what is wrong with the whole."""

    answers: int
    wanted: int
    problems: tuple[str, ...]
    questions: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing falls short."""
        return not self.problems and not any(verdict.problems for verdict in self.questions)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"ok": self.ok, **asdict(self)}

    def table(self) -> str:
        """A line a question, and what is wrong with the whole form below."""
        lines = [f"{'question':>8}  {'words':>5}  {'wanted':>8}  {'images':>6}  {'wanted':>6}  verdict"]
        for v in self.questions:
            verdict = "; ".join(v.problems) or "ok"
            words, images = _range(v.words_wanted), _range(v.images_wanted)
            lines.append(f"{v.question:8d}  {v.words:5d}  {words:>8}  {v.images:6d}  {images:>6}  {verdict}")
        short = sum(bool(v.problems) for v in self.questions)
        return "\n".join([*lines, *self.problems, f"{self.answers} answers of {self.wanted}; {short} fall short"])


def read(path: Path) -> str:
    """A form as text, whatever its newlines.

    Raises:
        EvidenceError: no such file, or no text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise EvidenceError(f"{path}: no such file; name a filled form, or a journal") from None
    except OSError as error:
        raise EvidenceError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise EvidenceError(f"{path}: is no UTF-8 text; save it as UTF-8") from None


def limits(form: str) -> dict[int, tuple[Limits | None, Limits | None]]:
    """Words and images that a blank form asks for, by question that has an `Answer:`; None where it states no limit."""
    found = {}
    for number, _, body in _sections(_mark(form.splitlines())):
        if not _answers(body):
            continue
        asked = " ".join(re.sub(r"^[>\s]+|\*\*", "", line) for line, _ in body)
        words, images = WORDS.search(asked), IMAGES.search(asked)
        one = (1, 1) if "Include a figure" in asked else None
        found[number] = _pair(words), _pair(images) or one
    return found


def judge(text: str, wanted: dict[int, tuple[Limits | None, Limits | None]]) -> Judgement:
    """A filled form held against the `limits` of its blank one, question by question."""
    *lines, (_, opened) = _mark([*text.splitlines(), "the end"])
    sections = _sections(lines)
    times = Counter(number for number, _, _ in sections)
    first = {number: (line, body) for number, line, body in reversed(sections)}
    verdicts = [_verdict(number, first.get(number), *wanted[number]) for number in wanted]
    answers = _answers(lines)
    problems = []
    if answers != len(wanted):
        problems.append(f"{answers} answers where the form has {len(wanted)}")
    problems += [f"question {number} stands {n} times" for number, n in times.items() if n > 1]
    problems += [f"question {number} is none of the form" for number in times if number not in wanted]
    problems += [f"{_answers(body)} `Answer:` under question {n}" for n, _, body in sections if _answers(body) > 1]
    if opened and problems:
        problems.append(f"{UNCLOSED.format(opened)}, and hides what follows")
    return Judgement(answers, len(wanted), tuple(problems), tuple(verdicts))


def _verdict(number: int, section: tuple[int, Marked] | None, words: Limits | None, images: Limits | None) -> Verdict:
    if section is None:
        return Verdict(number, 0, 0, words, 0, images, (f"no heading `Question {number}`",))
    line, body = section
    start = next((i for i, (text, hidden) in enumerate(body) if not hidden and ANSWER.match(text)), None)
    if start is None:
        return Verdict(number, line, 0, words, 0, images, ("no `Answer:`",))
    marked = [(ANSWER.sub("", body[start][0], count=1), 0), *body[start + 1 :]]
    answer = [text for text, _ in marked]
    counted = len(" ".join(answer).split())
    shown = "\n".join("" if hidden else text.strip() for text, hidden in marked)
    pictures = IMAGE.findall(PLAIN.sub(" ", shown)).count(")")
    said = []
    if UNFILLED.search(" ".join(answer)):
        said.append("not answered")
    elif not counted and not (words and words[0] == 0):
        said.append("empty")
    elif words and not words[0] <= counted <= words[1]:
        said.append(f"{counted} words, not {_range(words)}")
    if images and not images[0] <= pictures <= images[1]:
        said.append(f"{pictures} images, not {_range(images)}")
    if (opened := -body[-1][1]) > 0:
        said.append(UNCLOSED.format(opened))
    return Verdict(number, line, counted, words, pictures, images, tuple(said))


def _mark(lines: list[str]) -> Marked:
    """Each line with the number of the line whose fence or comment hides it, 0 for none.

    What is never closed ends with the lists and quotes that it stands in; else before the next question, where the
    number is negative, so that it costs one answer and not all.
    """
    found: Marked = []
    opened, asked, around, closer = 0, 0, "", ""
    for place, line in enumerate(lines, 1):
        flat = line.expandtabs(4)
        question = int(heading[1]) if (heading := NEXT.match(flat)) else 0
        if not flat.lstrip().startswith(">") if ">" in around else flat[: len(around)].strip():
            opened = 0
        if opened and question == asked + 1:
            found[-1], opened = (found[-1][0], -opened), 0
        if opened:
            found.append((line, opened))
            opened *= not re.match(closer, flat)
            continue
        asked = question or asked
        around = ""
        if mark := OPENER.match(flat):
            opened, around = place, mark[1]
            inset = rf"[ {'>' * ('>' in around)}]{{0,{mark.start(2) + 3}}}"
            closer = ".*-->" if mark[2] == "<!--" else rf"{inset}{mark[2][0]}{{{len(mark[2])},}}\s*$"
        found.append((line, opened))
    return found


def _sections(lines: Marked) -> list[tuple[int, int, Marked]]:
    """Number, line and body of each section under a heading `Question N`."""
    found: list[tuple[int, int, Marked]] = []
    inside = False
    for place, (line, hidden) in enumerate(lines, 1):
        if not hidden and (heading := HEADING.match("\n".join(text for text, _ in lines[place - 1 : place + 1]))):
            question = QUESTION.match(heading[1] or "")
            inside = bool(question)
            if question:
                found.append((int(question[1]), place, []))
        elif inside:
            found[-1][2].append((line, hidden))
    return found


def _answers(lines: Marked) -> int:
    return sum(bool(ANSWER.match(line)) for line, hidden in lines if not hidden)


def _pair(found: re.Match[str] | None) -> Limits | None:
    return (int(found[1]), int(found[2])) if found else None


def _range(limits: Limits | None) -> str:
    if limits is None:
        return "any"
    return str(limits[0]) if limits[0] == limits[1] else f"{limits[0]}-{limits[1]}"
