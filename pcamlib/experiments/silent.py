"""Silent failure: how bad a slice may become before the score of the whole shows it.

Two ways lead there. More patches come from the slice than before (its own rates stay, the whole's fall); or the slice
itself gets harder (a new scanner, a faded stain), and its rate falls alone. Both are simulated on stored predictions,
with the share of tumour held fixed, and beside them stands how many labelled patches would show the fall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from scipy import stats

from pcamlib.errors import DataError
from pcamlib.experiments.features import Features
from pcamlib.experiments.slices import Bound, Slice

LEVEL, POWER = 0.05, 0.8  # chance of a false alarm, and of a true one
RATES = ("specificity", "recall")  # of label 0, of label 1


def subject(found: Sequence[Slice], shared: pd.DataFrame, features: Features) -> tuple[Slice, str]:
    """The slice to watch, and why it is this one.

    Args:
        found: confirmed slices, the worst first.
        shared: what mistakes share, from `contrast.contrast`; where no slice is confirmed, the tenth of the patches
            furthest out in its first feature is taken, and without any the darkest tenth.
    """
    if found:
        return found[0], "the worst of the confirmed slices"
    why = "no slice was confirmed; this is the darkest tenth of the patches"
    name, high = "brightness", False
    if len(shared):
        name, high = str(shared.iloc[0]["feature"]), bool(shared.iloc[0]["higher"] > 0.5)
        why = (
            f"no slice was confirmed; this is the tenth of the patches with the {'most' if high else 'least'} {name}, "
            "in which mistakes differ most from right answers"
        )
    cut = float(np.quantile(features[name], 0.9 if high else 0.1, method="inverted_cdf"))
    return Slice((Bound(name, low=cut) if high else Bound(name, high=cut),)), why


def weak(inside: np.ndarray, label: np.ndarray, wrong: np.ndarray) -> int:
    """The class that the slice fails in: 1 where its recall falls furthest below the rest's, 0 where its specificity.

    Raises:
        DataError: no class has patches on both sides.
    """
    gaps = {}
    for side in (0, 1):
        here, there = inside & (label == side), ~inside & (label == side)
        if here.any() and there.any():
            gaps[side] = float(wrong[here].mean() - wrong[there].mean())
    if not gaps:
        raise DataError("no class has patches both inside and outside of the slice: nothing to compare")
    return max(gaps, key=lambda side: gaps[side])


def mix(
    inside: np.ndarray, label: np.ndarray, wrong: np.ndarray, shares: Sequence[float], resamples: int = 1000
) -> pd.DataFrame:
    """What is seen when the slice's share of its weak class grows.

    Args:
        inside, wrong: (N,) bool.
        label: (N,) 0 or 1.
        shares: of the weak class's patches that come from the slice, each 0 to 1.
        resamples: bootstrap over the patches, within class and slice.

    Returns:
        A row a share: `share`, `accuracy`, the weak class's rate over `all` and in the `slice`, `missed` (mistakes in
        1,000 patches of that class), each but the first with 95 % bounds in `NAME 95 %`.
    """
    side, rng = weak(inside, label, wrong), np.random.default_rng(0)
    of = label == side

    def drawn(rows: np.ndarray) -> np.ndarray:  # mistakes' share: as counted, then as resampled
        n, share = int(rows.sum()), float(wrong[rows].mean())
        return np.append(share, rng.binomial(n, share, resamples) / n)

    slice_, rest = drawn(inside & of), drawn(~inside & of)
    other = drawn(~of) if (~of).any() else np.zeros(resamples + 1)
    rows = []
    for share in shares:
        missed = share * slice_ + (1 - share) * rest
        values = {
            "accuracy": 1 - of.mean() * missed - (1 - of.mean()) * other,
            "all": 1 - missed,
            "slice": 1 - slice_,
            "missed": 1000 * missed,
        }
        row: dict[str, Any] = {"share": float(share)}
        for name, value in values.items():
            row |= {name: float(value[0]), f"{name} 95 %": np.percentile(value[1:], [2.5, 97.5]).tolist()}
        rows.append(row)
    return pd.DataFrame(rows)


def fade(inside: np.ndarray, label: np.ndarray, wrong: np.ndarray, rates: Sequence[float]) -> pd.DataFrame:
    """What is seen when the slice's own rate falls to each of `rates` and nothing else changes.

    Returns:
        A row a rate: `slice` (its recall or specificity), `all` (that of every patch of the class), `accuracy`.
    """
    of = label == weak(inside, label, wrong)
    share = (inside & of).sum() / of.sum()
    rest = 1 - wrong[~inside & of].mean()
    other = 1 - wrong[~of].mean() if (~of).any() else 0.0
    rows = []
    for rate in rates:
        whole = share * rate + (1 - share) * rest
        rows.append({"slice": float(rate), "all": whole, "accuracy": of.mean() * whole + (1 - of.mean()) * other})
    return pd.DataFrame(rows)


def power(before: float, after: float, n: int) -> float:
    """Chance that `n` labelled patches show the fall of a rate, by a one-sided exact binomial test at `LEVEL`."""
    cut = int(stats.binom.ppf(LEVEL, n, before)) - 1  # the largest count that chance alone reaches in at most LEVEL
    return float(stats.binom.cdf(cut, n, after)) if cut >= 0 else 0.0


def needed(before: float, after: float, most: int = 10**6) -> int | None:
    """Labelled patches from which on the fall of a rate is seen with a chance of `POWER`; None: more than `most`.

    The power of an exact test goes up in teeth. This takes the last tooth below `POWER` between the normal
    approximation's half and double.
    """
    if after >= before:
        return None
    quantiles = stats.norm.ppf(1 - LEVEL), stats.norm.ppf(POWER)
    spread = quantiles[0] * math.sqrt(before * (1 - before)) + quantiles[1] * math.sqrt(after * (1 - after))
    guess = max(10.0, (spread / (before - after)) ** 2)
    if guess > most:
        return None
    grid = np.unique(np.linspace(guess / 2, 2 * guess + 40, 400).astype(int))
    short = [int(n) for n in grid if power(before, after, int(n)) < POWER]
    return (max(short) if short else int(grid[0]) - 1) + 1


def monitors(inside: np.ndarray, label: np.ndarray, wrong: np.ndarray, falls: Sequence[float]) -> pd.DataFrame:
    """Labelled patches that show a fall of the slice's rate, by what is watched.

    Returns:
        A row a fall: the slice's rate `before` and `after`; patches `of the slice` and of the weak class to label;
        patches `at random` to label so that as many of those are among them; patches until the whole's `accuracy`
        shows it; and the fall of that accuracy. None: more than a million.
    """
    side = weak(inside, label, wrong)
    own = inside & (label == side)
    before, share = 1 - float(wrong[own].mean()), float(own.mean())
    accuracy = 1 - float(wrong.mean())
    rows = []
    for fall in falls:
        after = max(0.0, before - fall)
        count, whole = needed(before, after), needed(accuracy, accuracy - share * (before - after))
        rows.append({
            "falls by": before - after,
            f"{RATES[side]} before": before,
            f"{RATES[side]} after": after,
            "accuracy falls by": share * (before - after),
            "of the slice": count,
            "at random, slice watched": None if count is None else math.ceil(count / share),
            "at random, accuracy watched": whole,
        })  # fmt: skip
    return pd.DataFrame(rows, dtype=object)


class Told(NamedTuple):
    """All of it for one slice: the `rate` of its weak class, its `share` of that class, tables, figure, a sentence."""

    rate: str
    share: float
    mix: pd.DataFrame
    monitors: pd.DataFrame
    series: dict[str, list[Any]]
    figure: Figure
    sentence: str


def tell(
    inside: np.ndarray, label: np.ndarray, wrong: np.ndarray, falls: Sequence[float] = (0.05, 0.1, 0.2, 0.3)
) -> Told:
    """Both simulations and the monitors for one slice; arguments as `mix`, `falls` of the slice's rate.

    Raises:
        DataError: as `weak`.
    """
    side = weak(inside, label, wrong)
    own = inside & (label == side)
    share, before = float(own.sum() / (label == side).sum()), 1 - float(wrong[own].mean())
    mixed = mix(inside, label, wrong, np.linspace(share, max(share, 0.9), 8).tolist())
    faded = fade(inside, label, wrong, np.linspace(before, max(0.0, before - 0.4), 9).tolist())
    watched = monitors(inside, label, wrong, [fall for fall in falls if fall <= before] or [before])
    row = watched.iloc[(watched["falls by"].astype(float) - 0.2).abs().argmin()]
    counts = [row[name] for name in ("of the slice", "at random, slice watched", "at random, accuracy watched")]
    few, random, whole = ("more than a million" if count is None else f"{count:,}" for count in counts)
    name = RATES[side]
    sentence = (
        f"When the {name} inside falls from {row[f'{name} before']:.2f} to {row[f'{name} after']:.2f}, the accuracy of "
        f"the whole falls by {row['accuracy falls by']:.4f}. To notice it takes {few} labelled patches of the slice "
        f"and that class, {random} drawn at random if the slice is watched, and {whole} if only the accuracy is."
    )
    series = {f"{part} {name}": table[name].tolist() for part, table in
              (("mix", mixed), ("fade", faded), ("monitors", watched)) for name in table}  # fmt: skip
    return Told(name, share, mixed, watched, series, plot(mixed, faded, watched, name), sentence)


def plot(mixed: pd.DataFrame, faded: pd.DataFrame, watched: pd.DataFrame, rate: str) -> Figure:
    """Left: the slice's share grows. Middle: its rate falls. Right: labelled patches until each monitor sees the fall.

    Args:
        mixed, faded, watched: from `mix`, `fade`, `monitors`.
        rate: "recall" or "specificity".
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 3.9))
    colours = {"accuracy": "0.2", "all": "C0", "slice": "C3"}
    titles = {"accuracy": "accuracy, all patches", "all": f"{rate}, all patches", "slice": f"{rate}, slice"}
    for name, colour in colours.items():
        left.plot(mixed["share"], mixed[name], color=colour, label=titles[name])
        low, high = np.array(mixed[f"{name} 95 %"].tolist()).T
        left.fill_between(mixed["share"], low, high, color=colour, alpha=0.15, lw=0)
    fallen = faded["slice"].max() - faded["slice"]
    for name, colour in colours.items():
        middle.plot(fallen, faded[name], color=colour, label=titles[name])
    left.set(xlabel=f"share of the slice among patches that count for {rate}", title="more patches of the slice")
    middle.set(xlabel=f"fall of the slice's {rate}", title="the slice gets harder")
    for axis in (left, middle):
        axis.set_ylim(min(0.4, mixed["slice"].min() - 0.05, faded["slice"].min() - 0.02), 1)
    left.legend(frameon=False, fontsize=8, loc="lower left")
    for name, colour, mark in (
        ("at random, accuracy watched", "0.2", "o"),
        ("at random, slice watched", "C0", "s"),
        ("of the slice", "C3", "D"),
    ):
        known = watched[watched[name].notna()]
        right.plot(known["falls by"].astype(float), known[name].astype(float), color=colour, marker=mark, label=name)
    right.set(yscale="log", xlabel=f"fall of the slice's {rate}", title="labelled patches to notice")
    right.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure
