"""Other implementations of TRPO under the same work. Each is imported only when its contender is made.

All have two hidden tanh layers of 64 for policy and value, damping 0.1, KL bound 0.01 and 15 CG iterations, none of
which a small residual may save (their tolerance is set to 0 where they have one). What differs:

- sb3-contrib's CG starts from noise, which costs it one product more. Its `train` is the whole update: returns and
  advantages were computed before, during the rollout, and are not counted.
- Tianshou fixes CG at 10 iterations; a subclass asks for 15. Its critic knows no minibatches: it takes 10 steps on the
  whole batch, so the same samples, but a sixteenth of the optimiser's steps.
- skrl computes the KL anew, graph and all, for every product.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import gymnasium
import torch
from torch import nn

from trpo.benchmark import peer_learning
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
    Contender,
    Numbers,
    iterations,
    median_seconds,
    repeat,
    seconds,
)

PACKAGES = {"sb3-contrib": "sb3_contrib", "tianshou": "tianshou", "skrl": "skrl"}  # contender → module


def installed() -> list[str]:
    """Those of `PACKAGES` that can be imported here."""
    return [name for name, module in PACKAGES.items() if find_spec(module) is not None]


def make_peer(name: str) -> Contender:
    makers: dict[str, Callable[[], Contender]] = {"sb3-contrib": Sb3, "tianshou": Tianshou, "skrl": Skrl}
    return makers[name]()


class Sb3:
    """sb3-contrib, with `VecNormalize` as its users have it."""

    def __init__(self) -> None:
        from sb3_contrib.trpo import trpo

        self._solver = trpo.conjugate_gradient_solver
        self._ready: tuple[Any, Any] | None = None

    def _let_residual_stop(self, may: bool) -> None:
        from sb3_contrib.trpo import trpo

        trpo.conjugate_gradient_solver = self._solver if may else functools.partial(self._solver, residual_tol=0.0)

    def _model(self, task: str, envs: int, *, subprocesses: bool = False) -> Any:
        from sb3_contrib import TRPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

        env = make_vec_env(task, envs, seed=0, vec_env_cls=SubprocVecEnv if subprocesses else DummyVecEnv)
        return TRPO(
            "MlpPolicy",
            VecNormalize(env, gamma=GAMMA),
            n_steps=BATCH // envs,
            batch_size=MINIBATCH,
            learning_rate=LEARNING_RATE,
            gamma=GAMMA,
            gae_lambda=LAMBDA,
            cg_max_steps=CG_ITERATIONS,
            cg_damping=DAMPING,
            target_kl=MAX_KL,
            n_critic_updates=CRITIC_EPOCHS,
            policy_kwargs={"net_arch": [HIDDEN, HIDDEN], "activation_fn": nn.Tanh},
            seed=0,
            device="cpu",
        )

    def update(self, *, repeats: int) -> Numbers:
        self._let_residual_stop(False)
        if self._ready is None:
            model = self._model(UPDATE_TASK, UPDATE_ENVS)
            model.learn(BATCH)
            _, callback = model._setup_learn(BATCH, None, reset_num_timesteps=False)
            model.collect_rollouts(model.env, callback, model.rollout_buffer, n_rollout_steps=model.n_steps)
            model.env.close()
            self._ready = model, copy.deepcopy((model.policy.state_dict(), model.policy.optimizer.state_dict()))
        model, state = self._ready

        def restore(critic_updates: int) -> None:
            policy, optimizer = copy.deepcopy(state)
            model.policy.load_state_dict(policy)
            model.policy.optimizer.load_state_dict(optimizer)
            model.n_critic_updates = critic_updates

        whole = median_seconds(model.train, before=lambda: restore(CRITIC_EPOCHS), repeats=repeats)
        policy = median_seconds(model.train, before=lambda: restore(0), repeats=repeats)
        return {
            "whole_s": whole,
            "policy_s": policy,
            "value_s": whole - policy,
            "accepted": float(model.logger.name_to_value["train/is_line_search_success"]),
        }

    def train(self, *, task: str, setup: dict[str, Any], steps: int, recipe: bool = False) -> Numbers:
        self._let_residual_stop(recipe)
        if recipe:
            model = peer_learning.make_model(task, peer_learning.algorithm(task), seed=0)
        else:
            model = self._model(task, setup["num_envs"], subprocesses=setup.get("subprocesses", False))
        count, threads = iterations(steps), torch.get_num_threads()
        torch.set_num_threads(setup.get("threads", threads))
        try:
            model.learn(BATCH)
            took = seconds(lambda: model.learn(count * BATCH, reset_num_timesteps=False))
        finally:
            torch.set_num_threads(threads)
        model.env.close()
        return {"steps_per_s": count * BATCH / took}


class Tianshou:
    """Tianshou, collecting and updating as its on-policy trainer does, without its bookkeeping."""

    def __init__(self) -> None:
        self._ready: tuple[Any, Any, Any] | None = None

    def _build(self, task: str, envs: int) -> tuple[Any, Any]:
        from tianshou.algorithm import TRPO
        from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
        from tianshou.algorithm.optim import AdamOptimizerFactory
        from tianshou.data import Collector, CollectStats, VectorReplayBuffer
        from tianshou.env import DummyVectorEnv, VectorEnvNormObs
        from tianshou.utils.net.common import Net
        from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic
        from torch.distributions import Independent, Normal

        class FifteenIterations(TRPO):
            def _conjugate_gradients(self, minibatch: Any, flat_kl_grad: Any, **_: Any) -> Any:
                return super()._conjugate_gradients(minibatch, flat_kl_grad, nsteps=CG_ITERATIONS, residual_tol=0.0)

        venv = VectorEnvNormObs(DummyVectorEnv([lambda: gymnasium.make(task)] * envs))
        venv.seed(0)
        observations, actions = venv.observation_space[0], venv.action_space[0]

        def body() -> Any:
            return Net(state_shape=observations.shape, hidden_sizes=[HIDDEN, HIDDEN], activation=nn.Tanh)

        actor = ContinuousActorProbabilistic(preprocess_net=body(), action_shape=actions.shape, unbounded=True)
        policy = ProbabilisticActorPolicy(
            actor=actor,
            dist_fn=lambda parameters: Independent(Normal(*parameters), 1),
            action_space=actions,
            observation_space=observations,
        )
        algorithm = FifteenIterations(
            policy=policy,
            critic=ContinuousCritic(preprocess_net=body()),
            optim=AdamOptimizerFactory(lr=LEARNING_RATE),
            max_kl=MAX_KL,
            optim_critic_iters=CRITIC_EPOCHS,
            gae_lambda=LAMBDA,
            gamma=GAMMA,
            return_scaling=True,
        )
        collector = Collector[CollectStats](algorithm, venv, VectorReplayBuffer(BATCH, envs))
        collector.reset()
        return algorithm, collector

    def _iteration(self, algorithm: Any, collector: Any) -> None:
        collector.collect(n_step=BATCH)
        algorithm.update(collector.buffer, batch_size=None, repeat=1)
        collector.reset_buffer(keep_statistics=True)

    def update(self, *, repeats: int) -> Numbers:
        """Its parts are told apart by the number of critic steps, which cannot be 0."""
        from tianshou.utils.torch_utils import policy_within_training_step

        if self._ready is None:
            algorithm, collector = self._build(UPDATE_TASK, UPDATE_ENVS)
            with policy_within_training_step(algorithm.policy):
                self._iteration(algorithm, collector)
                collector.collect(n_step=BATCH)
            self._ready = algorithm, collector, copy.deepcopy((algorithm.state_dict(), algorithm.ret_rms))
        algorithm, collector, state = self._ready

        def restore(critic_steps: int) -> None:
            parameters, moments = copy.deepcopy(state)
            algorithm.load_state_dict(parameters)
            algorithm.ret_rms = moments
            algorithm.optim_critic_iters = critic_steps

        with policy_within_training_step(algorithm.policy):
            whole = median_seconds(
                lambda: algorithm.update(collector.buffer, batch_size=None, repeat=1),
                before=lambda: restore(CRITIC_EPOCHS),
                repeats=repeats,
            )
            restore(1)
            batch, indices = collector.buffer.sample(0)
            batch = algorithm._preprocess_batch(batch, collector.buffer, indices)
            parts = [
                median_seconds(
                    lambda: algorithm._update_with_batch(batch, batch_size=None, repeat=1),
                    before=functools.partial(restore, critic_steps),
                    repeats=repeats,
                )
                for critic_steps in (1, 1 + CRITIC_EPOCHS)
            ]
            restore(1)
            accepted = algorithm._update_with_batch(batch, batch_size=None, repeat=1).step_size.mean > 0
        value = parts[1] - parts[0]
        policy = parts[0] - value / CRITIC_EPOCHS
        return {"whole_s": whole, "policy_s": policy, "value_s": value, "accepted": float(accepted)}

    def train(self, *, task: str, setup: dict[str, Any], steps: int, recipe: bool = False) -> Numbers:
        from tianshou.utils.torch_utils import policy_within_training_step

        algorithm, collector = self._build(task, setup["num_envs"])
        with policy_within_training_step(algorithm.policy):
            self._iteration(algorithm, collector)
            count = iterations(steps)
            took = seconds(lambda: repeat(lambda: self._iteration(algorithm, collector), count))
        collector.env.close()
        return {"steps_per_s": count * BATCH / took}


class Skrl:
    """skrl, run by its sequential trainer without tracking or checkpoints."""

    def __init__(self) -> None:
        from skrl.agents.torch.trpo import trpo

        trpo.conjugate_gradient = functools.partial(trpo.conjugate_gradient, residual_tolerance=0.0)
        self._ready: tuple[Any, Any] | None = None

    def _trainer(self, task: str, envs: int) -> Any:
        from skrl.agents.torch.base import ExperimentCfg
        from skrl.agents.torch.trpo import TRPO
        from skrl.envs.wrappers.torch import wrap_env
        from skrl.memories.torch import RandomMemory
        from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
        from skrl.resources.preprocessors.torch import RunningStandardScaler
        from skrl.trainers.torch import SequentialTrainer

        env = wrap_env(gymnasium.make_vec(task, envs, vectorization_mode="sync"), verbose=False)
        spaces = {"observation_space": env.observation_space, "action_space": env.action_space, "device": "cpu"}

        def body(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(
                nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, outputs)
            )

        class Policy(GaussianMixin, Model):
            def __init__(self) -> None:
                Model.__init__(self, **spaces)
                GaussianMixin.__init__(self)
                self.net = body(self.num_observations, self.num_actions)
                self.log_std = nn.Parameter(torch.zeros(self.num_actions))

            def compute(self, inputs: Any, role: str = "") -> Any:
                return self.net(inputs["observations"]), {"log_std": self.log_std}

        class Value(DeterministicMixin, Model):
            def __init__(self) -> None:
                Model.__init__(self, **spaces)
                DeterministicMixin.__init__(self)
                self.net = body(self.num_observations, 1)

            def compute(self, inputs: Any, role: str = "") -> Any:
                return self.net(inputs["observations"]), {}

        agent = TRPO(
            models={"policy": Policy(), "value": Value()},
            memory=RandomMemory(memory_size=BATCH // envs, num_envs=envs, device="cpu"),
            **spaces,
            cfg={
                "rollouts": BATCH // envs,
                "learning_epochs": CRITIC_EPOCHS,
                "mini_batches": BATCH // MINIBATCH,
                "discount_factor": GAMMA,
                "gae_lambda": LAMBDA,
                "learning_rate": LEARNING_RATE,
                "grad_norm_clip": 0.0,
                "damping": DAMPING,
                "max_kl_divergence": MAX_KL,
                "conjugate_gradient_steps": CG_ITERATIONS,
                "observation_preprocessor": RunningStandardScaler,
                "observation_preprocessor_kwargs": {"size": env.observation_space, "device": "cpu"},
                "experiment": ExperimentCfg(directory=tempfile.gettempdir(), write_interval=0, checkpoint_interval=0),
            },
        )
        settings = {"headless": True, "disable_progressbar": True, "close_environment_at_exit": False}
        return SequentialTrainer(env=env, agents=agent, cfg=settings)

    @staticmethod
    def _run(trainer: Any, steps: int) -> None:
        trainer.cfg.timesteps = steps // trainer.env.num_envs
        trainer.train()

    def update(self, *, repeats: int) -> Numbers:
        if self._ready is None:
            trainer = self._trainer(UPDATE_TASK, UPDATE_ENVS)
            agent = trainer.agents
            self._run(trainer, BATCH)
            agent.cfg.rollouts = 10**9  # from here on only a rollout, without the update at its end
            self._run(trainer, BATCH)
            trainer.env.close()
            modules = [agent.policy, agent.value, agent.value_optimizer, agent._observation_preprocessor]
            self._ready = agent, [(module, copy.deepcopy(module.state_dict())) for module in modules]
        agent, states = self._ready

        def restore(epochs: int) -> None:
            for module, state in states:
                module.load_state_dict(copy.deepcopy(state))
            agent.cfg.learning_epochs = epochs

        def update() -> None:
            with contextlib.suppress(ZeroDivisionError):  # its last line divides by the epochs
                agent.update(timestep=0, timesteps=1)
            agent.tracking_data.clear()

        agent.enable_models_training_mode(True)
        whole = median_seconds(update, before=lambda: restore(CRITIC_EPOCHS), repeats=repeats)
        policy = median_seconds(update, before=lambda: restore(0), repeats=repeats)
        moved = any(not torch.equal(agent.policy.state_dict()[key], old) for key, old in states[0][1].items())
        return {"whole_s": whole, "policy_s": policy, "value_s": whole - policy, "accepted": float(moved)}

    def train(self, *, task: str, setup: dict[str, Any], steps: int, recipe: bool = False) -> Numbers:
        trainer = self._trainer(task, setup["num_envs"])
        self._run(trainer, BATCH)
        count = iterations(steps)
        took = seconds(lambda: self._run(trainer, count * BATCH))
        trainer.env.close()
        return {"steps_per_s": count * BATCH / took}
