"""Drafts: texts that people must answer for, offered by the templates until somebody takes them over.

    pcam journal draft q7_3              copies the draft to journal/prose/q7_3.md, where it is edited
    pcam journal draft q7_3 --approve    the same, and says that it stands as it is

A template holds a draft as `{% call draft("q7_3") %} ... {% endcall %}`; it quotes evidence, so it follows what was
measured, also after it was taken over.
"""

from __future__ import annotations

import re
from pathlib import Path

from pcamlib.errors import EvidenceError, nearest
from pcamlib.files import write_text
from pcamlib.journal.evidence import find

#: The journals there are; the first is the one that is meant where none is named.
NAMES = ("assignment_2", "assignment_1", "dtu_exam")

SHOWN = "**Draft from the measured facts.**"
MARK = "> **DRAFT.** Delete this line when the text is yours."

_BLOCK = re.compile(r'{% call draft\("(\w+)"\) %}\n(.*?)\n{% endcall %}', re.DOTALL)
_PLACE = re.compile(r'\b(?:prose|draft)\("(\w+)"')


def template(root: Path, name: str) -> Path:
    """The template of the journal `name`."""
    return find(root, f"journal/templates/{name}.md.j2")


def drafts(root: Path) -> dict[str, str]:
    """Source of each draft that a template offers, by name."""
    texts = [template(root, name).read_text(encoding="utf-8") for name in NAMES]
    return {name: source for text in texts for name, source in _BLOCK.findall(text)}


def written(root: Path, name: str) -> list[Path]:
    """The files of journal/prose that the journal `name` includes."""
    path = template(root, name)
    places = set(_PLACE.findall(path.read_text(encoding="utf-8"))) if path.is_file() else set()
    return [path for path in sorted((root / "journal" / "prose").glob("*.md")) if path.stem in places]


def take(root: Path, name: str, approve: bool = False) -> Path:
    """Copy a draft to journal/prose/NAME.md, marked as a draft unless approved; returns its path.

    Raises:
        EvidenceError: no such draft, or the file is there already (one that is still marked may be approved).
    """
    path = root / "journal" / "prose" / f"{name}.md"
    if path.is_file() and path.read_text(encoding="utf-8").strip():
        text = path.read_text(encoding="utf-8")
        if not (approve and MARK in text):
            raise EvidenceError(
                f"journal/prose/{name}.md: is there already; edit it, or delete it to get the draft back"
            )
        write_text(path, text.replace(MARK, "").lstrip())
        return path
    known = drafts(root)
    if name not in known:
        raise EvidenceError(f"no draft is named '{name}'{nearest(name, known)}")
    write_text(path, ("" if approve else f"{MARK}\n\n") + known[name] + "\n")
    return path
