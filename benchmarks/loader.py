"""Reading patches: our loader against memcpy, the torchvision way and the course skeleton's way, in one run.

    python benchmarks/loader.py [--json FILE] [--patches N]

The peers are written from their published behaviour: torchvision's PCAM opens both HDF5 files for every
item and makes a PIL image; the course skeleton keeps float32 files open and reads item by item, through PIL, in a
DataLoader with a WeightedRandomSampler.
Files are tiled from synthetic patches and lie in the page cache (warm), as after a first epoch.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from _rows import arguments, finish, interleaved, row
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

from pcamlib import seeding
from pcamlib.config import parse, recipe
from pcamlib.data import convert, scan
from pcamlib.data.folder import SYNTHETIC, data_folder
from pcamlib.data.layout import PATCH_BYTES, PATCH_SHAPE, inspect, split_path
from pcamlib.data.loader import Loader
from pcamlib.data.patches import open_split
from pcamlib.models.mlp import MLP
from pcamlib.training import metrics
from pcamlib.training.evaluate import evaluate
from pcamlib.training.state import Training

BATCH = 128


def tile(source: Path, dest: Path, count: int, dtype: str) -> Path:
    """A train and valid set of `count` train patches repeated from `source`, stored contiguous as `dtype`."""
    dest.mkdir(parents=True)
    for split in ("train", "valid"):
        patches = open_split(source, split)
        size = count if split == "train" else len(patches)
        with h5py.File(split_path(dest, split, "x"), "w") as x, h5py.File(split_path(dest, split, "y"), "w") as y:
            images = x.create_dataset("x", (size, *PATCH_SHAPE), dtype)
            for start in range(0, size, 500):
                rows = np.arange(start, min(start + 500, size)) % len(patches)
                images[start : start + len(rows)] = patches.images[rows]
            y["y"] = patches.labels[np.arange(size) % len(patches)].reshape(-1, 1, 1, 1)
    return dest


def to_tensor(image: Image.Image) -> torch.Tensor:
    """torchvision's ToTensor: (3, H, W) float32, 0 to 1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class PerItemOpen(Dataset):
    """torchvision's way: both files are opened for every item."""

    def __init__(self, folder: Path) -> None:
        self.x, self.y = (split_path(folder, "train", part) for part in "xy")

    def __len__(self) -> int:
        with h5py.File(self.x) as file:
            return len(file["x"])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with h5py.File(self.x) as file:
            image = to_tensor(Image.fromarray(file["x"][index]).convert("RGB"))
        with h5py.File(self.y) as file:
            return image, int(file["y"][index, 0, 0, 0])


class PersistentHandle(Dataset):
    """The course skeleton's way: open float32 files, one patch read, clipped, scaled and normalised at a time."""

    def __init__(self, folder: Path) -> None:
        self.paths = [split_path(folder, "train", part) for part in "xy"]
        self.labels = h5py.File(self.paths[1])["y"][:].reshape(-1)
        self.images: Any = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.images is None:  # opened in the worker that reads
            self.images = h5py.File(self.paths[0])["x"]
        image = np.clip(self.images[index], 0, 255).astype(np.uint8)
        return to_tensor(Image.fromarray(image)).sub_(0.5).div_(0.5), torch.tensor(int(self.labels[index]))


def skeleton_loader(folder: Path, workers: int, batch: int = BATCH) -> DataLoader[Any]:
    """The skeleton's DataLoader with its balancing sampler."""
    data = PersistentHandle(folder)
    weights = 1 / np.bincount(data.labels)[data.labels]
    sampler = WeightedRandomSampler(weights.tolist(), len(data), generator=torch.Generator().manual_seed(0))
    return DataLoader(data, batch, sampler=sampler, num_workers=workers)


def rate(batches: Any, seconds: float = 1.0) -> float:
    """Patches a second over about `seconds`, from the first batch on."""
    begun, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch[1])
        if time.perf_counter() - begun > seconds:
            break
    return count / (time.perf_counter() - begun)


