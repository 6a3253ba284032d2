"""The Open OnDemand app: rendered as the dashboard does it (`ondemand.rb`), and run as a job by a real Slurm."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest
import yaml
from cluster import Cluster
from portal import APP, FORM, PORTAL, Refused, Session, clone, dashboard, environment, execute
from tornado.httpclient import HTTPClientError, HTTPRequest

from pcamlib.sources import ROOT

PATIENCE = 120.0  # seconds for a server to come up on a busy machine

pytestmark = pytest.mark.skipif(not shutil.which("ruby"), reason="no ruby, which renders the templates of OnDemand")


# What the dashboard reads


def test_the_manifest_makes_it_a_batch_connect_app() -> None:
    manifest = yaml.safe_load((APP / "manifest.yml").read_text())
    assert manifest["role"] == "batch_connect"
    assert {"name", "category", "description"} <= manifest.keys()


def test_the_form_offers_the_partitions_of_the_site_files() -> None:
    form = json.loads(dashboard("form"))
    attributes = form["attributes"]
    assert set(form["form"]) == attributes.keys()
    values = [value for _, value in attributes["site_partition"]["options"]]
    assert {"snellius/cpu/thin_course", "snellius/gpu/gpu_course", "local/cpu/thin_course"} <= set(values)
    assert attributes["project_folder"]["value"] == str(ROOT)
    for name in ("hours", "cores", "memory_gb", "gpus"):
        assert attributes[name]["min"] <= attributes[name]["value"] <= attributes[name]["max"]
    here = json.loads(dashboard("form", clusters="other snellius"))["attributes"]["site_partition"]["options"]
    assert [value for _, value in here] == ["snellius/cpu/thin_course", "snellius/gpu/gpu_course"]


def test_what_slurm_is_asked_for(tmp_path: Path) -> None:
    asked = json.loads(dashboard("stage", tmp_path))
    assert asked[asked.index("-p") + 1] == "thin_course"
    assert asked[asked.index("-t") + 1] == "02:00:00"
    assert asked[-4:] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=2", "--mem=8G"]
    gpu = {"site_partition": "snellius/gpu/gpu_course", "gpus": "1", "hours": "30", "memory_gb": "64"}
    asked = json.loads(dashboard("stage", tmp_path / "gpu", choices=gpu))
    assert asked[asked.index("-p") + 1] == "gpu_course"
    assert asked[asked.index("-t") + 1] == "30:00:00"
    assert asked[-2:] == ["--mem=64G", "--gpus-per-node=1"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hours", "0", "Hours: a whole number from 1, not '0'"),
        ("cores", "2; scancel -u me", "CPU cores: a whole number from 1, not '2; scancel -u me'"),
        ("memory_gb", "", "Memory (GB): a whole number from 1, not ''"),
        ("gpus", "1", "GPUs: thin_course has none; choose the GPU partition, or 0 GPUs"),
        ("site_partition", "local/gpu/gpu_course", "GPUs: gpu_course is for jobs with a GPU; choose 1 or more"),
        ("site_partition", "$(id)/cpu/x", "Partition: choose one of the list, not '$(id)/cpu/x'"),
        ("portal_origin", "", "allow JavaScript here and reload the page"),
        ("portal_origin", 'https://x") or print("', "allow JavaScript here and reload the page"),
        ("project_folder", " ", "Project folder: name your clone of the journal"),
        ("data_folder", "/data\n#SBATCH", "Data folder: not a path"),
    ],
)
def test_a_bad_choice_is_refused_above_the_form(tmp_path: Path, name: str, value: str, message: str) -> None:
    with pytest.raises(Refused, match=re.escape(message)):
        dashboard("stage", tmp_path, choices={name: value})
    assert list(tmp_path.iterdir()) == []


def test_the_site_can_take_terminals_away(tmp_path: Path) -> None:
    for answer, setting in (("yes", "True"), ("no", "False")):
        dashboard("stage", tmp_path / answer, choices={"terminals": answer})
        assert f"c.ServerApp.terminals_enabled = {setting}\n" in (tmp_path / answer / "before.sh").read_text()


# What the batch script says where no server can start


@pytest.mark.parametrize(
    ("project", "data", "message"),
    [
        ("$(touch planted)/it's gone", "", "no folder {path} on .*: name your clone of the journal in the form"),
        ("empty", "", "{path} is no clone of the journal: it has no slurm/common.sh"),
        ("no environment", "", "no .venv in {path}: run 'make .venv' there"),
        ("good", "gone; touch planted", "no folder .*/gone; touch planted on .*: name the folder of the PCam files"),
    ],
)
def test_the_log_says_what_to_do(tmp_path: Path, project: str, data: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    clone(tmp_path / "good")
    (clone(tmp_path / "no environment") / ".venv").unlink()
    path, staged = tmp_path / project, tmp_path / "staged"
    choices = {"project_folder": path, "data_folder": tmp_path / data if data else ""}
    dashboard("stage", staged, choices={name: str(value) for name, value in choices.items()})
    variables = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-x", staged / "job_script_content.sh"], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(message.format(path=re.escape(str(path))), done.stdout + done.stderr)
    assert "the server did not start; the lines above say why" in done.stderr
    assert not (staged / "connection.yml").exists()
    assert list(tmp_path.rglob("planted")) == []
    traced = re.search(r"PCAM_LAB=(/tmp/pcam-lab-\w+)", done.stderr)
    assert traced and not Path(traced[1]).exists()


# A session, as a job


@pytest.fixture(scope="module")
def session(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """One session on the test's cluster, in a clone whose path has spaces; its home is empty."""
    folder = tmp_path_factory.mktemp("ondemand")
    project, staged, home = clone(folder / "my clone (pcam)"), folder / "staged", folder / "home"
    # what the user left in the home must not count: an open server, a kernel of that name
    (home / ".jupyter").mkdir(parents=True)
    lax = {"ServerApp": {"allow_origin": "*", "disable_check_xsrf": True}, "IdentityProvider": {"token": ""}}
    (home / ".jupyter" / "jupyter_server_config.json").write_text(json.dumps(lax))
    kernel = home / ".local" / "share" / "jupyter" / "kernels" / "pcam"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text('{"argv": ["false"], "display_name": "x", "language": "python"}')
    site = folder / "site"  # the tests may run as root, which the server refuses
    site.mkdir()
    (site / "jupyter_server_config.json").write_text('{"ServerApp": {"allow_root": true}}')
    choices = {"project_folder": str(project), "cores": "1", "memory_gb": "2", "hours": "1"}
    asked = json.loads(dashboard("stage", staged, choices=choices))
    variables = f"--export=HOME={home},JUPYTER_CONFIG_PATH={site},PATH={os.environ['PATH']},password=exported"
    job = cluster.call("sbatch", "--parsable", variables, *asked, staged / "job_script_content.sh")
    deadline = time.monotonic() + PATIENCE
    while not (staged / "connection.yml").exists():
        log = (staged / "output.log").read_text() if (staged / "output.log").exists() else "no log"
        assert time.monotonic() < deadline and cluster.state(job) in ("PENDING", "RUNNING"), log
        time.sleep(0.3)
    connection = yaml.safe_load((staged / "connection.yml").read_text())
    yield Session(cluster, staged, project, job, connection["host"], connection["port"], str(connection["password"]))
    cluster.call("scancel", job, check=False)


