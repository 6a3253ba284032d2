"""Patches in memory, as the audit's checks see a split."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pcamlib.audit.findings import Split
from pcamlib.audit.stream import Block

Observer = Callable[[Block], dict[str, np.ndarray]]


class Held:
    """Patches in memory."""

    def __init__(self, split: str, images: np.ndarray, labels: np.ndarray | None, valid: np.ndarray | None = None):
        self.split, self.images, self.labels = split, images, labels
        self.valid = np.ones(len(images), bool) if valid is None else valid

    def __len__(self) -> int:
        return len(self.images)


def observed(images: np.ndarray, *observers: Observer) -> dict[str, np.ndarray]:
    """Columns that observers make of clean patches."""
    block = Block(0, images, images, np.zeros(len(images), np.uint8))
    return {name: column for observe in observers for name, column in observe(block).items()}


def split_of(
    observers: tuple[Observer, ...],
    name: str,
    images: np.ndarray,
    labels: np.ndarray | None = None,
    valid: np.ndarray | None = None,
) -> Split:
    """A split with its columns."""
    return Split(Held(name, images, labels, valid), observed(images, *observers))  # type: ignore[arg-type]
