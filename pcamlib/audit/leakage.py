"""Leakage: slides in two splits, foreign normalisation, odd assignment of rows, and what a leak does to a score.

Copies of a patch in two splits are found by `duplicates.py` and `near.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.resampling import auc, features
from pcamlib.audit.storage import OFFICIAL
from pcamlib.data.layout import SPLITS
from pcamlib.data.patches import channel_statistics, sample
from pcamlib.errors import DataError, RunError
from pcamlib.training import checkpoint
from pcamlib.training.runs import Run

_NEIGHBOURS = 5
_NONE = np.empty(0, np.int64)


def check(splits: dict[str, Split]) -> list[Finding]:
    """Slides that two splits share, and class mix and order of the splits."""
    pairs = itertools.combinations([name for name in SPLITS if name in splits], 2)
    shared = [finding for one, other in pairs for finding in _shared(splits[one], splits[other])]
    return shared + _mix(splits) + _order(splits)


def _shared(one: Split, other: Split) -> list[Finding]:
    """Slides in both splits: a finding for each. Where most of the first would go, only strays, away from home, are."""
    if one.slides is None or other.slides is None:
        return []
    both = np.intersect1d(one.slides, other.slides)
    if not len(both := both[both != ""]):
        return []
    counts = [{str(s): int((split.slides == s).sum()) for s in both} for split in (one, other)]
    at_home = [s for s in counts[0] if counts[0][s] >= counts[1][s]]
    known = {one.name: one.slides, other.name: other.slides}
    rows = {name: np.flatnonzero(np.isin(slides, both)) for name, slides in known.items()}
    strays = {one.name: rows[one.name][~np.isin(one.slides[rows[one.name]], at_home)],
              other.name: rows[other.name][np.isin(other.slides[rows[other.name]], at_home)]}  # fmt: skip
    most = len(rows[one.name]) > len(one) / 2
    drop = strays if most or one.name != "train" else {one.name: rows[one.name], other.name: _NONE}
    advice = (
        f"split again by slide; leaving out the {sum(map(len, strays.values())):,} strays, or moving them, is enough"
    )
    if not most and one.name == "train":
        advice = "leave these train rows out, or split again by slide"
    details = {"slides": {s: [counts[0][s], counts[1][s]] for s in counts[0]},
               "strays": {name: found.tolist() for name, found in strays.items()}}  # fmt: skip
    return [
        Finding(
            "leakage.slides", split.name,
            f"{len(both):,} slides lie in {one.name} and in {other.name}: {len(rows[one.name]):,} and "
            f"{len(rows[other.name]):,} of their rows",
            rows[split.name], "certain: names in both meta files", advice, "leak", drop[split.name], details,
        )
        for split in (one, other)
    ]  # fmt: skip


def assignment(splits: dict[str, Split]) -> list[dict[str, Any]]:
    """One row a split: size beside the official one and 80/10/10, class mix, order.

    Returns:
        dicts with `split`, `patches`, `of_official`, `of_all` and `of_all_official` (shares), `tumour` with its 95 %
        `interval`, `lag` (autocorrelation of neighbouring labels; by chance within `lag_chance` of 0), `slides`, and
        `same_slide`, the share of neighbouring rows of one slide; None where unknown. Classes over valid rows.
    """
    total = sum(map(len, splits.values()))
    rows = []
    for name, split in splits.items():
        labels = None if split.labels is None else split.labels[split.valid].astype(float)
        share, error = _share(split)
        rows.append({
            "split": name,
            "patches": len(split),
            "of_official": len(split) / OFFICIAL[name],
            "of_all": len(split) / total,
            "of_all_official": OFFICIAL[name] / sum(OFFICIAL.values()),
            "tumour": share,
            "interval": None if share is None else [max(share - 1.96 * error, 0.0), min(share + 1.96 * error, 1.0)],
            "lag": _lag(labels),
            "lag_chance": None if labels is None else 1.96 / max(len(labels), 1) ** 0.5,
            "slides": None if split.slides is None else len(np.unique(split.slides)),
            "same_slide": None if split.slides is None or len(split) < 2
            else float((split.slides[1:] == split.slides[:-1]).mean()),
        })  # fmt: skip
    return rows


def _share(split: Split) -> tuple[float | None, float]:
    """Share of tumour and its standard error: by slides where they are known, else by patches (Agresti-Coull)."""
    if split.labels is None or not split.valid.any():
        return None, 0.0
    labels = split.labels[split.valid].astype(float)
    n, share = len(labels), float(labels.mean())
    centre = (labels.sum() + 2) / (n + 4)
    error = float((centre * (1 - centre) / (n + 4)) ** 0.5)
    if split.slides is not None:
        _, member = np.unique(split.slides[split.valid], return_inverse=True)
        error = max(error, float((np.bincount(member, labels - share) ** 2).sum() ** 0.5 / n))
    return share, error


def _lag(labels: np.ndarray | None) -> float | None:
    if labels is None or len(labels) < 20 or labels.std() == 0:
        return None
    centred = labels - labels.mean()
    return float((centred[1:] * centred[:-1]).mean() / labels.var())


def _mix(splits: dict[str, Split]) -> list[Finding]:
    """Train's class mix against valid's: 4 standard errors and 5 points apart."""
    shares = {name: _share(splits[name]) for name in ("train", "valid") if name in splits}
    if len(shares) < 2 or any(share is None for share, _ in shares.values()):
        return []
    (here, e1), (there, e2) = ((share or 0.0, error) for share, error in shares.values())
    gap, error = here - there, float(np.hypot(e1, e2))
    if abs(gap) < max(0.05, 4 * error):
        return []
    what = f"{here:.1%} of train and {there:.1%} of valid are tumour, {abs(gap):.1%} +- {1.96 * error:.1%} apart"
    advice = "balance or weigh the classes in training, and choose the threshold on valid"
    table = {"gap": gap, "standard_error": error, "table": assignment(splits)}
    return [Finding("leakage.mix", "train", what, _NONE, "certain: labels counted", advice, details=table)]


def _order(splits: dict[str, Split]) -> list[Finding]:
    """Labels that follow each other: neighbours agree more than chance and than slides would make them."""
    found = []
    for row in assignment(splits):
        if row["lag"] is None or row["lag"] < max(0.2, 2 * row["lag_chance"]):
            continue
        what = f"labels follow each other: autocorrelation of neighbours {row['lag']:.2f}, by chance at most " \
               f"{row['lag_chance']:.2f}"  # fmt: skip
        advice = "shuffle while training, and never cut a split off by row number"
        found.append(Finding("leakage.order", row["split"], what, _NONE, "certain: computed from every label", advice,
                             details=row))  # fmt: skip
    return found


def normalisation(run: Run, splits: dict[str, Split]) -> list[Finding]:
    """Whether a run normalises with statistics of train: what it recorded, against statistics measured again.

    Equal to the last digit is certain; otherwise the nearest of train, the other splits and all pooled is named, where
    train is further off than 3 standard errors. Pooling a small split that resembles train shows in the record only.

    Args:
        run: trained on these splits.
        splits: train, and any other.

    Raises:
        RunError: another train split, or nothing recorded.
        DataError: no train split here.
    """
    if "train" not in splits:
        raise DataError("normalisation is judged against the train split, which is not here")
    record = run.provenance
    if record.get("data", {}).get("train") != splits["train"].patches.fingerprint:
        raise RunError(f"{run.path}: was trained on another train split; audit the folder that it names")
    stated = {"provenance.json": record.get("normalisation")}
    for path in (run.best, run.last):
        if path.exists():
            stated[path.name] = checkpoint.load(path)[1].get("normalisation")
    known = {place: entry for place, entry in stated.items() if entry}
    if not known:
        raise RunError(f"{run.path}: records no normalisation; train it with this version, or look at its code")
    return [finding for place, entry in known.items() if (finding := _foreign(run, place, entry, splits))]


def _foreign(run: Run, place: str, entry: dict[str, Any], splits: dict[str, Split]) -> Finding | None:
    most = int(entry.get("n", 8192))
    measured = {name: channel_statistics(s.patches, most) for name, s in splits.items() if s.valid.any()}
    table = {name: np.array([m["mean"], m["std"]]) for name, m in measured.items()}
    if len(table) > 1:
        weight = np.array([splits[name].valid.sum() for name in table], float)
        means, powers = (np.stack([f(t) for t in table.values()]) for f in (lambda t: t[0], lambda t: (t**2).sum(0)))
        mean = np.average(means, axis=0, weights=weight)
        deviation = np.sqrt(np.average(powers, axis=0, weights=weight) - mean**2)
        table[" and ".join(table)] = np.stack([mean, deviation])
    used = np.array([entry["mean"], entry["std"]])
    apart = {name: float(np.abs(used - values).max()) for name, values in table.items()}
    nearest, slack = min(apart, key=apart.__getitem__), 3 * float(used[1].max()) / max(most, 1) ** 0.5
    said = entry.get("split")
    exact = apart[nearest] < 1e-6
    if said == "train" and (apart["train"] < 1e-6 or (apart["train"] <= slack and not exact)):
        return None
    whose = f"those of {nearest}" if apart[nearest] <= slack else "of none of the splits here"
    what = (f"run {run.name} normalises with statistics that {place} calls {said!r}'s; they are {whose} "
            f"({apart[nearest]:.2g} grey levels off, train {apart['train']:.2g})")  # fmt: skip
    sure = "certain: equal to the last digit" if exact else f"likely: nearest of {len(apart)} candidates"
    return Finding(
        "leakage.normalisation", "train", what, _NONE, "certain: the record says so" if said != "train" else sure,
        "train again with statistics of train alone; scores on the split that leaked are not independent",
        details={"run": str(run.path), "place": place, "recorded": entry, "grey_levels_off": apart, "slack": slack},
    )  # fmt: skip


def permutation_probe(
    splits: dict[str, Split],
    groups: dict[str, np.ndarray],
    *,
    into: str = "valid",
    planted: float = 0.0,
    permutations: int = 200,
    most: int = 5000,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores under random labels, one draw a group: nothing but leakage can be learned, so without one the AUC is 0.5.

    The model votes among the five nearest train patches, weighted by closeness, in `resampling.features`. Of train are
    sampled first the rows whose group the sampled `into` rows share, at most half of the sample, then others.

    Args:
        splits: "train" and `into`.
        groups: by split, (N,) ids; rows of one group (copies, or a slide) carry one label in both splits.
        planted: share of the `into` rows that train is given copies of, to see what such a leak would do.
        permutations: random labellings.
        most: rows in all.

    Returns:
        dict: `value`, mean AUC, with 95 % `interval`; `leak`, whether it is over 4 standard errors above 0.5; `n` rows
        scored and `fitted`; `shared`, the share of these whose group train has; `null`, the AUCs (permutations,) with
        the groups cut apart; `score` and `score_without`: AUC on the true labels, with and without the train rows of
        shared groups (None without labels, or where nobody or everybody is left).

    Raises:
        DataError: a split missing, or fewer than 20 valid rows in one.
    """
    if missing := {"train", into} - splits.keys():
        raise DataError(f"the permutation probe needs train and {into}; {' and '.join(sorted(missing))} is not here")
    rng = np.random.default_rng(seed)
    seen, every = sample(splits[into].patches, most // 4), splits["train"].patches.rows()
    if min(len(seen), len(every)) < 20:
        raise DataError(f"{len(every)} train and {len(seen)} {into} patches; the permutation probe needs 20 of each")
    mate = np.isin(groups["train"][every], groups[into][seen])
    some = rng.permutation(every[mate])[: most // 2]
    fit = np.sort(np.concatenate([some, rng.permutation(every[~mate])[: most - len(seen) - len(some)]]))
    copies = rng.permutation(len(seen))[: round(planted * len(seen))]
    new = features(splits[into].patches.images, seen)
    known = np.concatenate([features(splits["train"].patches.images, fit), new[copies]])
    owners = np.concatenate([groups["train"][fit], groups[into][seen][copies], groups[into][seen]])
    _, member = np.unique(owners, return_inverse=True)
    theirs, mine = member[: len(known)], member[len(known) :]
    near, weight = _neighbours(known, new)
    truth, other = rng.integers(0, 2, (2, permutations, member.max() + 1))
    votes = (truth[:, theirs[near]] * weight).sum(-1)
    aucs, null = auc(truth[:, mine], votes), auc(other[:, mine], votes)
    value, error = float(np.nanmean(aucs)), float(np.nanstd(aucs, ddof=1) / permutations**0.5)
    result = {
        "value": value, "interval": [value - 1.96 * error, value + 1.96 * error], "leak": value - 0.5 > 4 * error,
        "n": len(seen), "fitted": len(known), "shared": float(np.isin(mine, theirs).mean()), "null": null.tolist(),
        "score": None, "score_without": None,
    }  # fmt: skip
    y, labels = splits["train"].labels, splits[into].labels
    if y is not None and labels is not None and len(set(labels[seen].tolist())) == 2:
        taught = np.concatenate([y[fit], labels[seen][copies]])
        result["score"] = float(auc(labels[seen], (taught[near] * weight).sum(-1)))
        if 20 <= (kept := ~np.isin(theirs, mine)).sum() < len(kept):
            near, weight = _neighbours(known[kept], new)
            result["score_without"] = float(auc(labels[seen], (taught[kept][near] * weight).sum(-1)))
    return result


def _neighbours(known: np.ndarray, new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the nearest rows of `known` to each of `new`, and their weights; (n, 5) each."""
    mean, scale = known.mean(0), np.maximum(known.std(0), 1e-3)
    left, right = (new - mean) / scale, (known - mean) / scale
    squared = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    near = np.argpartition(squared, _NEIGHBOURS - 1, axis=1)[:, :_NEIGHBOURS]
    weight = 1 / (np.maximum(np.take_along_axis(squared, near, 1), 0) + 0.01)
    return near, weight / weight.sum(1, keepdims=True)
