"""What a training step reads and changes, and how all of it is saved and put back bitwise."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pcamlib import provenance, seeding
from pcamlib.config import Config, Model, validate
from pcamlib.data.loader import Batch, Loader
from pcamlib.data.patches import Patches, channel_statistics, open_split
from pcamlib.errors import CheckpointError, ConfigError, DataError, RunError
from pcamlib.files import digest
from pcamlib.models import Classifier, build
from pcamlib.training import checkpoint
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


def optimizer_for(model: torch.nn.Module, config: Config) -> torch.optim.Optimizer:
    """Optimiser by name; biases and normalisation weights (one dimension) are not decayed."""
    settings = config.optimizer
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
        self.config = config
        self.device = choose_device(config.train.device)
        self.precision = choose_precision(config.train.precision, self.device)
        self.train, self.valid = open_split(folder, "train"), open_split(folder, "valid")
        _both_classes(self.valid)
        self.statistics = channel_statistics(self.train)
        self.model = build(config.model, self.statistics).to(self.device)
        self.optimizer = optimizer_for(self.model, config)
        self.loader = Loader(
            self.train,
            self.train.rows(config.data.drop, config.data.limit, config.data.clean),
            batch_size=config.loader.batch_size,
            sampler=config.loader.sampler,
            seed=config.seed,
            augmentations=config.loader.augment,
            strength=config.loader.stain_strength,
            view=self.model.view,
            device=self.device,
            pin=self.device == "cuda",
            resident=config.loader.resident,
        )
        self.progress = Progress()
        epochs = config.train.epochs
        self.total = epochs * len(self.loader) if epochs else config.train.steps

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
        }
        meta = {**self.header(), "progress": asdict(self.progress), "loader": self.loader.state_dict()}
        meta["config"] = self.config.digest()
        # JSON has no infinity: before the first evaluation there is no best score
        meta["progress"]["best"] = None if math.isinf(self.progress.best) else self.progress.best
        checkpoint.save(path, tensors, meta)

    def load(self, path: Path) -> None:
        """Put back what `save` wrote.

        Raises:
            CheckpointError: damaged, or written under another configuration.
        """
        tensors, meta = checkpoint.load(path)
        if meta.get("config") != self.config.digest():
            raise CheckpointError(f"{path}: written under another configuration than the run's config.yaml")
        checkpoint.load_weights(self.model, checkpoint.split(tensors, "model"), path)
        checkpoint.load_optimizer(self.optimizer, checkpoint.split(tensors, "optimizer"))
        seeding.set_rng_state(checkpoint.split(tensors, "rng"))
        self.loader.load_state_dict(meta["loader"])
        best = meta["progress"]["best"]
        self.progress = Progress(**{**meta["progress"], "best": -math.inf if best is None else best})

    def step(self, batch: Batch, progress: float) -> dict[str, float]:
        """One optimiser step; returns loss, learning rate and global gradient norm before clipping.

        Raises:
            RunError: the loss is not finite; names the step and the patches.
        """
        settings = self.config.train
        rate = self.config.optimizer.lr * factor(self.config.schedule.name, progress, self.config.schedule.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(batch.images)
        loss = functional.cross_entropy(logits, batch.labels, label_smoothing=settings.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        weights = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if settings.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(weights, settings.grad_clip, norm)
        value = float(loss.detach())
        if not math.isfinite(value) or not math.isfinite(float(norm)):
            rows = ", ".join(map(str, batch.rows[:8]))
            raise RunError(
                f"step {self.progress.step + 1}: loss {value}, gradient norm {float(norm)}; "
                f"patches of the batch: {rows}, ... Lower optimizer.lr or set train.grad_clip; "
                f"the last good checkpoint is kept"
            )
        self.optimizer.step()
        return {"loss": value, "lr": rate, "grad_norm": float(norm)}


def load_classifier(path: str | Path) -> tuple[Classifier, dict[str, Any]]:
    """A model from a checkpoint alone, in eval mode, and the checkpoint's metadata.

    Raises:
        CheckpointError: damaged, or not one of ours.
    """
    tensors, meta = checkpoint.load(path)
    model = build(validate(Model, meta["model"]), meta["normalisation"])
    checkpoint.load_weights(model, checkpoint.split(tensors, "model"), path)
    return model.eval(), meta
