"""What a training step reads and changes, and how all of it is saved and put back bitwise."""

from __future__ import annotations

import copy
import ctypes
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from pcamlib import provenance, seeding
from pcamlib.config import Config, Model, validate
from pcamlib.data.loader import Batch, Loader
from pcamlib.data.patches import Patches, channel_statistics, open_split
from pcamlib.errors import CheckpointError, ConfigError, DataError, DivergedError
from pcamlib.files import digest
from pcamlib.models import Classifier, build
from pcamlib.training import checkpoint, distributed
from pcamlib.training.muon import Muon
from pcamlib.training.schedule import factor


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    elapsed: float = 0.0  # seconds in earlier attempts
    best: float = -math.inf
    best_step: int = 0
    evaluations: int = 0
    since_best: int = 0


def choose_device(name: str) -> str:
    """ "auto" is the GPU where there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no GPU; use auto or cpu, or ask Slurm for --gpus=1")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def choose_precision(name: str, device: str) -> str:
    """ "auto" is bf16 where hardware multiplies it (AMX, GPU); elsewhere bf16 is slower than float32."""
    return name if name != "auto" else "bf16" if device == "cuda" or provenance.has_amx() else "fp32"


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: given back, each step's maps are zeroed page by page anew (1.1 times as slow)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: blocks below 1 GiB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: whose top stays


def optimizer_for(model: torch.nn.Module, config: Config, precision: str) -> torch.optim.Optimizer:
    """Optimiser by name; biases and normalisation weights (one dimension) are not decayed."""
    settings = config.optimizer
    if settings.name == "muon":
        last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1].weight
        matrices = [p for p in model.parameters() if p.ndim > 1 and p is not last]
        others = [p for p in model.parameters() if p.ndim == 1 or p is last]
        return Muon(
            matrices,
            others,
            lr=settings.lr,
            other_lr=settings.other_lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )
    groups: list[dict[str, Any]] = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    if settings.weight_decay:  # two groups are two kernel launches
        decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    if settings.name == "sgd":
        nesterov = settings.momentum > 0
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=nesterov, fused=True)
    return torch.optim.AdamW(groups, lr=settings.lr, fused=True)  # fused: up to 2.9 times faster on small batches


def _both_classes(valid: Patches) -> None:
    if valid.labels is not None and len(set(valid.labels.tolist())) == 1:
        raise DataError(
            f"{valid.stored.path}: all {len(valid):,} labels are {valid.labels[0]}; validation needs both classes: "
            f"without them there is no AUC to choose the best weights by"
        )


class Training:
    """Everything that a step reads and changes, and how it is saved and put back."""

    def __init__(self, config: Config, folder: str | Path) -> None:
        seeding.seed_everything(config.seed)
        seeding.set_threads(config.train.threads)
        keep_freed_memory()
        self.config = config
        self.device = choose_device(config.train.device)
        self.precision = choose_precision(config.train.precision, self.device)
        self.train, self.valid = open_split(folder, "train"), open_split(folder, "valid")
        _both_classes(self.valid)
        self.statistics = channel_statistics(self.train)
        self.world = distributed.world()
        self.model = build(config.model, self.statistics).to(self.device)
        self.average = copy.deepcopy(self.model).eval() if config.train.ema else None
        self.optimizer = optimizer_for(self.model, config, self.precision)
        self.loader = Loader(
            self.train.raw if config.data.raw else self.train,
            self.train.rows(config.data.drop, config.data.limit, config.data.clean),
            batch_size=config.loader.batch_size,
            sampler=config.loader.sampler,
            seed=config.seed,
            augmentations=config.loader.augment,
            strength=config.loader.stain_strength,
            shift=config.loader.shift_pixels,
            view=self.model.view,
            device=self.device,
            pin=self.device == "cuda",
            resident=config.loader.resident,
            world=(self.world.rank, self.world.size),
        )
        self.progress = Progress()
        epochs = config.train.epochs
        self.total = epochs * len(self.loader) if epochs else config.train.steps

    @property
    def judged(self) -> Classifier:
        """The weights that are evaluated and kept: the moving average where there is one."""
        return self.average or self.model

    def record(self) -> dict[str, Any]:
        """Provenance of this attempt."""
        return provenance.capture(
            self.device,
            data={
                "train": self.train.fingerprint,
                "valid": self.valid.fingerprint,
                "rows": digest(self.loader.rows.tolist()),
            },
            config=self.config.digest(),
            precision=self.precision,
            normalisation=self.statistics,
            synthetic=self.train.synthetic,
        )

    def header(self) -> dict[str, Any]:
        """Metadata that make a checkpoint usable alone."""
        synthetic = self.train.synthetic is not None
        return {"model": self.config.model.model_dump(), "normalisation": self.statistics, "synthetic": synthetic}

    def save(self, path: Path) -> None:
        """Write everything needed to go on bitwise."""
        tensors = {
            **checkpoint.join("model", self.model.state_dict()),
            **checkpoint.join("optimizer", checkpoint.optimizer_tensors(self.optimizer)),
            **checkpoint.join("rng", seeding.rng_state()),
            **(checkpoint.join("average", self.average.state_dict()) if self.average else {}),
        }
        meta = {**self.header(), "progress": asdict(self.progress), "loader": self.loader.state_dict()}
        meta["config"] = self.config.digest()
        # JSON has no infinity: before the first evaluation there is no best score
        meta["progress"]["best"] = None if math.isinf(self.progress.best) else self.progress.best
        checkpoint.save(path, tensors, meta)

    def load(self, path: Path) -> None:
        """Put back what `save` wrote.

        Raises:
            CheckpointError: damaged, or written under another configuration or normalisation.
        """
        tensors, meta = checkpoint.load(path)
        if meta.get("config") != self.config.digest():
            raise CheckpointError(f"{path}: written under another configuration than the run's config.yaml")
        same_normalisation(path, meta, self.statistics)
        checkpoint.load_weights(self.model, checkpoint.split(tensors, "model"), path)
        if self.average:
            checkpoint.load_weights(self.average, checkpoint.split(tensors, "average"), path)
        checkpoint.load_optimizer(self.optimizer, checkpoint.split(tensors, "optimizer"))
        seeding.set_rng_state(checkpoint.split(tensors, "rng"))
        self.loader.load_state_dict(meta["loader"])
        best = meta["progress"]["best"]
        self.progress = Progress(**{**meta["progress"], "best": -math.inf if best is None else best})

    def step(self, batch: Batch, progress: float) -> dict[str, float]:
        """One optimiser step; returns loss, learning rate and gradient norms before clipping.

        Raises:
            DivergedError: the loss is not finite; names the step and the patches.
        """
        settings = self.config.train
        rate = self.config.optimizer.lr * factor(self.config.schedule.name, progress, self.config.schedule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.world.draw_apart(self.config.seed, self.progress.step)
        enabled = self.precision == "bf16"
        with self.world.statistics(), torch.autocast(self.device, torch.bfloat16, enabled=enabled):
            logits = self.model(batch.images)
        loss = functional.cross_entropy(logits, batch.labels, label_smoothing=settings.label_smoothing) * batch.share
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights = list(self.model.parameters())
        loss = self.world.add_up(loss, weights)
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        layers = self._layer_norms() if settings.layer_norms else {}
        if settings.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(weights, settings.grad_clip, norm)
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            raise DivergedError(
                f"step {self.progress.step + 1}: loss {value}, gradient norm {float(norm)}; "
                f"{_suspects(batch, logits.detach(), self.world)}; the last good checkpoint is kept"
            )
        self.optimizer.step()
        self._follow()
        return {"loss": value, "lr": rate, "grad_norm": float(norm), **layers}

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights; at first faster, so that it forgets where they began."""
        if self.average is None:
            return
        done = self.progress.step
        decay = min(self.config.train.ema, (1 + done) / (10 + done))
        pairs = zip(self.average.state_dict().values(), self.model.state_dict().values(), strict=True)
        moving = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in moving], [now for _, now in moving], 1 - decay)

    def _layer_norms(self) -> dict[str, float]:
        """Gradient norm of each layer by `grad_norm/LAYER`, the weights and biases of one module together."""
        held = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([gradient for _, gradient in held])).tolist()
        found: dict[str, float] = {}
        for (name, _), norm in zip(held, norms, strict=True):
            key = f"grad_norm/{name.rpartition('.')[0].removeprefix('network.')}"
            found[key] = math.hypot(found.get(key, 0.0), norm)
        return found


