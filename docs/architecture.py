"""The picture of the house, drawn from the imports as they are: floors as rows, folders as boxes, imports as arrows.

    .venv/bin/python docs/architecture.py            # writes assets/architecture.png and assets/architecture.json
    .venv/bin/python docs/architecture.py --check    # exit code 1: the picture is not that of the code any more

The floors are those that tests/test_repository.py holds; what a folder is, its own docstring says. A number on an arrow
is how many files of the upper box import something of the lower one. Everybody imports the ground floor, so that number
stands in the box.
"""

from __future__ import annotations

import ast
import math
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Path_

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from test_repository import FLOOR, FLOORS, code_lines  # noqa: E402  # the one list of floors

from pcamlib.files import atomic_path, read_json, write_json  # noqa: E402
from pcamlib.sources import notebook_code  # noqa: E402

GROUND, TOP = "ground", len(FLOORS) - 1
#: What stands above the house and is no package: files that a face is made of.
FACES = {"notebooks": "notebooks/*.ipynb", "inference.py": "inference.py", "benchmarks": "benchmarks/*.py"}
DATA, PICTURE = ROOT / "assets/architecture.json", ROOT / "assets/architecture.png"


def _box(unit: str) -> str:
    """The box of a module of pcamlib: the ground is one."""
    return GROUND if FLOOR.get(unit) == 0 else unit


def _imported(code: str) -> set[str]:
    """Boxes that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # absolute ones: the house has no others
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found |= {_box(p[1]) for p in parts if p[0] == "pcamlib" and len(p) > 1 and p[1] in FLOOR and FLOOR[p[1]] < TOP}
    return found


def graph() -> dict[str, Any]:
    """What is drawn: `floors` (rows of boxes, the ground first), `boxes` (files, lines, what) and `arrows` (files)."""
    members: dict[str, list[tuple[str, Path]]] = {}
    for path in sorted((ROOT / "pcamlib").rglob("*.py")):
        unit = path.relative_to(ROOT / "pcamlib").parts[0].removesuffix(".py")
        if unit in FLOOR and unit != "__init__":
            members.setdefault(_box(unit), []).append((path.read_text(encoding="utf-8"), path))
    for face, pattern in FACES.items():
        for path in sorted(ROOT.glob(pattern)):
            code = notebook_code(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
            members.setdefault(face, []).append((code, path))
    arrows: Counter[tuple[str, str]] = Counter()
    boxes = {}
    for box, files in members.items():
        for code, _ in files:
            arrows.update((box, other) for other in _imported(code) - {box})
        lines = sum(code_lines(code) for code, _ in files)
        boxes[box] = {"files": len(files), "lines": lines, "what": _what(box)}
    rows = [[GROUND], *([_box(unit) for unit in floor] for floor in FLOORS[1:-1]), list(FACES)]
    return {
        "floors": [[box for box in row if box in boxes] for row in rows],
        "boxes": boxes,
        "arrows": [{"from": a, "to": b, "files": n} for (a, b), n in sorted(arrows.items())],
    }


def _what(box: str) -> str:
    """The first sentence of a folder's docstring, without its own name."""
    own = {GROUND: "What everything stands on: " + ", ".join(sorted(FLOORS[0])) + ".",
           "notebooks": "The journal's questions, one notebook each.",
           "inference.py": "One checkpoint, many patches.",
           "benchmarks": "Tables of speed, memory and rates."}  # fmt: skip
    path = ROOT / "pcamlib" / box
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if box in own or not source.is_file():
        return own.get(box, "")
    text = (ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or "").replace("`", "")
    sentence = re.split(r"[.;]\s|\.$|\n\n", " ".join(text.split("\n\n")[0].split()))[0]
    name, colon, rest = sentence.partition(": ")
    text = rest if colon and name.lower().removeprefix("the ") in (box, "pcam") else sentence
    return text[:1].upper() + text[1:]


# Drawing. Units are inches; the picture is WIDE across.

WIDE, LINE, GAP = 13.0, 0.96, 1.8
HEIGHT, SLAB = 0.98, 0.78  # of a box, of a floor that is one box
COLOURS = {
    "ground": "#65728a", "data": "#2a9d8f", "models": "#7b6cb3", "journal": "#c77d3a", "jobs": "#6c8f3d",
    "training": "#2f6db5", "audit": "#b5483f", "experiments": "#b8398a", "serving": "#0f8ba8",
    "make": "#5b6470", "submit": "#5b6470", "cli": "#3c444f",
}  # fmt: skip
#: Where the boxes of the middle floors stand, left to right; others are spread evenly.
PLACES = {"journal": 1.55, "jobs": 4.05, "data": 8.35, "models": 11.45, "training": 6.0,
          "serving": 2.6, "experiments": 7.5, "audit": 11.3}  # fmt: skip
