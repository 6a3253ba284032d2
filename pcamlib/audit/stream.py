"""A block of the streaming pass: every check looks at the same rows and shares what is computed from them.

A check takes part with a function `observe(block) -> {column: (B, ...) array}`; `measure.py` makes the pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(eq=False)
class Block:
    """Consecutive rows of one split.

    Attributes:
        start: row number of the first.
        raw: (B, 96, 96, 3) as stored: uint8, or float32 with whatever it holds.
        images: (B, 96, 96, 3) uint8: rounded, clipped, NaN as 0; `raw` itself where that is uint8.
        flags: (B,) uint8, bits of `convert.FLAGS`.
    """

    start: int
    raw: np.ndarray
    images: np.ndarray
    flags: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def flat(self) -> torch.Tensor:
        """(B, 27648) float32, 0..255; shared by the checks, so not to be written to."""
        return torch.from_numpy(np.require(self.images, requirements="W")).flatten(1).float()
