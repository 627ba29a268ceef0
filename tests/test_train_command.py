"""The training command from end to end on a tiny run, and its answers to mistakes."""

from __future__ import annotations

import ast
import csv
import errno
import json
import math
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import PROJECT, Outcome, command, one_line, run_process, run_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trpo.command_line import CommandParser, run_command
from trpo.config.file import load_config, parse_config
from trpo.errors import UserError
from trpo.evaluation import evaluate
from trpo.run.checkpoint import checkpoint_paths
from trpo.run.saved_policy import load_policy
from trpo.runtime.random_streams import stream_seed

TINY = """\
env: {id: CartPole-v1, num_envs: 4}
total_steps: 300
batch_size: 128
policy: {hidden_sizes: [8]}
value: {hidden_sizes: [8]}
evaluation: {every_steps: 128, episodes: 2, final_episodes: 3}
"""

# As users of other libraries know them. Not in this run: train/std (discrete actions), the success rates (no report).
KNOWN_TAGS = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "time/fps",
    "time/iterations",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/learning_rate",
    "train/policy_objective",
    "train/value_loss",
    "train/kl_divergence_loss",
    "train/explained_variance",
    "train/is_line_search_success",
    "train/n_updates",
    "eval/mean_reward",
    "eval/mean_ep_length",
}
TRUST_REGION_TAGS = {
    "trust_region/expected_improvement",
    "trust_region/actual_improvement",
    "trust_region/quadratic_kl",
    "trust_region/kl",
    "trust_region/backtracks",
    "trust_region/cg_residual",
    "trust_region/cg_iterations",
    "trust_region/gradient_norm",
    "trust_region/entropy",
    "value/explained_variance_after",
    "time/rollout_s",
    "time/policy_update_s",
    "time/value_fit_s",
}


@dataclass(frozen=True)
class Trained:
    outcome: Outcome
    run: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """Two updates by the command in a process of its own."""
    root = tmp_path_factory.mktemp("train")
    (root / "tiny.yaml").write_text(TINY)
    arguments = ("--config", root / "tiny.yaml", "--root", root / "my runs", "--set", "natural_gradient.max_kl=0.02")
    outcome = run_process("train.py", *arguments, "--seed", 7, "--name", "first", "--device", "cpu")
    assert outcome.status == 0, outcome.err
    (run,) = (root / "my runs" / "CartPole-v1").iterdir()
    return Trained(outcome, run)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8") as opened:
        return [*csv.DictReader(opened)]


def test_the_runs_directory_is_as_documented(trained):
    assert trained.run.name.startswith("first-s7-")
    names = {path.name for path in trained.run.iterdir() if not path.name.startswith((".", "events.out.tfevents."))}
    assert names == {
        "config.yaml",
        "meta.json",
        "progress.csv",
        "evaluations.csv",
        "log.txt",
        "checkpoints",
        "best",
        "final",
    }
    assert len([*trained.run.glob("events.out.tfevents.*")]) == 1
    assert [path.name for path in checkpoint_paths(trained.run / "checkpoints")] == ["step-000000256"]
    config = load_config(trained.run / "config.yaml")
    assert (config.seed, config.name, config.natural_gradient.max_kl) == (7, "first", 0.02)
    assert "--seed" in json.loads((trained.run / "meta.json").read_text())["command"]


