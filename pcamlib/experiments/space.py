"""A search space: which settings of a recipe may vary, between which bounds, by which sampler, within which budget.

    pcamlib/spaces/NAME.yaml    base: cnn, metric: auc, sampler: {...}, pruner: {...}, phases: [...], parameters: {...}

Everything is checked before the first trial: unknown settings, bounds that the configuration refuses, a score that a
constant answer wins.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from optuna import distributions, pruners, samplers
from pydantic import BeforeValidator, Field, field_validator, model_validator

from pcamlib import config
from pcamlib.config import Config, Strict
from pcamlib.errors import ConfigError, nearest
from pcamlib.files import digest

SPACES = Path(config.__file__).parent / "spaces"
#: Settings that a phase or the study decides; a seed chosen by its score is luck, not a setting.
RESERVED = ("seed", "data.dir", "data.limit", "train.steps", "train.epochs", "train.time_limit",
            "train.evaluate_every", "train.patience", "train.select", "tracking.group")  # fmt: skip

Number = Annotated[float, BeforeValidator(lambda value: config.scalar(value) if isinstance(value, str) else value)]


class Parameter(Strict):
    """What every kind of parameter has."""

    why: str = Field("", description="why it is searched, and between these bounds; the journal quotes it")


class Real(Parameter):
    """A real number between two bounds."""

    type: Literal["float"]
    low: Number
    high: Number
    log: bool = False

    def distribution(self) -> distributions.BaseDistribution:
        """As Optuna's."""
        return distributions.FloatDistribution(self.low, self.high, log=self.log)

    def ends(self) -> list[Any]:
        """The values that bounds are tried with."""
        return [self.low, self.high]


class Integer(Parameter):
    """A whole number between two bounds."""

    type: Literal["int"]
    low: int
    high: int
    step: int = Field(1, gt=0)
    log: bool = False

    def distribution(self) -> distributions.BaseDistribution:
        """As Optuna's."""
        return distributions.IntDistribution(self.low, self.high, log=self.log, step=self.step)

    def ends(self) -> list[Any]:
        """The values that bounds are tried with."""
        return [self.low, self.high]


class Categorical(Parameter):
    """One of several values; a list counts as one value."""

    type: Literal["categorical"]
    choices: list[bool | int | float | str | list[Any] | None] = Field(min_length=2)

    @property
    def stored(self) -> list[Any]:
        """The choices as Optuna stores them, which knows no lists: those travel as JSON."""
        return [json.dumps(choice) if isinstance(choice, list) else choice for choice in self.choices]

    def distribution(self) -> distributions.BaseDistribution:
        """As Optuna's."""
        return distributions.CategoricalDistribution(self.stored)

    def ends(self) -> list[Any]:
        """The values that bounds are tried with."""
        return self.choices


class Sampler(Strict):
    """Who proposes: Optuna's defaults change between its major versions, so each choice is named."""

    name: Literal["tpe", "random"]
    startup: int = Field(5, ge=0, description="tpe: random trials before the first proposal")
    multivariate: bool = Field(True, description="tpe: settings are proposed jointly (Falkner et al. 2018)")
    candidates: int = Field(24, gt=0, description="tpe: draws of which the likeliest is proposed")

    def build(self, seed: int) -> samplers.BaseSampler:
        """Optuna's sampler; running trials count as bad ones (constant liar), so that workers do not propose alike."""
        if self.name == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(
            n_startup_trials=self.startup, multivariate=self.multivariate, group=False, constant_liar=True,
            n_ei_candidates=self.candidates, seed=seed,
        )  # fmt: skip


class Pruner(Strict):
    """Who ends a trial at one of its evaluations."""

    name: Literal["none", "median", "asha"]
    startup: int = Field(5, ge=0, description="median: trials that are never pruned")
    warmup: int = Field(1, ge=0, description="evaluations of a trial before it may be pruned")

    def build(self) -> pruners.BasePruner:
        """Optuna's pruner; the k-th evaluation of a trial is compared with the k-th of others: equal patches."""
        if self.name == "median":
            return pruners.MedianPruner(n_startup_trials=self.startup, n_warmup_steps=self.warmup + 1)
        if self.name == "asha":
            return pruners.SuccessiveHalvingPruner(min_resource=self.warmup + 1, reduction_factor=2)
        return pruners.NopPruner()


