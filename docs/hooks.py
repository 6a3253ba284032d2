"""The site is the repository's own pages at their own places: README.md, journals, notebooks, docs/, their pictures.

MkDocs calls these functions while it builds. Nothing is copied: a page is read where it lies, and a link that holds in
the repository holds on the site. A link to a file that is no page (a script, a recipe) becomes its plain text. What
notebooks would fetch from elsewhere is taken out, so that the site can be read without internet.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: What the site shows, by section; a name leads, else the page's own title.
SECTIONS = {
    "Journal": ["JOURNAL*.md"],
    "Notebooks": ["notebooks/*.ipynb"],
    "Models and data": ["docs/model_card.md", "docs/data_card.md"],
    "How it is built": ["docs/architecture.md", "docs/containers.md", "CONTRIBUTING.md", "docs/LOG.md"],
    "Clusters": ["slurm/ondemand/README.md"],
}
PICTURES = ("docs/*.png", "assets/*.png")
#: A Markdown link or image whose target is no address: text, target, anchor.
LINK = re.compile(r"(?<!\\)(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
CODE = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]*`)", re.DOTALL)
#: Scripts that come from, or name, another host: MathJax, Mermaid and widgets, which no page here needs.
ELSEWHERE = re.compile(
    r"<script[^>]*\ssrc=[\"'](?:(?:https?:)?//[^>]*)?[\"']\s*>\s*</script>"
    r"|<script[^>]*>(?:(?!</script>).)*[\"']https?://[^\"']+\.m?js[\"'](?:(?!</script>).)*</script>",
    re.DOTALL,
)


def _pages(patterns: list[str]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def on_config(config: Any) -> Any:
    """The navigation: README first, then the sections that have pages."""
    sections = {name: _pages(patterns) for name, patterns in SECTIONS.items()}
    config.nav = [{"Overview": "README.md"}, *({name: pages} for name, pages in sections.items() if pages)]
    return config


@event_priority(100)  # before mkdocs-jupyter, which takes notebooks out of what it finds here
def on_files(files: Files, config: Any) -> Files:
    """Instead of docs/ alone, every page and picture at its place in the repository."""
    shown = ["README.md", *(page for patterns in SECTIONS.values() for page in _pages(patterns)), *_pages([*PICTURES])]
    theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*theme, *(File(name, str(ROOT), config.site_dir, config.use_directory_urls) for name in shown)])


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files that are no page of the site become their text."""
    here = posixpath.dirname(page.file.src_uri)

    def kept(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, match[3]))
        if files.get_file_from_path(target) is not None:
            return match[0]
        line = match.string[match.string.rfind("\n", 0, match.start()) + 1 :]
        form = line.startswith(">")  # a form's own words, which point at pictures of the form's repository
        return match[2] if form or (ROOT / target).exists() else match[0]  # what is nowhere, --strict refuses

    parts = CODE.split(markdown)
    return "".join(part if number % 2 else LINK.sub(kept, part) for number, part in enumerate(parts))


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Nothing is fetched from elsewhere."""
    return ELSEWHERE.sub("", output)
