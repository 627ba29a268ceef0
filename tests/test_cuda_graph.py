"""What is recorded is what would have been done: with graphs that are pretended, and with real ones on a GPU."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pretended_graph
import pytest
import torch
from helpers import on_gpu, randn
from torch import Tensor

from trpo.config import Config
from trpo.config.file import parse_config
from trpo.envs.torch_classic import TASKS
from trpo.errors import EnvError
from trpo.run.messages import Messages
from trpo.runtime.cuda_graph import Recorded
from trpo.trainer import Trainer
from trpo.value import AdamFit, build_value

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
    "layers of one's own": "env: {id: CartPole-v1, num_envs: 8}"
    ", policy: {body: {name: 'bodies:convolution'}}, value: {body: {name: 'bodies:convolution'}}",
    "without graphs of the policy": "env: {id: Pendulum-v1, backend: torch, num_envs: 8}"
    ", natural_gradient: {preconditioner: kronecker}",
    "Gauss-Newton": "env: {id: Pendulum-v1, backend: torch, num_envs: 8}, value: {fit: gauss_newton}",
    "rollouts again, after a rest": "env: {id: Pendulum-v1, backend: torch, num_envs: 8}"
    ", reuse_rollouts: 2, learning_starts: 192",
}
# Of rollout, direction and epoch, where not all three are.
RECORDED = {"other environments": 2, "layers of one's own": 0, "without graphs of the policy": 2, "Gauss-Newton": 2}


DEVICE = "cpu"  # unless a test says otherwise


def config_of(text: str, device: str | None = None) -> Config:
    return parse_config(f"{{{text}, {RUN}, device: '{device or DEVICE}'}}")


def trained(text: str, root: Path, *, device: str | None = None, stops: tuple[int, ...] = ()) -> dict[str, Any]:
    """All state after a run of eight updates, stopped and resumed after so many."""
    config = config_of(text, device)
    trainer = Trainer(config, root=root, console=False)
    for stop in stops:
        path = trainer.train(max_updates=stop).directory
        trainer = Trainer(config, root=root, resume=path, console=False)
    trainer.train()
    return state_of(trainer)


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that training has changed, and what it said of itself."""
    agent, collector = trainer.agent, trainer.collector
    state: dict[str, Any] = {
        "policy": agent.policy.state_dict(),
        "value": agent.value.state_dict(),
        "fit": agent.value_fit.state_dict(),
        "agent": agent.local_state_dict(),
        "collector": collector.state_dict(),
        "obs": collector.obs,
    }
    if trainer.config.env.backend != "torch":
        state["collector"].pop("env")
    rows = (Path(trainer.run.path) / "progress.csv").read_text().splitlines()
    names = rows[0].split(",")
    metrics = [[x for name, x in zip(names, row.split(","), strict=True) if "time/" not in name] for row in rows[1:]]
    return {**state, "metrics": metrics}


