"""Near copies: re-encoded, shifted, brightened, turned; found by their spectrum, proved on their pixels.

The power spectrum of the windowed patch forgets its place, and summed over D4 its orientation. Patches that are
neighbours by its whitened logarithm (faiss) are candidates; `align.py` lays one on the other, and pixels decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import faiss
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from pcamlib import seeding
from pcamlib.audit import align, duplicates
from pcamlib.audit.duplicates import SHOWN, Group, Member, conflicts, leaks
from pcamlib.audit.findings import Finding, Split
from pcamlib.audit.stream import Block
from pcamlib.data.layout import PATCH_BYTES
from pcamlib.data.patches import take

NEIGHBOURS = 8  # looked at for each patch
SIMILAR = 0.3  # cosine of whitened descriptors that makes a candidate
PHASE = 0.4  # phase correlation that makes it worth comparing pixels
AGREE = 0.8  # correlation of pixels, over the overlap and in the median tile, that proves it
GAIN = 1.5  # of brightness, up or down, at most; blank patches under the same planted pattern differ by more
COPY = 10  # pixels of shift up to which two patches pass for copies; beyond they are cut-outs that overlap
_ALL = 32  # patches up to which every pair is a candidate: too few to whiten on
_FLAT = 100_000  # patches above which faiss searches inverted lists
_BATCH = 32  # pairs laid on each other at a time: what fits the cache is three times as fast
_SURE = f"likely: laid on each other, the patches correlate at {AGREE} or more over the overlap and in the median tile"


@dataclass(frozen=True)
class Evidence:
    """Why two patches are nearly equal.

    Attributes:
        view: element of D4 (`duplicates.views`) that turns the first into the second.
        shift: (down, right) pixels from the first, so turned, to the second.
        phase: height of the phase correlation, 0 to 1.
        overlap: correlation of the band-passed grey patches where they overlap.
        tile: the median of the same over nine tiles.
        gain: brightness of the second over that of the first.
        similarity: cosine of the whitened descriptors.
        phash: bits of 64 in which the perceptual hashes of the turned first and the second differ.
    """

    view: int
    shift: tuple[int, int]
    phase: float
    overlap: float
    tile: float
    gain: float
    similarity: float
    phash: int

    @property
    def copied(self) -> bool:
        """Whether the shift is a copy's, not that of two cut-outs which overlap."""
        return max(map(abs, self.shift)) <= COPY


@dataclass(frozen=True)
class Pair:
    """Two patches, in the order of splits and rows, and the evidence that they are nearly equal."""

    first: Member
    second: Member
    evidence: Evidence


@dataclass(frozen=True)
class Near:
    """What a search found: proved pairs, and groups of copies of which each is a proved copy of the first."""

    pairs: list[Pair]
    groups: list[Group]


def observe(block: Block) -> dict[str, np.ndarray]:
    """Column of the streaming pass.

    Returns:
        `near.descriptor`: (B, 112) float16: log power by frequency, summed over D4, less the mean over frequencies, so
        that a gain in brightness changes nothing.
    """
    plane = align.spectra(block.flat)
    power = torch.view_as_real(plane).square().sum(3)
    quarter = power[:, align.CYCLES :] + power[:, : align.CYCLES + 1].flip(1)
    octant = (quarter + quarter.transpose(1, 2))[:, torch.triu(align.disc()[align.CYCLES :])]
    logs = torch.log(octant + 1)
    return {"near.descriptor": (logs - logs.mean(1, keepdim=True)).half().numpy()}


class _Pool:
    """The patches that are compared: valid rows of all splits, of exact copies only the first."""

    def __init__(self, splits: dict[str, Split], exact: Iterable[Group]) -> None:
        followers = {member for group in exact for member in group.members[1:]}
        self._splits, rows = splits, []
        for name, split in splits.items():
            keep = split.valid.copy()
            keep[[row for other, row in followers if other == name]] = False
            rows.append(np.flatnonzero(keep))
        self.names = np.repeat(list(splits), [len(here) for here in rows])
        self.rows = np.concatenate([np.empty(0, np.int64), *rows])
        columns = [split.columns["near.descriptor"][here] for split, here in zip(splits.values(), rows, strict=True)]
        self.descriptors = _whiten(np.concatenate(columns).astype(np.float32)) if len(self) else np.empty((0, 1))

    def __len__(self) -> int:
        return len(self.rows)

    def member(self, place: int) -> Member:
        return Member(str(self.names[place]), int(self.rows[place]))

    def flat(self, places: np.ndarray) -> torch.Tensor:
        """(n, 27648) float32 pixels."""
        images = np.empty((len(places), PATCH_BYTES), np.float32)
        for name, split in self._splits.items():
            here = self.names[places] == name
            images[here] = take(split.patches.images, self.rows[places[here]]).reshape(-1, PATCH_BYTES)
        return torch.from_numpy(images)


