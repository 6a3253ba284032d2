"""The configuration of a run: strict, from a recipe or a YAML file, changed by `key=value` on the command line.

    pcam train --recipe cnn --data DIR optimizer.lr=1e-3 train.epochs=5

An unknown key or a wrong type is an error that names the key and the nearest known one; nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pcamlib.errors import ConfigError, nearest
from pcamlib.files import digest

T = TypeVar("T", bound=BaseModel)
RECIPES = Path(__file__).parent / "recipes"
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 1e-3 as a string


class Strict(BaseModel):
    """A frozen model without coercion and without room for unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(Strict):
    """Where the patches lie and which are left out of training."""

    dir: str | None = Field(None, description="folder with the official files; None: --data, then $PCAM_DATA")
    drop: list[Literal["nan", "range", "black", "white"]] = ["nan", "range", "black", "white"]
    limit: int | None = Field(None, gt=0, description="train on the first N valid patches only")
    raw: bool = Field(False, description="train on values as stored, NaN and 1e5 too, not on the clean uint8 copy")
    clean: bool | list[Literal["duplicates", "conflicts", "near", "leak", "labels", "poison"]] = Field(
        False, description="rules of `pcam audit` whose rows are left out; true: every rule it looked for"
    )


class Loader(Strict):
    """Batches: size, order, augmentation."""

    batch_size: int = Field(128, gt=0)
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    augment: list[Literal["d4", "stain", "shift"]] = []
    shift_pixels: int = Field(4, ge=1, le=16, description="largest move of a shifted patch, before pooling")
    stain_strength: float = Field(0.05, ge=0, le=0.5, description="of the optical-density gains and offsets")
    resident: bool = Field(False, description="keep the train patches in device memory; a batch is then an index")