class Phase(Strict):
    """Budget of one round of trials: the first proposes `trials` of them, a later one repeats the best `keep`."""

    trials: int | None = Field(None, gt=0)
    keep: int | None = Field(None, gt=0)
    limit: int | None = Field(None, gt=0, description="train patches; None: all")
    samples: int | None = Field(None, gt=0, description="patches seen by a trial")
    steps: int | None = Field(None, gt=0)
    seconds: float | None = Field(None, gt=0)
    evaluations: int = Field(1, gt=0, description="of a trial; the pruner decides at each but the last")

    @model_validator(mode="after")
    def _is_bounded(self) -> Phase:
        if [self.samples, self.steps, self.seconds].count(None) != 2:
            raise ValueError("a phase needs one budget for each trial: samples, steps or seconds")
        if self.seconds and self.evaluations > 1:
            raise ValueError(
                "a budget in seconds has one evaluation: nobody knows beforehand at which step a part ends"
            )
        return self


class Space(Strict):
    """A whole search."""

    base: str = "cnn"
    set: dict[str, Any] = {}  # noqa: RUF012  # pydantic copies it
    metric: Literal["auc", "nll"]
    seed: int = Field(0, ge=0)
    sampler: Sampler
    pruner: Pruner
    phases: list[Phase] = Field(min_length=1)
    parameters: dict[str, Annotated[Real | Integer | Categorical, Field(discriminator="type")]] = Field(min_length=1)

    @field_validator("metric", mode="before")
    @classmethod
    def _is_honest(cls, value: Any) -> Any:
        if value in ("accuracy", "f1", "f2"):
            raise ValueError(
                "depends on a threshold of 0.5 that nobody chose, and on balanced classes the answer 'always tumour' "
                "has an F2 of 5/6: search on auc or nll, and choose the threshold afterwards"
            )
        return value

    @model_validator(mode="after")
    def _phases_follow(self) -> Space:
        first, *rest = self.phases
        if first.trials is None or first.keep or any(phase.trials or phase.keep is None for phase in rest):
            raise ValueError("the first phase names trials, each later one how many of the best it keeps")
        counts = [first.trials, *(phase.keep or 0 for phase in rest)]
        if counts != sorted(counts, reverse=True):
            raise ValueError(f"a later phase keeps at most what the one before it tried; got {counts}")
        return self

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Of the study, in Optuna's words."""
        return "maximize" if self.metric == "auc" else "minimize"

    def table(self) -> list[dict[str, Any]]:
        """One row a setting: setting, values, scale, why."""
        rows = []
        for key, parameter in self.parameters.items():
            values, scale = f"{parameter.ends()[0]} to {parameter.ends()[-1]}", "linear"
            if isinstance(parameter, Categorical):
                values, scale = ", ".join(map(str, parameter.choices)), "choice"
            elif parameter.log:
                scale = "logarithmic"
            rows.append({"setting": key, "values": values, "scale": scale, "why": parameter.why})
        return rows

    def sentence(self) -> str:
        """How the search goes, in words: sampler, pruner, score, budget of each phase."""
        tpe = f"multivariate {'yes' if self.sampler.multivariate else 'no'}, {self.sampler.startup} random trials first"
        sampler = (
            f"TPE ({tpe}, {self.sampler.candidates} candidates)" if self.sampler.name == "tpe" else "random search"
        )
        pruner = {"none": "no pruning", "median": f"median pruning after {self.pruner.startup} trials",
                  "asha": "asynchronous successive halving"}[self.pruner.name]  # fmt: skip
        phases = []
        for number, phase in enumerate(self.phases):
            budget = f"{phase.seconds} s" if phase.seconds else f"{phase.samples or phase.steps:,} "
            budget += "" if phase.seconds else "patches seen" if phase.samples else "steps"
            subset = f"the first {phase.limit:,} train patches" if phase.limit else "all train patches"
            phases.append(f"{self.total(number)} trials of {budget} each from {subset}")
        return f"{sampler}, {pruner}, on the validation {self.metric.upper()}; {', then the best '.join(phases)}."

    def distributions(self) -> dict[str, distributions.BaseDistribution]:
        """Optuna's distributions by dotted key."""
        return {key: parameter.distribution() for key, parameter in self.parameters.items()}

    def total(self, phase: int) -> int:
        """Trials of a phase."""
        return self.phases[phase].trials or self.phases[phase].keep or 0

    def draw(self, slot: int) -> samplers.BaseSampler:
        """The sampler of one trial, its seed keyed by its place.

        So random draws follow from the place alone; what TPE proposes also rests on the trials that had finished when
        it was asked, which with several workers is a matter of timing.
        """
        return self.sampler.build(int(digest([self.seed, slot])[:8], 16))

    def sized(self, *, trials: int | None = None, sampler: str | None = None, **budget: Any) -> Space:
        """A copy with another number of trials, sampler or budget of the first phase, checked again; None: as it is."""
        first = {"trials": trials, **budget}
        if {"samples", "steps", "seconds"} & first.keys():
            first = {"samples": None, "steps": None, "seconds": None, **first}
        kept = {key for key, value in first.items() if value is not None or key in ("samples", "steps", "seconds")}
        whole = self.model_dump()
        whole["phases"][0] |= {key: first[key] for key in kept}
        whole["sampler"] |= {"name": sampler} if sampler else {}
        return check(config.validate(Space, whole), "the search space")

    def config(self, parameters: dict[str, Any], phase: int) -> Config:
        """The configuration of one trial.

        Raises:
            ConfigError: these values do not fit together.
        """
        budget = self.phases[phase]
        fixed = config.parse(config.recipe(self.base), [_item(*pair) for pair in {**self.set, **parameters}.items()])
        steps = budget.steps or (budget.samples and max(1, budget.samples // fixed.loader.batch_size))
        decided: dict[str, Any] = {"seed": self.seed, "data.limit": budget.limit, "train.select": self.metric}
        decided |= {"train.patience": None, "train.time_limit": budget.seconds}
        if steps:
            decided |= {"train.steps": steps, "train.evaluate_every": -(-steps // budget.evaluations)}
        else:  # one look at the end: fast settings must not have more of them than slow ones
            decided |= {"train.epochs": None, "train.steps": None, "train.evaluate_every": 10**9}
        return fixed.override(*(_item(*pair) for pair in decided.items()))


def _item(key: str, value: Any) -> str:
    return f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def read(name: str) -> Space:
    """A space that comes with the package, by name, or one in a YAML file, by path.

    Raises:
        ConfigError: no such space, or something in it that does not fit; the message names the place.
    """
    known = {path.stem: path for path in SPACES.glob("*.yaml")}
    if not name.endswith((".yaml", ".yml")) and name not in known:
        raise ConfigError(f"unknown search space '{name}'{nearest(name, known)}; or give the path of a .yaml file")
    path = known.get(name, Path(name))
    mapping = config.read_yaml(path)
    try:
        return check(config.validate(Space, mapping), path.name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{path.name}: ')}") from None


def check(space: Space, place: str) -> Space:
    """The space itself, when every setting is known and every bound, alone and in pairs, is one a run accepts.

    Raises:
        ConfigError: the first that is not; names the setting.
    """
    known = config.keys()
    for key in [*space.set, *space.parameters]:
        if key not in known:
            raise ConfigError(f"{place}: unknown setting '{key}'{nearest(key, known)}")
        if key in RESERVED:
            raise ConfigError(f"{place}: '{key}' is decided by the phases and the study, and cannot be searched or set")
    for values in _corners(space):
        try:
            space.config(values, 0)
        except ConfigError as error:
            raise ConfigError(f"{place}: {' with '.join(values) or 'set'}: {error}") from None
    for key, parameter in space.parameters.items():
        try:
            parameter.distribution()
        except ValueError as error:
            raise ConfigError(f"{place}: {key}: {error}") from None
    return space


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """The base alone, every end of every parameter alone, and every pair of ends of two parameters."""
    yield {}
    for several in (1, 2):
        for some in itertools.combinations(space.parameters.items(), several):
            for values in itertools.product(*(parameter.ends() for _, parameter in some)):
                yield dict(zip((key for key, _ in some), values, strict=True))