def _whiten(found: np.ndarray) -> np.ndarray:
    """Descriptors, (N, D) float32, whitened on up to 8,192 of them and scaled to length 1, in place."""
    some = found[np.linspace(0, len(found) - 1, min(len(found), 8192)).astype(np.int64)].astype(np.float64)
    values, vectors = np.linalg.eigh(np.cov(some.T, bias=True))
    ridge = 0.02 + found.shape[1] / len(some)  # few patches say little about small directions
    whiten = (vectors / np.sqrt(np.maximum(values, 0) + ridge * values.mean() + 1e-9)).astype(np.float32)
    middle = some.mean(0).astype(np.float32)
    for start in range(0, len(found), 8192):
        part = (found[start : start + 8192] - middle) @ whiten
        found[start : start + 8192] = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-6)
    return found


def _index(descriptors: np.ndarray) -> faiss.Index:
    """Of inner products: exact, or for many patches by inverted lists, of which 40 are searched."""
    count, width = descriptors.shape
    index: faiss.Index = faiss.IndexFlatIP(width)
    if count > _FLAT:
        lists = faiss.IndexIVFFlat(index, width, int(2 * count**0.5), faiss.METRIC_INNER_PRODUCT)
        lists.cp.max_points_per_centroid, lists.cp.niter, lists.nprobe = 64, 10, 40
        lists.train(descriptors)
        index = lists
    index.add(descriptors)
    return index


def candidates(descriptors: np.ndarray) -> np.ndarray:
    """Pairs of neighbours, the N most similar ones (2,000 where there are fewer patches); all pairs up to 32 patches.

    Args:
        descriptors: (N, D) float32 of length 1.

    Returns:
        (P, 2) int64, first below second, ascending.
    """
    count = len(descriptors)
    if count <= _ALL:
        return np.stack(np.triu_indices(count, 1), 1)
    index = _index(descriptors)
    found, similar = [], []
    for start in range(0, count, 8192):
        cosines, places = index.search(descriptors[start : start + 8192], NEIGHBOURS + 1)
        row, column = np.nonzero((cosines >= SIMILAR) & (places >= 0))
        found.append(np.stack([row + start, places[row, column]], 1))
        similar.append(cosines[row, column])
    couples, once = np.unique(np.sort(np.concatenate(found), 1), axis=0, return_index=True)
    order = np.argsort(-np.concatenate(similar)[once], kind="stable")
    best = order[couples[order, 0] < couples[order, 1]][: max(count, 2000)]
    return couples[np.sort(best)]


def _compare(pool: _Pool, chunk: np.ndarray) -> dict[tuple[int, int], Evidence]:
    """Evidence on the pairs of places that phase correlation lets pass and the pixels prove."""
    places, ends = np.unique(chunk, return_inverse=True)
    back = torch.from_numpy(ends.reshape(chunk.shape))
    flat = pool.flat(places)
    spectra = align.spectra(flat)
    view, shift, phase = align.register(spectra[back[:, 0]], spectra[back[:, 1]])
    worth = torch.nonzero(phase >= PHASE)[:, 0]
    if not len(worth):
        return {}
    first, second = align.grey(flat[back[worth]].flatten(0, 1)).unflatten(0, (-1, 2)).unbind(1)
    first = align.turned(first, view[worth])
    agreed = align.agreement(first, second, shift[worth]).tolist()
    differ = (align.phash(first) != align.phash(second)).sum(1).tolist()
    proved = {}
    for i, (overlap, tile, gain), bits in zip(worth.tolist(), agreed, differ, strict=True):
        if min(overlap, tile) >= AGREE and 1 / GAIN <= gain <= GAIN:
            one, two = map(int, chunk[i])
            similar = float(pool.descriptors[one] @ pool.descriptors[two])
            down, right = shift[i].tolist()
            proved[one, two] = Evidence(
                int(view[i]), (down, right), float(phase[i]), overlap, tile, gain, similar, bits
            )
    return proved