def _suspects(batch: Batch, logits: torch.Tensor, world: distributed.World) -> str:
    """Which patches of a batch made its loss not finite, and what to do; a batch norm spreads one NaN to all logits."""
    broken = {
        "their pixels are not finite: leave them out (data.drop)": batch.images,
        "the answers to them alone are not finite": logits,
    }
    rows = world.concat(batch.rows)
    for what, values in broken.items():
        found = rows[world.concat(~torch.isfinite(values).flatten(1).all(1).cpu().numpy())]
        if len(found) > 0 and (values is batch.images or len(found) < len(rows)):
            return f"patches {', '.join(map(str, found))}: {what}"
    some = ", ".join(map(str, rows[:8]))
    return f"patches of the batch: {some}, ... Lower optimizer.lr or set train.grad_clip"


def same_normalisation(path: str | Path, meta: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises CheckpointError where a checkpoint was trained on patches of another mean or spread than `expected`."""
    for name in ("mean", "std"):
        here, wanted = meta["normalisation"][name], expected[name]
        if not np.allclose(here, wanted, rtol=1e-6, atol=0):
            told = (", ".join(f"{value:.2f}" for value in values) for values in (here, wanted))
            raise CheckpointError(
                f"{path}: trained on another normalisation: {name} of the channels {' and '.join(told)}; "
                f"its answers would mean nothing here"
            )


def load_classifier(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """A model from a checkpoint alone, in eval mode, and the checkpoint's metadata.

    Raises:
        CheckpointError: damaged, or not one of ours.
    """
    tensors, meta = checkpoint.load(path)
    model = build(validate(Model, meta["model"]), meta["normalisation"])
    checkpoint.load_weights(model, checkpoint.split(tensors, "model"), path)
    return model.eval(), meta
