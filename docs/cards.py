"""Model card and data card, filled from evidence and registered checkpoints; nobody types a number into them.

    .venv/bin/python docs/cards.py             # docs/model_card.md and docs/data_card.md from docs/*_card.md.j2
    .venv/bin/python docs/cards.py --check     # exit code 1: evidence or models changed since

A template may use `page`, the journal's own quotations (`page.table("data.splits")`, ...), `models`, the entries of
models/index.yaml with what their checkpoints carry, and `show`, numbers as the journal writes them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jinja2

from pcamlib.files import write_text
from pcamlib.journal.claims import show
from pcamlib.journal.draft import NAMES
from pcamlib.journal.render import Page
from pcamlib.serving import registry
from pcamlib.sources import ROOT
from pcamlib.training import checkpoint

CARDS = ("model_card", "data_card")


def models(root: Path) -> list[dict[str, Any]]:
    """Each registered model: its entry in the index, and under `meta` what its checkpoint carries."""
    return [{**entry.model_dump(), "meta": checkpoint.load(root / entry.file)[1]} for entry in registry.entries(root)]


def card(name: str, root: Path = ROOT) -> str:
    """One card as Markdown; paths are those of a file in docs/."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ROOT / "docs"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    page = Page(root, NAMES[0])  # its quotations alone; the form does not matter
    text = environment.get_template(f"{name}.md.j2").render(page=page, models=models(root), show=show)
    text = re.sub(r"\]\((?=(?:assets|notebooks|models)/)", "](../", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> int:
    """Write the cards, or with --check compare them with what they would be."""
    made = {ROOT / "docs" / f"{name}.md": card(name) for name in CARDS}
    if "--check" not in sys.argv[1:]:
        for path, text in made.items():
            write_text(path, text)
            print(path.relative_to(ROOT))
        return 0
    stale = [path.name for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    print(
        f"stale: {', '.join(stale)}: run .venv/bin/python docs/cards.py" if stale else "the cards say what is recorded"
    )
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