def reading(uint8: Path, float32: Path, rounds: int) -> list[dict[str, Any]]:
    """Shuffled batches of 128."""
    patches = open_split(uint8, "train")
    everything = np.arange(len(patches))
    ours = Loader(patches, everything, batch_size=BATCH)
    copy_from = np.ascontiguousarray(patches.images).reshape(len(patches), -1)
    target = np.empty((BATCH, PATCH_BYTES), np.uint8)

    def memcpy() -> float:
        begun = time.perf_counter()
        for start in range(0, len(copy_from) - BATCH + 1, BATCH):
            np.copyto(target, copy_from[start : start + BATCH])
        return len(copy_from) / (time.perf_counter() - begun)

    torchvision = PerItemOpen(uint8)
    contestants: dict[str, Callable[[], float]] = {
        "memcpy": memcpy,
        "ours": lambda: rate(ours),
        **{
            f"torchvision {w}": (lambda w=w: rate(DataLoader(torchvision, BATCH, shuffle=True, num_workers=w)))
            for w in (0, 2)
        },
        **{f"skeleton {w}": (lambda w=w: rate(skeleton_loader(float32, w))) for w in (0, 2)},
    }
    found = interleaved(contestants, rounds)
    ours_rate, bytes_rate = found["ours"], found["memcpy"]
    note = f"memcpy of the same bytes: {bytes_rate:,.0f}"
    rows = [row("loader, shuffled batches of 128 uint8", ours_rate, "img/s", n=rounds, against=note,
                ratio=ours_rate / bytes_rate, bar="RATIO>=0.8")]  # fmt: skip
    for peer, how, bar in (
        ("torchvision", "h5py.File per item, best of 0 and 2 workers", "RATIO>=100"),
        ("skeleton", "float32 per item, WeightedRandomSampler, best of 0 and 2", "RATIO>=25"),
    ):
        best = max(found[f"{peer} 0"], found[f"{peer} 2"])
        rows.append(row(f"loader against the {peer} way", ours_rate, "img/s", n=rounds, against=f"{how}: {best:,.0f}",
                        ratio=ours_rate / best, bar=bar))  # fmt: skip
    return rows


def end_to_end(uint8: Path, float32: Path, rounds: int, size: int) -> dict[str, Any]:
    """The MLP's training at one batch size, batches included."""
    steps = 3072 // size
    config = parse(recipe("mlp"), [f"train.steps={steps}", f"loader.batch_size={size}", "loader.sampler=balanced"])
    state = Training(config, uint8)
    seeding.seed_everything(0)
    network = MLP(PATCH_SHAPE, config.model.hidden_units)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.optimizer.lr)

    def ours() -> float:
        begun, count = time.perf_counter(), 0
        for batch in state.loader:
            state.step(batch, 0.0)
            count += len(batch.labels)
            if count >= steps * size:
                break
        return count / (time.perf_counter() - begun)

    def skeleton(workers: int) -> float:
        begun, count = time.perf_counter(), 0
        for images, labels in skeleton_loader(float32, workers, size):
            optimizer.zero_grad()
            scores = network(images)
            loss = functional.cross_entropy(scores, labels)
            loss.backward()
            optimizer.step()
            loss.item(), (scores.argmax(1) == labels).sum().item()  # the running loss and accuracy it tracks
            count += len(labels)
            if count >= steps * size:
                break
        return count / (time.perf_counter() - begun)

    found = interleaved({"ours": ours, "s0": lambda: skeleton(0), "s2": lambda: skeleton(2)}, rounds)
    best = max(found["s0"], found["s2"])
    note = f"skeleton's loop, best of 0 and 2 workers: {best:,.0f}"
    return row(f"MLP training end to end, batch {size}", found["ours"], "img/s", n=rounds, against=note,
                ratio=found["ours"] / best, bar="RATIO>=5" if size == BATCH else "")  # fmt: skip