def test_tensorboard_has_the_names_users_know_and_the_trust_regions(trained):
    events = EventAccumulator(str(trained.run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= KNOWN_TAGS | TRUST_REGION_TAGS
    (config,) = events.Tensors("config/text_summary")
    assert "max_kl: 0.02" in config.tensor_proto.string_val[0].decode()
    steps = [event.step for event in events.Scalars("train/policy_objective")]
    assert steps == [128, 256]  # total_steps 300 holds two batches; a third would exceed it


def test_what_is_logged_describes_the_update_of_the_same_row(trained):
    for number, row in enumerate(rows(trained.run / "progress.csv"), start=1):
        values = {key: float(cell) for key, cell in row.items() if cell}
        assert values["env_steps"] == values["time/total_timesteps"] == 128 * number
        assert values["train/n_updates"] == number
        assert values["train/is_line_search_success"] == 1
        assert 0 < values["trust_region/kl"] <= 0.02
        assert values["trust_region/actual_improvement"] > 0
        assert 0 < values["trust_region/entropy"] <= math.log(2)


def test_the_last_evaluation_is_printed_and_can_be_repeated(trained):
    policy = load_policy(trained.run)
    assert policy.info["env_steps"] == 256
    seed = stream_seed(7, "evaluation")
    result = evaluate(policy.policy, policy.environment(), policy.action_space, episodes=3, seed=seed)
    assert f"last policy, deterministic: {result}\n" in trained.outcome.out
    said = trained.outcome.out.splitlines()[-1].partition("; evaluate it with: ")[2]
    again = subprocess.run([*shlex.split(said), "--episodes", "1"], capture_output=True, text=True, check=True)
    assert again.stdout.startswith("CartPole-v1, deterministic: return ")
    first, last = rows(trained.run / "evaluations.csv")
    assert (first["env_steps"], first["eval/episodes"]) == ("128", "2.0")
    assert (last["env_steps"], float(last["eval/mean_reward"])) == ("256", result.mean)


def test_best_is_the_policy_with_the_highest_mean(trained):
    evaluations = rows(trained.run / "evaluations.csv")
    best = max(evaluations, key=lambda row: float(row["eval/mean_reward"]))
    info = load_policy(trained.run / "best").info
    assert str(info["env_steps"]) == best["env_steps"]
    assert info["evaluation"]["eval/mean_reward"] == float(best["eval/mean_reward"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--config", "{tmp}/tinny.yaml"), "tiny.yaml"),
        (("--config", "{tmp}"), "is a directory"),
        (("--config", "{tmp}/damaged.yaml"), "damaged.yaml:1"),
        (("--config", "{tmp}/tiny.yaml", "--set", "natural_gradient.max_lk=1"), "max_kl"),
        (("--config", "{tmp}/tiny.yaml", "--set", "natural_gradient.max_kl=-1"), "natural_gradient.max_kl"),
        (("--config", "{tmp}/tiny.yaml", "--set", "batch_size"), "batch_size"),
        (("--config", "{tmp}/tiny.yaml", "--set", "seed=1", "name=b"), "b; every KEY=VALUE needs a --set of its own"),
        (("--config", "{tmp}/tiny.yaml", "--sead", "1"), "unrecognized arguments: --sead 1 (see --help)"),
        (("--config", "{tmp}/tiny.yaml", "--seed", "one"), "seed"),
        (("--config", "{tmp}/tiny.yaml", "--set", "env.id=CartPool-v1"), "CartPole-v1"),
        (("--config", "{tmp}/tiny.yaml", "--device", "cuda:99"), "cuda:99"),
        (("--config", "{tmp}/tiny.yaml", "--root", "{tmp}/tiny.yaml"), "cannot make a run"),
        (("--config", "{tmp}/tiny.yaml", "--from", "{tmp}/nowhere"), "no such file or directory"),
        (("--config", "{tmp}/tiny.yaml", "--from", str(PROJECT / "pretrained/Hopper-v5")), "it observes 11 numbers"),
        (("--config", "{tmp}/tiny.yaml", "--config", "{tmp}/tiny.yaml"), "--config was given twice"),
        (("--resume", "{tmp}"), "is not a run: it has no config.yaml"),
        ((), "--config"),
        (("--env", "CartPool-v1"), "CartPole-v1"),
        (("--env", "CartPole-v1", "--set", "total_steps=100"), "batch_size"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(arguments, problem, tmp_path, capsys, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "damaged.yaml").write_text("env: {id: [}\n")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    if "--root" not in given:
        given += ["--root", str(tmp_path / "runs")]
    outcome = run_script("train.py", *given, capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and outcome.out == ""
    assert problem in one_line(outcome.err)
    assert not (tmp_path / "runs").exists()


def test_an_environment_in_the_working_directory_is_found(tmp_path, capsys, monkeypatch):
    (tmp_path / "task_nearby.py").write_text(
        "import gymnasium\ngymnasium.register('Nearby-v0', 'gymnasium.envs.classic_control:CartPoleEnv')\n"
    )
    (tmp_path / "task.yaml").write_text(TINY.replace("CartPole-v1", "task_nearby:Nearby-v0"))
    monkeypatch.chdir(tmp_path)
    outcome = run_script(
        "train.py", "--config", "task.yaml", "--set", "total_steps=128", capture=capsys, patch=monkeypatch
    )
    assert outcome.status == 0, outcome.err
    last = outcome.out.splitlines()[-1]
    assert last.endswith("--trust-code")
    outcome = run_script(*last.split("scripts/")[1].split(), capture=capsys, patch=monkeypatch)
    assert outcome.status == 0, outcome.err


def test_an_environment_by_its_id_has_the_defaults(tmp_path, capsys, monkeypatch):
    changes = ["total_steps=128", "batch_size=64", "device=cpu"]
    short = [word for change in changes for word in ("--set", change)]
    given = ("--env", "CartPole-v1", *short, "--root", tmp_path)
    outcome = run_script("train.py", *given, capture=capsys, patch=monkeypatch)
    assert outcome.status == 0, outcome.err
    (run,) = (tmp_path / "CartPole-v1").iterdir()
    assert load_config(run / "config.yaml") == parse_config("env: {id: CartPole-v1}", overrides=changes)
    outcome = run_script("train.py", *given, "--resume", "auto", capture=capsys, patch=monkeypatch)
    assert outcome.status == 0 and "finished already" in outcome.out
    other = run_script(
        "train.py", "--env", "CartPole-v1", "--root", tmp_path, "--resume", "auto", capture=capsys, patch=monkeypatch
    )
    assert other.status == 2 and one_line(other.err).startswith("error: --env differs from the settings of")
    both = run_script(
        "train.py", "--config", run / "config.yaml", "--env", "Acrobot-v1", "--root", tmp_path, capture=capsys,
        patch=monkeypatch,
    )  # fmt: skip
    assert both.status == 0 and (tmp_path / "Acrobot-v1").is_dir()


def test_an_interrupt_while_a_command_imports_is_one_line_too() -> None:
    script = "import trpo.command_line; raise KeyboardInterrupt"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == -signal.SIGINT and one_line(done.stderr) == "interrupted"
    other = subprocess.run(
        [sys.executable, "-c", script.replace("KeyboardInterrupt", "ValueError")], capture_output=True, text=True
    )
    assert other.returncode == 1 and "Traceback" in other.stderr


@pytest.mark.parametrize("script", sorted((PROJECT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_commands_import_what_makes_that_so_before_anything_slow(script: Path) -> None:
    imports = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.ImportFrom | ast.Import)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    first = next(name for name in names if name.split(".")[0] not in sys.stdlib_module_names)
    assert first == "trpo.command_line"


def test_what_may_not_be_read_is_one_line(capsys, monkeypatch):
    def refused() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/runs/of/others")

    with pytest.raises(SystemExit, match="2"):
        run_command(refused)
    assert one_line(capsys.readouterr().err) == "error: /runs/of/others: Permission denied"

    def unspecified() -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    with pytest.raises(SystemExit, match="2"):
        run_command(unspecified)
    assert one_line(capsys.readouterr().err) == "error: libcuda.so.1: cannot open shared object file"


def test_a_command_can_do_without_its_standard_output(tmp_path: Path) -> None:
    """Where the shell closed it (`>&-`), or where it takes no ±."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["--config", tmp_path / "tiny.yaml", "--root", tmp_path]
    ascii_only = run_process("train.py", *arguments, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (ascii_only.status, ascii_only.err) == (0, "") and " ? " in ascii_only.out
    shell = f"{shlex.join(map(str, command('train.py', *arguments)))} >&-"
    closed = subprocess.run(shell, shell=True, capture_output=True, text=True, timeout=120)
    assert (closed.returncode, closed.stderr) == (0, "")


@pytest.mark.parametrize("option", ["--from", "--config", "--resume"])
def test_an_option_that_an_unset_variable_left_empty_is_not_ignored(option, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run_script("train.py", "--env", "CartPole-v1", option, "", capture=capsys, patch=monkeypatch)
    assert outcome.status == 2 and one_line(outcome.err).startswith("error: ")
    assert [*tmp_path.iterdir()] == []


def test_an_interrupted_command_says_so_in_one_line(capsys, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_command(interrupted)
    assert one_line(capsys.readouterr().err) == "interrupted"


def test_a_repeated_option_is_refused_whatever_its_value() -> None:
    parser = CommandParser()
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--set", action="append")
    assert parser.parse_args(["--episodes", "20", "--set", "a", "--set", "b"]).set == ["a", "b"]
    with pytest.raises(UserError, match="--episodes was given twice"):
        parser.parse_args(["--episodes", "20", "--episodes", "2"])
