"""Our side of the speed benchmark."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from gymnasium.spaces import Box

from trpo.benchmark.floor import matmul_rate, update_flops
from trpo.benchmark.work import (
    BATCH,
    CG_ITERATIONS,
    CRITIC_EPOCHS,
    DAMPING,
    GAMMA,
    HIDDEN,
    LAMBDA,
    LEARNING_RATE,
    MAX_KL,
    MINIBATCH,
    UPDATE_ENVS,
    UPDATE_TASK,
    Numbers,
    iterations,
    medians,
    repeat,
    seconds,
)
from trpo.config import Config, NaturalGradientConfig
from trpo.envs.contract import BatchEnv
from trpo.natural_gradient import trust_region_step
from trpo.run.directory import find_run
from trpo.runtime.timers import PhaseTimers
from trpo.trainer import Trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "plain 50": {"cg_iterations": 50},
    "preconditioned 5": {"cg_iterations": 5, "preconditioner": "kronecker"},
}


class Ours:
    """This package, driven as `scripts/train.py` drives it, run directory and metrics included."""

    def __init__(self) -> None:
        self._threads = torch.get_num_threads()
        self._update: _Update | None = None

    def update(self, *, repeats: int) -> Numbers:
        """One whole update, its phases, and the policy part again with each of `VARIANTS`.

        `…_gain` is the improvement predicted at the bound: what a nearer natural gradient has more of.
        """
        if self._update is None:
            self._update = _Update(_config(UPDATE_TASK, {"num_envs": UPDATE_ENVS}))
        return self._update.measure(repeats, variants=True)

    def train(
        self, *, task: str, setup: dict[str, Any], steps: int, recipe: bool = False, random: bool = False
    ) -> Numbers:
        """With `random` also the rate of random stepping through `BatchEnv`, right after it on the same environments:
        actions uniform in their bounds, drawn beforehand."""
        environments = {key: value for key, value in setup.items() if key != "threads"}
        make_config = _defaults if recipe else _config
        with temporary_trainer(make_config(task, environments, threads=setup.get("threads", self._threads))) as trainer:
            trainer.iteration()
            before = trainer.env_steps  # counted there: envpool's resets are rows of a batch, but no steps
            took = seconds(lambda: repeat(trainer.iteration, iterations(steps)))
            rate = (trainer.env_steps - before) / took
            assert trainer.env is not None
            stepping = {"random_steps_per_s": _random_rate(trainer.env, steps)} if random else {}
        return {"steps_per_s": rate, **stepping}

    def rollout(self, *, envs: int, steps: int) -> Numbers:
        """Rollouts of one number of environments, without updates, against random stepping of the same ones."""
        config = _config(UPDATE_TASK, {"num_envs": envs})
        with temporary_trainer(config) as trainer:
            trainer.iteration()
            count = iterations(steps)
            took = seconds(lambda: repeat(trainer.collector.collect, count))
            assert trainer.env is not None
            return {"steps_per_s": count * BATCH / took, "random_steps_per_s": _random_rate(trainer.env, steps)}

    def scaling(self, *, batch: int, hidden: int, repeats: int) -> Numbers:
        """Policy and value part of one update, and the floor under the policy part."""
        config = _config(UPDATE_TASK, {"num_envs": 16}, batch=batch, hidden=hidden)
        rate = matmul_rate(hidden, batch)
        update = _Update(config)
        measured = update.measure(repeats, variants=False)
        sizes = [update.obs_dim, hidden, hidden, update.action_dim]
        flops = update_flops(
            sizes, batch, cg_iterations=int(measured["cg_iterations"]), evaluations=int(measured["evaluations"])
        )
        return {**measured, "flops": flops, "flops_per_s": rate, "floor_s": flops / rate}


class _Update:
    """One rollout, and updates on it from the same state again and again."""

    def __init__(self, config: Config):
        with temporary_trainer(config) as trainer:
            trainer.iteration()  # a normaliser that has seen data, a value function that has been fitted
            self.agent = trainer.agent
            self.rollout, _ = trainer.collector.collect()
        self.obs_dim = self.rollout.obs.shape[-1]
        self.action_dim = self.rollout.action.shape[-1]
        self._state = copy.deepcopy((self.agent.state_dict(), self.agent.local_state_dict()))
        self._timers = PhaseTimers()

    def measure(self, repeats: int, *, variants: bool) -> Numbers:
        def sample() -> Numbers:
            numbers = self._once()
            for name, change in VARIANTS.items() if variants else ():
                numbers |= self._variant(name, self.agent.config.natural_gradient.model_copy(update=change))
            return numbers

        sample()  # warms up
        return medians([sample() for _ in range(repeats)])

    def _once(self) -> Numbers:
        self._restore()
        start = time.perf_counter()
        report = self.agent.update(self.rollout, progress=0.0, timers=self._timers)
        whole = time.perf_counter() - start
        phases = self._timers.pop()
        step = report.step
        return {
            "whole_s": whole,
            "policy_s": phases["policy_update"],
            "value_s": phases["value_fit"],
            "accepted": float(step.accepted),
            "gain": step.expected_gain / step.scale if step.accepted else 0.0,
            "cg_iterations": step.cg.iterations if step.cg else 0,
            "evaluations": step.search.tries if step.search else 0,
        }

    def _variant(self, name: str, settings: NaturalGradientConfig) -> Numbers:
        self._restore()
        batch, _, _ = self.agent.prepare(self.rollout, progress=0.0)
        start = time.perf_counter()
        step = trust_region_step(
            self.agent.policy, batch, max_kl=MAX_KL, settings=settings, generator=self.agent.fisher_generator
        )
        took = time.perf_counter() - start
        return {f"{name}_s": took, f"{name}_gain": step.expected_gain / step.scale if step.accepted else 0.0}

    def _restore(self) -> None:
        shared, local = copy.deepcopy(self._state)
        self.agent.load_state_dict(shared)
        self.agent.load_local_state_dict(local)


def _config(
    task: str, environments: dict[str, Any], *, threads: int = 1, batch: int = BATCH, hidden: int = HIDDEN
) -> Config:
    return Config.model_validate(
        {
            "env": {"id": task, **environments},
            "total_steps": 10**9,
            "batch_size": batch,
            "device": "cpu",
            "threads": threads,
            "policy": {"hidden_sizes": [hidden, hidden], "bins": None},  # Gaussian, as everyone's
            "value": {
                "hidden_sizes": [hidden, hidden],
                "adam": {"epochs": CRITIC_EPOCHS, "minibatch_size": MINIBATCH, "learning_rate": LEARNING_RATE},
            },
            "gae": {"gamma": GAMMA, "lambda": LAMBDA},
            "natural_gradient": {
                "max_kl": MAX_KL,
                "max_kl_per_dimension": False,
                "cooldown": 0.0,
                "damping": DAMPING,
                "cg_iterations": CG_ITERATIONS,
                "cg_tolerance": 0.0,  # all iterations, as everyone here
            },
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
        }
    )


def _defaults(task: str, environments: dict[str, Any], *, threads: int) -> Config:
    """What `scripts/train.py` runs, but for evaluations and checkpoints."""
    return Config.model_validate(
        {
            "env": {"id": task, **environments},
            "total_steps": 10**9,
            "device": "cpu",
            "threads": threads,
            "evaluation": {"every_steps": 0},
            "checkpoint": {"every_steps": 0},
        }
    )


@contextmanager
def temporary_trainer(config: Config) -> Iterator[Trainer]:
    with (
        tempfile.TemporaryDirectory() as root,
        closing(Trainer(config, root=root, console=False)) as trainer,
        trainer.torch_for_training(),
    ):
        yield trainer


def trained(config: Config, root: Path) -> Trainer:
    """A trainer at the end of its run, the one of that config under `root` or a new one."""
    if find_run(root, config) is None:
        Trainer(config, root=root).train()
    return Trainer(config, root=root, resume=find_run(root, config), console=False)


def _random_rate(env: BatchEnv, steps: int) -> float:
    space = env.single_action_space
    assert isinstance(space, Box), "the tasks of this benchmark have bounded continuous actions"
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    count = -(-steps // env.num_envs)
    actions = low + (high - low) * torch.rand(count, env.num_envs, *space.shape)
    valid = torch.empty(count, env.num_envs, dtype=torch.bool, device=env.device)
    env.reset()

    def act(some: torch.Tensor) -> None:
        for action, row in zip(some, valid, strict=False):
            row.copy_(env.step(action).valid)

    act(actions[: 1 + count // 10])  # warms up
    took = seconds(lambda: act(actions))
    return int(valid.sum()) / took
