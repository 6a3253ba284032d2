"""Dockerfile and apptainer.def: one recipe twice, and every step of it tried in a throw-away copy of this machine.

No container engine is needed. `test_every_step_runs` lays an overlay over this machine's own file system, makes a bare
Python environment in it that stands for the base image, and runs each COPY, RUN, USER, ENTRYPOINT and HEALTHCHECK there
in a chroot; what it writes is gone afterwards. It needs root, an overlay file system and a package index.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pcamlib.config import Model
from pcamlib.models import build
from pcamlib.training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
#: How torch is chosen is not tried: uv's choice needs an index of its own; pip finds what this machine is set up for.
INSTALL = "python -m pip install"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def steps() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile in order, as (name, rest), continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined if line.strip())]


def every(name: str) -> list[str]:
    return [rest for found, rest in steps() if found == name]


def sections() -> dict[str, list[str]]:
    """Sections of apptainer.def and its header, as stripped lines without comments."""
    found: dict[str, list[str]] = {"": []}
    section = ""
    for line in (ROOT / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            found[section := line.strip()] = []
        elif line.strip() and not line.lstrip().startswith("#"):
            found[section].append(line.strip())
    return found


def test_both_start_from_the_same_image_with_the_same_labels() -> None:
    header = dict(line.split(": ") for line in sections()[""])
    assert header == {"Bootstrap": "docker", "From": every("FROM")[0]} and len(every("FROM")) == 1
    labels = dict(token.split("=", 1) for token in shlex.split(every("LABEL")[0]))
    assert labels == dict(line.split(" ", 1) for line in sections()["%labels"]) and len(labels) == 3


def test_both_run_the_same_commands_with_the_same_lock() -> None:
    argument = every("ARG")[0]
    assert argument.replace('"', "") == sections()["%arguments"][0]
    environment = f"export {every('ENV')[0]}"
    runs = [run.replace("$INSTALL", "{{ INSTALL }}") for run in every("RUN") if not run.startswith("useradd")]
    assert sections()["%post"] == [environment, f"cd {every('WORKDIR')[0]}", *runs]
    assert sections()["%environment"] == [environment]
    assert sum("--constraint requirements.lock" in run for run in every("RUN")) == 1
    assert sections()["%runscript"] == [f'exec {" ".join(json.loads(every("ENTRYPOINT")[0]))} "$@"']


def test_both_copy_the_same_files_and_all_are_there() -> None:
    copied = {(source, to) for copy in every("COPY") for *sources, to in [copy.split()] for source in sources}
    at = every("WORKDIR")[0]
    there = {(source, to.replace("./", f"{at}/")) for source, to in copied}
    assert there == {tuple(line.split()) for line in sections()["%files"]}
    missing = [source for source, _ in copied if not (ROOT / source).exists()]
    assert missing == []
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*" and {line[1:] for line in lines if line[0] == "!"} == {source for source, _ in copied}


def test_the_versions_are_those_of_the_makefile_and_of_the_lock() -> None:
    image = every("FROM")[0]
    assert re.fullmatch(r"python:3\.1[12]-slim", image), "a Python that the lock was made for and CI tries"
    ci = re.search(r"INSTALL: (.+?)\s+#", (ROOT / ".github/workflows/ci.yml").read_text())
    assert ci and f'INSTALL="{ci[1]}"' == every("ARG")[0]


def test_it_runs_as_nobody_in_particular() -> None:
    names = [name for name, _ in steps()]
    user = every("USER")[0]
    assert user not in ("root", "0") and any(run.split()[-1] == user for run in every("RUN") if "useradd" in run)
    assert "RUN" not in names[names.index("USER") :] and not any(copy.startswith("--chown") for copy in every("COPY"))


def test_no_secret_and_no_patch_gets_in() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert not any(re.search(r"TOKEN|PASSWORD", rest) for name, rest in steps() if name in ("ENV", "ARG"))
    assert "models" not in " ".join(every("COPY")) and "PCAM_TOKEN=" in text  # weights are mounted, the token is given


_SCRIPT = """set -eu
mount -t overlay overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" "$1/root"
for part in proc dev sys; do mount --rbind /$part "$1/root/$part"; done
exec sleep infinity
"""


class Copy:
    """A throw-away copy of this machine that commands run in."""

    def __init__(self, folder: Path) -> None:
        for part in ("upper", "work", "root"):
            (folder / part).mkdir()
        self.root = folder / "root"
        self.holder = subprocess.Popen(
            ["unshare", "-m", "bash", "-c", _SCRIPT, "-", str(folder)], stderr=subprocess.PIPE
        )
        self.environment = {"PATH": PATH, "HOME": "/root"}
        self.user = "root"

    def call(self, command: str) -> list[str]:
        """A shell command inside, as the user of now."""
        inside = ["nsenter", "-m", "-t", str(self.holder.pid), "chroot", f"--userspec={self.user}", str(self.root)]
        return [*inside, "/bin/sh", "-c", command]

    @property
    def variables(self) -> dict[str, str]:
        """The environment of now, and how this machine's pip finds packages."""
        keep = {name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.endswith("_proxy")}
        return {**keep, **self.environment}

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Carry a command out; standard output and errors together."""
        out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run(self.call(command), env=self.variables, text=True, timeout=900, **out)

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *stop: object) -> None:
        self.holder.kill()
        self.holder.wait()
        shutil.rmtree(self.root.parent / "upper", ignore_errors=True)  # gigabytes


def untrained(path: Path) -> None:
    """A checkpoint of a network that has learned nothing, readable by everybody."""
    settings, channels = Model(name="cnn", width=8), {"mean": [128.0] * 3, "std": [60.0] * 3, "n": 1, "split": "train"}
    decision = {"rule": "F2", "threshold": 0.5, "temperature": 1.0, "split": "valid", "n": 1, "fingerprint": "0" * 64}
    meta = {"model": settings.model_dump(), "normalisation": channels, "synthetic": True, "decision": decision}
    checkpoint.save(path, checkpoint.join("model", build(settings, channels).state_dict()), meta)
    for folder in [path, *path.parents[:-1]]:
        folder.chmod(folder.stat().st_mode | 0o005)


@pytest.mark.install
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_step_runs(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the steps of the Dockerfile were NOT run: a chroot needs root")
    with Copy(tmp_path) as copy:
        while copy.run("test -d /proc/self").returncode:  # until the overlay is mounted
            if copy.holder.poll() is not None:
                pytest.skip(
                    f"the steps of the Dockerfile were NOT run: no overlay here: {copy.holder.communicate()[1]!r}"
                )
            time.sleep(0.05)
        base = str(Path(sys.base_prefix).resolve())
        parents = " ".join(map(shlex.quote, [base, *map(str, Path(base).parents[:-1])]))
        made = copy.run(f"{sys._base_executable} -m venv /opt/image && chmod o+x {parents} && chmod 1777 /tmp")
        assert made.returncode == 0, made.stdout
        copy.environment |= {"PATH": f"/opt/image/bin:{PATH}", "INSTALL": INSTALL}
        done, at = _steps(copy, tmp_path), every("WORKDIR")[0]
        assert done == len(steps())
        who = copy.run(f"cd {at} && id -un && ! touch {at}/x 2> /dev/null && ! touch /opt/image/x 2> /dev/null")
        assert (who.returncode, who.stdout.strip()) == (0, every("USER")[0]), "not root, and its code is not its own"
        entry = " ".join(map(shlex.quote, json.loads(every("ENTRYPOINT")[0])))
        assert "--checkpoint" in copy.run(f"{entry} {' '.join(json.loads(every('CMD')[0]))}").stdout
        untrained(tmp_path / "best.safetensors")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        service = subprocess.Popen(
            copy.call(f"exec {entry} --checkpoint {tmp_path}/best.safetensors --port {port}"), env=copy.variables
        )
        try:
            health = every("HEALTHCHECK")[0].partition("CMD ")[2].replace("8000", port)
            held, began = False, time.monotonic()
            while not held and service.poll() is None and time.monotonic() - began < 300:
                time.sleep(0.5)
                held = copy.run(health).returncode == 0
            assert held, "the health check never held"
        finally:
            service.terminate()
            assert service.wait(60) == 0, "told to stop, it leaves well"
        assert copy.run(health).returncode != 0, "the health check holds without a service"


def _steps(copy: Copy, tmp_path: Path) -> int:
    """Carry out the Dockerfile; returns how many of its instructions were carried out or need nothing."""
    done, at = 0, "/"
    for name, rest in steps():
        if name == "WORKDIR":
            at = rest
            assert copy.run(f"mkdir -p {at}").returncode == 0
        elif name == "ENV":
            copy.environment |= dict(token.split("=", 1) for token in shlex.split(rest))
        elif name == "COPY":
            *sources, to = rest.split()
            inside = [str(ROOT / source) for source in sources]  # the copy shows this checkout too
            target = f"{at}/{to}" if len(inside) > 1 else f"{at}/"
            assert copy.run(f"cp -r {' '.join(map(shlex.quote, inside))} {target}").returncode == 0
        elif name == "RUN":
            ran = copy.run(f"cd {at} && {rest}")
            if ran.returncode and re.search(r"No matching distribution|Temporary failure|ConnectionError", ran.stdout):
                pytest.skip(f"RUN {rest} was NOT tried to its end: no package index here ({ran.stdout[-200:]})")
            assert ran.returncode == 0, f"RUN {rest}\n{ran.stdout[-3000:]}"
        elif name == "USER":
            copy.user = rest
            copy.environment["HOME"] = f"/home/{rest}"
        else:
            assert name in ("FROM", "LABEL", "ARG", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"), name
        done += 1
    return done
