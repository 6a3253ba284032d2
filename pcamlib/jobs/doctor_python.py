"""Checks of `pcam doctor`: the interpreter, and whose packages it sees.

torch is not imported for that: it takes seconds, and where its build does not fit the node it may not come up.
"""

from __future__ import annotations

import re
from pathlib import Path

from pcamlib.jobs import kernelspec
from pcamlib.jobs.finding import Finding, Level, Place, distributions, listed

#: Least driver for a major version of CUDA; docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html
DRIVERS = {11: 450, 12: 525, 13: 580}


def python(here: Place) -> Finding:
    """New enough, and that of the project's .venv, or of an active conda environment."""
    what, version = "python", ".".join(map(str, here.version))
    if here.version < (3, 11):
        remedy = "'module load' a newer one, remove .venv and run 'make .venv'"
        return Finding("FAIL", what, f"{version} is older than 3.11 ({here.executable})", remedy)
    if here.prefix.resolve() == (here.root / ".venv").resolve():
        return Finding("ok", what, f"{version}, of .venv")
    if here.env.get("CONDA_PREFIX") and here.prefix.resolve() == Path(here.env["CONDA_PREFIX"]).resolve():
        return Finding("ok", what, f"{version}, of the conda environment {here.prefix.name}")
    remedy = f"run {here.root / '.venv/bin/pcam'}, which 'make .venv' makes"
    return Finding("warn", what, f"{version} is not of {here.root / '.venv'} ({here.executable})", remedy)


def python_path(here: Place) -> Finding:
    """PYTHONPATH and PYTHONHOME, which loaded modules set, and which go before every package of .venv."""
    what = "modules, python"
    if here.env.get("PYTHONHOME"):
        return Finding("FAIL", what, f"PYTHONHOME={here.env['PYTHONHOME']}", "unset PYTHONHOME, or module purge")
    entries = [Path(entry) for entry in here.env.get("PYTHONPATH", "").split(":") if entry]
    remedy = "unset PYTHONPATH, or module purge"
    for entry in entries:
        if shadowed := sorted(distributions(entry).keys() & here.locked.keys()):
            return Finding("FAIL", what, f"PYTHONPATH puts {entry} before .venv, with {listed(shadowed)}", remedy)
    if entries:
        return Finding("warn", what, f"PYTHONPATH={here.env['PYTHONPATH']} goes before .venv", remedy)
    return Finding("ok", what, "no PYTHONPATH, no PYTHONHOME")


def libraries(here: Place) -> Finding:
    """LD_LIBRARY_PATH: another libtorch or CUDA in there is loaded instead of what torch brought along."""
    what, remedy = "modules, libraries", "module purge, or unset LD_LIBRARY_PATH"
    own = re.compile(r"lib(torch|c10|cudart|cublas|cudnn|nccl|cusparse|nvrtc)\w*\.so")
    found = []
    for folder in filter(None, here.env.get("LD_LIBRARY_PATH", "").split(":")):
        names = sorted(path.name for path in Path(folder).glob("lib*.so*") if own.match(path.name))
        found += [f"{folder}/{name}" for name in names]
    if not found:
        return Finding("ok", what, "LD_LIBRARY_PATH holds no other torch or CUDA")
    worst = any(Path(path).name.startswith(("libtorch", "libc10")) for path in found)
    return Finding("FAIL" if worst else "warn", what, f"LD_LIBRARY_PATH holds {listed(found, 2)}", remedy)


def conda(here: Place) -> Finding:
    """An active conda environment that this Python is none of: its programs and libraries come first."""
    active = here.env.get("CONDA_PREFIX", "")
    if active and Path(active).resolve() != here.prefix.resolve():
        return Finding("warn", "conda", f"{active} is active, but {here.executable} runs", "conda deactivate")
    return Finding("ok", "conda", "active, and the one that runs" if active else "none active")


