"""The service's page as people meet it: `pcam serve` as a process, patches dropped in a real browser.

make test-browser
"""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from pcamlib.config import parse, recipe
from pcamlib.data.patches import open_split
from pcamlib.serving.predict import Predictor
from pcamlib.training import loop

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]

TOKEN = "0123456789abcdef"
DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: "image/png" }));
  document.querySelector("#drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
}"""


@pytest.fixture(scope="module")
def checkpoint(synthetic_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = ["model.width=8", "train.epochs=null", "train.steps=32", "train.precision=fp32", "train.threads=1"]
    run = tmp_path_factory.mktemp("service") / "run"
    return loop.train(parse(recipe("cnn"), changes), synthetic_dir, run, report=lambda line: None).best


@pytest.fixture(scope="module", params=[None, TOKEN], ids=["open", "token"])
def address(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[str]:
    """Of a service; with a token, too."""
    command = [sys.executable, "-m", "pcamlib.cli", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
    environment = {**os.environ, **({"PCAM_TOKEN": request.param} if request.param else {})}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    said = process.stdout.readline()
    assert " answers" in said
    yield said.split(" ")[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.fixture
def watched(page: Page) -> Iterator[Page]:
    """A page that may ask nobody but the service, and says nothing in its console."""
    asked: list[str] = []
    said: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    assert asked and all(url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:")) for url in asked), asked
    assert [line for line in said if "favicon" not in line and "status of 4" not in line] == []


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


def test_patches_are_dropped_and_judged_and_show_their_heat(watched, address, checkpoint, synthetic_dir, request):
    images = np.array(open_split(synthetic_dir, "test").images[:2])
    expected = Predictor(checkpoint).answer(images)
    page = watched
    page.goto(address)
    expect(page.locator("#about")).to_contain_text("Answers of run")
    expect(page.locator(".synthetic")).to_have_text(" Trained on synthetic patches. ")
    if "token" in request.node.callspec.id:
        page.evaluate(DROP, ["a.png", base64.b64encode(png(images[0])).decode()])
        expect(page.locator("article .error")).to_contain_text("send the token")
        page.locator("article").evaluate("card => card.remove()")
        page.locator("#token").fill(TOKEN)
    page.evaluate(DROP, ["a.png", base64.b64encode(png(images[0])).decode()])
    card = page.locator("article").first
    expect(card.locator(".call")).to_have_text("tumour" if expected.tumour[0] else "normal")
    expect(card).to_contain_text(f"probability {expected.probability[0]:.4f}")
    expect(card).to_contain_text(f"calibrated {100 * expected.confidence[0]:.1f} % tumour")
    expect(card.locator("img")).to_have_js_property("naturalWidth", 96)
    painted = card.locator("canvas").evaluate("c => [...c.getContext('2d').getImageData(0, 0, 8, 8).data]")
    assert card.locator("canvas").evaluate("c => [c.width, c.height]") == [8, 8]
    assert max(painted[3::4]) == 255  # the strongest square
    page.locator("#heat").uncheck()
    expect(card.locator("canvas")).to_be_hidden()

    page.locator("#threshold").fill("0")  # and through the file dialog
    page.locator("#drop input").set_input_files(
        [
            {"name": "b.png", "mimeType": "image/png", "buffer": png(images[1])},
            {"name": "<b>bad</b>.png", "mimeType": "image/png", "buffer": b"no image"},
        ]
    )
    expect(page.locator("#state")).to_have_text("2 of 2 done")
    expect(page.locator("article", has_text="b.png").locator(".call")).to_have_text("tumour")
    bad = page.locator("article.failed .error")
    expect(bad).to_contain_text("<b>bad</b>.png: no PNG, JPEG or TIFF")
    assert page.locator("article b").count() == 0


def test_the_interface_is_shown_without_the_internet(watched, address):
    watched.goto(f"{address}/docs")
    expect(watched.get_by_role("heading", name="POST /predict")).to_be_visible()
    expect(watched.get_by_role("heading", name="Result", exact=True)).to_be_visible()
    expect(watched.get_by_role("row", name="threshold number", exact=False).first).to_be_visible()
    expect(watched.locator("pre")).to_contain_text(f"{address}/predict")
