"""Evidence, prose and sources -> JOURNAL.md, and JOURNAL.html that stands alone; a pair of files for each journal.

A template asks for evidence by key, `{{ table("data.splits") }}`; whatever is not there yet becomes a visible open
place. A template may call the public methods of `Page`, and the functions of `quotes`.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from pcamlib.errors import EvidenceError, nearest
from pcamlib.files import read_json, write_text
from pcamlib.journal import boxes, draft, head, page, quotes
from pcamlib.journal.claims import Evidence, Row, show
from pcamlib.journal.evidence import records
from pcamlib.journal.group import read_group
from pcamlib.journal.page import OPEN
from pcamlib.sources import ROOT

#: What surrounds text taken from git: it changes with every commit, so `check` does not compare it.
GIT = ("<!-- from git -->", "<!-- end of git -->")


class Page:
    """One rendering: what a template may call, and which keys it quoted since the last evidence line."""

    def __init__(self, root: Path, name: str) -> None:
        self._root, self.group = root, read_group(root)
        self._records = records(root)
        self._claims = {claim.key: claim for record in self._records.values() for claim in record.evidence}
        self._boxes = boxes.boxes(root, name, self._claims)
        self._quoted: dict[str, None] = {}
        self._jinja = jinja2.Environment(
            loader=jinja2.FileSystemLoader([root / "journal", ROOT / "journal"]),
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # Markdown, written by the journal's owners
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._jinja.globals = {name: getattr(self, name) for name in dir(self) if not name.startswith("_")}
        self._jinja.globals["show"] = show
        for function in (quotes.code, quotes.found, quotes.heading, quotes.git_graph, quotes.git_facts):
            self._jinja.globals[function.__name__] = partial(function, root)

    def text(self, template: str) -> str:
        """A template, by path under journal/, rendered to Markdown.

        Raises:
            EvidenceError: a name it uses is unknown, it does not parse, or it quotes evidence and names no source.
        """
        try:
            rendered = self._jinja.get_template(template).render()
        except jinja2.TemplateNotFound as error:
            raise EvidenceError(f"journal/{error.name}: no such template") from None
        except jinja2.TemplateSyntaxError as error:
            raise EvidenceError(f"journal/{error.name}:{error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TypeError, UnicodeDecodeError, EvidenceError) as error:
            raise EvidenceError(f"{_place(error)}: {error}") from None
        if self._quoted:
            raise EvidenceError(f"journal/{template}: no {{{{ evidence() }}}} follows after quoting {self._keys()}")
        return _squeezed(rendered)

    # --- evidence -----------------------------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether there is evidence of this key."""
        return key in self._claims

    def synthetic(self) -> bool:
        """Whether any of the evidence was made on synthetic data."""
        return any(record.synthetic for record in self._records.values())

    def raw(self, key: str) -> Any:
        """A value as recorded, for `if` and arithmetic; None where there is none."""
        return self._quote(key).value if key in self._claims else None

    def value(self, key: str, digits: int = 3) -> str:
        """A value with its unit, for use in a sentence; its key stands in a comment behind it."""
        if key not in self._claims:
            return _missing(key)
        claim = self._quote(key)
        return f"{_united(claim, claim.value, digits)}<!-- {key} -->"

    def bounds(self, key: str) -> tuple[float, float] | None:
        """The interval of a metric, for `if`; None where there is none."""
        return self._quote(key).interval if key in self._claims else None

    def note(self, key: str) -> str:
        """The note or caption recorded with evidence; nothing where there is none."""
        return self._quote(key).caption if key in self._claims else ""

    def metric(self, key: str, digits: int = 3) -> str:
        """A metric with interval, n, seeds and baseline, for use in a sentence."""
        if key not in self._claims:
            return _missing(key)
        claim = self._quote(key)
        if claim.kind != "metric" or claim.interval is None:
            raise EvidenceError(f"evidence '{key}' is a {claim.kind}, no metric")
        low, high = (show(float(bound), digits) for bound in claim.interval)
        parts = [f"95 % interval {low} to {high}", f"n = {show(claim.n)}"]
        if claim.seeds:
            parts.append(f"seeds {', '.join(map(str, claim.seeds))}")
        parts += [f"baseline {name} {_united(claim, score, digits)}" for name, score in claim.baseline.items()]
        return f"{_united(claim, claim.value, digits)} ({'; '.join(parts)})<!-- {key} -->"

    def table(self, key: str, columns: list[str] | None = None) -> str:
        """A Markdown table with its caption and evidence line, of all columns or the named ones."""
        if key not in self._claims:
            return self.open(f"No evidence `{key}` yet.")
        rows = self._rows(key)
        names = columns or list(dict.fromkeys(name for row in rows for name in row))
        numeric = [
            all(isinstance(row.get(n), int | float | None) and not isinstance(row.get(n), bool) for row in rows)
            for n in names
        ]
        lines = [_line(names), _line("---:" if number else ":---" for number in numeric)]
        lines += [_line(_cell(self._pick(key, row, name)) for name in names) for row in rows]
        claim = self._quote(key)
        caption = " ".join(filter(None, [claim.caption, f"n = {show(claim.n)}." if claim.n else ""]))
        return "\n\n".join(filter(None, ["\n".join(lines), caption and f"*{caption}*", self.evidence(key)]))

    def cell(self, key: str, column: str, where: str, equals: Any) -> str:
        """The cell of one table row, for use in a sentence: `cell("data.splits", "patches", "split", "train")`."""
        if key not in self._claims:
            return _missing(key)
        found = [row for row in self._rows(key) if self._pick(key, row, where) == equals]
        if not found:
            raise EvidenceError(f"evidence '{key}': no row whose {where} is {equals}")
        return f"{_cell(self._pick(key, found[0], column))}<!-- {key} -->"

    def count(self, key: str, column: str = "", equals: Any = None) -> int:
        """How many rows a table has, or how many hold this value; 0 where there is no such evidence."""
        rows = self._rows(key) if key in self._claims else []
        return sum(self._pick(key, row, column) == equals for row in rows) if column else len(rows)

    def figure(self, key: str) -> str:
        """A figure with caption and evidence line."""
        if key not in self._claims:
            return self.open(f"No evidence `{key}` yet.")
        claim = self._quote(key)
        caption = claim.caption + (f" n = {show(claim.n)}." if claim.n else "")
        alternative = re.sub(r"[\[\]]", "", claim.caption)
        return f"![{alternative}]({claim.image})\n\n*{caption}*\n\n{self.evidence(key)}"

    def series(self, key: str) -> dict[str, Any]:
        """What a figure was drawn from, series by series, for a text that reads it; empty where there is none."""
        return read_json(self._root / self._quote(key).data)["series"] if key in self._claims else {}

    def evidence(self, *keys: str) -> str:
        """The small line that leads from numbers to runs; without keys, for all quoted since the last such line."""
        claims = [self._claims[key] for key in keys or self._quoted if key in self._claims]
        for claim in claims:
            self._quoted.pop(claim.key, None)
        lines = [
            self._source(notebook, [claim for claim in claims if claim.notebook == notebook])
            for notebook in dict.fromkeys(claim.notebook for claim in claims)
        ]
        return f"<sub>{'<br>'.join(lines)}</sub>" if lines else ""

    def _source(self, notebook: str, claims: list[Evidence]) -> str:
        record = self._records[notebook]
        runs = list(dict.fromkeys(run for claim in claims for run in claim.runs))
        more = f" and {len(runs) - 6} more" if len(runs) > 6 else ""
        parts = [
            f"evidence: {', '.join(f'`{claim.key}`' for claim in claims)}",
            f"notebook [{notebook}](notebooks/{notebook}.ipynb)",
            "**synthetic patches**" if record.synthetic else "",
            f"runs {', '.join(runs[:6])}{more}" if runs else "",
            record.commit,
            record.job,
        ]
        return " · ".join(filter(None, parts))

    def _quote(self, key: str) -> Evidence:
        self._quoted[key] = None
        return self._claims[key]

    def _keys(self) -> str:
        return ", ".join(self._quoted)

    def _rows(self, key: str) -> list[Row]:
        claim = self._quote(key)
        if not isinstance(claim.value, list):
            raise EvidenceError(f"evidence '{key}' is a {claim.kind}, no table")
        return claim.value

    def _pick(self, key: str, row: Row, column: str) -> Any:
        known = {name for other in self._rows(key) for name in other}
        if column not in known:
            raise EvidenceError(f"evidence '{key}': unknown column '{column}'{nearest(column, known)}")
        return row.get(column)

    # --- the rest of the page -----------------------------------------------------------------------------------

    def head(self) -> str:
        """What the journal rests on, as `head.head` says it."""
        made = list(self._records.values())
        return head.head(made) if made else self.open("No notebook has left evidence yet; `make journal` runs them.")

    def members(self) -> str:
        """The group's members as `name (id)`, or nothing."""
        return ", ".join(f"{m.name} ({m.id or 'no id'})" for m in self.group.members if m.name)

    def prose(self, name: str, reason: str = "") -> str:
        """The text that people wrote in journal/prose/NAME.md; without it an open place that gives `reason`, if any."""
        path = self._root / "journal" / "prose" / f"{name}.md"
        if not path.is_file() or not path.read_text(encoding="utf-8").strip():
            return self.open(reason + f" Write it in `journal/prose/{name}.md`.") if reason else ""
        return self._cited(self._jinja.get_template(f"prose/{name}.md").render)

    def draft(self, name: str, caller: Callable[[], str]) -> str:
        """The text that people wrote in journal/prose/NAME.md; without it that of the call block, marked as a draft."""
        mark = f"> {draft.SHOWN} To change or approve it: `pcam journal draft {name}`."
        return (self.prose(name) or f"{mark}\n\n{self._cited(caller)}") + "\n"  # a block's end eats one newline

    def _cited(self, text: Callable[[], str]) -> str:
        """A text, and below it the line that leads from the evidence it quoted to the runs."""
        outer, self._quoted = self._quoted, {}
        said = text().strip()
        line, self._quoted = self.evidence(), outer
        return f"{said}\n\n{line}" if line else said

    def box(self, name: str) -> str:
        """The mark of a checklist's box: `x` where its check passes, else a space."""
        if name not in self._boxes:
            raise EvidenceError(f"no box is named '{name}'{nearest(name, self._boxes)}")
        return "x" if self._boxes[name].ticked else " "

    def open(self, reason: str) -> str:
        """A visible place that still needs an answer."""
        return f"> {OPEN} {reason}"

    def exists(self, pattern: str) -> bool:
        """Whether the repository holds a file that matches the glob `pattern`."""
        return any(self._root.glob(pattern))


