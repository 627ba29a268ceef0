"""What is recorded is what would have been done: with graphs that are pretended, and with real ones on a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pretended_graph
import pytest
import torch
from torch import Tensor

from trpo.config_file import parse_config
from trpo.cuda_graph import Recorded
from trpo.envs.torch_classic import TASKS
from trpo.trainer import Trainer

RUN = "total_steps: 1536, batch_size: 192, checkpoint: {every_steps: 0}, evaluation: {every_steps: 0, episodes: 1"
RUN += ", final_episodes: 1}, dtype: float64"  # float32 is for compiled code here
SETTINGS = {
    "ordinal": "env: {id: Pendulum-v1, backend: torch, num_envs: 8, stagger: true}"
    ", value: {adam: {learning_rate: {start: 0.001, end: 0.0002}}}",
    "categorical": "env: {id: CartPole-v1, backend: torch, num_envs: 16}, value: {adam: {minibatch_size: 50}}",
    "gaussian": "env: {id: Pendulum-v1, backend: torch, num_envs: 32}, policy: {bins: null, noise_exponent: 0.5}",
    "std given": "env: {id: Pendulum-v1, backend: torch, num_envs: 8}"
    ", policy: {bins: null, std: {start: 0.5, end: 0.2}, activation: silu}, gae: {gamma: {start: 0.9, end: 0.99}}",
    "std of the state": "env: {id: Pendulum-v1, backend: torch, num_envs: 8}"
    ", policy: {bins: null, std: {state_dependent: true}, activation: elu}",
    "other environments": "env: {id: CartPole-v1, num_envs: 8}, policy: {hidden_sizes: [16], activation: relu}",
    "without graphs of the policy": "env: {id: Pendulum-v1, backend: torch, num_envs: 8}"
    ", natural_gradient: {preconditioner: kronecker}",
    "Gauss-Newton": "env: {id: Pendulum-v1, backend: torch, num_envs: 8}, value: {fit: gauss_newton}",
}

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def trained(text: str, root: Path, *, device: str = "cpu", stops: tuple[int, ...] = ()) -> dict[str, Any]:
    """All state after a run of eight updates, stopped and resumed after so many."""
    config = parse_config(f"{{{text}, {RUN}, device: '{device}'}}")
    trainer = Trainer(config, root=root, console=False)
    for stop in stops:
        path = trainer.train(max_updates=stop).directory
        trainer = Trainer(config, root=root, resume=path, console=False)
    trainer.train()
    agent, collector = trainer.agent, trainer.collector
    state: dict[str, Any] = {
        "policy": agent.policy.state_dict(),
        "value": agent.value.state_dict(),
        "fit": agent.value_fit.state_dict(),
        "agent": agent.local_state_dict(),
        "collector": collector.state_dict(),
        "obs": collector.obs,
    }
    if config.env.backend != "torch":
        state["collector"].pop("env")
    rows = (Path(trainer.run.path) / "progress.csv").read_text().splitlines()
    names = rows[0].split(",")
    metrics = [[x for name, x in zip(names, row.split(","), strict=True) if "time/" not in name] for row in rows[1:]]
    return {**state, "metrics": metrics}


def leaves(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for key in state for leaf in leaves(state[key])]
    return [state.cpu()] if isinstance(state, Tensor) else [state]


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", SETTINGS)
def test_a_recorded_run_is_the_run(name: str, tmp_path: Path) -> None:
    # Recorded: rollout, direction and epoch; what cannot be is called, and gives the same on a CPU that knows no graphs
    # but for Adam, which is torch's own.
    with pytest.MonkeyPatch.context() as patch:
        count = pretended_graph.pretend(patch)
        recorded = trained(SETTINGS[name], tmp_path / "recorded")
        resumed = trained(SETTINGS[name], tmp_path / "resumed", stops=(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        pretended_graph.pretend(patch, recorded=False)
        called = trained(SETTINGS[name], tmp_path / "called")
    plain = trained(SETTINGS[name], tmp_path / "plain")
    assert_same(recorded, called)
    assert_same(resumed, called)
    # Of two calls, of which one was before each stop; epochs are ten an update.
    missing = {"other environments": 3, "without graphs of the policy": 3, "Gauss-Newton": 4}.get(name, 0)
    assert len(count) == 3 + 3 + 4 - missing
    for part in ("policy", "value"):
        for a, b in zip(leaves(recorded[part]), leaves(plain[part]), strict=True):
            # Eight updates of rounding in float64, which a falling pole amplifies.
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_other_shapes_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    count = pretended_graph.pretend(monkeypatch)
    weight, calls = torch.ones(3), []

    def function(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        weight.add_(1.0)
        return x * weight, x.sum()

    recorded = Recorded(function)
    for i, rows in enumerate((2, 2, 2, 2, 5, 2, 2, 2)):
        x = torch.full((rows, 3), float(i))
        product, total = recorded(x)
        assert torch.equal(product, x * (2.0 + i)) and total == x.sum()
    assert len(calls) == 2 + 1 + 2 and len(count) == 2


def test_what_waits_is_called_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended_graph.pretend(monkeypatch)
    weight = torch.ones(3)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        weight.add_(1.0)
        return (x / float(x.sum()),)

    said: list[str] = []
    recorded = Recorded(function, on_refusal=said.append)
    for i in range(1, 5):
        assert torch.equal(recorded(torch.ones(3))[0], torch.full((3,), 1 / 3))
        assert torch.equal(weight, torch.full((3,), 1.0 + i))
    assert len(said) == 1 and "not permitted" in said[0]


def a_task_that_waits(patch: pytest.MonkeyPatch) -> None:
    calm = TASKS["Pendulum-v1"]

    def advance(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert float(state[1].abs().max()) <= 8
        return calm.advance(state, action)

    patch.setitem(TASKS, "Pendulum-v1", dataclasses.replace(calm, advance=advance))


def waiting(device: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    expected = trained(SETTINGS["ordinal"], root / "calm", device=device)
    a_task_that_waits(patch)
    said: list[str] = []
    patch.setattr(Trainer, "_say", lambda self, text: said.append(text))
    assert_same(trained(SETTINGS["ordinal"], root / "waiting", device=device), expected)
    (warning,) = (text for text in said if "CUDA graph" in text)
    assert "what Pendulum-v1 does in a step cannot be recorded" in warning


def test_a_task_that_waits_is_stepped_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretended_graph.pretend(monkeypatch)
    waiting("cpu", tmp_path, monkeypatch)


@on_gpu
def test_a_task_that_waits_is_stepped_as_before_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting("cuda", tmp_path, monkeypatch)


@on_gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_a_gpu_learns_what_a_cpu_learns(name: str, tmp_path: Path) -> None:
    # The order of minibatches is drawn on the GPU: one minibatch has none, but for rounding.
    text = SETTINGS[name].replace("{adam: {", "{adam: {minibatch_size: 192, ").replace(", minibatch_size: 50", "")
    if "value:" not in text:
        text += ", value: {adam: {minibatch_size: 192}}"
    there, here = (trained(text, tmp_path / device, device=device) for device in ("cuda", "cpu"))
    for part in ("policy", "value"):
        for a, b in zip(leaves(there[part]), leaves(here[part]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)  # eight updates of rounding in float64


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_on_a_gpu_is_repeated_and_resumed_to_the_bit(name: str, dtype: str, tmp_path: Path) -> None:
    text = f"{SETTINGS[name]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "RUN", RUN.replace("float64", dtype))
        expected = trained(text, tmp_path / "expected", device="cuda")
        assert_same(trained(text, tmp_path / "again", device="cuda"), expected)
        assert_same(trained(text, tmp_path / "resumed", device="cuda", stops=(1, 3)), expected)
        patch.setattr(Recorded, "__call__", lambda self, *arguments: self.function(*arguments))
        assert_same(trained(text, tmp_path / "called", device="cuda"), expected)
