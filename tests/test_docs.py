"""The site builds without a warning and reads without internet; cards and picture say what is recorded."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

from pcamlib.journal.check import SKIPPED, TYPED

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import architecture  # noqa: E402
import cards  # noqa: E402
import hooks  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as CI does, without the cache of notebooks."""
    folder = tmp_path_factory.mktemp("docs") / "site"
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        call, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not re.search(r"^(WARNING|ERROR)", done.stderr, re.MULTILINE), done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_every_page_is_there_once(site: Path) -> None:
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    notebooks = {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    wanted = {"index.html", "JOURNAL.html", "CONTRIBUTING.html", "docs/LOG.html", "docs/model_card.html"}
    assert wanted | notebooks <= pages
    text = (site / "index.html").read_text()
    assert "proves itself" in text and (site / "docs/explorer.png").is_file()
    assert "stylesheets/main" in text and next(site.glob("assets/stylesheets/main*.css")).stat().st_size > 50_000
    outputs = (site / "notebooks/00_data.html").read_text()
    assert outputs.count("data:image/png;base64") >= 3, "a notebook is shown with its outputs"


@pytest.mark.slow
def test_no_link_is_broken(site: Path) -> None:
    broken = []
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"(?:href|src)=\"([^\"#?]+)", text):
            if re.match(r"[a-z]+:|//", target):
                continue
            path = (page.parent / unquote(target)).resolve()
            if page.name != "404.html" and not (path / "index.html" if path.is_dir() else path).exists():
                broken.append((page.relative_to(site).as_posix(), target))
    assert broken == []


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    fetched = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|rel=\"?stylesheet[^>]*//|@import[^;]*//"
    )
    assert {path.name: found[0] for path, text in pages.items() if (found := fetched.search(text))} == {}
    named = re.compile(r"[\"']https?://[^\"'\s]+\.m?js[\"']")
    assert {path.name: found[0] for path, text in pages.items() if (found := named.search(text))} == {}


def test_links_hold_where_the_target_is_a_page_and_are_text_where_it_is_none() -> None:
    files = SimpleNamespace(get_file_from_path={"docs/LOG.md": 1, "README.md": 1}.get)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="docs/architecture.md"))
    text = (
        "[log](LOG.md#x) [up](../README.md) [code](hooks.py) `[kept](hooks.py)` [gone](nowhere.md) [out](https://a.b/c)"
    )
    expected = text.replace("[code](hooks.py)", "code")
    assert hooks.on_page_markdown(text, page, None, files) == expected
    form = "[gone](nowhere.md)\n> a form's words: [this](figures/theirs.png)\n"
    assert hooks.on_page_markdown(form, page, None, files) == "[gone](nowhere.md)\n> a form's words: this\n"


def test_scripts_from_elsewhere_are_taken_out() -> None:
    own = '<script src="../assets/bundle.js"></script><script>let a = 1</script>'
    others = (
        '<script src="https://cdn.example/mathjax.js"></script>'
        '<script type="module">await import("https://cdn.example/mermaid.mjs")</script>'
    )
    assert hooks.on_post_page(f"{others}{own}{others}", None, None) == own


def test_the_picture_is_that_of_the_code() -> None:
    """Stale? `make docs`, or `python docs/architecture.py`, and commit assets/architecture.*"""
    assert architecture._drawn(architecture.read_json(architecture.DATA)) == architecture._drawn(architecture.graph())
    assert architecture.PICTURE.read_bytes().startswith(b"\x89PNG")


def test_an_import_is_an_arrow() -> None:
    found = architecture.graph()
    assert {("training", "models"), ("cli", "make")} <= {(arrow["from"], arrow["to"]) for arrow in found["arrows"]}
    rank = {box: number for number, row in enumerate(found["floors"]) for box in row}
    assert all(rank[arrow["from"]] > rank[arrow["to"]] for arrow in found["arrows"]), "imports go down"
    assert architecture._imported("import pcamlib.data.layout, torch\nfrom pcamlib import files, jobs") == {
        "data", "ground", "jobs"
    }  # fmt: skip
    assert set(architecture.PLACES) <= set(rank), "a box of the picture that is no folder any more"


def test_the_cards_say_what_is_recorded() -> None:
    """Stale? `make docs`, or `python docs/cards.py`, and commit docs/*_card.md"""
    for name in cards.CARDS:
        assert (ROOT / "docs" / f"{name}.md").read_text() == cards.card(name), name


@pytest.mark.parametrize("name", cards.CARDS)
def test_nobody_types_a_number_into_a_card(name: str) -> None:
    text = SKIPPED.sub("", (ROOT / "docs" / f"{name}.md.j2").read_text())
    assert TYPED.findall(text) == []


def test_a_registered_model_is_described_with_n_and_marked_where_it_is_synthetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    origin = {"run": "first", "seed": 3, "torch": "2.13.0", "machine": "a processor"}
    recorded = {"metrics": {"auc": {"value": 0.8765, "interval": [0.86, 0.89]}}}
    meta = {"provenance": origin, "recorded": recorded, "normalisation": {"mean": [1.0], "std": [2.0]}}
    model = {
        "name": "small", "file": "models/small.safetensors", "bytes": 12345, "sha256": "ab" * 32, "synthetic": True,
        "model": {"name": "cnn", "width": 8}, "data": {"train": "cd" * 32}, "commit": "1234567 + local changes",
        "decision": {"threshold": 0.25, "rule": "F2", "n": 256, "split": "valid", "temperature": 1.5},
        "metric": {"n": 256, "split": "valid", "best_of": 2}, "meta": meta,
    }  # fmt: skip
    monkeypatch.setattr(cards, "models", lambda root: [model])
    text = cards.card("model_card")
    assert "| auc | 0.876 | 0.86 to 0.89 |" in text or "| auc | 0.877 | 0.86 to 0.89 |" in text
    assert "n = 256 synthetic valid patches" in text and "**synthetic patches**" in text and "SYNTHETIC DATA" in text
    assert "12,345 bytes" in text and "with local changes" in text and "best of 2 evaluations" in text
    monkeypatch.setattr(cards, "models", lambda root: [])
    assert "No model is registered yet" in cards.card("model_card")