def markdown_text(name: str, root: str | Path) -> str:
    """The journal `name` (a form in journal/templates) as Markdown; errors as in `Page.text`."""
    return Page(Path(root), name).text(f"templates/{name}.md.j2")


def output(name: str) -> str:
    """The file that a journal is rendered to: at the root, since its images are relative to it."""
    return "JOURNAL.md" if name == draft.NAMES[0] else f"JOURNAL_{name}.md"


def render(name: str = draft.NAMES[0], root: str | Path = ROOT) -> tuple[Path, Path]:
    """Write a journal as Markdown and as a page in `root`, and return their paths; errors as in `Page.text`."""
    root = Path(root)
    text = markdown_text(name, root)
    written = root / output(name)
    write_text(written, text)
    write_text(written.with_suffix(".html"), page.html(text, root))
    return written, written.with_suffix(".html")


def _place(error: BaseException) -> str:
    """The template line an exception came from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith((".j2", ".md"))]
    return f"journal/{Path(frames[-1].filename).parent.name}/{Path(frames[-1].filename).name}:{frames[-1].lineno}"


def _missing(key: str) -> str:
    return f"**[not answered yet: no evidence `{key}`]**"


def _united(claim: Evidence, value: Any, digits: int) -> str:
    return f"{show(value, digits)} {claim.unit}".rstrip()


def _cell(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value):
        return f"`{value[:12]}`"  # a digest: twelve digits tell two apart
    return re.sub(r"\s*\n\s*", " ", show(value)).replace("|", "\\|")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _squeezed(text: str) -> str:
    """At most one empty line in a row, except in code; one newline at the end."""
    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(p if p.startswith("```") else re.sub(r"\n\s*\n", "\n\n", p) for p in parts).strip() + "\n"
