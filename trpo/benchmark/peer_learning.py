"""What sb3-contrib's TRPO learns, on the environments and with the evaluation of ours.

Its settings are those of rl-baselines3-zoo for MuJoCo (hyperparams/trpo.yml), which names some tasks and has nothing
for the others: those are given the common ones.
"""

from __future__ import annotations

import json
import platform
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from trpo.benchmark.work import versions
from trpo.config import Config, EnvConfig
from trpo.errors import UserError
from trpo.evaluation import evaluate
from trpo.runtime.random_streams import stream_seed

ENVS = 2
SETTINGS = {
    "n_steps": 1024,
    "batch_size": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
}
DEPARTURES = {"HalfCheetah": {"target_kl": 0.04}, "Swimmer": {"gamma": 0.9999}}


def algorithm(env_id: str) -> dict[str, Any]:
    """The settings of rl-zoo for a task."""
    return SETTINGS | DEPARTURES.get(env_id.rpartition("-v")[0], {})


def settings(config: Config) -> str:
    """All that decides what a run of the peer gives, as JSON; of `config` what does not belong to the algorithm."""
    return json.dumps(
        {
            "agent": "sb3-contrib",
            "env": config.env.model_dump(mode="json", include={"id", "kwargs", "wrappers"}),
            "num_envs": ENVS,
            "algorithm": algorithm(config.env.id),
            "total_steps": config.total_steps,
            "evaluation": {"every_steps": config.evaluation.every_steps, "episodes": config.evaluation.episodes},
            "seed": config.seed,
        },
        indent=1,
    )


def learn(run: dict[str, Any], episodes: int, *, seed: int) -> dict[str, Any]:
    """Trains as `settings` says, then scores the last policy over `episodes` from `seed` on; what a result file keeps.

    `wall_s` begins with imports, holds the evaluations along the way, and ends before the last policy is scored.
    """
    started = time.perf_counter()
    meta = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": run,
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    torch.set_num_threads(1)
    if run["env"]["wrappers"]:
        raise UserError("sb3-contrib is trained without wrappers; leave env.wrappers out")
    model = make_model(run["env"]["id"], run["algorithm"], seed=run["seed"], **run["env"]["kwargs"])
    env_config = EnvConfig.model_validate(run["env"])
    every, evaluation_seed = run["evaluation"]["every_steps"], stream_seed(run["seed"], "evaluation")
    evaluations: dict[str, list[float]] = {"env_steps": [], "mean": []}
    training: dict[str, list[float | None]] = {"env_steps": [], "return": []}

    def score(count: int, first: int, deterministic: bool = True) -> Any:
        policy = FrozenPolicy(model)
        return evaluate(policy, env_config, model.action_space, episodes=count, seed=first, deterministic=deterministic)

    def evaluate_now() -> None:
        evaluations["mean"].append(score(run["evaluation"]["episodes"], evaluation_seed).mean)
        evaluations["env_steps"].append(model.num_timesteps)

    batch = ENVS * SETTINGS["n_steps"]
    total = run["total_steps"] // batch * int(batch)

    def after_update() -> None:
        """The first rollout of all has no update before it."""
        done = model.num_timesteps
        if done == 0:
            return
        returns = [episode["r"] for episode in model.ep_info_buffer]
        if done // batch % 8 == 1:
            training["env_steps"].append(done)
            training["return"].append(float(np.mean(returns)) if returns else None)
        if every and done // every > (done - batch) // every:
            evaluate_now()

    model.learn(total, callback=_at_rollout_start(after_update))
    evaluate_now()
    wall_s = time.perf_counter() - started
    scores = score(episodes, seed)
    stochastic = score(episodes, seed, deterministic=False)
    return {
        "env_steps": model.num_timesteps,
        "wall_s": wall_s,
        "returns": scores.returns,
        "lengths": scores.lengths,
        "stochastic_returns": stochastic.returns,
        "evaluations": evaluations,
        "training": training,
        "meta": meta,
    }


def make_model(env_id: str, algorithm: dict[str, Any], *, seed: int, **env_kwargs: Any) -> Any:
    """A TRPO of sb3-contrib on `ENVS` environments in this process, normalised as rl-zoo does.

    Raises:
        UserError: it is not installed, or cannot be trained on such actions here.
    """
    try:
        from sb3_contrib import TRPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.vec_env import VecNormalize
    except ImportError as error:
        raise UserError("sb3-contrib is not installed: pip install 'trpo[peers]'") from error
    from gymnasium.spaces import Box

    env = make_vec_env(env_id, ENVS, seed=seed, env_kwargs=env_kwargs)
    if not isinstance(env.action_space, Box):
        raise UserError(f"sb3-contrib is trained on continuous actions here, not {env.action_space}; name other tasks")
    return TRPO("MlpPolicy", VecNormalize(env, gamma=algorithm["gamma"]), **algorithm, seed=seed, device="cpu")


def _at_rollout_start(function: Any) -> Any:
    from stable_baselines3.common.callbacks import BaseCallback

    class AtRolloutStart(BaseCallback):
        def _on_rollout_start(self) -> None:
            function()

        def _on_step(self) -> bool:
            return True

    return AtRolloutStart()


class FrozenPolicy:
    """Policy and observation statistics of an sb3 model as they are now, with what `evaluate` asks of a policy."""

    def __init__(self, model: Any):
        self._policy, self._normalize = model.policy, model.get_vec_normalize_env().normalize_obs
        self.obs_dim, self.device = model.observation_space.shape[0], torch.device("cpu")
        self._actions = model.action_space.shape

    def noise(self, *, generator: torch.Generator) -> torch.Tensor:
        """Standard normal [A]."""
        return torch.randn(self._actions, generator=generator)

    @torch.no_grad()
    def mode(self, obs: torch.Tensor) -> torch.Tensor:
        """Raw observations [B, D] → mean actions [B, A], clipped by `evaluate` as sb3 clips them."""
        normal = self._distribution(obs)
        mean: torch.Tensor = normal.mean
        return mean

    @torch.no_grad()
    def sample(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        normal = self._distribution(obs)
        sampled: torch.Tensor = normal.mean + normal.stddev * noise
        return sampled

    def _distribution(self, obs: torch.Tensor) -> Any:
        normalized = torch.as_tensor(self._normalize(obs.numpy()), dtype=torch.float32)
        self._policy.set_training_mode(False)
        return self._policy.get_distribution(normalized).distribution
