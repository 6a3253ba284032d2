"""Labels that are probably wrong: out-of-fold predictions of a quick CNN, and a noise model that reads them.

No patch is judged by a model that learned from it, from a copy of it, or, where slides are known, from its slide. A
budget buys a number of steps at a stated rate, so equal input gives equal findings, whatever else the machine does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import roc_auc_score

from pcamlib import seeding
from pcamlib.audit import noise, quick
from pcamlib.audit.findings import Finding, Split
from pcamlib.training import checkpoint

RATE = 2300  # patches learned from in a CPU second, one core of a Xeon without AMX; the unit of the cost below
LIMIT = 100_000  # patches judged at most
_VIEWS = 4  # of eight; predicting one costs about a quarter of learning from a patch
_EPOCHS = 40  # 30 epochs of 10,000 real patches were still better than 20 (AUROC .929, .924); no more is known
_LEAST = 25  # patches of each class; below this nothing can be said
_FAIR = 0.6  # AUC against the given labels below which the quick model knows too little to accuse anybody
_EVIDENCE = 6.0  # `noise.Noise.evidence` below which no label is called wrong: what 1 clean set in 20 passes
_SHOWN = 200  # suspects listed in a finding


def _units(copies: np.ndarray, slides: np.ndarray) -> np.ndarray:
    """(n,) int64: patches that must not straddle folds share a number: equal `copies`, or equal `slides` but ""."""
    copy, named = np.unique(copies, return_inverse=True)[1], slides != ""
    slide = np.unique(slides[named], return_inverse=True)[1] + len(copies)
    links = coo_array((np.ones(len(slide)), (copy[named], slide)), shape=(2 * len(copies),) * 2)
    return connected_components(links, directed=False)[1][copy]


def _folds(units: np.ndarray, labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(n,) fold of each patch: units whole, large ones first, each to the fold that has least of its class."""
    units = np.unique(units, return_inverse=True)[1]
    size, tumour = np.bincount(units), np.bincount(units, labels)
    order = np.random.default_rng(seed).permutation(len(size))
    load, fold = np.zeros((2, folds)), np.zeros(len(size), np.int64)
    for unit in order[np.argsort(-size[order], kind="stable")]:
        here = fold[unit] = int(load[int(2 * tumour[unit] > size[unit])].argmin())
        load[:, here] += size[unit] - tumour[unit], tumour[unit]
    return fold[units]


class Judged(NamedTuple):
    """What networks say of patches that they did not learn from.

    Attributes:
        probability: by split, (N,) float64 of tumour, NaN for patches that were not judged.
        weights: digest of each network's weights.
    """

    probability: dict[str, np.ndarray]
    weights: list[str]


def out_of_fold(
    splits: dict[str, Split],
    *,
    folds: int = 2,
    seconds: float = 60.0,
    seed: int = 0,
    groups: dict[str, np.ndarray] | None = None,
    limit: int = LIMIT,
) -> Judged:
    """Probability of tumour of each valid, labelled patch by models that learned from other folds.

    All labelled splits are one pool: a small split is judged by what the large one taught.

    Args:
        splits: by name; those without labels are left out.
        folds: parts of the pool; at equal CPU time 2 beat 4 (20,000 real patches, one seed: AUROC .924 and .909).
        seconds: CPU time for all of it, at `RATE`.
        seed: of folds and networks.
        groups: by split, (N,) int64: equal numbers are copies, also between splits; negative: has none.
        limit: most patches to judge, evenly spaced, at 6 KiB of memory each; the budget sets one too, 575 a second.

    Returns:
        The probabilities; all NaN where a class has under 25 patches.
    """
    chosen = _chosen(splits, min(int(seconds * RATE / 4), limit))
    found = {name: np.full(len(splits[name]), np.nan) for name in chosen}
    labels = np.concatenate([np.empty(0, np.uint8), *(_given(splits[name])[rows] for name, rows in chosen.items())])
    if np.bincount(labels, minlength=2).min() < _LEAST:
        return Judged(found, [])
    fold = _assign(splits, chosen, labels, groups or {}, folds, seed)
    images = np.concatenate([quick.shrink(splits[name].patches.images, rows) for name, rows in chosen.items()])
    lessons = (seconds * RATE - len(labels) * (1 + _VIEWS) / 4) / folds

    def judge(part: int) -> tuple[np.ndarray, np.ndarray, str]:
        judged, learned = np.flatnonzero(fold == part), np.flatnonzero(fold != part)
        steps = int(min(lessons, max(_EPOCHS * len(learned), 300 * quick.BATCH)) / quick.BATCH)
        model = quick.fit(images, labels, learned, steps=max(1, steps), seed=seed + part)
        return judged, quick.predict(model, images, judged, views=_VIEWS), checkpoint.weights_digest(model)

    probability, weights = np.empty(len(labels)), []
    with seeding.workers() as pool:
        for judged, found_here, digest in pool.map(judge, range(folds)):
            probability[judged] = found_here
            weights.append(digest)
    for name, rows in chosen.items():
        found[name][rows], probability = probability[: len(rows)], probability[len(rows) :]
    return Judged(found, weights)