INK = "#22272e"


def draw(found: dict[str, Any]) -> Figure:
    """The picture of `graph`: floors with arrows between them, and slabs that name what they import."""
    middle = [row for row in found["floors"][1:] if all(box in PLACES for box in row)]
    top = [box for row in found["floors"][1:-1] if row not in middle for box in row]
    faces = found["floors"][-1]
    base = 1.6 + GAP * (len(middle) - 1) + HEIGHT + 0.4  # of the floors above the middle ones
    height = base + LINE * len(top) + 0.1 + HEIGHT + 0.85
    figure, axes = plt.subplots(figsize=(WIDE, height))
    axes.set(xlim=(0, WIDE), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    arrows = {(a["from"], a["to"]): a["files"] for a in found["arrows"]}
    axes.text(
        0.2, height - 0.32, "pcamlib: imports go down, never up, never sideways", size=15, weight="bold", color=INK
    )
    legend = (
        "A number: how many files of the importer import something of the imported. Dashed: what stands on the house."
    )
    axes.text(0.2, height - 0.6, legend, size=9, color="#5b6470")
    _slab(axes, found, GROUND, 0.2, {a: n for (a, b), n in arrows.items() if b == GROUND}, "imported by")
    at: dict[str, tuple[float, float]] = {}
    for level, row in enumerate(middle):
        y = 1.6 + GAP * level
        axes.axhspan(y - 0.2, y + HEIGHT + 0.2, color="#f2f4f7" if level % 2 else "#f8f9fb", lw=0, zorder=0)
        at |= {box: (PLACES[box], y) for box in row}
    _arrows(axes, {pair: n for pair, n in arrows.items() if set(pair) <= set(at)}, at)
    for box, (x, y) in at.items():
        _card(axes, found["boxes"][box], box, x - 1.2, y, 2.4)
    for level, box in enumerate(top):
        imported = {b: n for (a, b), n in arrows.items() if a == box and b != GROUND}
        _slab(axes, found, box, base + LINE * level, imported, "imports")
    y, x = base + LINE * len(top) + 0.1, 0.2
    several = {face: {b: n for (a, b), n in arrows.items() if a == face and b != GROUND} for face in faces}
    share = (WIDE - 0.4 - 0.2 * (len(faces) - 1)) / sum(len(imported) + 4 for imported in several.values())
    for face, imported in several.items():
        wide = share * (len(imported) + 4)
        _card(axes, found["boxes"][face], face, x, y, wide, dashed=True, centred=False)
        _chips(axes, imported, x + 0.15, y + 0.46, "imports", x + wide - 0.1)
        x += wide + 0.2
    return figure


def _outline(axes: Axes, x: float, y: float, wide: float, high: float, colour: str, dashed: bool = False) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y), wide, high, boxstyle="round,pad=0,rounding_size=0.09", fc="white", ec=colour, lw=1.8,
            ls=(0, (4, 2)) if dashed else "-", zorder=4,
        )
    )  # fmt: skip


def _card(
    axes: Axes, about: dict[str, Any], box: str, x: float, y: float, wide: float, *,
    dashed: bool = False, centred: bool = True,
) -> None:  # fmt: skip
    """A box: its name, how large it is, and what it is."""
    colour, high = COLOURS.get(box, "#5b6470"), HEIGHT
    _outline(axes, x, y, wide, high, colour, dashed)
    size = f"{about['files']} file{'s' * (about['files'] > 1)} · {about['lines']:,} lines"
    place, align = (x + wide / 2, "center") if centred else (x + 0.15, "left")
    axes.text(place, y + high - 0.2, box, ha=align, va="center", size=12.5, weight="bold", color=colour, zorder=5)
    if centred:
        axes.text(place, y + high - 0.41, size, ha=align, va="center", size=8, color="#5b6470", zorder=5)
        text = textwrap.fill(about["what"], 37, max_lines=2, placeholder=" …")
        axes.text(place, y + 0.26, text, ha=align, va="center", size=7.6, color=INK, zorder=5, linespacing=1.25)
    else:
        axes.text(x + wide - 0.15, y + high - 0.2, size, ha="right", va="center", size=8, color="#5b6470", zorder=5)