def leaves(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for key in state for leaf in leaves(state[key])]
    if isinstance(state, list):
        return [leaf for part in state for leaf in leaves(part)]
    return [state.cpu()] if isinstance(state, Tensor) else [state]


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    for a, b in zip(leaves(actual), leaves(expected), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_close(actual: dict[str, Any], expected: dict[str, Any], *, rtol: float = 1e-6) -> None:
    """In what is learned, but for rounding in float64, by eight updates, which a falling pole amplifies."""
    for part in {"policy", "value", "one", "other"} & set(actual):
        for a, b in zip(leaves(actual[part]), leaves(expected[part]), strict=True):
            if isinstance(a, Tensor) and a.is_floating_point():
                torch.testing.assert_close(a, b, rtol=rtol, atol=0.01 * rtol)


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
    # In the one run, and in the second and the third part of the other, since first updates are for libraries.
    assert len(count) == 3 * RECORDED.get(name, 3)
    assert_close(recorded, plain)


def fails_and_goes_on(root: Path) -> dict[str, Any]:
    """Resumed from what an environment's failure left: with new episodes in new environments."""
    config = config_of(SETTINGS["ordinal"])
    trainer = Trainer(config, root=root, console=False)
    collect, calls = trainer.collector.collect, iter(range(9))

    def failing() -> Any:
        if next(calls) == 3:
            raise EnvError("it broke")
        return collect()

    trainer.collector.collect = failing  # type: ignore[method-assign]
    with pytest.raises(EnvError):
        trainer.train()
    again = Trainer(config, root=root, resume=trainer.run.path, console=False)
    again.train()
    return state_of(again)


def changes_its_settings(root: Path) -> dict[str, Any]:
    """Damping and learning rate are others halfway."""

    def change(trainer: Trainer, _: Any) -> None:
        if trainer.updates == 4:
            config = trainer.agent.config
            step = config.natural_gradient.model_copy(update={"damping": 0.01, "cg_iterations": 5})
            trainer.agent.config = config.model_copy(update={"natural_gradient": step})
            trainer.agent.value_fit.learning_rate = lambda progress: 1e-4  # type: ignore[attr-defined]

    trainer = Trainer(config_of(SETTINGS["gaussian"]), root=root, console=False, on_update=change)
    trainer.train()
    return state_of(trainer)


def goes_back_and_takes_turns(root: Path) -> dict[str, Any]:
    """Two trainers in turn, of which one is given its collector's state of before, again and again."""
    makers = [partial(Trainer, config_of(SETTINGS[name]), root=root, console=False) for name in ("ordinal", "gaussian")]
    one, other = (make() for make in makers)
    state: Any = None
    for i in range(8):
        if i == 4:
            state = copy.deepcopy(one.collector.state_dict())
        if i in (5, 7):
            one.collector.load_state_dict(state)
        one.iteration(), other.iteration()
    one.close(), other.close()
    return {"one": state_of(one), "other": state_of(other)}


def meets_a_rollout_that_is_not_finite(root: Path) -> dict[str, Any]:
    """A policy that diverged is put back by a caller who goes on."""
    trainer = Trainer(config_of(SETTINGS["gaussian"]), root=root, console=False)
    for i in range(6):
        if i == 4:
            theta = trainer.agent.policy.theta.vector.clone()
            trainer.agent.policy.theta.vector.fill_(torch.nan)
            with pytest.raises(EnvError, match="not finite"):
                trainer.collector.collect()
            trainer.agent.policy.theta.assign_(theta)
            trainer.collector.begin_anew(trainer.collector.env)
        trainer.iteration()
    trainer.close()
    return state_of(trainer)


def fits_batches_of_other_sizes(root: Path) -> dict[str, Any]:
    """As where rows are resets: sizes of batches and of minibatches change, and come again."""
    config = config_of(SETTINGS["ordinal"])
    device, generator = torch.device(DEVICE), torch.Generator().manual_seed(0)
    value = build_value(config, 3, generator=generator, device=device)
    fit = AdamFit(config.value.adam, value, generator=generator, learning_rate=lambda progress: 1e-3)
    for rows in (300, 300, 270, 290, 290, 290, 300, 300, 300, 270, 270):
        obs, target = randn(rows, 3, seed=rows).to(device), randn(rows, seed=rows).to(device)
        fit.fit(value, obs, target, progress=0.0)
    return {"value": value.state_dict(), "fit": fit.state_dict()}


STORIES = [
    fails_and_goes_on,
    changes_its_settings,
    goes_back_and_takes_turns,
    meets_a_rollout_that_is_not_finite,
    fits_batches_of_other_sizes,
]


@pytest.mark.parametrize("story", STORIES)
def test_recordings_do_not_go_stale(story: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        count = pretended_graph.pretend(patch)
        recorded = story(tmp_path / "recorded")
    with pytest.MonkeyPatch.context() as patch:
        pretended_graph.pretend(patch, recorded=False)
        called = story(tmp_path / "called")
    assert_same(recorded, called)
    assert count
    assert_close(recorded, story(tmp_path / "plain"))


def test_other_shapes_are_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    count = pretended_graph.pretend(monkeypatch)
    weight = torch.ones(3)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        weight.add_(1.0)
        return x * weight, x.sum()

    recorded = Recorded(function)
    for i, rows in enumerate((2, 2, 2, 2, 5, 2, 2, 2)):
        x = torch.full((rows, 3), float(i))
        product, total = recorded(x)
        assert torch.equal(product, x * (2.0 + i)) and total == x.sum()
    assert len(count) == 2


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
    patch.setattr(Messages, "say", lambda self, text: said.append(text))
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
    assert_close(there, here, rtol=1e-5)  # a GPU sums in another order


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
        pretended_graph.only_call(patch)
        assert_same(trained(text, tmp_path / "called", device="cuda"), expected)


@on_gpu
@pytest.mark.parametrize("story", STORIES)
def test_recordings_do_not_go_stale_on_a_gpu(
    story: Callable[[Path], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "DEVICE", "cuda")
    recorded = story(tmp_path / "recorded")
    pretended_graph.only_call(monkeypatch)
    assert_same(recorded, story(tmp_path / "called"))