def _given(split: Split) -> np.ndarray:
    assert split.labels is not None, "unlabelled splits are left out before"
    return split.labels


def _chosen(splits: dict[str, Split], most: int) -> dict[str, np.ndarray]:
    """Valid rows of each labelled split, thinned evenly to about `most` in all."""
    rows = {name: np.flatnonzero(split.valid) for name, split in splits.items() if split.labels is not None}
    share = min(1.0, most / max(1, sum(len(of) for of in rows.values())))
    return {name: of[np.linspace(0, len(of), int(len(of) * share), False, dtype=np.int64)] for name, of in rows.items()}


def _assign(
    splits: dict[str, Split],
    chosen: dict[str, np.ndarray],
    labels: np.ndarray,
    groups: dict[str, np.ndarray],
    folds: int,
    seed: int,
) -> np.ndarray:
    """Folds by copies and slides; by copies alone where a few slides hold so much that a fold would lack a class."""
    copies: list[np.ndarray] = []
    slides: list[np.ndarray] = []
    for name, rows in chosen.items():
        alone = -1 - sum(len(part) for part in copies) - np.arange(len(rows))
        copies.append(np.where(groups[name][rows] < 0, alone, groups[name][rows]) if name in groups else alone)
        known = splits[name].slides
        slides.append(np.full(len(rows), "") if known is None else known[rows].astype(str))
    copy, slide = np.concatenate(copies), np.concatenate(slides)
    fold = _folds(_units(copy, slide), labels, folds, seed)
    least = np.bincount(2 * fold + labels, minlength=2 * folds).min()
    return fold if least >= _LEAST // folds else _folds(_units(copy, np.full(len(copy), "")), labels, folds, seed)


def check(
    splits: dict[str, Split],
    *,
    seconds: float = 60.0,
    seed: int = 0,
    groups: dict[str, np.ndarray] | None = None,
    limit: int = LIMIT,
) -> list[Finding]:
    """A finding "labels.suspect" for each labelled split in which labels are probably wrong.

    Details: `judged`, `rates` and `intervals` of the two kinds of flip, `expected` (the share of the accused that the
    noise model takes for wrong), `confident_learning` (how many cleanlab would accuse), and `ranked`: row, given
    label, out-of-fold probability of tumour, probability that the label is wrong, most suspect first; `evidence`;
    `weights`: digest of each network's.
    """
    found = []
    verdicts = out_of_fold(splits, seconds=seconds, seed=seed, groups=groups, limit=limit)
    for name, probability in verdicts.probability.items():
        judged, labels = np.flatnonzero(np.isfinite(probability)), _given(splits[name])
        if np.bincount(labels[judged], minlength=2).min() < _LEAST:
            continue
        if roc_auc_score(labels[judged], probability[judged]) < _FAIR:
            continue
        model = noise.estimate(probability[judged], labels[judged])
        wrong = model.wrong(probability[judged], labels[judged])
        accused = noise.cut(wrong)
        if model.evidence > _EVIDENCE and wrong[accused].sum() >= 1:
            finding = _finding(name, judged, labels[judged], probability[judged], wrong, accused, model)
            finding.details["weights"] = verdicts.weights
            found.append(finding)
    return found


def _finding(
    split: str,
    judged: np.ndarray,
    labels: np.ndarray,
    probability: np.ndarray,
    wrong: np.ndarray,
    accused: np.ndarray,
    model: noise.Noise,
) -> Finding:
    rows, expected = np.sort(judged[accused]), float(wrong[accused].mean())
    shares = [
        f"{rate:.1%} of the {kind} ({low:.1%} to {high:.1%})"
        for kind, rate, (low, high) in zip(("normal", "tumour"), model.rates, model.intervals, strict=True)
    ]
    details: dict[str, Any] = {
        "judged": len(judged),
        "rates": list(model.rates),
        "intervals": [list(pair) for pair in model.intervals],
        "expected": expected,
        "evidence": model.evidence,
        "confident_learning": _confident_learning(probability, labels),
        "ranked": [
            [int(judged[i]), int(labels[i]), round(float(probability[i]), 4), round(float(wrong[i]), 4)]
            for i in accused[:_SHOWN]
        ],
    }
    return Finding(
        "labels.suspect",
        split,
        f"{len(rows):,} of {len(judged):,} labels are suspect; by estimate {shares[0]} and {shares[1]} patches carry "
        "the other label",
        rows,
        f"possible: out of fold, about {expected:.0%} of them are wrong; the others are hard patches",
        "look at the most suspect ones first; train with and without them before leaving them out",
        "labels",
        rows,
        details,
    )


def _confident_learning(probability: np.ndarray, labels: np.ndarray) -> int:
    """How many labels cleanlab accuses (Northcutt et al. 2021, doi:10.1613/jair.1.12125)."""
    from cleanlab.filter import find_label_issues  # 2 s

    both = np.stack([1 - probability, probability], 1)
    return int(find_label_issues(labels.astype(np.int64), both, filter_by="confident_learning", n_jobs=1).sum())
