"""A Chromium without a window, and servers for it to visit. `make test-browser` runs what is here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pcamlib.files import write_json

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 240_000  # ms: a kernel's imports alone take half a minute on a busy machine


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--screenshot PATH`: keep the explorer in JupyterLab as a picture."""
    parser.addoption("--screenshot", type=Path, help="where to keep a picture of the explorer in JupyterLab")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The system's Chromium, started once."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    assert found, f"none of {', '.join(NAMES)} is on PATH; install one, on Debian: apt install chromium"
    with sync_playwright() as driver:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
        browser = driver.chromium.launch(executable_path=found, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    """An empty tab, wide enough for the explorer's two columns."""
    tab = chromium.new_page(viewport={"width": 1500, "height": 1200})
    tab.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    yield tab
    tab.close()


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """`serve(module, *arguments, **environment)`: a Jupyter server of this interpreter; returns its address.

    What it knows of the user, it finds in an empty folder: no settings, no workspace, no running servers. The news
    dialog is off, and cells out of sight stay in the page, so that they can be found there.
    """
    home, running = tmp_path_factory.mktemp("home"), []
    settings = home / "settings" / "@jupyterlab"
    write_json(settings / "apputils-extension" / "notification.jupyterlab-settings", {"fetchNews": "false"})
    write_json(settings / "notebook-extension" / "tracker.jupyterlab-settings", {"windowingMode": "none"})
    folders = {
        "config": "JUPYTER_CONFIG_DIR",
        "data": "JUPYTER_DATA_DIR",
        "runtime": "JUPYTER_RUNTIME_DIR",
        "settings": "JUPYTERLAB_SETTINGS_DIR",
        "work": "JUPYTERLAB_WORKSPACES_DIR",
        "ipython": "IPYTHONDIR",
    }

    def start(module: str, *arguments: str, **environment: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = open(home / f"{module}.log", "w+")  # noqa: SIM115 - closed below
        own = {name: str(home / folder) for folder, name in folders.items()}
        server = subprocess.Popen(
            [sys.executable, "-m", module, "--no-browser", f"--port={port}", *arguments],
            env={**os.environ, **own, **environment}, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        running.append((server, log))
        address, given_up = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
        while server.poll() is None and time.monotonic() < given_up:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return address
            time.sleep(0.2)
        log.seek(0)
        raise AssertionError(f"{module} did not start:\n{log.read()}")

    yield start
    for server, log in running:
        server.terminate()  # it shuts its kernels down
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()
