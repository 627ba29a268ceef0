"""The loader: what it reads, what it refuses and where, and that nothing but `ConfigError` ever comes out."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from trpo.config import Config, FractionSchedule, GaeConfig, LearnedStdConfig, PolicyConfig, Schedule, Settings
from trpo.config.file import dump_config, load_config, parse_config
from trpo.config.schema import describe, settings_table, words
from trpo.errors import ConfigError, UserError

ROOT = Path(__file__).parents[1]
ENV = "env: {id: X}\n"  # line 1 of most texts below


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, source="x.yaml", overrides=overrides)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


# Values.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1_000_000", 1_000_000),
        ("+7", 7),
        ("0", 0),
        ("-0", 0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("'on'", "on"),
        ('"010"', "010"),
        ("'None'", "None"),
        ("2020-01-01", "2020-01-01"),
        ("1:30", "1:30"),
        ("1__0", "1__0"),
        ("0.0.1", "0.0.1"),
        ("inf", "inf"),
        ("module:Class", "module:Class"),
        ("[1, [a, {b: 2.5}]]", [1, ["a", {"b": 2.5}]]),
    ],
)
def test_a_scalar_reads_as_yaml_1_2(text: str, value: object) -> None:
    read = parse_config(f"env:\n  id: X\n  kwargs:\n    k: {text}\n").env.kwargs["k"]
    assert (read, type(read)) == (value, type(value))


def test_nan_is_read_where_anything_goes() -> None:
    read = parse_config("env: {id: X, kwargs: {k: .nan}}").env.kwargs["k"]
    assert isinstance(read, float) and read != read


def test_a_file_departs_from_the_defaults_and_overrides_depart_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(
        b"\xef\xbb\xbfenv:\r\n  id: X\r\nseed: 3\r\npolicy:\r\n  hidden_sizes: [8]\r\n  activation: relu\r\n"
    )
    config = load_config(path, ["seed=4", "policy.hidden_sizes=[16, 16]", "seed=5", "gae.lambda=1", "name=a"])
    expected = Config.model_validate(
        {
            "env": {"id": "X"},
            "seed": 5,
            "policy": {"hidden_sizes": [16, 16], "activation": "relu"},
            "gae": {"lambda": 1.0},
            "name": "a",
        }
    )
    assert config == expected
    assert isinstance(config.gae.lambda_, float)


def test_a_mapping_merges_into_a_section_and_replaces_a_setting() -> None:
    text = "env: {id: X, kwargs: {a: 1}}\npolicy: {activation: relu}\nnatural_gradient: {max_kl: {start: 1, end: 2}}\n"
    overrides = ["policy={hidden_sizes: [3]}", "env.kwargs={b: 2}", "natural_gradient.max_kl={start: 3, end: 4}"]
    config = parse_config(text, overrides=overrides)
    assert (config.policy.activation, config.policy.hidden_sizes) == ("relu", (3,))
    assert config.env.kwargs == {"b": 2}
    assert config.natural_gradient.max_kl == Schedule(start=3.0, end=4.0)


def test_one_override_needs_no_list() -> None:
    assert parse_config("env: {id: A-v0}", overrides="seed=3") == parse_config("env: {id: A-v0}", overrides=["seed=3"])


def test_overrides_reach_into_a_schedule_and_free_arguments() -> None:
    text = ENV + "natural_gradient: {max_kl: 0.02}"
    overrides = ["natural_gradient.max_kl.start=1e-2", "natural_gradient.max_kl.end=1", "env.kwargs.a.b=1e-3"]
    config = parse_config(text, overrides=overrides)
    assert config.natural_gradient.max_kl == Schedule(start=0.01, end=1.0)
    assert config.env.kwargs == {"a": {"b": 0.001}}


# Errors: each with its exact line and key path.


def keys(section: type[Settings]) -> str:
    return ", ".join(field.alias or name for name, field in section.model_fields.items())


SECTION = keys(PolicyConfig)
NO_ALIAS = "anchors (&) and aliases (*) are not allowed; write the value out"
DISCOUNT = "a number in [0, 1] or a mapping {start, end, shape}"
TEXT_ERRORS = {
    "unknown key": (
        "policy:\n  hidden_size: [1]",
        "3: policy.hidden_size: unknown setting; did you mean policy.hidden_sizes?",
    ),
    "misspelt key": (
        "natural_gradient:\n\n  max_kll: 1",
        "4: natural_gradient.max_kll: unknown setting; did you mean natural_gradient.max_kl?",
    ),
    "key of another section": ("gamma: 0.9", "2: gamma: unknown setting; did you mean gae.gamma?"),
    "key of two sections": (
        "damping: 1",
        "2: damping: unknown setting; did you mean value.gauss_newton.damping or natural_gradient.damping?",
    ),
    "field name for alias": ("gae: {lambda_: 1}", "2: gae.lambda_: unknown setting; did you mean gae.lambda?"),
    "key unlike any": ("qqqqqq: 1", "2: qqqqqq: unknown setting"),
    "dotted key": ("gae.gamma: 1", '2: "gae.gamma": unknown setting; did you mean gae.gamma?'),
    "key of two lines": ('"a\\nb": 1', '2: "a\\nb": unknown setting'),
    "unknown key in schedule": (
        "natural_gradient: {max_kl: {start: 1, end: 1, shap: linear}}",
        "2: natural_gradient.max_kl.shap: unknown setting; did you mean natural_gradient.max_kl.shape?",
    ),
    "text for integer": ("seed: abc", '2: seed: must be an integer ≥ 0, not "abc"'),
    "boolean for integer": ("seed: true", "2: seed: must be an integer ≥ 0, not true"),
    "float for integer": ("seed: 1e3", "2: seed: must be an integer ≥ 0, not 1000.0; write 1000"),
    "fraction for integer": ("seed: 1.5", "2: seed: must be an integer ≥ 0, not 1.5"),
    "value below its key": ("seed:\n  abc", '2: seed: must be an integer ≥ 0, not "abc"'),
    "quoted number": ("seed: '5'", '2: seed: must be an integer ≥ 0, not "5"; remove the quotes'),
    "leading zero": ("seed: 010", '2: seed: must be an integer ≥ 0, not "010"; write 10'),
    "hexadecimal": ("seed: 0x10", '2: seed: must be an integer ≥ 0, not "0x10"; write 16'),
    "timestamp": ("seed: 2020-01-01", '2: seed: must be an integer ≥ 0, not "2020-01-01"'),
    "on": ("normalize: {rewards: on}", '2: normalize.rewards: must be true or false, not "on"; write true'),
    "no": ("normalize: {rewards: no}", '2: normalize.rewards: must be true or false, not "no"; write false'),
    "True": ("normalize: {rewards: True}", '2: normalize.rewards: must be true or false, not "True"; write true'),
    "integer for boolean": ("normalize: {rewards: 1}", "2: normalize.rewards: must be true or false, not 1"),
    "on for a number": (
        "gae: {gamma: on}",
        f'2: gae.gamma: must be {DISCOUNT}, not "on"',
    ),
    "integer for text": (
        "name: 3",
        '2: name: must be letters, digits, `_`, `.` and `-` only, not 3; quote it: "3"',
    ),
    "null": ("seed:", "2: seed: must be an integer ≥ 0, not null; leave it out for the default"),
    "None": ("seed: None", '2: seed: None is text in YAML: write null, or "None" for the text'),
    "none": ("name: none", '2: name: none is text in YAML: write null, or "none" for the text'),
    "below range": ("threads: -1", "2: threads: must be an integer ≥ 0, not -1"),
    "above range": (
        "gae:\n  gamma: 1.5",
        f"3: gae.gamma: must be {DISCOUNT}, not 1.5",
    ),
    "on an open bound": (
        "natural_gradient: {line_search: {shrink: 1}}",
        "2: natural_gradient.line_search.shrink: must be a number in (0, 1), not 1",
    ),
    "above range in a schedule": (
        "gae:\n  gamma: {start: 0.9, end: 1.1}",
        "3: gae.gamma.end: must be a number in [0, 1], not 1.1",
    ),
    "nan": (
        "gae: {gamma: .nan}",
        f"2: gae.gamma: must be {DISCOUNT}, not .nan",
    ),
    "infinite": ("policy: {mean_head_scale: .inf}", "2: policy.mean_head_scale: must be a number > 0, not .inf"),
    "more than a float32": (
        "natural_gradient: {damping: 1e39}",
        "2: natural_gradient.damping: 1e+39 is more than a float32 can be",
    ),
    "more than a float32, in a schedule": (
        "policy: {bins: null, std: {start: 1e300, end: 1}}",
        "2: policy.std.start: 1e+300 is more than a float32 can be",
    ),
    "overflow": ("policy: {mean_head_scale: 1e999}", "2: policy.mean_head_scale: 1e999 is too large for a number"),
    "long number": ("seed: " + "9" * 5000, "2: seed: a number of 5000 digits is too long"),
    "not one of": (
        "value: {fit: addam}",
        '2: value.fit: must be one of adam, gauss_newton, not "addam"; did you mean adam?',
    ),
    "number for one of": ("value: {fit: 3}", "2: value.fit: must be one of adam, gauss_newton, not 3"),
    "pattern": ("device: gpu", '2: device: must be `auto`, `cpu`, `cuda` or `cuda:N`, not "gpu"'),
    "item of list": (
        "policy:\n  hidden_sizes:\n  - 64\n  - 0",
        "5: policy.hidden_sizes[1]: must be an integer ≥ 1, not 0",
    ),
    "scalar for list": (
        "policy: {hidden_sizes: 64}",
        "2: policy.hidden_sizes: must be a list, each an integer ≥ 1, not 64",
    ),
    "scalar for section": ("policy: 3", f"2: policy: is a section ({SECTION}), not 3"),
    "empty section": ("policy:\n", f"2: policy: is a section ({SECTION}), not null"),
    "schedule of text": (
        "natural_gradient: {max_kl: fast}",
        '2: natural_gradient.max_kl: must be a number > 0 or a mapping {start, end, shape}, not "fast"',
    ),
    "schedule below range": (
        "natural_gradient: {max_kl: 0}",
        "2: natural_gradient.max_kl: must be a number > 0 or a mapping {start, end, shape}, not 0",
    ),
    "half a schedule": (
        "natural_gradient:\n  max_kl: {start: 1}",
        "3: natural_gradient.max_kl.end: is required: a number > 0",
    ),
    "schedule's end": (
        "value:\n  adam:\n    learning_rate:\n      start: 1\n      end: -1",
        "6: value.adam.learning_rate.end: must be a number > 0, not -1",
    ),
    "duplicate key": ("seed: 1\nseed: 1", "3: seed: given twice; the first is on line 2"),
    "duplicate key below": (
        "gae:\n  gamma: 1\n  lambda: 1\n  'gamma': 1",
        "5: gae.gamma: given twice; the first is on line 3",
    ),
    "batch does not divide": ("batch_size: 2050", "2: batch_size: 2050 is not a multiple of env.num_envs 16; 2064 is"),
    "batch above total": (
        "total_steps: 100",
        "2: batch_size: 2048 is larger than total_steps 100: not one update fits",
    ),
    "std outside its bounds": (
        "policy:\n  std: {initial: 0.6, max: 0.5}",
        "3: policy.std.initial: must lie strictly between min 0.1 and max 0.5, not 0.6",
    ),
    "std bounds crossed": ("policy: {std: {min: 30}}", "2: policy.std.min: must be below max 20.0, not 30.0"),
    "a preconditioner without damping": (
        "natural_gradient:\n  preconditioner: kronecker\n  damping: 0",
        "4: natural_gradient.damping: must be above 0 with a preconditioner, whose factors may be singular",
    ),
    "std both scheduled and learned": (
        "policy:\n  std:\n    start: 0.3\n    end: 0.1\n    min: 0.2",
        "6: policy.std.min: belongs to another form of this setting than the keys beside it: keep one form",
    ),
    "misspelt in a choice of three": (
        "policy: {std: {initail: 1}}",
        "2: policy.std.initail: unknown setting; did you mean policy.std.initial?",
    ),
    "key named like a branch of the choice": (
        "policy:\n  std:\n    learned: true",
        "4: policy.std.learned: unknown setting; did you mean policy.std.end?",
    ),
    "factors to zero": (
        "gae:\n  lambda:\n    start: 0.9\n    end: 0\n    shape: geometric",
        "5: gae.lambda.end: must be above 0 for shape geometric: no factors lead there",
    ),
    "a choice of three": (
        "policy: {std: wide}",
        "2: policy.std: must be a number > 0 or a mapping {start, end, shape} or a mapping {initial, min, max, "
        'state_dependent}, not "wide"',
    ),
    "inside a choice of three": (
        "policy:\n  std: {start: 0, end: 1}",
        "3: policy.std.start: must be a number > 0, not 0",
    ),
    "several": ("threads: -1\nseed: -1\nfoo: 1", "2: threads: must be an integer ≥ 0, not -1 (and 2 more)"),
    "syntax": ("seed: 1: 2", "2: is not valid YAML: mapping values are not allowed here"),
    "tab": (
        "gae:\n\tgamma: 1",
        "3: is not valid YAML: while scanning for the next token, found character '\\t' that cannot start any token; "
        "indent with spaces",
    ),
    "control character": ("seed: 1\x00", "2: is not valid YAML: character U+0000 is not allowed"),
    "second document": (
        "---\nseed: 1",
        "2: is not valid YAML: expected a single document in the stream, but found another document",
    ),
    "anchor": ("gae: &a {gamma: 1}", f"2: gae: {NO_ALIAS}"),
    "alias": ("name: *a", f"2: name: {NO_ALIAS}"),
    "tag": ("name: !!str 1", "2: name: tags (tag:yaml.org,2002:str) are not allowed; write a plain value"),
    "local tag": ("gae:\n  gamma: !x 1", "3: gae.gamma: tags (!x) are not allowed; write a plain value"),
    "merge key": ("gae:\n  <<: {gamma: 1}", "3: gae: merge keys (<<) are not allowed; write the values out"),
    "key is a number": ("gae: {1: 1}", '2: gae: a key must be text; quote it: "1"'),
    "key is a list": ("gae: {? [a] : 1}", "2: gae: a key must be text, not a list or a mapping"),
}


@pytest.mark.parametrize("name", TEXT_ERRORS)
def test_error_in_a_file(name: str) -> None:
    text, message = TEXT_ERRORS[name]
    assert error_of(ENV + text) == "x.yaml:" + message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml: is empty; at least env.id is needed"),
        ("# nothing\n---\n", "x.yaml: is empty; at least env.id is needed"),
        ("\n- 1", "x.yaml:2: must be a mapping of settings, not [1]"),
        ("abc", 'x.yaml:1: must be a mapping of settings, not "abc"'),
        ("{}", "x.yaml: env.id: is required: text that is not empty"),
        ("seed: 1\nenv: {}", "x.yaml:2: env.id: is required: text that is not empty"),
        ("env: {id: ''}", 'x.yaml:1: env.id: must be text that is not empty, not ""'),
        ("seed: 1\nenvv: {id: X}", "x.yaml:2: envv: unknown setting; did you mean env? (and 1 more)"),
        ("env:\n  id: X\n  num_envs: 3", "x.yaml:3: batch_size: 2048 is not a multiple of env.num_envs 3; 2049 is"),
        (
            "env:\n  id: X\n  kwargs:\n    k: on",
            'x.yaml:4: env.kwargs.k: on is text in YAML: write true, or "on" for the text',
        ),
        (
            "env: {id: X, kwargs: {k: [0x10]}}",
            'x.yaml:1: env.kwargs.k[0]: 0x10 is text in YAML: write 16, or "0x10" for the text',
        ),
        (
            "env:\n  id: X\n  wrappers:\n  - nam: a:B",
            "x.yaml:4: env.wrappers[0].nam: unknown setting; did you mean env.wrappers[0].name? (and 1 more)",
        ),
        ("env: {id: X, wrappers: [{name: B}]}", 'x.yaml:1: env.wrappers[0].name: must be `module:Class`, not "B"'),
    ],
)
def test_error_in_a_whole_file(text: str, message: str) -> None:
    assert error_of(text) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write it as key.path=value"),
        ("seed=-1", "seed: must be an integer ≥ 0, not -1"),
        ("seed=", "seed: must be an integer ≥ 0, not null; leave it out for the default"),
        ("sed=3", "sed: unknown setting; did you mean seed?"),
        ("seed.x=3", "seed.x: unknown setting; did you mean seed?"),
        (
            "natural_gradient.max_kll=1",
            "natural_gradient.max_kll: unknown setting; did you mean natural_gradient.max_kl?",
        ),
        ("=3", '"": unknown setting'),
        ("policy=3", f"policy: is a section ({SECTION}), not 3"),
        ("gae={gama: 1}", "gae.gama: unknown setting; did you mean gae.gamma?"),
        ("gae={gamma: 1, gamma: 1}", "gae.gamma: given twice; the first is on line 1"),
        ("policy.std.start=1", "policy.std.end: is required: a number > 0"),
        (
            "seed=[1",
            "seed: is not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'",
        ),
        ("env.wrappers.0.name=a:B", "env.wrappers: is a list: give the whole of it"),
        ("env.wrappers[0].name=a:B", "env.wrappers: is a list: give the whole of it"),
        ("policy.hidden_sizes[1]=32", "policy.hidden_sizes: is a list: give the whole of it"),
        ("seed[0]=3", '"seed[0]": unknown setting; did you mean seed?'),
        ("env.kwargs.k=off", 'env.kwargs.k: off is text in YAML: write false, or "off" for the text'),
        ("batch_size=33", "batch_size: 33 is not a multiple of env.num_envs 16; 48 is"),
        (
            "name=!!python/name:os.system",
            "name: tags (tag:yaml.org,2002:python/name:os.system) are not allowed; write a plain value",
        ),
    ],
)
def test_error_in_an_override(override: str, message: str) -> None:
    assert error_of(ENV, override) == f"override {override}: {message}"


def test_an_override_of_one_number_of_a_schedule_leaves_the_others() -> None:
    config = parse_config(ENV, overrides=["natural_gradient.max_kl.start=0.1", "gae.gamma.shape=linear"])
    assert config.natural_gradient.max_kl == Schedule(start=0.1, end=0.0034)
    assert config.gae.gamma == FractionSchedule(start=0.99, end=0.995)
    text = ENV + "natural_gradient: {max_kl: {start: 0.03, end: 0.02, shape: cosine}}\n"
    given = parse_config(text, overrides=["natural_gradient.max_kl.end=0.01"])
    assert given.natural_gradient.max_kl == Schedule(start=0.03, end=0.01, shape="cosine")


def test_an_override_does_not_hide_a_broken_section() -> None:
    expected = f"x.yaml:2: gae: is a section ({keys(GaeConfig)}), not null"
    assert error_of(ENV + "gae:\n", "gae.gamma=1") == expected


@pytest.mark.parametrize(
    ("text", "override", "problem"),
    [
        (  # the file's initial is gone with the rest of its mapping
            "policy: {std: {initial: 0.6, min: 0.05}}",
            "policy.std={min: 0.7}",
            "policy.std.initial: must lie strictly between min 0.7 and max 20.0, not 0.4",
        ),
        ("gae: {gamma: 0.9}", "gae.gamma.end=0.998", "gae.gamma.start: is required: a number in [0, 1]"),
    ],
)
def test_what_an_override_puts_in_the_place_of_a_files_value_is_the_overrides(
    text: str, override: str, problem: str
) -> None:
    assert error_of(ENV + text, override) == f"override {override}: {problem}"


@pytest.mark.parametrize("text", ["[" * 10_000, "a: " + "[" * 10_000, "{a: " * 10_000, "- " * 10_000, "? " * 10_000])
def test_deep_nesting_is_an_error_like_any_other(text: str) -> None:
    assert "nested more than 32 levels deep" in error_of(text)
    assert "nested more than 32 levels deep" in error_of(ENV, "env.kwargs=" + text)
    assert "unknown setting" in error_of(ENV, "env.kwargs." + "a." * 10_000 + "a=1")


def test_an_alias_bomb_is_refused_before_it_grows() -> None:
    rows = ["env: &l0 {id: X}"] + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert error_of("\n".join(rows)) == f"x.yaml:1: env: {NO_ALIAS}"


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir"])
def test_a_python_tag_runs_nothing(tag: str, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    message = error_of(f"env: {{id: X, kwargs: {{k: {tag} ['{trap}']}}}}")
    assert message.startswith("x.yaml:1: env.kwargs.k: tags (tag:yaml.org,2002:python/object/")
    assert not trap.exists()


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pendulum.yaml").write_text(ENV)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")

    def message(path: Path | str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        return str(caught.value)

    missing = tmp_path / "pendulm.yaml"
    assert message(missing) == f"{missing}: no such file; did you mean {tmp_path / 'pendulum.yaml'}?"
    assert message(tmp_path / "pong.yaml") == f"{tmp_path / 'pong.yaml'}: no such file"  # though most of the path is
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert message("hopper") == f"hopper: no such file; did you mean {Path('configs', 'hopper.yaml')}?"
    assert message(tmp_path) == f"{tmp_path}: is a directory; name a YAML file"
    assert message(tmp_path / "latin.yaml").endswith("latin.yaml: is not UTF-8 text (byte 0xe9 at offset 9)")
    assert message(tmp_path / "pendulum.yaml" / "x").endswith("cannot be read: Not a directory")
    assert "cannot be read" in message("a\0b")


def test_numbers_of_numpy_are_numbers() -> None:
    given = {"env": {"id": "X", "num_envs": np.int64(8)}, "seed": np.arange(4)[3], "gae": {"gamma": np.float64(0.9)}}
    config = Config.model_validate(given)
    assert (config.env.num_envs, config.seed, config.gae.gamma) == (8, 3, 0.9)
    assert (type(config.env.num_envs), type(config.seed), type(config.gae.gamma)) == (int, int, float)
    assert Config(env={"id": "X"}, seed=np.int32(3)) == Config(env={"id": "X"}, seed=3)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="seed"):
        Config.model_validate(given | {"seed": np.float64(3)})  # as of a float of Python


def test_the_models_alone_refuse_contradictions() -> None:
    with pytest.raises(ValidationError, match=r"batch_size: 2050 is not a multiple of env\.num_envs 16"):
        Config.model_validate({"env": {"id": "X"}, "batch_size": 2050})
    with pytest.raises(ValidationError, match="initial: must lie strictly between"):
        LearnedStdConfig(initial=0.007)


# Properties.

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
share = st.floats(min_value=0, max_value=1)
schedule = st.builds(dict, start=positive, end=positive, shape=st.sampled_from(["linear", "cosine", "geometric"]))
AWKWARD = [
    "on",
    "No",
    "none",
    "None",
    "null",
    "010",
    "1e-3",
    "0x10",
    "1:30",
    "<<",
    "=",
    "~",
    "- a",
    "a: b",
    "#",
    "",
    "\x85",
]
awkward = st.sampled_from(AWKWARD)
free = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | awkward,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text() | awkward, below, max_size=3),
    max_leaves=8,
)
free_mapping = st.dictionaries(st.text() | awkward, free, max_size=3)
learned_std = st.builds(dict, min=st.floats(1e-300, 0.3), state_dependent=st.booleans())
wrapper = st.fixed_dictionaries({"name": st.just("some.module:Class")}, optional={"kwargs": free_mapping})
environment = st.fixed_dictionaries(
    {"id": st.text(min_size=1) | awkward.filter(bool), "num_envs": st.sampled_from([1, 2, 8])},
    optional={"kwargs": free_mapping, "wrappers": st.lists(wrapper, max_size=2), "timeout_s": positive},
)
configs = st.fixed_dictionaries(
    {"env": environment, "dtype": st.just("float64")},  # in which every float is a number
    optional={
        "seed": st.integers(min_value=0, max_value=10**300),
        "name": st.from_regex(r"[A-Za-z0-9_.-]+", fullmatch=True),
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
        "policy": st.builds(
            dict, hidden_sizes=st.lists(st.integers(min_value=1)), std=positive | schedule | learned_std, bins=st.none()
        ),
        "gae": st.builds(lambda gamma, lambda_: {"gamma": gamma, "lambda": lambda_}, share, share),
        "natural_gradient": st.builds(dict, max_kl=positive | schedule, damping=positive),
        "normalize": st.builds(dict, rewards=st.booleans(), clip_rewards=positive),
    },
).map(Config.model_validate)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_config_to_yaml_to_config_is_exact(config: Config) -> None:
    # repr, not ==: it tells 1 from 1.0 and -0.0 from 0.0, shows every bit of a float, and a NaN equals itself.
    assert repr(parse_config(dump_config(config))) == repr(config)


@settings(max_examples=60, deadline=None)
@given(configs)
def test_other_yaml_readers_see_the_same_values(config: Config) -> None:
    def lists(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: lists(item) for key, item in value.items()}
        return [lists(item) for item in value] if isinstance(value, list | tuple) else value

    assert repr(yaml.safe_load(dump_config(config))) == repr(lists(config.model_dump(by_alias=True)))


@pytest.mark.parametrize("text", AWKWARD)
def test_text_that_looks_like_something_else_stays_text(text: str) -> None:
    config = Config.model_validate({"env": {"id": "X", "kwargs": {text: text, "list": [text]}}})
    assert parse_config(dump_config(config)) == config


def test_a_value_that_yaml_cannot_hold_is_refused_by_its_path() -> None:
    config = parse_config(ENV).model_copy(deep=True)
    config.env.kwargs["k"] = [1, {2, 3}]
    with pytest.raises(
        ConfigError, match=r"^config: env\.kwargs\.k\[1\]: a value of type set cannot be written as YAML$"
    ):
        dump_config(config)


FRAGMENTS = [
    *("env", "id", "X", "seed", "natural_gradient", "max_kl", "start", "policy", "hidden_sizes", ": ", ":"),
    *("\n", "\n  ", "- ", "[", "]", "{", "}", ", ", "? ", "|", ">", "#", "'", '"', "\\", "\\U", "\\x", "\t"),
    *("&a ", "*a", "!!int ", "!", "<<", "%YAML 1.1\n", "%TAG ! !", "---\n", "...", "\ufeff", "\x85", "\ud800"),
    *("null", "None", "0x1", ".nan", "1e9", "9" * 30),
]
tokens = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


def config_or_message(text: str, overrides: list[str]) -> Config | str:
    try:
        return parse_config(text, overrides=overrides)
    except ConfigError as error:
        return str(error)


@settings(max_examples=400, deadline=None)
@given(st.text() | tokens, st.lists(st.text() | tokens.map(lambda text: "policy=" + text), max_size=2))
@example('env: {id: X}\nname: "\\UFFFFFFFF"', [])
@example("%YAML " + "9" * 5000 + ".1\n---\nseed: 1", [])
@example('{"\\uD800": 1}', [])
@example("env: {id: '\u2028'}", ["seed=\u2028"])
def test_any_text_gives_a_config_or_one_line(text: str, overrides: list[str]) -> None:
    for given_overrides in ([], overrides):
        outcome = config_or_message(text, given_overrides)
        assert isinstance(outcome, Config) or len(outcome.splitlines()) == 1


@settings(max_examples=50, deadline=None)
@given(st.text() | tokens, st.sampled_from(["policy", "env.kwargs", "env.kwargs.a", "natural_gradient.max_kl", "seed"]))
def test_any_override_gives_a_config_or_one_line(value: str, key: str) -> None:
    outcome = config_or_message(ENV, [f"{key}={value}"])
    assert isinstance(outcome, Config) or len(outcome.splitlines()) == 1


# The page of settings.


def test_the_table_lists_every_setting_with_its_range_and_default() -> None:
    table = settings_table()

    def leaves(data: dict[str, Any], path: str = "") -> list[str]:
        return [
            leaf
            for key, value in data.items()
            for leaf in (leaves(value, f"{path}{key}.") if isinstance(value, dict) and value else [path + key])
        ]

    for leaf in leaves(parse_config(ENV).model_dump(by_alias=True)):
        assert f"\n| `{leaf}` | " in table
    assert "\n| `gae.value_lambda` | a number in [0, 1] or null | `null` | " in table
    assert (
        "\n| `natural_gradient.max_kl` | a number > 0 or a mapping {start, end, shape} | "
        "`{start: 0.0067, end: 0.0034, shape: linear}` | "
    ) in table
    assert "\n| `env.id` | text that is not empty | required | " in table
    assert all(row.replace(r"\|", "").count("|") == 5 and not row.endswith("|  |") for row in table.splitlines())


def test_a_choice_that_may_be_null_is_described_by_its_words() -> None:
    # As pydantic writes `Literal["a"] | None` and `Literal["a", "b"] | None`.
    one = {"anyOf": [{"const": "a", "type": "string"}, {"type": "null"}]}
    two = {"anyOf": [{"enum": ["a", "b"], "type": "string"}, {"type": "null"}]}
    assert (describe(one), words(one)) == ("a or null", ["a"])
    assert (describe(two), words(two)) == ("one of a, b or null", ["a", "b"])


def test_the_settings_in_docs_and_readme_are_current_and_staleness_is_noticed(tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))["main"]
    main(["--check"])
    copy, arguments = tmp_path / "README.md", ["--root", str(tmp_path)]
    copy.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(UserError, match=r"settings\.md: out of date"):
        main(["--check", *arguments])
    main(arguments)
    main(["--check", *arguments])
    for page in (copy, tmp_path / "docs" / "settings.md"):
        good = page.read_text(encoding="utf-8")
        page.write_text(good.replace("`0.8`", "`0.96`"), encoding="utf-8")
        with pytest.raises(UserError, match=rf"{page.name}: out of date; run python scripts/settings_table\.py"):
            main(["--check", *arguments])
        page.write_text(good, encoding="utf-8")
