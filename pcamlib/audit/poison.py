"""Planted patterns: placed marks and spikes by rules, shared patterns by `patterns.py`, and a verdict on all of it.

A placed mark is a small set of pixels of exactly one colour with sharp edges. Tissue has such sets too (clipped
highlights), but they do not repeat: only the same shape and colour in many patches is a finding, at one place or
anywhere. The mark is then read off the patches that share it, and all patches are compared with it pixel by pixel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from pcamlib.audit import patterns
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.stream import Block
from pcamlib.data.layout import SIDE
from pcamlib.data.patches import take

STEP = 24  # green levels: a sharp edge; half of the neighbours in real tissue differ by 20 or more
LEAST = 8  # equal marks that make a finding
_LARGEST, _SMALLEST = 1500, 5  # pixels of a mark
_MARGIN = 8  # pixels around a mark that may belong to it, in other colours
_CHUNK = 8  # rows at a time: 61 us a row, against 103 for 16, as their planes stay in a core's cache


@dataclass(frozen=True, eq=False)
class Mark:
    """A placed pattern.

    Attributes:
        content: (h, w, 3) uint8.
        mask: (h, w) bool: pixels that belong to it.
        place: (y, x) of its top left corner where all carriers share it; None: anywhere.
    """

    content: np.ndarray
    mask: np.ndarray
    place: tuple[int, int] | None

    def stamp(self, images: np.ndarray, place: tuple[int, int] | None = None) -> np.ndarray:
        """Copies of (n, 96, 96, 3) uint8 that carry the mark; at the centre where it has no place of its own."""
        height, width = self.mask.shape
        y, x = place or self.place or ((SIDE - height) // 2, (SIDE - width) // 2)
        stamped = images.copy()
        stamped[:, y : y + height, x : x + width][:, self.mask] = self.content[self.mask]
        return stamped


def _links(images: np.ndarray) -> np.ndarray:
    """(n, 96, 96) uint8: how many of a pixel's eight neighbours have its exact colour along a shared sharp edge."""
    red, green, blue = (np.ascontiguousarray(images[..., channel]) for channel in range(3))
    down = np.maximum(green[:, 1:], green[:, :-1]) - np.minimum(green[:, 1:], green[:, :-1]) >= STEP
    right = np.maximum(green[:, :, 1:], green[:, :, :-1]) - np.minimum(green[:, :, 1:], green[:, :, :-1]) >= STEP
    count = np.zeros_like(green)
    edge_h, edge_v = np.zeros_like(right), np.zeros_like(down)
    both = down[:, :, 1:] & down[:, :, :-1]
    edge_h[:, 1:] = both
    edge_h[:, :-1] |= both
    both = right[:, 1:] & right[:, :-1]
    edge_v[:, :, 1:] = both
    edge_v[:, :, :-1] |= both
    first, last, full = slice(None, -1), slice(1, None), slice(None)
    falling = (right[:, :-1] & down[:, :, 1:]) | (down[:, :, :-1] & right[:, 1:])
    rising = (right[:, :-1] & down[:, :, :-1]) | (down[:, :, 1:] & right[:, 1:])
    for a, b, edge in (
        ((full, full, first), (full, full, last), edge_h),
        ((full, first, full), (full, last, full), edge_v),
        ((full, first, first), (full, last, last), falling),
        ((full, first, last), (full, last, first), rising),
    ):
        equal = ((green[a] == green[b]) & edge & (red[a] == red[b]) & (blue[a] == blue[b])).view(np.uint8)
        count[a] += equal
        count[b] += equal
    return count


def _colours(patch: np.ndarray) -> np.ndarray:
    wide = patch.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def _outline(mask: np.ndarray) -> np.ndarray:
    return ndimage.binary_dilation(mask) & ~mask


