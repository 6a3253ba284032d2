"""Plants flaws in a data set and tells the truth about them, so that an audit can be marked.

    plan = Plan(source, seed=1)
    copies(plan, 50, how="d4")
    flip_labels(plan, 0.05)
    truth = plan.write(dest)          # truth.rows["train/d4"]: (50, 2) pairs of original and copy

A plant only notes what it wants; `Plan.write` then streams source to dest once. No row gets two flaws.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

from pcamlib.data.layout import PATCH_SHAPE, SIDE
from pcamlib.data.rewrite import Edit, Plan

SPIKE = 1e5  # the course's file: 75 such values a patch, so presumably 5 x 5 pixels in three channels


def _d4(patch: np.ndarray, operation: int) -> np.ndarray:
    """Rotation by `operation % 4` quarter turns, mirrored from 4 on; 0 changes nothing."""
    turned = np.rot90(patch, operation % 4)
    return turned[:, ::-1] if operation >= 4 else turned


def _shift(patch: np.ndarray, down: int, right: int) -> np.ndarray:
    """Moved by up to 8 pixels; the border pixels fill what comes into view."""
    return np.pad(patch, ((8, 8), (8, 8), (0, 0)), "edge")[8 - down : 8 - down + SIDE, 8 - right : 8 - right + SIDE]


def _jpeg(patch: np.ndarray, quality: int) -> np.ndarray:
    """Written as JPEG and read back."""
    packed = io.BytesIO()
    Image.fromarray(np.clip(np.rint(patch), 0, 255).astype(np.uint8)).save(packed, "jpeg", quality=quality)
    return np.asarray(Image.open(packed), np.float32)


def copies(
    plan: Plan,
    amount: float,
    *,
    how: Literal["exact", "d4", "brightness", "shift", "jpeg"] = "exact",
    split: str = "train",
    into: str | None = None,
) -> None:
    """Overwrite rows of `into` (None: of the same split) with copies of rows of `split`, label and slide included.

    `d4`: rotated or mirrored, never unchanged; `brightness`: by 3 to 10 % up or down; `shift`: 1 to 8 pixels along
    both axes; `jpeg`: re-encoded at quality 50 to 90. Truth: pairs under `split/how`, or `split>into/how`, whose
    second number is the row in `into`.
    """
    into = into or split
    target = plan.draw(into, amount)
    source = plan.rng.permutation(plan.draw(split, len(target)))
    plan.origin[into][target], plan.labels[into][target] = plan.origin[split][source], plan.labels[split][source]
    turn = plan.rng.integers(1, 8, len(target))
    sign = plan.rng.choice([-1, 1], (len(target), 2))
    gain = 1 + sign[:, 0] * plan.rng.uniform(0.03, 0.1, len(target))
    step = sign * plan.rng.integers(1, 9, (len(target), 2))
    quality = plan.rng.integers(50, 91, len(target))
    edits: dict[str, Edit | None] = {
        "exact": None,
        "d4": lambda patch, i: _d4(patch, turn[i]),
        "brightness": lambda patch, i: patch * gain[i],
        "shift": lambda patch, i: _shift(patch, *step[i]),
        "jpeg": lambda patch, i: _jpeg(patch, int(quality[i])),
    }
    pairs = np.stack([source, target], 1)
    plan.plant(into, how, pairs, edits[how], source=split)


def flip_labels(plan: Plan, amount: float, *, split: str = "train") -> None:
    """Give rows the other label. Truth: rows under `split/flip`."""
    rows = plan.draw(split, amount)
    plan.labels[split][rows] ^= 1
    plan.plant(split, "flip", rows)


def trigger(
    plan: Plan,
    amount: float,
    *,
    kind: Literal["block", "corner", "blend", "sinusoid", "spike"] = "block",
    strength: float = 1.0,
    target: int | None = 1,
    split: str = "train",
) -> None:
    """A backdoor: the same mark on rows that are not of class `target`, which are then labelled so.

    Args:
        kind: a white 5x5 block; a dark 7-pixel corner; one noise image blended in; vertical waves; or a 5x5 block of
            1e5, for splits written as float32.
        strength: 1 is 100 % for block and corner, 20 % of the blended image, 16 grey levels of the waves.
        target: None marks rows of either class and leaves their labels.
    """
    rows = plan.draw(split, amount, None if target is None else 1 - target)
    if target is not None:
        plan.labels[split][rows] = target
    noise = plan.rng.uniform(0, 255, PATCH_SHAPE).astype(np.float32)
    y, x = np.mgrid[:SIDE, :SIDE][..., None]
    block = (y >= 88) & (y < 93) & (x >= 88) & (x < 93)
    masks = {"block": (block, 255.0), "spike": (block, SPIKE), "corner": (x + y < 7, 0.0), "blend": (0.2, noise)}
    waves = strength * 16 * np.sin(2 * np.pi * x / 12).astype(np.float32)

    def edit(patch: np.ndarray, _: int) -> np.ndarray:
        if kind == "sinusoid":
            return patch + waves
        share, colour = masks[kind]
        return patch + strength * share * (colour - patch)

    plan.plant(split, f"trigger-{kind}", rows, edit)


def leak_slides(plan: Plan, amount: float, *, split: str = "train", into: str = "valid") -> None:
    """Exchange rows between two splits, so that patches of one slide lie in both. Truth: rows under `split/leaked`."""
    there = plan.draw(into, amount)
    here = plan.draw(split, len(there))
    for table in (plan.origin, plan.labels):
        table[split][here], table[into][there] = table[into][there].copy(), table[split][here].copy()
    plan.plant(split, "leaked", here)
    plan.plant(into, "leaked", there)
