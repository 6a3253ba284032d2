"""The portal and the browser of a test: Open OnDemand's dashboard (`ondemand.rb`), and who presses its button."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from cluster import Cluster
from tornado.httpclient import HTTPRequest
from tornado.websocket import websocket_connect

from pcamlib.sources import ROOT

APP = ROOT / "slurm" / "ondemand"
PORTAL = "https://portal.example"
FORM = {"Content_Type": "application/x-www-form-urlencoded"}


class Refused(Exception):
    """The dashboard shows this above the form."""


def dashboard(verb: str, *arguments: str | Path, choices: dict[str, Any] | None = None, clusters: str = "") -> str:
    """Standard output of `ondemand.rb`.

    Raises:
        Refused: what the user chose cannot be.
    """
    done = subprocess.run(
        ["ruby", Path(__file__).with_name("ondemand.rb"), verb, APP, *arguments],
        input=json.dumps({"portal_origin": PORTAL, **(choices or {})}),
        env={**os.environ, "CLUSTERS": clusters},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Refused(done.stderr.strip())
    return done.stdout


def clone(folder: Path) -> Path:
    """A folder that serves as a clone: this repository's slurm/, .venv and notebooks."""
    folder.mkdir()
    for name in ("slurm", ".venv", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def environment(process: int) -> dict[str, str]:
    text = Path(f"/proc/{process}/environ").read_text(errors="replace")
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


@dataclass
class Session:
    """A running session, and the browser that looks at it: its cookies, and the portal as its origin."""

    cluster: Cluster
    staged: Path
    project: Path
    job: str
    host: str
    port: int
    token: str
    cookies: dict[str, str] = field(default_factory=dict)

    def ask(
        self, path: str, method: str = "GET", body: str | None = None, origin: str | None = PORTAL, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, str]:
        """Status, headers and text of the answer to a request below /node/HOST/PORT/, as OnDemand's proxy sends it."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        sent = {**self.sent(origin), **{name.replace("_", "-"): value for name, value in headers.items()}}
        connection.request(method, f"/node/{self.host}/{self.port}/{path}", body, sent)
        answer = connection.getresponse()
        text = answer.read().decode()
        for cookie in answer.headers.get_all("Set-Cookie") or []:
            name, value = cookie.split(";")[0].split("=", 1)
            self.cookies[name] = value
        connection.close()
        return answer.status, answer.headers, text

    def sent(self, origin: str | None) -> dict[str, str]:
        headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())}
        return {**headers, "Origin": origin} if origin else headers

    def enter(self, token: str | None = None, origin: str = PORTAL) -> tuple[int, http.client.HTTPMessage, str]:
        """Press the button that the portal shows."""
        page = dashboard("view", self.staged)
        action = re.search(r'action="/node/[^/]+/\d+/([^"]+)" method="post"', page)
        assert action
        fields = dict(re.findall(r'name="(\w+)" value="(\w+)"', page))
        values = dict.fromkeys(fields, token) if token else fields
        return self.ask(action[1], "POST", urlencode(values), origin, **FORM)

    def processes(self) -> dict[int, list[str]]:
        """Command line of every process of the job, by number."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"SLURM_JOB_ID={self.job}\0" in (folder / "environ").read_text(errors="replace"):
                    found[int(folder.name)] = (folder / "cmdline").read_text(errors="replace").split("\0")
            except OSError:
                continue  # it ended while we looked
        return found

    def lab(self) -> Path:
        """The session's private folder."""
        server = next(number for number, words in self.processes().items() if "jupyterlab" in words)
        return Path(environment(server)["PCAM_LAB"])


async def execute(request: HTTPRequest, code: str) -> str:
    """What `code` prints in the kernel behind a channel, as JupyterLab would run it."""
    socket = await websocket_connect(request)
    mine = uuid.uuid4().hex
    header = {"msg_id": mine, "msg_type": "execute_request", "username": "", "session": "test", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    message = {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}
    await socket.write_message(json.dumps(message))
    printed = ""
    while True:
        received = await asyncio.wait_for(socket.read_message(), 60)
        assert received is not None, "the channel was closed"
        answer = json.loads(received)
        if answer["parent_header"].get("msg_id") != mine:
            continue
        assert answer["msg_type"] != "error", answer["content"]
        if answer["msg_type"] == "stream":
            printed += answer["content"]["text"]
        if answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
            socket.close()
            return printed
