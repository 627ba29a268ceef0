"""All settings of a run: types, ranges, meanings, contradictions.

Every setting carries its type, range and meaning; `docs/settings.md` is generated from them. A YAML file lists only
departures from these defaults: the defaults are the recipe.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from trpo.config.schedule import (
    FractionSchedule,
    OptionSchedule,
    Schedule,
    Scheduled,
    ScheduledFraction,
    is_schedule,
    number_or_schedule,
)
from trpo.config.section import Settings, contradiction

Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)]
Activation = Literal["tanh", "relu", "elu", "silu"]


class WrapperConfig(Settings):
    name: str = Field(
        pattern=r"^[\w.]+:\w+$",
        json_schema_extra={"form": "`module:Class`"},
        description="`module:Class` of a Gymnasium wrapper.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the wrapper.")
    training_only: bool = Field(
        False, description="Left out of evaluations: for wrappers that shape rewards. Spaces have to stay the same."
    )


class EnvConfig(Settings):
    id: str = Field(min_length=1, description="Gymnasium id, or `module:Env-v0` to import the module first.")
    num_envs: int = Field(
        16,
        ge=1,
        description="Environments stepped side by side (all processes together); also the most that an evaluation runs "
        "at once.",
    )
    backend: Literal["auto", "gymnasium", "gymnasium-async", "mujoco", "envpool", "torch"] = Field(
        "auto",
        description="`gymnasium`: in this process; `gymnasium-async`: in worker processes; `mujoco`: Gymnasium's own "
        "MuJoCo tasks (v5) in threads, with the same numbers; `envpool`: in threads, by that package; `torch`: "
        "Pendulum-v1, CartPole-v1 and tasks of your own on `device`; `auto`: `mujoco` where it can, else `gymnasium`.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of `gymnasium.make`.")
    wrappers: Annotated[tuple[WrapperConfig, ...], Field(strict=False)] = Field(
        (), description="Gymnasium wrappers, innermost first."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="What every `reset` is given as its `options`. A number may be scheduled, as a curriculum: a "
        "mapping with `start` or `end` is a schedule, `{start: 0.1, end: 1.0}`, and gives floats; evaluations take "
        "its end.",
    )
    info: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (),
        description="Names of numbers in the last `info` of an episode, averaged over episodes as `rollout/info/…` and "
        "`eval/info/…`; where one is missing, the episode is left out.",
    )
    stagger: bool = Field(
        True,
        description="Truncate the first episode of each environment at a step of its own, so that episodes of one "
        "length do not run in step.",
    )
    workers: int = Field(
        0, ge=0, description="Processes of `gymnasium-async`, threads of `mujoco` and `envpool`; 0: one per core."
    )
    timeout_s: float = Field(60.0, gt=0, description="Seconds a worker may take for one step before it counts as hung.")
    on_worker_failure: Literal["fail", "restart"] = Field(
        "fail", description="What to do when a worker dies or hangs; `restart` truncates the cut episodes."
    )
    max_restarts: int = Field(3, ge=0, description="Worker restarts allowed in one run.")

    @model_validator(mode="after")
    def _options_are_values_or_schedules(self) -> Self:
        for name, value in self.options.items():
            if is_schedule(value) and not isinstance(value, Schedule):
                try:
                    OptionSchedule.model_validate(value)
                except ValidationError as error:
                    problem = error.errors()[0]
                    where = ".".join(str(part) for part in ("options", name, *problem["loc"]))
                    said = {
                        "missing": "is required: a schedule has start and end",
                        "extra_forbidden": "is no part of a schedule, which has start, end and shape",
                    }.get(problem["type"], problem["msg"].replace("Input should be", "must be"))
                    raise contradiction(where, said, against="options") from None
        return self

    @property
    def for_evaluation(self) -> EnvConfig:
        """Without the wrappers that are for training only."""
        return self.model_copy(update={"wrappers": tuple(w for w in self.wrappers if not w.training_only)})


class LearnedStdConfig(Settings):
    initial: float = Field(0.4, gt=0, description="A learned σ at the start.")
    min: float = Field(
        0.1, gt=0, description="Lower bound on a learned σ, reached smoothly: a policy without noise cannot recover."
    )
    max: float = Field(20.0, gt=0, description="Upper bound on a learned σ, reached smoothly.")
    state_dependent: bool = Field(False, description="Let the network output log σ(s).")

    @model_validator(mode="after")
    def _initial_lies_within(self) -> Self:
        if self.min >= self.max:
            raise contradiction("min", f"must be below max {self.max}, not {self.min}", against="max")
        if not self.min < self.initial < self.max:
            problem = f"must lie strictly between min {self.min} and max {self.max}, not {self.initial}"
            raise contradiction("initial", problem, against="min" if self.initial <= self.min else "max")
        return self


def _std_kind(value: object) -> str:
    learned = isinstance(value, dict) and not {"start", "end", "shape"} & value.keys()
    return "learned" if learned or isinstance(value, LearnedStdConfig) else number_or_schedule(value)


class BodyConfig(Settings):
    name: str = Field(
        pattern=r"^[\w.]+:\w+$",
        json_schema_extra={"form": "`module:callable`"},
        description="`module:callable` that makes a torch module, [B, inputs] → [B, features], when called with the "
        "number of inputs and `kwargs`: a function of each row alone, without noise or memory, twice differentiable.",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Keyword arguments of the callable.")


_BODY = Field(
    None,
    description="Layers of your own before the last one, in place of `hidden_sizes` and `activation`; null: those.",
)


class PolicyConfig(Settings):
    hidden_sizes: Sizes = Field((64, 64), description="Units of each hidden layer.")
    activation: Activation = Field("tanh", description="Hidden activation.")
    body: BodyConfig | None = _BODY
    bins: Annotated[int, Field(ge=2)] | None = Field(
        11,
        description="Values, evenly spaced between its bounds, that a component of a Box action takes: an ordinal "
        "policy. Without finite bounds, or with null, the policy is Gaussian.",
    )
    std: Annotated[
        Annotated[float, Field(gt=0), Tag("number")]
        | Annotated[Schedule, Tag("schedule")]
        | Annotated[LearnedStdConfig, Tag("learned")],
        Discriminator(_std_kind),
    ] = Field(
        LearnedStdConfig(),
        description="Standard deviation σ of a Gaussian policy: given, constant or scheduled, or learned. Of an "
        "ordinal one only `initial` counts.",
    )
    action_mask: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Key, in a Dict observation, of numbers above 0 for the choices of a Discrete or MultiDiscrete "
        "action that may be taken; others never are.",
    )
    noise_exponent: float = Field(
        0.5,
        ge=0,
        le=2,
        description="β of the spectrum 1/f^β of the action noise over a rollout: 0 is white, 1 pink.",
    )
    mean_head_scale: float = Field(0.01, gt=0, description="Gain of the orthogonal initialisation of the last layer.")


class AdamFitConfig(Settings):
    epochs: int = Field(10, ge=1, description="Passes over the batch per update.")
    minibatch_size: int = Field(
        128, ge=1, description="Samples per Adam step, at least: a batch is split into equal parts."
    )
    learning_rate: Scheduled = Field(1e-3, description="Adam step size, constant or scheduled.")


class GaussNewtonFitConfig(Settings):
    iterations: int = Field(3, ge=1, description="Gauss-Newton steps per update.")
    damping: float = Field(0.1, gt=0, description="Levenberg-Marquardt term added to JᵀJ/B.")
    cg_iterations: int = Field(15, ge=1, description="CG iterations per step.")
    backtracks: int = Field(
        5, ge=0, description="Halvings tried before a step that does not lower the loss is refused."
    )


class ValueConfig(Settings):
    hidden_sizes: Sizes = Field((64, 64), description="Units of each hidden layer.")
    activation: Activation = Field("tanh", description="Hidden activation.")
    body: BodyConfig | None = _BODY
    fit: Literal["adam", "gauss_newton"] = Field("adam", description="How V(s) is fitted to the returns.")
    adam: AdamFitConfig = AdamFitConfig()
    gauss_newton: GaussNewtonFitConfig = GaussNewtonFitConfig()
    fit_first: bool = Field(
        False,
        description="Fit V to a batch before its advantages are estimated, not after the policy's update: V keeps up "
        "with the policy, but advantages are biased, since it has seen the returns it is compared with.",
    )
    ema_decay: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="Decay, per update, of the moving average of V's parameters that estimates advantages and targets; "
        "0: V as last fitted.",
    )


class NormalizeConfig(Settings):
    observations: bool = Field(True, description="Standardise observations by running mean and variance.")
    rewards: bool = Field(True, description="Divide rewards by the running std of the discounted return.")
    clip_observations: float = Field(10.0, gt=0, description="Bound on |normalised observation|.")
    clip_rewards: float = Field(10.0, gt=0, description="Bound on |scaled reward|.")


class GaeConfig(Settings):
    gamma: ScheduledFraction = Field(
        FractionSchedule(start=0.99, end=0.995, shape="cosine"),
        description="Discount γ, constant or scheduled: near goals first, then what comes late.",
    )
    lambda_: ScheduledFraction | None = Field(
        None,
        alias="lambda",
        description="λ of the advantages, constant or scheduled: 0 is one-step TD, 1 Monte Carlo; null: in a straight "
        "line from 1 − √(1 − γ) to 1 − 2√(1 − γ), at least 0, with the γ of the first update: 0.9 → 0.8 for 0.99.",
    )
    value_lambda: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="λ of the value targets; null: 1 − ½√(1 − γ) with the γ of the first update: 0.95 for 0.99.",
    )


class LineSearchConfig(Settings):
    enabled: bool = Field(True, description="Off: the full natural-gradient step, unchecked (natural policy gradient).")
    backtracks: int = Field(10, ge=0, description="Shorter steps tried after the full one.")
    shrink: float = Field(0.8, gt=0, lt=1, description="Factor between tries.")
    accept_ratio: float = Field(0.0, ge=0, lt=1, description="Least share of the predicted improvement to accept.")


class NaturalGradientConfig(Settings):
    max_kl: Scheduled = Field(
        Schedule(start=0.0067, end=0.0034),
        description="Bound δ on the mean KL(π_old ‖ π_new), nats, constant or scheduled.",
    )
    cooldown: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Last share of the run, over which `max_kl` is also multiplied by a factor that falls from 1 to "
        "0.1: the last policy is the one that counts, and short steps take less of their noise into it.",
    )
    max_kl_per_dimension: bool = Field(
        True,
        description="Bound the joint KL by `max_kl` times the number of action dimensions, whose KLs it sums; off: by "
        "`max_kl` itself.",
    )
    damping: float = Field(1.0, ge=0, description="λ in (F + λI)x = g.")
    cg_iterations: int = Field(15, ge=1, description="Most CG iterations.")
    cg_tolerance: float = Field(1e-8, ge=0, lt=1, description="Stop when ‖residual‖ ≤ tolerance · ‖g‖.")
    preconditioner: Literal["kronecker"] | None = Field(
        None, description="Preconditioner of CG: `kronecker` comes as near (F + λI)⁻¹g with far fewer products."
    )
    line_search: LineSearchConfig = LineSearchConfig()
    abort_after: int = Field(
        10, ge=1, description="Updates in a row with NaN, infinity or negative curvature after which training gives up."
    )
    fisher_subsample: float = Field(1.0, gt=0, le=1, description="Share of the batch used for Fisher products only.")

    @model_validator(mode="after")
    def _preconditioner_is_damped(self) -> Self:
        if self.preconditioner is not None and self.damping == 0:
            problem = "must be above 0 with a preconditioner, whose factors may be singular"
            raise contradiction("damping", problem, against="preconditioner")
        return self


class EvaluationConfig(Settings):
    every_steps: int = Field(50_000, ge=0, description="Environment steps between evaluations; 0: only at the end.")
    episodes: int = Field(10, ge=1, description="Episodes of each evaluation during training, deterministic policy.")
    final_episodes: int = Field(20, ge=1, description="Episodes of the evaluation of the last policy.")
    max_episode_steps: int = Field(
        10_000, ge=1, description="Steps after which an episode is cut where the environment has no time limit."
    )
    video: bool = Field(False, description="Record the first episode of each evaluation, in the run's `videos/`.")


class CheckpointConfig(Settings):
    every_steps: int = Field(
        100_000,
        ge=0,
        description="Environment steps between checkpoints; also after any update once ten minutes have passed since "
        "the last one; 0: only at the end.",
    )
    keep: int = Field(3, ge=1, description="Newest checkpoints kept.")
    abort_after: int = Field(5, ge=1, description="Consecutive failures to save after which training gives up.")


_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def _floats(settings: Settings, prefix: str) -> Iterator[tuple[str, float]]:
    """Dotted keys and values of all settings that are floats."""
    for name, field in type(settings).model_fields.items():
        key, value = prefix + (field.alias or name), getattr(settings, name)
        if isinstance(value, Settings):
            yield from _floats(value, f"{key}.")
        elif isinstance(value, float):
            yield key, value


class Config(Settings):
    """All settings of one training run."""

    env: EnvConfig
    total_steps: int = Field(
        1_000_000, ge=1, description="Environment steps, all environments together; never exceeded."
    )
    batch_size: int = Field(
        2048, ge=2, description="Environment steps between updates, all environments together: a rollout."
    )
    reuse_rollouts: int = Field(
        0,
        ge=0,
        description="Earlier rollouts, the latest ones, that an update learns from beside the new one. Their actions "
        "count by how likely they are now against then, twice at most.",
    )
    learning_starts: int = Field(
        0,
        ge=0,
        description="Environment steps before the policy takes its first step; V and the statistics learn from what "
        "it meets until then.",
    )
    seed: int = Field(0, ge=0, description="Root of every random stream.")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        json_schema_extra={"form": "`auto`, `cpu`, `cuda` or `cuda:N`"},
        description="Where networks and update live; `auto` takes a GPU if there is one and work for it: batches of "
        "4096 steps of environments of backend `torch`, a `body`, or a hidden layer of 128 units.",
    )
    dtype: Literal["float32", "float64"] = Field("float32", description="Arithmetic of networks and update.")
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads of an update; one of them fits V while the policy takes its step (not with "
        "`value.fit_first`, several processes or a GPU). 0: one per core, at most 4, where the networks are compiled "
        "and threads change no bit; else 1.",
    )
    name: str = Field(
        "trpo",
        pattern=r"^[\w.-]+$",
        json_schema_extra={"form": "letters, digits, `_`, `.` and `-` only"},
        description="Name of the run's directory.",
    )
    policy: PolicyConfig = PolicyConfig()
    value: ValueConfig = ValueConfig()
    normalize: NormalizeConfig = NormalizeConfig()
    gae: GaeConfig = GaeConfig()
    natural_gradient: NaturalGradientConfig = NaturalGradientConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        if remainder := self.batch_size % self.env.num_envs:
            above = self.batch_size - remainder + self.env.num_envs
            problem = f"{self.batch_size} is not a multiple of env.num_envs {self.env.num_envs}; {above} is"
            raise contradiction("batch_size", problem, against="env.num_envs")
        if self.batch_size > self.total_steps:
            problem = f"{self.batch_size} is larger than total_steps {self.total_steps}: not one update fits"
            raise contradiction("batch_size", problem, against="total_steps")
        return self

    @model_validator(mode="after")
    def _numbers_are_of_the_dtype(self) -> Self:
        if self.dtype == "float32":
            for section in ("policy", "value", "normalize", "gae", "natural_gradient"):
                for key, value in _floats(getattr(self, section), f"{section}."):
                    if abs(value) > _LARGEST_FLOAT32:
                        raise contradiction(key, f"{value} is more than a float32 can be", against="dtype")
        return self

    @model_validator(mode="after")
    def _factors_are_of_known_layers(self) -> Self:
        if self.policy.body is not None and self.natural_gradient.preconditioner is not None:
            problem = "must be null with layers of your own, whose factors nobody knows"
            raise contradiction("natural_gradient.preconditioner", problem, against="policy.body")
        return self

    @property
    def rollout_length(self) -> int:
        """Time steps T per environment and update: batch_size / num_envs."""
        return self.batch_size // self.env.num_envs

    @property
    def updates(self) -> int:
        """Updates in the run. The remainder of total_steps is left out: a tiny last batch would be the noisiest."""
        return self.total_steps // self.batch_size
