"""pcamlib: the thin library under the PCam research journal.

The names of the course's own skeleton are importable from here (`from pcamlib import PCAMDataset`); they load on
first use, so that `import pcamlib` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_COURSE = {
    "PCAMDataset": "pcamlib.data.course",
    "get_dataloaders": "pcamlib.data.course",
    "load_config": "pcamlib.data.course",
    "setup_logger": "pcamlib.data.course",
    "MLP": "pcamlib.models.mlp",
    "seed_everything": "pcamlib.seeding",
    "Trainer": "pcamlib.training.course",
    "ExperimentTracker": "pcamlib.training.course",
}

__all__ = ["__version__", *_COURSE]  # noqa: PLE0604 - names, all of them text


def __getattr__(name: str) -> Any:
    if name in _COURSE:
        return getattr(importlib.import_module(_COURSE[name]), name)
    raise AttributeError(f"module 'pcamlib' has no attribute '{name}'")