def torch(here: Place) -> Finding:
    """torch's build against the driver and the GPU of this node."""
    what, path = "torch", here.packages / "torch" / "version.py"
    if not path.is_file():
        return Finding("FAIL", what, "not installed", "make .venv")
    text = path.read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '(.+)'", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b.*= '(\d+)\.", text, re.MULTILINE)
    build = f"{version[1] if version else 'unknown version'}, {f'CUDA {cuda[1]}' if cuda else 'CPU'} build"
    module = here.proc / "driver" / "nvidia" / "version"
    driver = re.search(r"Module.*?\s(\d{3,})\.\d", module.read_text()) if module.is_file() else None
    if cuda and driver and int(driver[1]) < DRIVERS.get(int(cuda[1]), 0):
        remedy = (
            f"ask for a node with driver {DRIVERS[int(cuda[1])]} or newer, or install a torch built for an older CUDA"
        )
        return Finding("FAIL", what, f"{build}, but the driver is {driver[1]}", remedy)
    if cuda or not driver:
        given = here.env.get("SLURM_JOB_GPUS") or here.env.get("SLURM_STEP_GPUS")
        if given and not driver:
            remedy = "the node is broken: resubmit with --exclude=$SLURMD_NODENAME, and tell the administrators"
            return Finding("FAIL", what, f"{build}, GPU {given} was given to this job, but no driver is loaded", remedy)
        return Finding("ok", what, f"{build}, {f'driver {driver[1]}' if driver else 'no GPU here'}")
    remedy = "remove .venv and run 'make .venv', whose torch is the CUDA build"
    return Finding("warn", what, f"{build}, though this node has a GPU (driver {driver[1]})", remedy)


def lock(here: Place) -> Finding:
    """Whether what is installed is what requirements.lock names."""
    what, installed = "requirements.lock", distributions(here.packages)
    wrong = []
    for name, version in here.locked.items():
        has = installed.get(name, "").partition("+")[0]  # torch's build is left to the machine
        if has != version:
            wrong.append(f"{name} {has or 'is missing'}{f' instead of {version}' if has else ''}")
    if not wrong:
        return Finding("ok", what, f"{len(here.locked)} packages as locked")
    # conda resolves by itself what environment.yml does not name
    level: Level = "FAIL" if here.prefix.resolve() == (here.root / ".venv").resolve() else "warn"
    said = f"{len(wrong)} packages differ: {listed(wrong)}"
    return Finding(level, what, said, "touch requirements.lock && make .venv")


def user_site(here: Place) -> Finding:
    """~/.local: packages there go before those of an environment that lets them in."""
    what = "user site"
    if here.user_site is None:
        return Finding("ok", what, "shut out")
    if shadowed := sorted(distributions(here.user_site).keys() & here.locked.keys()):
        remedy = "export PYTHONNOUSERSITE=1, or use .venv"
        return Finding("FAIL", what, f"{here.user_site} goes first, with {listed(shadowed)}", remedy)
    return Finding("ok", what, f"{here.user_site} is let in, but holds none of the locked packages")


def kernel(here: Place) -> Finding:
    """ipykernel, and what JupyterLab starts under the name `pcam`."""
    what, remedy = "kernel", f"{here.root / '.venv/bin/pcam'} kernel install"
    if "ipykernel" not in distributions(here.packages):
        return Finding("FAIL", what, "ipykernel is not installed: no notebook can run", "make .venv")
    spec = kernelspec.folder()
    if not (spec / "kernel.json").exists():
        return Finding("ok", what, "ipykernel is there; 'pcam kernel install' would offer it to other JupyterLabs")
    starts = kernelspec.interpreter(spec)
    if starts is None or not Path(starts).is_file():
        return Finding(
            "FAIL", what, f"{spec} starts {starts or 'nothing: its kernel.json is broken'}, no Python", remedy
        )
    if Path(starts).absolute() != Path(here.executable).absolute():
        return Finding("warn", what, f"{spec} starts {starts}, another environment", remedy)
    return Finding("ok", what, f"{spec} starts this environment")