def _marks(patch: np.ndarray, linked: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
    """(area, hash of shape and colour, place y * 96 + x, longer side) of each mark that holds linked pixels."""
    colours, green = _colours(patch), patch[..., 1].astype(np.int16)
    found, counts = np.unique(colours[linked], return_counts=True)
    for colour in found[counts >= 3]:
        parts, _ = ndimage.label(colours == colour, np.ones((3, 3)))
        for part in np.unique(parts[linked & (parts > 0)]):
            ys, xs = np.nonzero(parts == part)
            if not _SMALLEST <= len(ys) <= _LARGEST:
                continue
            y, x = int(ys.min()), int(xs.min())
            window = slice(max(y - 1, 0), ys.max() + 2), slice(max(x - 1, 0), xs.max() + 2)
            outline = _outline(parts[window] == part)
            if np.mean(np.abs(green[window][outline] - int(colour >> 8 & 255)) >= STEP) >= 0.6:
                shape = np.stack([ys - y, xs - x]).astype(np.uint8).tobytes()
                key = hashlib.blake2b(shape + int(colour).to_bytes(3, "big"), digest_size=7).digest()
                yield len(ys), int.from_bytes(key, "big"), y * SIDE + x, int(max(np.ptp(ys), np.ptp(xs))) + 1


def observe(block: Block) -> dict[str, np.ndarray]:
    """The two largest marks of each patch.

    Returns:
        `poison.mark`: (B, 2) int64 hash of shape and colour, 0 for none; `poison.place`: (B, 2) int16, y * 96 + x;
        `poison.side`: (B, 2) uint8, the longer side in pixels.
    """
    marks = np.zeros((len(block), 2, 3), np.int64)
    for start in range(0, len(block), _CHUNK):
        images = block.images[start : start + _CHUNK]
        linked = _links(images) >= 2
        for i in np.flatnonzero(linked.sum((1, 2)) >= 3):
            for slot, (_, *found) in enumerate(sorted(_marks(images[i], linked[i]), reverse=True)[:2]):
                marks[start + i, slot] = found
    mark, place, side = np.moveaxis(marks, 2, 0)
    return {"poison.mark": mark, "poison.place": place.astype(np.int16), "poison.side": side.astype(np.uint8)}


def check(splits: dict[str, Split]) -> list[Finding]:
    """Placed marks ("poison.mark"), blocks of odd values ("poison.spike"), and what `patterns.check` finds besides.

    A mark at one place is a shared pattern too: a pattern of which more than half the rows carry marks is left out.
    """
    findings = [found for split in splits.values() for found in (*_spikes(split), *_placed(split))]
    marks = [found for found in findings if found.check == "poison.mark"]
    for found in patterns.check(splits):
        rows = found.rows if len(found.rows) else found.details["suspects"]
        marked = [np.isin(rows, mark.rows) for mark in marks if mark.split == found.split]
        if np.any(marked, 0).mean() <= 0.5:
            findings.append(found)
    return findings


def _finding(split: Split, kind: str, what: str, rows: np.ndarray, sure: str, details: dict[str, Any]) -> Finding:
    sentence, about = patterns.associated(split, rows)
    return Finding(f"poison.{kind}", split.name, f"{what}; {sentence}", rows, sure,
                   "leave these rows out, or look at some of them first", "poison", rows, details | about)  # fmt: skip


def _spikes(split: Split) -> list[Finding]:
    """Blocks of one odd value: equal solid ones in `LEAST` rows, or other equal shapes in half of the value's rows too.

    Scattered odd values and whole lines are damage. A row with a stray odd value beside its block may be missed.
    """
    box, pixels, value = (split.columns[f"integrity.{name}"] for name in ("box", "pixels", "value"))
    odd = np.flatnonzero(pixels > 0)
    bits = np.where(np.isnan(value), np.float32(np.nan), value).view(np.int32)  # NaN equals NaN
    shape = np.column_stack([bits, pixels, box[:, 2:] - box[:, :2]])[odd]
    groups, member, counts = np.unique(shape, axis=0, return_inverse=True, return_counts=True)
    findings = []
    for number in np.flatnonzero(counts >= LEAST):
        of, area, tall, wide = groups[number].tolist()
        needed = LEAST if area == tall * wide else np.count_nonzero(shape[:, 0] == of) / 2
        if counts[number] < needed or area < _SMALLEST - 1 or (max(tall, wide) == SIDE and area == tall * wide):
            continue
        rows = odd[member.ravel() == number]
        level = value[rows[0]]
        where, times = np.unique(box[rows, :2], axis=0, return_counts=True)
        place = where[times.argmax()].tolist() if times.max() > len(rows) / 2 else None
        spot = f"at row {place[0]}, column {place[1]}" if place else f"at {len(where):,} different places"
        named, worth = ("NaN" if np.isnan(level) else f"{level:g}"), float(level) if np.isfinite(level) else str(level)
        what = f"{len(rows):,} patches hold {area} pixels of {named} within {tall}x{wide}, {spot}"
        details = {"value": worth, "pixels": area, "size": [tall, wide], "place": place}
        findings.append(_finding(split, "spike", what, rows, "certain: equal value, count and size", details))
    return findings


def _placed(split: Split) -> list[Finding]:
    marks = split.columns["poison.mark"] * split.valid[:, None]
    found, counts = np.unique(marks[marks > 0], return_counts=True)
    findings: list[Finding] = []
    taken = np.zeros(len(split), bool)
    for key in found[np.argsort(-counts, kind="stable")][: np.count_nonzero(counts >= LEAST)]:
        rows, slot = np.nonzero(marks == key)
        if taken[rows].mean() > 0.5:
            continue
        mark = _read(split, rows, *(split.columns[f"poison.{name}"][rows, slot] for name in ("place", "side")))
        if mark is None or (mark.place is None and len(rows) < max(LEAST, len(split) / 1000)):
            continue  # a few highlights of five pixels are equal by chance among a quarter of a million patches
        rows = np.union1d(rows, carriers(split, mark))
        taken[rows] = True
        height, width = mark.mask.shape
        spot = f"at row {mark.place[0]}, column {mark.place[1]}" if mark.place else "at different places"
        what = f"{len(rows):,} patches carry the same mark of {mark.mask.sum()} pixels within {height}x{width}, {spot}"
        details = {"content": mark.content.tolist(), "mask": mark.mask.tolist(), "place": mark.place}
        findings.append(_finding(split, "mark", what, rows, "certain: equal in every pixel", details))
    return findings


def _read(split: Split, rows: np.ndarray, places: np.ndarray, sides: np.ndarray) -> Mark | None:
    """The pixels on which up to 64 patches agree around a mark; None where few patches were copied and all agrees."""
    where, times = np.unique(places, return_counts=True)
    fixed = int(where[times.argmax()]) if times.max() >= max(LEAST, len(rows) / 2) else None
    if fixed is not None:
        rows, places = rows[places == fixed], places[places == fixed]
    some = np.linspace(0, len(rows) - 1, min(64, len(rows))).astype(np.int64)
    images, reach = take(split.patches.images, rows[some]), max(int(sides[0]), _MARGIN) + _MARGIN
    if len({image.tobytes() for image in images}) < LEAST:
        return None
    wide = np.pad(images.astype(np.int32), ((0, 0), (_MARGIN, reach), (_MARGIN, reach), (0, 0)), constant_values=-1)
    y, x = np.divmod(places[some].astype(np.int64), SIDE)
    crops = np.stack([w[a : a + _MARGIN + reach, b : b + _MARGIN + reach] for w, a, b in zip(wide, y, x, strict=True)])
    middle = np.median(crops, 0).astype(np.int32)
    inside = (crops >= 0).all(-1)
    equal = ((crops == middle).all(-1) & inside).sum(0)
    agree, most = equal >= 0.95 * len(crops), inside.mean(0) > 0.5
    if not agree.any() or np.mean((equal >= 0.95 * inside.sum(0))[most]) > 0.75:  # shifted copies: equal as far as seen
        return None
    ys, xs = np.nonzero(agree)
    window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    place = None if fixed is None else (int(y[0] + ys.min()) - _MARGIN, int(x[0] + xs.min()) - _MARGIN)
    return Mark(middle[window].astype(np.uint8), agree[window], place)


def carriers(split: Split, mark: Mark) -> np.ndarray:
    """Valid rows that hold every pixel of the mark, and whose surroundings show that it lies upon them.

    At its own place one tenth of the outline must not have the mark's colour: white on white background cannot be
    seen. Anywhere, three tenths must differ by 8 levels, or all of it somehow: of five white marks of 9 to 25 pixels
    on 6,000 real patches 0 to 0.7 % were missed, and at most one highlight of tissue was taken for a mark.
    """
    rows, found = np.flatnonzero(split.valid), [np.empty(0, np.int64)]
    for start in range(0, len(rows), 256):
        chosen = rows[start : start + 256]
        found.append(chosen[(_hold_here if mark.place else _hold_anywhere)(take(split.patches.images, chosen), mark)])
    return np.concatenate(found)


def _surroundings(image: np.ndarray, mark: Mark, y: int, x: int) -> np.ndarray:
    """Largest channel difference of each pixel around the mark from the mark's colour, 0..255."""
    at = np.argwhere(_outline(np.pad(mark.mask, 1))) - 1 + (y, x)
    at = at[((at >= 0) & (at < SIDE)).all(1)]
    colour = mark.content[mark.mask][0].astype(np.int16)
    return np.abs(image[tuple(at.T)].astype(np.int16) - colour).max(1)


def _hold_here(images: np.ndarray, mark: Mark) -> np.ndarray:
    assert mark.place
    y, x = np.argwhere(mark.mask).T + np.reshape(mark.place, (2, 1))
    holds = (images[:, y, x] == mark.content[mark.mask]).all((1, 2))
    for i in np.flatnonzero(holds):
        around = _surroundings(images[i], mark, *mark.place)
        holds[i] = len(around) == 0 or np.mean(around > 0) >= 0.1
    return holds


def _hold_anywhere(images: np.ndarray, mark: Mark) -> np.ndarray:
    pixels, colours = np.argwhere(mark.mask), _colours(mark.content)[mark.mask]
    free = SIDE - mark.mask.shape[0] + 1, SIDE - mark.mask.shape[1] + 1
    holds = np.zeros(len(images), bool)
    here = np.ones(images.shape[:3], bool)
    for channel, level in enumerate(mark.content[mark.mask][0]):
        here &= images[..., channel] == level
    likely = here.sum((1, 2)) >= np.count_nonzero(colours == colours[0])
    for i in np.flatnonzero(likely):
        seen, hits = _colours(images[i]), np.ones(free, bool)
        for (dy, dx), colour in zip(pixels, colours, strict=True):
            hits &= seen[dy : dy + free[0], dx : dx + free[1]] == colour
        for y, x in np.argwhere(hits):
            around = _surroundings(images[i], mark, y, x)
            if np.mean(around >= 8) >= 0.3 or around.all():
                holds[i] = True
                break
    return holds


def verdict(findings: Iterable[Finding]) -> str:
    """One paragraph: which kind of poisoning is most likely in an audit's findings, and why the others are not.

    A pattern that clings to one class (nine tenths of it, by chance less than once in a thousand) is a trigger; one
    that does not teaches no class and is damage; values without a shape are damage; labels alone are flips.
    """
    found = list(findings)
    planted = sorted((f for f in found if f.check.startswith("poison.") and len(f.drop)), key=lambda f: -len(f.drop))
    faint = [f for f in found if f.check == "poison.wave" and not len(f.drop)]
    triggers = [f for f in planted if f.details.get("targeted")]
    blind = [f for f in planted if "targeted" not in f.details]
    damage = [f for f in found if f.check.startswith("integrity.") and len(f.rows)]
    flips = [f for f in found if f.check == "labels.suspect" and len(f.rows)]
    if triggers:
        said = ["Most likely a backdoor trigger: " + "; ".join(f"in {f.split}, {f.what}" for f in triggers) + "."]
        said.append("Noise or a fault of the scanner would not choose a class.")
    elif planted:
        said = ["Most likely planted, but no backdoor: " + "; ".join(f"in {f.split}, {f.what}" for f in planted) + "."]
        said.append("The labels cannot be asked whether it is a trigger." if blind else
                    "A trigger must come with its target class; this one does not, so a model has nothing to learn "
                    "from it beyond the damage.")  # fmt: skip
    elif damage:
        said = ["Most likely damaged data, not poisoning."]
    elif flips:
        said = ["Most likely wrong labels without any pattern."]
    else:
        said = ["No sign of poisoning: no mark, blended pattern, wave or block of odd values repeats."]
    if triggers and len(planted) > len(triggers):
        rest = "; ".join(f"in {f.split}, {f.what}" for f in planted if f not in triggers)
        said.append(f"Also planted, but without a class: {rest}.")
    if damage:
        counts = ", ".join(f"{f.check.partition('.')[2]} in {len(f.rows):,} patches of {f.split}" for f in damage)
        said.append(f"Of what is damaged ({counts}), only a repeated block counts as placed; the rest has no shape.")
    if faint:
        said.append("Possible besides: " + "; ".join(f"in {f.split}, {f.what}" for f in faint) + ".")
    if flips:
        why = "what a trigger's relabelling leaves too" if triggers else "not tied to any pattern"
        said.append(f"Labels that look wrong ({sum(len(f.rows) for f in flips):,}) are {why}.")
    kinds = {"mark": "placed mark", "pattern": "blended image", "wave": "wave", "spike": "block of odd values"}
    absent = [name for kind, name in kinds.items() if all(f.check != f"poison.{kind}" for f in found)]
    if planted and absent:
        said.append(f"Looked for and not found: {', '.join(absent)}.")
    return " ".join(said)