@pytest.fixture
def browser(session: Session) -> Session:
    """The session with a browser of its own, which has no cookies yet."""
    session.cookies.clear()
    return session


@pytest.mark.slurm
def test_nothing_opens_without_the_token(browser: Session) -> None:
    assert browser.ask("lab")[0] == 302  # to the login page
    assert browser.ask("api/contents")[0] == 403
    assert browser.ask("api/contents", Authorization="token ")[0] == 403
    for wrong in ("wrong", "x" * 32, browser.token[:-1]):
        assert browser.ask("api/contents", Authorization=f"token {wrong}")[0] == 403
        assert browser.enter(wrong)[0] == 403
    password = urlencode({"password": browser.token})  # what common templates post: without the token it needs XSRF
    assert browser.ask("login", "POST", password, **FORM)[0] == 403
    assert browser.ask("api/contents")[0] == 403


@pytest.mark.slurm
def test_the_button_opens_it_and_xsrf_stays_on(browser: Session) -> None:
    status, headers, _ = browser.enter()
    assert (status, headers["Location"]) == (302, f"/node/{browser.host}/{browser.port}/lab")
    assert all(
        "secure" in cookie.lower() and "samesite=strict" in cookie.lower() for cookie in headers.get_all("Set-Cookie")
    )
    status, _, page = browser.ask("lab")
    assert status == 200 and "jupyter-config-data" in page
    kernel = json.dumps({"name": "pcam"})
    assert browser.ask("api/kernels", "POST", kernel)[0] == 403  # logged in, but without XSRF
    assert browser.ask("api/kernels", "POST", kernel, X_XSRFToken="2|1|1|1")[0] == 403
    assert "'_xsrf' argument missing" in (browser.staged / "output.log").read_text()
    assert json.loads(browser.ask("api/kernels")[2]) == []


