"""The explorer as people meet it: notebook 06 in a real JupyterLab, and a Voila page, touched in a real browser.

make test-browser
.venv/bin/pytest -m browser tests/browser --screenshot docs/explorer.png
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from pcamlib.config import parse
from pcamlib.data.patches import Patches, open_split
from pcamlib.experiments import features, saved
from pcamlib.experiments.explorer import Filter
from pcamlib.experiments.slices import Bound, Slice
from pcamlib.experiments.view import Spec, View, slice_view
from pcamlib.journal import evidence
from pcamlib.sources import ROOT
from pcamlib.training import loop
from pcamlib.training.evaluate import Predictions, evaluate
from pcamlib.training.state import choose_precision, load_classifier

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(1200)]

#: Ten steps of a small network, and just enough patches for slices.
PARAMETERS = {"recipe": "mlp", "samples": 1280, "patches": 700, "proposals": 4}
TINY = {
    "loader": {"batch_size": 32},
    "model": {"name": "mlp", "crop": 32, "hidden_units": [8]},
    "train": {"steps": 30, "threads": 1, "precision": "fp32", "device": "cpu"},
}


def notebook(folder: Path, parameters: dict[str, Any]) -> None:
    """Notebook 06 in `folder` with other parameters, and without what its last run left in it."""
    whole = nbformat.read(ROOT / "notebooks" / "06_slicing.ipynb", as_version=4)
    whole.metadata.pop("widgets", None)
    for cell in whole.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(whole, folder / "06_slicing.ipynb")


def viewer(patches: Patches, predictions: Predictions) -> Callable[..., View]:
    """What an explorer of these must show for a `Spec`, computed here."""
    table = features.of(patches).of(predictions)
    return lambda *choice: slice_view(predictions, table, Spec(*choice))


def shows(page: Page, view: View) -> None:
    """Wait for a view's threshold and size, then compare every number of the matrix."""
    expect(page.locator(f".pcam-view[data-threshold='{view.spec.threshold}'][data-n='{view.n}']")).to_be_visible()
    cells = page.locator(".pcam-matrix td[data-cell]").all()
    names = ("data-cell", "data-count", "data-low", "data-high")
    found = [tuple(cell.get_attribute(name) for name in names) for cell in cells]
    assert found == [(name, str(view.counts[name]), str(r.low), str(r.high)) for name, r in view.cells.items()]


def enter(readout: Locator, text: str) -> None:
    """Type into the number beside a slider."""
    readout.click()
    readout.press("ControlOrMeta+a")
    readout.press_sequentially(text)
    readout.press("Enter")


def touch(page: Page, patches: Patches, predictions: Predictions) -> View:
    """Move the threshold, narrow a feature, click a mistake; what is shown must follow `slice_view`."""
    view = viewer(patches, predictions)
    cut = round(float(np.quantile(predictions.probability[predictions.label == 1], 0.6)), 2)
    assert view(cut).counts != view(0.5).counts
    enter(page.locator(".pcam-threshold .widget-readout"), str(cut))
    shows(page, view(cut))
    strip, twin = page.locator(".pcam-filter").first, Filter(features.of(patches), lambda change: None)
    strip.locator("select").select_option("brightness")
    twin.feature.value = "brightness"
    readout, form = strip.locator(".widget-readout"), twin.range.readout_format
    expect(readout).to_have_text(f"{twin.range.min:{form}} – {twin.range.max:{form}}")
    middle = float(format(np.median(features.of(patches)["brightness"]), form))
    enter(readout, f"{twin.range.min} – {middle}")
    dim = view(cut, Slice((Bound("brightness", high=middle),)))
    assert 20 <= dim.n < len(patches) and len(dim.mistakes)
    shows(page, dim)
    row = predictions.index[dim.mistakes[0]]
    tile = page.locator(".pcam-tile").first
    expect(tile.locator("button")).to_have_text(re.compile(f"row {row}:"))
    tile.locator("button").click()
    large = page.locator(f".pcam-large[data-row='{row}']")
    expect(large).to_be_visible()
    assert large.locator("img").count() == 2 + 6  # the patch, its saliency, its neighbours
    expect(large.locator("img").first).to_have_js_property("naturalWidth", 288)
    return dim


def test_run_all_touch_and_save_in_jupyterlab(page, serve, synthetic_dir, tmp_path, request) -> None:
    path = request.config.getoption("--screenshot")
    scale = {} if path else {**PARAMETERS, "data_dir": str(synthetic_dir)}  # a picture shows the notebook as it is
    notebook(tmp_path, {**scale, "root": str(tmp_path)})
    root = ["--allow-root"] if os.geteuid() == 0 else []
    address = serve("jupyterlab", f"--ServerApp.root_dir={tmp_path}", "--IdentityProvider.token=t", *root)
    page.goto(f"{address}/lab/tree/06_slicing.ipynb?token=t&reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # before that Run All runs nothing, and says nothing
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".pcam-view").wait_for(timeout=900_000)
    (trained,) = (tmp_path / "runs").glob("06-model-*")
    patches = open_split(tmp_path / "data" / "06-valid", "valid")
    model, _ = load_classifier(trained / "checkpoints" / "best.safetensors")
    predictions = evaluate(model, patches, precision=choose_precision("auto", "cpu"))
    shows(page, viewer(patches, predictions)(0.5))
    seen = touch(page, patches, predictions)
    if path:
        page.set_viewport_size({"width": 1500, "height": 1700})  # what is scrolled away is not drawn
        page.locator(".pcam-explorer").screenshot(path=path)
    page.get_by_role("button", name="Save slice").click()
    expect(page.locator(".pcam-error")).to_have_text("not saved: give the slice a name first")
    page.locator(".pcam-name input").fill("dim ones")
    page.get_by_role("button", name="Save slice").click()
    expect(page.locator(".pcam-saved")).to_contain_text("'dim ones'")
    kept = saved.read(tmp_path / "journal" / "slices.yaml")["dim ones"]
    assert (kept.threshold, kept.slice) == (seen.spec.threshold, seen.spec.bounds)
    (row,) = evidence.load(tmp_path)["slice.saved"].value
    assert (row["name"], row["n"], row["error"]) == ("dim ones", seen.n, seen.rates["error"].value)


def test_the_page_of_make_explore(page, serve, synthetic_dir, tmp_path) -> None:
    run = loop.train(parse(TINY), synthetic_dir, tmp_path / "tiny", report=lambda line: None)
    languages = "--VoilaConfiguration.extension_language_mapping=.py=python"
    where = {"PCAM_DATA": str(synthetic_dir), "PCAM_RUNS": str(tmp_path)}
    page.goto(serve("voila", str(ROOT / "notebooks" / "explorer.py"), languages, **where))
    patches = open_split(synthetic_dir, "valid")
    shows(page, viewer(patches, run.predictions())(0.5))
    seen = touch(page, patches, run.predictions())
    expect(page.locator(".pcam-view")).to_contain_text(f"{seen.n:,} of {len(patches):,} synthetic patches")
    assert page.locator(".pcam-error").count() == 0
