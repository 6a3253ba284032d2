"""Is a filled form within its own limits? Words and images of each answer, as the blank form states them.

    pcam journal check FILE --template dtu_exam [--json]

An answer is what stands between `Answer:` and the next heading; words are separated by white space; images are
Markdown image links. Code fences hold neither headings nor images. Nothing is changed here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcamlib.errors import EvidenceError

Limits = tuple[int, int]

FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})")
HEADING = re.compile(r" {0,3}#{1,6}(?:\s+(.*)|$)")
QUESTION = re.compile(r"Question\s+(\d+)\b")
ANSWER = re.compile(r"\s*(?:>\s*)*[*_]*Answer:[*_]*")
UNFILLED = re.compile(r"-{2,}\s*question\s+\d+\s+fill\s+here\s*-{2,}", re.IGNORECASE)
IMAGE = re.compile(r"!\[[^\]]*\]\([^)\s][^)]*\)")
WORDS = re.compile(r"(\d+)\s*(?:-|–|to)\s*(\d+)\s+words")
IMAGES = re.compile(r"(\d+)\s*(?:-|–|to)\s*(\d+)\s+(?:images|screenshots)")


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
    except (FileNotFoundError, IsADirectoryError):
        raise EvidenceError(f"{path}: no such file; name a filled form, or a journal") from None
    except UnicodeDecodeError:
        raise EvidenceError(f"{path}: is no UTF-8 text; save it as UTF-8") from None


def limits(form: str) -> dict[int, tuple[Limits | None, Limits | None]]:
    """Words and images that a blank form asks for, by question that has an `Answer:`; None where it states no limit."""
    found = {}
    for number, _, body in _sections(form.splitlines()):
        if not _marks(body):
            continue
        asked = " ".join(re.sub(r"^[>\s]+|\*\*", "", line) for line in body)
        words, images = WORDS.search(asked), IMAGES.search(asked)
        one = (1, 1) if "Include a figure" in asked else None
        found[number] = _pair(words), _pair(images) or one
    return found


def judge(text: str, wanted: dict[int, tuple[Limits | None, Limits | None]]) -> Judgement:
    """A filled form held against the `limits` of its blank one, question by question."""
    lines = text.splitlines()
    sections = _sections(lines)
    times = Counter(number for number, _, _ in sections)
    first = {number: (line, body) for number, line, body in reversed(sections)}
    verdicts = [_verdict(number, first.get(number), *wanted[number]) for number in wanted]
    answers = sum(bool(ANSWER.match(line)) for line, outside in _outside(lines) if outside)
    problems = []
    if answers != len(wanted):
        problems.append(f"{answers} answers where the form has {len(wanted)}")
    problems += [f"question {number} stands {n} times" for number, n in times.items() if n > 1]
    problems += [f"question {number} is none of the form" for number in times if number not in wanted]
    problems += [f"{_marks(body)} `Answer:` under question {n}" for n, _, body in sections if _marks(body) > 1]
    if (opened := _unclosed(lines)) and problems:
        problems.append(f"the code fence of line {opened} is never closed, and hides what follows")
    return Judgement(answers, len(wanted), tuple(problems), tuple(verdicts))


def _verdict(
    number: int, section: tuple[int, list[str]] | None, words: Limits | None, images: Limits | None
) -> Verdict:
    if section is None:
        return Verdict(number, 0, 0, words, 0, images, (f"no heading `Question {number}`",))
    line, body = section
    start = next((i for i, (text, outside) in enumerate(_outside(body)) if outside and ANSWER.match(text)), None)
    if start is None:
        return Verdict(number, line, 0, words, 0, images, ("no `Answer:`",))
    answer = [ANSWER.sub("", body[start], count=1), *body[start + 1 :]]
    counted = len(" ".join(answer).split())
    shown = " ".join(re.sub(r"`[^`]*`", "", text) for text, outside in _outside(answer) if outside)
    pictures = len(IMAGE.findall(shown))
    said = []
    if UNFILLED.search(" ".join(answer)):
        said.append("not answered")
    elif not counted and not (words and words[0] == 0):
        said.append("empty")
    elif words and not words[0] <= counted <= words[1]:
        said.append(f"{counted} words, not {_range(words)}")
    if images and not images[0] <= pictures <= images[1]:
        said.append(f"{pictures} images, not {_range(images)}")
    return Verdict(number, line, counted, words, pictures, images, tuple(said))


def _outside(lines: list[str]) -> Iterator[tuple[str, bool]]:
    """Each line, and whether it stands outside of code fences."""
    fence = ""
    for line in lines:
        mark = FENCE.match(line)
        if not fence:
            fence = mark[1] if mark else ""
            yield line, not mark
        else:
            yield line, False
            if mark and mark[1].startswith(fence) and not line.strip().strip(fence[0]):
                fence = ""


def _unclosed(lines: list[str]) -> int:
    """Line number of a fence that is never closed; 0 where there is none."""
    marked = list(_outside([*lines, "end"]))
    if marked[-1][1]:
        return 0
    return next(i for i in range(len(marked) - 1, -1, -1) if i == 0 or marked[i - 1][1]) + 1


def _sections(lines: list[str]) -> list[tuple[int, int, list[str]]]:
    """Number, line and body of each section under a heading `Question N`."""
    found: list[tuple[int, int, list[str]]] = []
    inside = False
    for place, (line, outside) in enumerate(_outside(lines), 1):
        if outside and (heading := HEADING.match(line)):
            question = QUESTION.match(heading[1] or "")
            inside = bool(question)
            if question:
                found.append((int(question[1]), place, []))
        elif inside:
            found[-1][2].append(line)
    return found


def _marks(body: list[str]) -> int:
    return sum(bool(ANSWER.match(line)) for line, outside in _outside(body) if outside)


def _pair(found: re.Match[str] | None) -> Limits | None:
    return (int(found[1]), int(found[2])) if found else None


def _range(limits: Limits | None) -> str:
    if limits is None:
        return "any"
    return str(limits[0]) if limits[0] == limits[1] else f"{limits[0]}-{limits[1]}"
