"""What differs between configs, and which settings have no effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trpo.config import Config
from trpo.config import difference as config_difference_module
from trpo.config.difference import config_difference, without_effect
from trpo.config.file import load_config
from trpo.config.schema import branches, schema_at, words

CONFIGS = Path(__file__).parents[1] / "configs"


def config(**settings: Any) -> Config:
    return Config.model_validate({"env": {"id": "Pendulum-v1", **settings.pop("env", {})}, **settings})


def test_no_difference() -> None:
    assert config_difference(config(), config()) == []


def test_differences_name_their_key_path() -> None:
    saved = config(seed=1, natural_gradient={"max_kl": 0.01}, gae={"lambda": 0.95}, policy={"hidden_sizes": [64, 64]})
    given = config(
        seed=1,
        env={"kwargs": {"g": 9.81, "on": True}},
        natural_gradient={"max_kl": 0.02},
        gae={"lambda": 0.9},
        policy={"hidden_sizes": [64]},
    )
    assert config_difference(saved, given) == [
        "env.kwargs.g: (not set) → 9.81",
        "env.kwargs.on: (not set) → true",
        "policy.hidden_sizes: [64, 64] → [64]",
        "gae.lambda: 0.95 → 0.9",
        "natural_gradient.max_kl: 0.01 → 0.02",
    ]


def test_a_schedule_in_place_of_a_number_is_one_difference() -> None:
    scheduled = config(natural_gradient={"max_kl": {"start": 0.02, "end": 0.01}})
    constant = config(natural_gradient={"max_kl": 0.01})
    assert config_difference(constant, scheduled) == [
        'natural_gradient.max_kl: 0.01 → {"start": 0.02, "end": 0.01, "shape": "linear"}'
    ]
    other = config(natural_gradient={"max_kl": {"start": 0.02, "end": 0.001}})
    assert config_difference(scheduled, other) == ["natural_gradient.max_kl.end: 0.01 → 0.001"]


def test_true_and_one_differ() -> None:
    line = "env.kwargs.a: 1 → true"
    assert config_difference(config(env={"kwargs": {"a": 1}}), config(env={"kwargs": {"a": True}})) == [line]


# --- without effect ---


def test_defaults_and_what_counts_are_not_named() -> None:
    assert without_effect(config()) == []
    counts = config(
        env={"backend": "gymnasium-async", "workers": 2, "timeout_s": 5.0, "on_worker_failure": "restart"},
        value={"fit": "gauss_newton", "gauss_newton": {"iterations": 5}},
        natural_gradient={"line_search": {"backtracks": 3}},
    )
    assert without_effect(counts) == []


@pytest.mark.parametrize(
    ("settings", "lines"),
    [
        (
            {"value": {"gauss_newton": {"iterations": 5, "damping": 0.3}}},
            [
                'value.gauss_newton.iterations, while value.fit is "adam"',
                'value.gauss_newton.damping, while value.fit is "adam"',
            ],
        ),
        (
            {"value": {"fit": "gauss_newton", "adam": {"learning_rate": {"start": 1e-3, "end": 1e-4}}}},
            ['value.adam.learning_rate, while value.fit is "gauss_newton"'],
        ),
        (
            {"natural_gradient": {"line_search": {"enabled": False, "shrink": 0.5}}},
            ["natural_gradient.line_search.shrink, while natural_gradient.line_search.enabled is false"],
        ),
        (
            {"normalize": {"observations": False, "clip_observations": 5.0, "clip_rewards": 5.0}},
            ["normalize.clip_observations, while normalize.observations is false"],
        ),
        ({"env": {"workers": 4, "backend": "gymnasium"}}, ['env.workers, while env.backend is "gymnasium"']),
        ({"env": {"workers": 4}}, []),  # `auto` may take a backend that has some
        ({"env": {"workers": 4, "backend": "envpool"}}, []),
        (
            {"env": {"max_restarts": 9, "backend": "gymnasium-async"}},
            ['env.max_restarts, while env.on_worker_failure is "fail"'],
        ),
        (
            {"env": {"max_restarts": 9, "on_worker_failure": "restart"}},
            [
                'env.on_worker_failure, while env.backend is "auto"',
                'env.max_restarts, while env.backend is "auto"',
            ],
        ),
        (
            {"evaluation": {"every_steps": 0, "episodes": 3, "final_episodes": 3}},
            ["evaluation.episodes, while evaluation.every_steps is 0"],
        ),
    ],
)
def test_what_changes_nothing_is_named(settings: dict[str, Any], lines: list[str]) -> None:
    assert without_effect(config(**settings)) == lines


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_files_that_come_along_have_none(file: Path) -> None:
    assert without_effect(load_config(file)) == []


@pytest.mark.parametrize(("setting", "other", "values"), config_difference_module._IDLE)
def test_the_names_are_settings(setting: str, other: str, values: tuple[object, ...]) -> None:
    assert schema_at(tuple(setting.split("."))) is not None
    known = schema_at(tuple(other.split(".")))
    assert known is not None
    if values == (config_difference_module._GIVEN,):
        assert {"type": "null"} in branches(known)
    else:
        assert set(values) < set(words(known) or (True, False, 0))