def _components(couples: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Places that are connected, ascending in each component."""
    places, ends = np.unique(np.array(couples), return_inverse=True)
    one, two = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(one)), (one, two)), shape=(len(places), len(places)))
    count, name = connected_components(graph, directed=False)
    found: list[list[int]] = [[] for _ in range(count)]
    for component, place in zip(name, places.tolist(), strict=True):
        found[component].append(place)
    return found


def _stars(pool: _Pool, copied: dict[tuple[int, int], Evidence]) -> list[Group]:
    """Groups of which every member is a proved copy of the first, so that chains of small shifts are cut."""
    known, left, groups = dict(copied), list(copied), []
    while left:
        taken: set[int] = set()
        components = _components(left)
        unknown = [(one, two) for one, *others in components for two in others if (one, two) not in known]
        more = _compare(pool, np.array(unknown, np.int64).reshape(-1, 2))
        known |= {couple: evidence for couple, evidence in more.items() if evidence.copied}
        for one, *others in components:
            group = Group()
            group.add(pool.member(one))
            for two in (two for two in others if (one, two) in known):
                group.add(pool.member(two), **asdict(known[one, two]))
                taken.add(two)
            groups.append(group)
            taken.add(one)
        left = [(one, two) for one, two in left if one not in taken and two not in taken]
    return groups


def search(splits: dict[str, Split], exact: list[Group] | None = None) -> Near:
    """Nearly equal patches over all splits jointly; flagged rows are left out, exact copies count as one patch.

    Args:
        splits: by name, with the columns of `observe` and `duplicates.observe`.
        exact: what `duplicates.groups` returned; None: search.
    """
    pool = _Pool(splits, duplicates.groups(splits) if exact is None else exact)
    couples = candidates(pool.descriptors)
    chunks = [couples[start : start + _BATCH] for start in range(0, len(couples), _BATCH)]
    found: dict[tuple[int, int], Evidence] = {}
    with seeding.workers() as threads:
        for proved in threads.map(lambda chunk: _compare(pool, chunk), chunks):
            found |= proved
    pairs = [Pair(pool.member(one), pool.member(two), evidence) for (one, two), evidence in found.items()]
    return Near(pairs, _stars(pool, {couple: evidence for couple, evidence in found.items() if evidence.copied}))


def check(splits: dict[str, Split], exact: list[Group] | None = None, near: Near | None = None) -> list[Finding]:
    """Findings `near.copies`, `near.overlap`, `near.conflict` and `near.leak`, at most one of each for a split.

    Args:
        splits: by name, with the columns of `observe` and `duplicates.observe`.
        exact: what `duplicates.groups` returned; None: search.
        near: what `search` returned; None: search.
    """
    exact = duplicates.groups(splits) if exact is None else exact
    near = search(splits, exact) if near is None else near
    twins = {group.members[0]: group.members[1:] for group in exact}
    findings = [finding for name in splits for finding in _copies(name, near.groups, twins)]
    findings += [finding for name in splits for finding in _overlap(name, near.pairs)]
    advice = "look at them: a shift may rightly change the label, since the centre moved; a re-encoding may not"
    findings += conflicts(splits, near.groups, "near.conflict", "nearly equal patches", _SURE, None, advice)
    couples = [
        _with(Group([pair.first, pair.second], [{}, asdict(pair.evidence)]), twins)
        for pair in near.pairs
        if len({member.split for one in (pair.first, pair.second) for member in (one, *twins.get(one, ()))}) > 1
    ]
    return findings + leaks(splits, couples, "near.leak", "nearly equal", _SURE)


def _with(group: Group, twins: dict[Member, list[Member]]) -> Group:
    """The group and the exact copies of its members."""
    whole = Group(list(group.members), list(group.notes))
    for member in group.members:
        for twin in twins.get(member, ()):
            whole.add(twin, equals=member)
    return whole


def _copies(name: str, groups: list[Group], twins: dict[Member, list[Member]]) -> list[Finding]:
    inside = []
    for group in groups:
        alike = [[row for split, row in (one, *twins.get(one, ())) if split == name] for one in group.members]
        rows = np.sort([here[0] for here in alike if here])
        if len(rows) > 1:
            inside.append((group, rows))
    if not inside:
        return []
    rows, drop = (np.sort(np.concatenate([rows[skip:] for _, rows in inside])) for skip in (0, 1))
    what = f"{len(drop):,} patches are re-encoded, shifted or otherwise altered copies of {len(inside):,} others"
    advice = "keep the first of each group, as with equal patches"
    details = {"groups": len(inside), "shown": [group.json() for group, _ in inside[:SHOWN]]}
    return [Finding("near.copies", name, what, rows, _SURE, advice, "near", drop, details)]


def _overlap(name: str, pairs: list[Pair]) -> list[Finding]:
    inside = [pair for pair in pairs if pair.first.split == pair.second.split == name and not pair.evidence.copied]
    if not inside:
        return []
    rows = np.unique([row for pair in inside for _, row in (pair.first, pair.second)])
    what = f"{len(rows):,} patches overlap another, {len(inside):,} pairs, by {COPY + 1} to {align.REACH} pixels' shift"
    advice = "keep them, but they are not independent: split by slide, and resample by slide for intervals"
    shown = [Group([pair.first, pair.second], [{}, asdict(pair.evidence)]).json() for pair in inside[:SHOWN]]
    return [Finding("near.overlap", name, what, rows, _SURE, advice, details={"pairs": len(inside), "shown": shown})]