def equal_steps(uint8: Path, float32: Path, steps: int = 120, seeds: int = 3) -> list[dict[str, Any]]:
    """Mean validation AUC of both loops over seeds after equal steps: faster must not mean worse."""
    valid = open_split(uint8, "valid")
    pixels = torch.from_numpy(np.array(valid.images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    aucs: dict[str, list[float]] = {"ours": [], "skeleton": []}
    for seed in range(seeds):
        config = parse(recipe("mlp"), [f"seed={seed}", "train.steps=1", "loader.sampler=balanced"])
        state = Training(config, uint8)
        while state.progress.step < steps:
            for batch in state.loader:
                state.step(batch, 0.0)
                state.progress.step += 1
                if state.progress.step == steps:
                    break
        probability = evaluate(state.model, valid, precision=state.precision).probability
        aucs["ours"].append(_auc(valid.labels, probability))
        seeding.seed_everything(seed)
        network = MLP(PATCH_SHAPE, config.model.hidden_units)
        _train_plain(network, float32, steps)
        with torch.inference_mode():
            aucs["skeleton"].append(_auc(valid.labels, network(pixels).double().softmax(1)[:, 1].numpy()))
    mean = {name: float(np.mean(values)) for name, values in aucs.items()}
    error = float(np.sqrt(sum(np.var(values, ddof=1) / seeds for values in aucs.values())))
    note = f"skeleton's loop: {mean['skeleton']:.3f}, {seeds} seeds each"
    low = mean["ours"] - mean["skeleton"] - 2 * error  # lower end of the difference, seeds within each loop
    return [row(f"valid AUC after {steps} equal steps", mean["ours"], "AUC", n=seeds, against=note),
            row("  lower end of the difference, 2 se", low, "AUC", n=seeds, bar="VALUE>=-0.03")]  # fmt: skip


def _train_plain(network: nn.Module, folder: Path, steps: int) -> None:
    optimizer, done = torch.optim.Adam(network.parameters(), lr=1e-3), 0
    while done < steps:
        for images, labels in skeleton_loader(folder, 0):
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
            done += 1
            if done == steps:
                break


def _auc(labels: Any, probability: np.ndarray) -> float:
    return float(metrics.scores(labels, probability, np.ones((1, len(labels))))["auc"][0])


def resident_mib() -> float:
    """Resident memory of this process now, file-backed pages included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def large_files(folder: Path, float32: Path, gibibytes: float) -> list[dict[str, Any]]:
    """A sparse contiguous file of PCam's size: first batch and memory; then the float32 conversion."""
    count = int(gibibytes * 2**30 / PATCH_BYTES)
    big = folder / "big"
    big.mkdir()
    with h5py.File(split_path(big, "train", "x"), "w") as x, h5py.File(split_path(big, "train", "y"), "w") as y:
        x.create_dataset("x", (count, *PATCH_SHAPE), "uint8", fill_time="never")
        x["x"][-1] = 1  # allocates the whole array, as a hole on disk
        y["y"] = (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)
    before, begun = resident_mib(), time.perf_counter()
    patches = open_split(big, "train")
    batches = iter(Loader(patches, batch_size=BATCH))
    next(batches)
    first = time.perf_counter() - begun
    peak = before
    for number, _ in enumerate(batches):
        if number % 16 == 0:
            peak = max(peak, resident_mib())
        if number * BATCH * PATCH_BYTES > 3 << 30:
            break
    stored = inspect(split_path(float32, "train", "x"), "x")
    size = stored.shape[0] * stored.row_bytes
    for entry in convert.cache_dir(stored.path).glob("*"):
        entry.unlink()
    base, over = resident_mib(), threading.Event()
    seen = [base]

    def watch() -> None:
        while not over.wait(0.01):
            seen.append(resident_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    scan.scan(stored)
    seconds = time.perf_counter() - begun
    over.set()
    watcher.join()
    return [
        row(f"first batch of a {gibibytes:g} GiB file", first, "s", n=1, bar="VALUE<=1"),
        row("peak memory growth while loading it", peak - before, "MiB", n=1, bar="VALUE<=256"),
        row("float32 conversion", size / 1e6 / seconds, "MB/s", n=1, bar="VALUE>=400"),
        row("  memory growth of the conversion", max(seen) - base, "MiB", n=1, bar="VALUE<=1024"),
    ]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--patches", type=int, default=16_000, help="train patches of the uint8 file")
    options = parser.parse_args()
    seeding.set_threads(None)
    data_folder(SYNTHETIC if SYNTHETIC.is_dir() else None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        uint8 = tile(SYNTHETIC, folder / "uint8", options.patches, "uint8")
        float32 = tile(SYNTHETIC, folder / "float32", options.patches // 2, "float32")
        rows = reading(uint8, float32, options.rounds)
        rows += [end_to_end(uint8, float32, options.rounds, size) for size in (32, BATCH)]  # 32 is the course's own
        rows += equal_steps(uint8, float32)
        rows += large_files(folder, float32, 7.0)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