def _slab(axes: Axes, found: dict[str, Any], box: str, y: float, counts: dict[str, int], word: str) -> None:
    """A floor of one box, across the picture, with its imports as chips."""
    about, colour, high = found["boxes"][box], COLOURS[box], SLAB
    _outline(axes, 0.2, y, WIDE - 0.4, high, colour)
    axes.text(0.4, y + high - 0.24, box, va="center", size=12.5, weight="bold", color=colour, zorder=5)
    size = f"{about['files']} file{'s' * (about['files'] > 1)} · {about['lines']:,} lines"
    axes.text(WIDE - 0.4, y + high - 0.24, size, ha="right", va="center", size=8, color="#5b6470", zorder=5)
    axes.text(1.45, y + high - 0.24, about["what"], va="center", size=8.6, color=INK, zorder=5)
    _chips(axes, counts, 0.4, y + 0.22, word)


def _chips(axes: Axes, counts: dict[str, int], x: float, y: float, word: str, end: float = WIDE) -> None:
    """`word`, then one coloured chip a folder with its number of files, the most first; a new line at `end`."""
    axes.text(x, y, word, va="center", size=8, color="#5b6470", zorder=5)
    x = start = x + 0.085 * len(word)
    for box, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        label = f"{box} {count}"
        wide = 0.16 + 0.071 * len(label)
        if x + wide > end:
            x, y = start, y - 0.27
        axes.add_patch(
            FancyBboxPatch((x, y - 0.105), wide, 0.21, boxstyle="round,pad=0,rounding_size=0.1", lw=0,
                           fc=COLOURS.get(box, "#5b6470"), zorder=5)
        )  # fmt: skip
        axes.text(x + wide / 2, y - 0.005, label, ha="center", va="center", size=7.4, color="white", zorder=6)
        x += wide + 0.08


def _arrows(axes: Axes, arrows: dict[tuple[str, str], int], at: dict[str, tuple[float, float]]) -> None:
    """Curves from the bottom of the importer to the top of the imported, at ports side by side, each with its count."""

    def port(box: str, other: str, others: list[str]) -> float:
        order = sorted(others, key=lambda name: at[name][0])
        return at[box][0] + (order.index(other) - (len(order) - 1) / 2) * 0.4

    for (upper, lower), count in arrows.items():
        x0 = port(upper, lower, [b for a, b in arrows if a == upper])
        x1 = port(lower, upper, [a for a, b in arrows if b == lower])
        y0, y1 = at[upper][1], at[lower][1] + HEIGHT
        bend = GAP - HEIGHT  # across between two floors, then straight down past those between
        points = [(x0, y0), (x0, y0 - 0.75 * bend), (x1, y0 - 0.25 * bend), (x1, y0 - bend)]
        codes = [Path_.MOVETO, Path_.CURVE4, Path_.CURVE4, Path_.CURVE4]
        if y0 - bend > y1 + 0.01:
            points.append((x1, y1))
            codes.append(Path_.LINETO)
        axes.add_patch(
            FancyArrowPatch(
                path=Path_(points, codes), arrowstyle="-|>,head_length=5,head_width=2.6", shrinkA=0, shrinkB=0,
                lw=0.9 + 0.75 * math.log2(count), color=COLOURS[upper], alpha=0.8, zorder=2,
                capstyle="butt", joinstyle="round",
            )
        )  # fmt: skip
        ring = {"boxstyle": "circle,pad=0.18", "fc": "white", "ec": COLOURS[upper], "lw": 0.8}
        style = {"size": 8.5, "weight": "bold", "color": COLOURS[upper], "bbox": ring, "zorder": 3}
        axes.text(x1, y1 + 0.27, str(count), ha="center", va="center", **style)


def _drawn(found: dict[str, Any]) -> dict[str, Any]:
    """What makes a picture stale: boxes and arrows, not how many lines a box has or what its docstring says."""
    return {**found, "boxes": {box: about["files"] for box, about in found["boxes"].items()}}


def main() -> int:
    """Write the picture and its data, or with --check compare the data with the code."""
    found = graph()
    if "--check" in sys.argv[1:]:
        same = DATA.is_file() and _drawn(read_json(DATA)) == _drawn(found)
        print("the picture is that of the code" if same else "stale: .venv/bin/python docs/architecture.py")
        return 0 if same else 1
    with atomic_path(PICTURE) as part:
        draw(found).savefig(part, format="png", dpi=110, metadata={"Software": None})
    write_json(DATA, found)
    print(PICTURE.relative_to(ROOT), DATA.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