@pytest.mark.slurm
def test_no_other_site_and_no_other_name_reaches_it(browser: Session) -> None:
    browser.enter()
    browser.ask("lab")  # gives the XSRF cookie
    assert browser.ask("api/status")[1]["Access-Control-Allow-Origin"] == PORTAL
    for foreign in ("https://evil.example", f"{PORTAL}.evil.example", "http://portal.example", "null"):
        assert "Access-Control-Allow-Origin" not in browser.ask("api/status", origin=foreign)[1]
        body = json.dumps({"name": "pcam"})
        xsrf = browser.cookies["_xsrf"]
        assert browser.ask("api/kernels", "POST", body, origin=foreign, X_XSRFToken=xsrf)[0] == 404
    assert browser.ask("login")[0] == 302
    assert browser.ask("login", Host="evil.example")[0] == 403  # DNS rebinding; a cookie would not count there anyway
    assert json.loads(browser.ask("api/kernels")[2]) == []


@pytest.mark.slurm
def test_the_secret_stays_in_files_of_mode_600(session: Session) -> None:
    lab = session.lab()
    assert lab.stat().st_mode & 0o777 == 0o700
    holders = [path for path in lab.rglob("*") if path.is_file() and session.token in path.read_text(errors="replace")]
    assert lab / "config" / "jupyter_server_config.py" in holders
    holders.append(session.staged / "connection.yml")
    for path in holders:
        inside = path.is_relative_to(lab / "runtime") and (lab / "runtime").stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600 or inside, path
    assert session.token not in (session.staged / "output.log").read_text()
    everybody = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "jupyterlab" in everybody and session.token not in everybody
    assert all(session.token not in str(environment(number)) for number in session.processes())
    assert listening(session.port) and not any(set(address) == {"0"} for address in listening(session.port))


def listening(port: int) -> list[str]:
    """Addresses, as hex digits, that somebody listens at on `port`; all zeros are every interface."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    found = [row[1].split(":") for row in rows if row[3] == "0A"]
    return [address for address, number in found if int(number, 16) == port]


@pytest.mark.slurm
def test_a_notebook_runs_and_all_ends_with_the_job(browser: Session) -> None:
    """The last of this file: it cancels the session's job."""
    browser.enter()
    browser.ask("lab")
    xsrf = {"X_XSRFToken": browser.cookies["_xsrf"]}
    status, _, text = browser.ask("api/contents/notebooks/00_data.ipynb")
    assert status == 200 and json.loads(text)["content"]["cells"]
    assert list(json.loads(browser.ask("api/kernelspecs")[2])["kernelspecs"]) == ["pcam"]
    wanted = {"path": "notebooks/00_data.ipynb", "type": "notebook", "name": "", "kernel": {"name": "pcam"}}
    status, _, text = browser.ask("api/sessions", "POST", json.dumps(wanted), **xsrf)
    assert status == 201, text
    kernel = json.loads(text)["kernel"]["id"]
    channel = f"ws://{browser.host}:{browser.port}/node/{browser.host}/{browser.port}/api/kernels/{kernel}/channels"
    for foreign in (browser.sent("https://evil.example"), {"Origin": PORTAL}):  # another site; no cookie
        with pytest.raises(HTTPClientError, match="403"):
            asyncio.run(execute(HTTPRequest(channel, headers=foreign), "1"))
    said = asyncio.run(execute(HTTPRequest(channel, headers=browser.sent(PORTAL)), LOOK))
    seen = json.loads(said)
    assert Path(seen["python"]).parent.resolve() == (browser.project / ".venv/bin").resolve()  # its .venv is a link
    assert (seen["transport"], seen["cwd"]) == ("ipc", str((browser.project / "notebooks").resolve()))
    assert (seen["threads"], seen["job"]) == ("1", browser.job)
    lab, processes = browser.lab(), browser.processes()
    assert seen["pid"] in processes and len(str(seen["ip"])) < 100 and str(seen["ip"]).startswith(str(lab))
    browser.cluster.call("scancel", browser.job)
    assert browser.cluster.wait([browser.job], 60) == ["CANCELLED"]
    deadline = time.monotonic() + 30
    while browser.processes() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert browser.processes() == {}
    assert not lab.exists()
    with pytest.raises(ConnectionRefusedError):
        browser.ask("api")


LOOK = """import json, os, sys
from ipykernel.connect import get_connection_info
print(json.dumps({**json.loads(get_connection_info()), "python": sys.executable, "cwd": os.getcwd(), "pid": os.getpid(),
                  "threads": os.environ["OMP_NUM_THREADS"], "job": os.environ["SLURM_JOB_ID"]}))"""