class Model(Strict):
    """The network, by name; each reads the fields that concern it."""

    name: Literal["mlp", "cnn", "d4"] = "cnn"
    crop: int = Field(96, ge=32, le=96, description="side of the centre square that the network sees")
    pool: int = Field(1, ge=1, le=4, description="pixels averaged on a side before the network; must divide crop")
    hidden_units: list[int] = Field([64, 32], description="mlp: units of each hidden layer")
    dropout_rate: float = Field(0.0, ge=0, lt=1)
    width: int = Field(32, gt=0, description="cnn, d4: channels of the first stage; d4: a multiple of 8")

    views: Literal[1, 8] = Field(1, description="8: the answer is the mean over the patch's rotations and reflections")

    @model_validator(mode="after")
    def _pools_evenly(self) -> Model:
        if self.crop % self.pool:
            raise ValueError(f"model.pool={self.pool} does not divide model.crop={self.crop}")
        if self.name == "d4" and (self.width % 8 or self.crop // self.pool % 8):
            raise ValueError(
                f"model.name=d4 needs model.width and model.crop / model.pool to be multiples of 8: eight orientations "
                f"a field, three halvings of the grid; they are {self.width} and {self.crop // self.pool}"
            )
        if self.name == "d4" and self.views > 1:
            raise ValueError("model.views=8 only costs time with model.name=d4, whose answer is the same for all views")
        return self


class Optimizer(Strict):
    """Optimiser by name."""

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd and muon, with Nesterov")
    other_lr: float = Field(2e-3, gt=0, description="muon: of biases, gains and the last layer, which AdamW moves")


class Schedule(Strict):
    """Learning rate as a function of training progress (0 to 1)."""

    name: Literal["constant", "step", "cosine", "onecycle"] = "constant"
    warmup: float = Field(0.0, ge=0, lt=1, description="fraction of training with a linear rise from 0")


class Train(Strict):
    """Length, precision, checkpoints. Length is `epochs` or `steps`; `time_limit` ends earlier."""

    epochs: int | None = Field(None, gt=0)
    steps: int | None = Field(None, gt=0)
    time_limit: float | None = Field(None, gt=0, description="seconds; the schedule then follows the clock")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where AMX or a GPU runs it")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(None, gt=0, description="None: all cores this process may use")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    grad_clip: float | None = Field(None, gt=0, description="largest global gradient norm")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of the moving average of weights that is judged; 0: none")
    layer_norms: bool = Field(False, description="also log each layer's gradient norm at every step")
    checkpoint_every: int | None = Field(None, gt=0, description="steps; None: at each evaluation")
    evaluate_every: int | None = Field(None, gt=0, description="steps; None: once an epoch")
    patience: int | None = Field(None, gt=0, description="evaluations without a better score before stopping")
    select: Literal["auc", "nll"] = Field("auc", description="validation metric that chooses best.safetensors")

    @model_validator(mode="after")
    def _has_an_end(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give train.epochs or train.steps, not both")
        if self.epochs is None and self.steps is None and self.time_limit is None:
            raise ValueError("training has no end: give train.epochs, train.steps or train.time_limit")
        return self


class Tracking(Strict):
    """`metrics.jsonl` is always written; wandb is a copy."""

    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "pcam-journal"
    group: str | None = None

    @field_validator("wandb", mode="before")
    @classmethod
    def _bare_off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads off as false


class Config(Strict):
    """A whole run."""

    seed: int = Field(0, ge=0, lt=2**63)
    data: Data = Data()
    loader: Loader = Loader()
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train(epochs=1)
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _raw_stays_raw(self) -> Config:
        if self.data.raw and (self.model.pool > 1 or "stain" in self.loader.augment or self.loader.resident):
            raise ValueError(
                "data.raw=true needs model.pool=1, no stain augmentation and loader.resident=false: these count in "
                "grey levels"
            )
        return self

    def digest(self) -> str:
        """SHA-256 over everything that decides the result; where the data lie and who is told do not."""
        return digest(self.model_dump(exclude={"tracking": True, "data": {"dir"}}))

    def yaml(self) -> str:
        """The configuration as YAML text that `read_yaml` and `parse` read back to an equal object."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def override(self, *items: str) -> Config:
        """A copy with `key=value` items applied, as on the command line."""
        return parse(self.model_dump(), items)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds no mapping.
    """
    path = Path(path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(value).__name__}")
    return value


def recipe(name: str) -> dict[str, Any]:
    """The mapping of a recipe that comes with the package, by name, or of a YAML file, by path."""
    if name.endswith((".yaml", ".yml")):
        return read_yaml(name)
    known = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if name not in known:
        raise ConfigError(f"unknown recipe '{name}'{nearest(name, known)}")
    return read_yaml(known[name])


def parse(mapping: dict[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Validate a mapping, with `key=value` overrides applied first.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type, a value out of bounds.
    """
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in mapping.items()}
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"'{item}' is no override; write key=value, as in optimizer.lr=1e-3")
        section, _, field = key.rpartition(".")
        target = merged.setdefault(section, {}) if section else merged
        if not isinstance(target, dict):
            raise ConfigError(f"unknown key '{key}'{nearest(key, keys())}")
        target[field] = scalar(text)
        if key == "train.epochs":  # the two lengths exclude each other: the override wins over the recipe
            target["steps"] = None
        elif key == "train.steps":
            target["epochs"] = None
    return validate(Config, merged)


def scalar(text: str) -> Any:
    """A command-line value read as YAML, plus the float notation 1e-3 that YAML 1.1 takes for a string."""
    if _FLOAT.fullmatch(text.strip()):
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration model."""
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += keys(field.annotation, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


def validate(model: type[T], mapping: dict[str, Any]) -> T:
    """`model.model_validate` with an error for people: the key, what was wrong, the nearest key."""
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        raise ConfigError(f"unknown key '{key}'{nearest(key, keys(model))}")
    message = first["msg"].removeprefix("Value error, ")
    raise ConfigError(f"{key}={first['input']!r}: {message}" if key and first["loc"] else message)
