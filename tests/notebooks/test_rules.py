"""The house rules of the committed notebooks: thin, runnable from their first line, and holding what a run stored."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from pcamlib.jobs.verdict import INJECTED

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
CELLS, LINES, DEFINITION = 12, 15, 5
# a slash that no word, tag, number or URL leads up to, and at least two names: /home/ada, but not img/s, </td>, 1/2/3
ABSOLUTE = re.compile(r"(?<![\w.:/<>\-])/[A-Za-z_][\w.\-]*/[\w.\-]+|file:///|\b[A-Z]:\\\w")


def violations(notebook: Any) -> list[str]:
    """Every house rule that a notebook breaks, in words; cells are counted from 1, all kinds alike."""
    cells = list(enumerate(notebook.cells, start=1))
    code = [(number, cell) for number, cell in cells if cell.cell_type == "code"]
    found = _opening(notebook.cells)
    if len(code) > CELLS:
        found.append(f"{len(code)} code cells; at most {CELLS}")
    tagged = [number for number, cell in code if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        found.append(f"{len(tagged)} cells are tagged 'parameters'; one is wanted")
    importing = [number for number, cell in code if _imports(cell) and number not in tagged]
    if len(importing) != 1:
        found.append(f"cells {importing} import; one imports cell is wanted")
    if not code or not _closes(code[-1][1]):
        found.append("the last code cell does not call .close()")
    if not any("NBVAL_CHECK_OUTPUT" in cell.source or "nbval-check-output" in _tags(cell) for _, cell in code):
        found.append("no cell is marked NBVAL_CHECK_OUTPUT")
    for number, cell in code:
        found += [f"cell {number}: {what}" for what in (*_source_faults(cell, number in importing), *_stored(cell))]
    return found


def _tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def _opening(cells: list[Any]) -> list[str]:
    first = cells[0] if cells and cells[0].cell_type == "markdown" else new_markdown_cell("")
    wanted = {
        "title (`# ...`)": first.source.startswith("# "),
        "question (`?`)": "?" in first.source,
        "way to run it (`pcam notebook run NN`)": re.search(r"pcam notebook run \d\d", first.source),
    }
    return [f"the first cell lacks a {what}" for what, there in wanted.items() if not there]


def _tree(cell: Any) -> ast.Module:
    return ast.parse("\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in cell.source.splitlines()))


def _imports(cell: Any) -> bool:
    return any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(_tree(cell)))


def _closes(cell: Any) -> bool:
    calls = (node.func for node in ast.walk(_tree(cell)) if isinstance(node, ast.Call))
    return any(isinstance(called, ast.Attribute) and called.attr == "close" for called in calls)


def _source_faults(cell: Any, is_imports: bool) -> list[str]:
    lines, found = cell.source.splitlines(), []
    if not cell.source.strip():
        return ["is empty"]
    if len(lines) > LINES:
        found.append(f"{len(lines)} lines; at most {LINES}")
    for node in ast.walk(_tree(cell)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > DEFINITION:
                found.append(f"{node.name} has {length} lines; at most {DEFINITION}, the logic lives in pcamlib")
    if re.search(r"tqdm\.(auto|notebook)", cell.source):
        found.append("tqdm.auto freezes at 0 % in a headless run; use plain tqdm")
    if re.search(r"\bplt\.", cell.source) and not is_imports and lines[-1].strip() != "plt.show()":
        found.append("plots, but does not end with plt.show()")
    if INJECTED in _tags(cell):
        found.append("holds the parameters of one run; commit the notebook as run with its defaults")
    return found


def _stored(cell: Any) -> list[str]:
    found = ["has no stored output: execution_count is null"] if cell.execution_count is None else []
    for output in cell.outputs:
        if output.output_type == "error":
            found.append(f"a stored error: {output.ename}")
            continue
        data = output.get("data", {"text/plain": output.get("text", "")})
        for kind, text in data.items():
            hit = None if kind.startswith("image/") else ABSOLUTE.search(str(text))
            if hit:
                found.append(f"an absolute path in a stored output: {hit.group()}")
    return found


def good() -> Any:
    """A notebook that keeps every rule."""
    sources = [
        "seed: int = 0",
        "import matplotlib.pyplot as plt\nfrom pcamlib import journal\nplt.rcParams['font.size'] = 9",
        "%matplotlib inline\nplt.plot([seed])\nplt.show()",
        "# NBVAL_CHECK_OUTPUT\nevidence = journal\nprint('0.91')",
        "evidence.close()",
    ]
    cells = [new_code_cell(source, execution_count=n) for n, source in enumerate(sources, start=1)]
    cells[0].metadata["tags"] = ["parameters"]
    cells[3].outputs = [new_output("stream", text="120 img/s, 1/2/3, https://zenodo.org/records/2546921, data/train\n")]
    html = "<table><tr><td>a</td></tr></table>"
    cells[2].outputs = [new_output("display_data", data={"text/html": html, "image/png": "aGk=/home/x/"})]
    opening = "# Twins\n\nDo two runs agree?\n\n    pcam notebook run 01 --scale smoke"
    return new_notebook(cells=[new_markdown_cell(opening), *cells])


def test_a_good_notebook_breaks_nothing():
    assert violations(good()) == []


def replaced(number: int, source: str) -> Any:
    """`good()` with the source of cell `number` replaced."""
    notebook = good()
    notebook.cells[number - 1].source = source
    return notebook


def with_output(output: Any) -> Any:
    notebook = good()
    notebook.cells[5].outputs = [output]
    return notebook


def without_first() -> Any:
    notebook = good()
    del notebook.cells[0]
    return notebook


def with_tag(tag: str, number: int = 4) -> Any:
    notebook = good()
    notebook.cells[number - 1].metadata["tags"] = [tag]
    return notebook


def with_more_cells() -> Any:
    notebook = good()
    notebook.cells[3:3] = [copy.deepcopy(notebook.cells[3]) for _ in range(8)]
    return notebook


def never_executed() -> Any:
    notebook = good()
    notebook.cells[3].execution_count = None
    return notebook


def path_in(**data: str) -> Any:
    return with_output(new_output("execute_result", data={kind.replace("_", "/"): text for kind, text in data.items()}))


OPENING = good().cells[0].source
LONG = "def f():\n    a = 1\n    a += 1\n    a += 1\n    a += 1\n    return a"


@pytest.mark.parametrize(
    ("notebook", "expected"),
    [
        (replaced(1, OPENING.replace("# ", "")), "the first cell lacks a title"),
        (replaced(1, OPENING.replace("?", "")), "the first cell lacks a question"),
        (replaced(1, OPENING.replace("run 01", "run")), "the first cell lacks a way to run it"),
        (with_more_cells(), "13 code cells; at most 12"),
        (replaced(4, "a = 1\n" * 14 + "plt.plot()\nplt.show()"), "cell 4: 16 lines; at most 15"),
        (replaced(4, LONG), "cell 4: f has 6 lines; at most 5"),
        (replaced(4, LONG.replace("def f()", "class C")), "cell 4: C has 6 lines; at most 5"),
        (replaced(4, "  "), "cell 4: is empty"),
        (with_tag("other", 2), "0 cells are tagged 'parameters'"),
        (with_tag("parameters"), "2 cells are tagged 'parameters'"),
        (replaced(4, "import os"), "cells [3, 4] import"),
        (replaced(4, "if seed:\n    from os import path"), "cells [3, 4] import"),
        (replaced(3, "journal = []"), "cells [] import"),
        (replaced(6, "evidence.closed"), "the last code cell does not call .close()"),
        (replaced(4, "bar = 'tqdm.auto'"), "cell 4: tqdm.auto freezes"),
        (replaced(4, "plt.show()\nplt.plot([1]);"), "cell 4: plots, but does not end with plt.show()"),
        (with_tag(INJECTED), "cell 4: holds the parameters of one run"),
        (replaced(5, "print(1)"), "no cell is marked NBVAL_CHECK_OUTPUT"),
        (never_executed(), "cell 4: has no stored output"),
        (with_output(new_output("error", ename="ValueError", evalue="")), "cell 6: a stored error: ValueError"),
        (with_output(new_output("stream", text="saved to /home/ada/x.png")), "cell 6: an absolute path in a stored ou"),
        (path_in(text_plain="PosixPath('/gpfs/work1/x')"), "output: /gpfs/work1"),
        (path_in(text_html="<img src='/scratch/a/b.png'>"), "output: /scratch/a"),
        (path_in(text_html="<a href='file:///x'>"), "output: file:///"),
        (path_in(text_plain=r"C:\Users\ada"), r"output: C:\U"),
    ],
)
def test_each_rule_can_fail(notebook, expected):
    found = violations(notebook)
    assert len(found) == 1
    assert expected in found[0]


def test_a_notebook_without_a_first_cell_lacks_all_of_it():
    assert len([what for what in violations(without_first()) if what.startswith("the first cell lacks")]) == 3
    assert violations(new_notebook())


def test_there_are_notebooks():
    assert NOTEBOOKS, "notebooks/ holds no notebook"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_notebooks_keep_the_rules(path):
    assert violations(nbformat.read(path, as_version=4)) == []
