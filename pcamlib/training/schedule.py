"""Learning-rate schedules as pure functions of training progress, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def factor(name: str, progress: float, warmup: float = 0.0) -> float:
    """Multiple of the peak learning rate.

    Args:
        name: "constant", "step" (x0.1 at half, x0.01 at three quarters), "cosine" (to 0), or "onecycle"
            (Smith & Topin 2018: linear rise over `warmup`, 0.3 if none is given, then cosine to 0).
        progress: 0 at the first step, 1 at the end.
        warmup: fraction with a linear rise from 0 before the named curve begins.
    """
    if name == "onecycle":
        name, warmup = "cosine", warmup or 0.3
    if progress < warmup:
        return progress / warmup
    after = min(1.0, (progress - warmup) / (1 - warmup))
    if name == "cosine":
        return 0.5 * (1 + math.cos(math.pi * after))
    if name == "step":
        return 1.0 if after < 0.5 else 0.1 if after < 0.75 else 0.01
    return 1.0
