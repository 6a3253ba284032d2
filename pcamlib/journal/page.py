"""The journal as one HTML file, for reading and printing, and printed as PDF where there is a Chromium."""

from __future__ import annotations

import base64
import mimetypes
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import jinja2
import markdown

from pcamlib.errors import PcamError
from pcamlib.files import atomic_path
from pcamlib.journal.draft import SHOWN
from pcamlib.journal.evidence import find

OPEN = "**Not answered yet.**"


def html(text: str, root: Path) -> str:
    """The journal as one HTML page that needs no other file: images are inlined."""
    converter = markdown.Markdown(
        extensions=["tables", "fenced_code", "toc", "sane_lists"], extension_configs={"toc": {"toc_depth": "2-3"}}
    )
    marks = "|".join(map(re.escape, (OPEN, SHOWN)))
    body = converter.convert(re.sub(rf"\n\n(?=> (?:{marks}))", "\n\n<!-- -->\n\n", text))  # else two quotes become one
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<li>\[([ x])\] ", lambda m: f'<li class="box">{"☑" if m[1] == "x" else "☐"} ', body)
    for mark, kind in ((OPEN, "open"), (SHOWN, "draft")):
        told = f"<p><strong>{mark[2:-2]}"
        body = body.replace(f"<blockquote>\n{told}", f'<blockquote class="{kind}">\n{told}')
    body = re.sub(r'src="([^":]+)"', lambda m: f'src="{_inlined(root / m[1], m[1])}"', body)
    page = jinja2.Template(find(root, "journal/templates/page.html.j2").read_text(encoding="utf-8"))
    title = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("# ")), "Journal")
    return page.render(title=title, body=body, contents=getattr(converter, "toc", ""))


def pdf(path: Path) -> Path:
    """Print an HTML page with the system's Chromium; returns the path of the PDF beside it.

    Raises:
        PcamError: there is no Chromium, or it prints nothing within two minutes.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        raise PcamError(f"no Chromium here to print {path.name}; `make chromium` installs it, or print from a browser")
    root = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox refuses root, as in containers
    with tempfile.TemporaryDirectory() as profile, atomic_path(path.with_suffix(".pdf")) as part:
        options = ["--headless", *root, "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
        call = [browser, *options, f"--print-to-pdf={part}", path.resolve().as_uri()]
        try:
            done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
        except subprocess.TimeoutExpired:
            raise PcamError(f"{browser} did not print {path.name} within 120 s; print it from a browser") from None
        if not part.is_file():
            said = (done.stderr.strip().splitlines() or ["no word"])[-1]
            raise PcamError(f"{browser} did not print {path.name} (exit code {done.returncode}): {said}")
    return path.with_suffix(".pdf")


def _inlined(path: Path, otherwise: str) -> str:
    if not path.is_file():
        return otherwise
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
