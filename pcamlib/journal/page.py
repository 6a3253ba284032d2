"""The journal as one HTML file, for reading and printing."""

from __future__ import annotations

import base64
import mimetypes
import re
from pathlib import Path

import jinja2
import markdown

from pcamlib.journal.evidence import find

OPEN = "**Not answered yet.**"


def html(text: str, root: Path) -> str:
    """The journal as one HTML page that needs no other file: images are inlined."""
    converter = markdown.Markdown(
        extensions=["tables", "fenced_code", "toc", "sane_lists"], extension_configs={"toc": {"toc_depth": "2-2"}}
    )
    body = converter.convert(text)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<li>\[([ x])\] ", lambda m: f'<li class="box">{"☑" if m[1] == "x" else "☐"} ', body)
    body = body.replace(f"<blockquote>\n<p><strong>{OPEN[2:-2]}", f'<blockquote class="open">\n<p><strong>{OPEN[2:-2]}')
    body = re.sub(r'src="([^":]+)"', lambda m: f'src="{_inlined(root / m[1], m[1])}"', body)
    page = jinja2.Template(find(root, "journal/templates/page.html.j2").read_text(encoding="utf-8"))
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "Journal")
    return page.render(title=title, body=body, contents=getattr(converter, "toc", ""))


def _inlined(path: Path, otherwise: str) -> str:
    if not path.is_file():
        return otherwise
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
