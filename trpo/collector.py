"""Policy + environments → rollout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from trpo.batch import Rollout
from trpo.colored_noise import ColoredNoise
from trpo.envs.contract import BatchEnv, Step, check_env_count
from trpo.envs.returned import LARGEST
from trpo.errors import EnvError
from trpo.policy import Policy

_SMALL = 10_000_000  # multiplications for the actions of a step


@dataclass(frozen=True, slots=True)
class Episodes:
    """Episodes that ended during a rollout, in order of their end; without first ones where starts are staggered."""

    returns: list[float]  # sums of unscaled rewards
    lengths: list[int]  # environment steps
    successes: list[float]  # only of episodes that reported one
    info: dict[str, list[float]] = field(default_factory=dict)  # by name of `env.info`, of those that reported it


class Collector:
    """Steps N environments for T steps with a fixed policy, into buffers made once.

    Where environments are stepped on the CPU a small policy acts there as well, wherever it learns: it is done before a
    GPU would have answered.

    A rollout's tensors are these buffers: they are valid until the next call of `collect`. One policy forward pass per
    step over all environments; everything else (values, log-probabilities, statistics) happens in batch afterwards. So
    does whatever has to look at a tensor's values: on an accelerator nothing waits for it within a rollout.

    Args:
        env: the environments of this process.
        policy: samples the actions.
        length: T.
        generator: source of the action noise, on the CPU.
        noise_exponent: β of the spectrum 1/f^β that the noise has over the T steps.
        shard: which of `total_envs` environments are this process's. The noise of all of them is drawn, so that the
            numbers do not depend on how environments are spread over processes.
        staggered: the environments cut first episodes (`envs/stagger.py`), which are then not reported, not even those
            that ended by themselves: of first episodes only early failures would count.
        info: names of the columns of `Step.info`.
    """

    def __init__(
        self,
        env: BatchEnv,
        policy: Policy,
        length: int,
        *,
        generator: torch.Generator,
        noise_exponent: float = 0.0,
        shard: slice | None = None,
        total_envs: int | None = None,
        staggered: bool = False,
        info: Sequence[str] = (),
    ):
        self.env = env
        self.policy = policy
        self.length = length
        self.generator = generator
        self.shard = shard or slice(0, env.num_envs)
        self.total_envs = total_envs or env.num_envs
        self.obs = env.reset().clone()
        theta = policy.theta.vector
        # A CPU has done with it in about the time in which a GPU is told, and answers.
        small = policy.closed_form and env.num_envs * len(theta) <= _SMALL
        here = env.device.type == "cpu" and theta.device.type != "cpu" and small
        self._copy = policy.copy_on(env.device) if here else None
        like = theta.new_empty(0, device=env.device if here else None)
        self._color = ColoredNoise(length, noise_exponent, like=like)
        self.noise = like.new_empty(length, env.num_envs, policy.distribution.noise_dim)
        self._buffers = _buffers(env, policy, length, self.obs)
        self._success = torch.full((length, env.num_envs), torch.nan, device=env.device)
        self._info_names = tuple(info)
        self._info = torch.full((length, env.num_envs, len(info)), torch.nan, dtype=torch.float64, device=env.device)
        self._running_return = torch.zeros(env.num_envs, dtype=torch.float64, device=env.device)
        self._running_length = torch.zeros(env.num_envs, dtype=torch.int64, device=env.device)
        self.staggered = staggered
        self.goes_on = True  # with the episodes of the state that was loaded last
        self._left_out = torch.full((env.num_envs,), staggered, device=env.device)  # the running episodes
        self._take_steps = self._in_one()

    def _in_one(self) -> Callable[[], None]:
        """`_steps`, with policy and environments on one device and nothing to wait for as one operation."""
        in_one = getattr(self.env, "in_one", None)
        together = self.policy.closed_form and self.policy.device == self.env.device
        return in_one(self._steps, self.length) if in_one and together else self._steps

    def begin_anew(self, env: BatchEnv) -> None:
        """Goes on with other environments, as many as before, and their first episodes."""
        self.env = env
        self.obs.copy_(env.reset())
        self._take_steps = self._in_one()

    @property
    def acting(self) -> Policy:
        """The policy as it is now, where it acts."""
        if self._copy is None:
            return self.policy
        self._copy.follow(self.policy)
        return self._copy

    def collect(self) -> tuple[Rollout, Episodes]:
        """One rollout of T steps, and the episodes that ended in it.

        Raises:
            EnvError: an environment failed, or an action, observation or reward is not finite.
        """
        out = self._buffers
        shape = (self.length, self.total_envs)
        white = self.policy.noise(*shape, generator=self.generator).to(self.noise.device)
        self.noise.copy_(self._color(white)[:, self.shard])
        try:
            self._take_steps()
            _check_finite(out)
        except BaseException:  # who goes on all the same has episodes of which a part was counted nowhere
            self._left_out.fill_(True)
            raise
        return out, self._episodes(out)

    def _steps(self) -> None:
        """T steps from `obs` on with the actions of `noise`, into the buffers."""
        out = self._buffers
        self._success.fill_(torch.nan)
        self._info.fill_(torch.nan)
        act = self.acting.actor(out.obs, self.noise, out.action)
        parts = [*(getattr(out, field.name) for field in fields(Rollout)), self._success]
        obs = self.obs
        try:
            for t, (*views, success) in enumerate(_rows(*parts)):
                row = Rollout(*views)
                row.obs.copy_(obs)
                act(t)
                step = self.env.step(row.action)
                _store(row, step)
                if step.success is not None:
                    success.copy_(step.success)
                if self._info_names and step.info is not None:
                    self._info[t].copy_(step.info)
                obs = step.reset_obs
        finally:
            self.obs.copy_(obs)

    def changed_actions(self, rollout: Rollout) -> float:
        """Share of stored actions that differ from what the policy would sample now for the same noise.

        0 right after `collect`, unless the policy or its normaliser moved between rollout and update, in which case the
        importance ratio would not be 1 at θ_old.
        """
        device = self.policy.device
        again = self.policy.sample(rollout.obs.flatten(0, 1).to(device), self.noise.flatten(0, 1))
        stored = rollout.action.flatten(0, 1).to(device)
        close = torch.isclose(again, stored, rtol=1e-3, atol=1e-3) if again.is_floating_point() else again == stored
        return float((~close.all(-1)).double().mean())

    def _episodes(self, rollout: Rollout) -> Episodes:
        """Splits [T, N] rewards into episodes, carrying unfinished ones over to the next rollout."""
        valid = rollout.valid
        total = (rollout.reward.double() * valid).cumsum(0)
        steps = valid.long().cumsum(0)
        start_return, start_length, left_out = -self._running_return, -self._running_length, self._left_out
        episodes = Episodes([], [], [], {name: [] for name in self._info_names})
        t, n = (rollout.terminated | rollout.truncated).nonzero(as_tuple=True)
        if len(n):
            # Ends of one environment follow each other in `order`, early ones first.
            order = n.argsort(stable=True)
            goes_on = n[order[1:]] == n[order[:-1]]
            before = torch.full_like(n, -1)  # the end that an episode follows, if that lies in this rollout
            before[order[1:]] = torch.where(goes_on, order[:-1], -1)
            first, at_end = before < 0, (t, n)

            def since(now: Tensor, running: Tensor) -> Tensor:
                return now[at_end] - torch.where(first, running[n], now[at_end][before])

            # What follows a loss is cut like a first episode.
            cut = self.staggered & ~valid[at_end]
            # Not valid: the episode was cut by a lost worker, and nobody knows how it would have ended.
            told = valid[at_end] & ~torch.where(first, left_out[n], cut[before])
            success, *info = torch.column_stack([self._success[at_end], self._info[at_end]])[told].T.tolist()
            episodes = Episodes(
                since(total, start_return)[told].tolist(),
                since(steps, start_length)[told].tolist(),
                [x for x in success if not math.isnan(x)],
                {name: [x for x in xs if not math.isnan(x)] for name, xs in zip(self._info_names, info, strict=True)},
            )
            last = order[torch.cat([~goes_on, goes_on.new_ones(1)])]
            at_last, ended = (t[last], n[last]), n[last]
            start_return = start_return.index_put((ended,), total[at_last])
            start_length = start_length.index_put((ended,), steps[at_last])
            left_out = left_out.index_put((ended,), cut[last])
        self._running_return = total[-1] - start_return
        self._running_length = steps[-1] - start_length
        self._left_out = left_out
        return episodes

    def state_dict(self, episodes: bool = True) -> dict[str, Any]:
        """Environments, running episodes and the noise generator: enough to go on to the bit.

        Args:
            episodes: off: without the environments, which have failed.
        """
        return {
            "env": self.env.state_dict() if episodes else None,
            "running_return": self._running_return,
            "running_length": self._running_length,
            "left_out": self._left_out,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_env_count(state["running_length"], self.env.num_envs)
        if state["env"] is not None:  # else the episodes are those that this collector began with
            self.obs.copy_(self.env.load_state_dict(state["env"]))
        # If not, the environments began new episodes, of which nothing has happened yet.
        self.goes_on = self.env.exact_resume and state["env"] is not None
        device = self.env.device
        self._running_return = state["running_return"].to(device) * self.goes_on
        self._running_length = state["running_length"].to(device) * self.goes_on
        left_out = state["left_out"].to(device)
        self._left_out = left_out if self.goes_on else torch.full_like(left_out, self.staggered)
        self.generator.set_state(state["generator"])


def _buffers(env: BatchEnv, policy: Policy, length: int, obs: Tensor) -> Rollout:
    shape = (length, env.num_envs)
    dist = policy.distribution
    action_dtype = dist.action_dtype or policy.theta.vector.dtype

    def empty(*more: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, *more, dtype=dtype, device=env.device)

    return Rollout(
        obs=empty(*obs.shape[1:], dtype=obs.dtype),
        next_obs=empty(*obs.shape[1:], dtype=obs.dtype),
        action=empty(dist.action_dim, dtype=action_dtype),
        reward=empty(dtype=torch.float64),
        terminated=empty(dtype=torch.bool),
        truncated=empty(dtype=torch.bool),
        valid=empty(dtype=torch.bool),
    )


def _rows(*parts: Tensor, at_once: int = 128) -> Iterator[tuple[Tensor, ...]]:
    """One view of each part [T, …] after the other, over T; made many at once, which is faster, but not all."""
    for start in range(0, len(parts[0]), at_once):
        yield from zip(*(part[start : start + at_once].unbind() for part in parts), strict=True)


def _store(row: Rollout, step: Step) -> None:
    row.next_obs.copy_(step.next_obs)
    row.reward.copy_(step.reward)
    row.terminated.copy_(step.terminated)
    row.truncated.copy_(step.truncated)
    row.valid.copy_(step.valid)


def _check_finite(out: Rollout) -> None:
    """Raises `EnvError` unless all is finite, and can be squared.

    Backends in host memory find it themselves, in the step where it is.
    """
    for name, values in (("action", out.action), ("observation", out.next_obs), ("reward", out.reward)):
        usable = values.abs() <= LARGEST if values.dtype == torch.float64 else values.isfinite()
        if not usable.all():
            t, n = (~usable).nonzero()[0, :2].tolist()
            cause = "the policy diverged" if name == "action" else "the simulation diverged or divides by zero"
            problem = f"beyond {LARGEST:g}" if values[t, n].isfinite().all() else "not finite"
            raise EnvError(f"environment {n}, step {t} of the rollout: the {name} is {problem} ({cause})")
