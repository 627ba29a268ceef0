"""Observation, reward and end of Gymnasium's MuJoCo tasks (v5), each for all simulations at once.

The simulations are stepped by MuJoCo itself (`mujoco_batch.py`); what Gymnasium's classes then compute of each in
Python is written here once more, over rows. The weights and ranges are read from an environment that Gymnasium built,
and every operation is the one Gymnasium does, in its order and its dtypes: so the numbers are the same to the bit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from trpo.envs.spaces import Array


class Task:
    """What is observed and rewarded in a task.

    `d` is MuJoCo's data: attributes with the names of `MjData`, of one simulation or with a row for each of N. Arrays
    are indexed from their end, so that both work.

    Args:
        env: Gymnasium's environment, unwrapped, whose weights and ranges count.
    """

    fields: ClassVar[tuple[str, ...]] = ()  # of MjData, beside qpos, qvel and ctrl
    contact_forces: ClassVar[bool] = False  # whether cfrc_ext is asked for, which MuJoCo's own step does not compute

    def __init__(self, env: Any) -> None:
        self.env = env

    def position(self, d: Any) -> Array:
        """What the reward is the velocity of [...]; 0 where there is no such thing."""
        return np.zeros(d.qpos.shape[:-1])

    def observe(self, d: Any) -> list[Array]:
        """The parts [..., k] of the observation, in order."""
        raise NotImplementedError

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        """Reward [N] and whether the episode terminated [N].

        Args:
            d: The data after the step, N rows.
            action: [N, A] float32, as the environment takes it.
            velocity: [N] of `position`, over the step.
        """
        raise NotImplementedError


def _squares(values: Array) -> Array:
    """Σ x² over all but the first axis, summed as numpy sums one simulation's contiguous array."""
    return np.square(values).reshape(len(values), -1).sum(axis=-1)


def _norms(rows: Array) -> Array:
    """‖x‖ [N] of the rows [N, k]; by a dot product each, as `numpy.linalg.norm` of one vector."""
    return np.sqrt([row.dot(row) for row in np.ascontiguousarray(rows)])


def _powers(values: Array) -> Array:
    """x² [N] as numpy takes the power of one number, which rounds in another way than that of an array."""
    return np.array([x**2 for x in values])


def _state(env: Any, d: Any, hidden: int) -> list[Array]:
    """Positions, without so many leading ones unless they are asked for, and velocities."""
    return [d.qpos[..., hidden if env._exclude_current_positions_from_observation else 0 :], d.qvel]


def _finite(d: Any) -> Array:
    """[N] bool."""
    return np.isfinite(d.qpos).all(axis=1) & np.isfinite(d.qvel).all(axis=1)


def _ended(env: Any, healthy: Array) -> Array:
    """[N] bool, whether episodes end for not being healthy."""
    return ~healthy & bool(env._terminate_when_unhealthy)


class _Runner(Task):
    """Forward velocity less the cost of control, and a bonus for being healthy."""

    hidden = 1  # leading positions that are not observed unless asked for

    def position(self, d: Any) -> Array:
        return d.qpos[..., 0]

    def observe(self, d: Any) -> list[Array]:
        return _state(self.env, d, self.hidden)

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        env = self.env
        forward = env._forward_reward_weight * velocity
        cost = env._ctrl_cost_weight * _squares(action)
        return forward - cost, np.zeros(len(forward), bool)


class HalfCheetah(_Runner):
    pass


class Swimmer(_Runner):
    hidden = 2


class Walker2d(_Runner):
    def observe(self, d: Any) -> list[Array]:
        position, velocity = super().observe(d)
        return [position, np.clip(velocity, -10, 10)]

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        env, healthy = self.env, self.healthy(d)
        rewards = env._forward_reward_weight * velocity + healthy * env._healthy_reward
        return rewards - env._ctrl_cost_weight * _squares(action), _ended(env, healthy)

    def healthy(self, d: Any) -> Array:
        """[N] bool."""
        height = _within(d.qpos[:, 1], self.env._healthy_z_range)
        return height & _within(d.qpos[:, 2], self.env._healthy_angle_range)


class Hopper(Walker2d):
    def healthy(self, d: Any) -> Array:
        state = np.concatenate([d.qpos, d.qvel], axis=1)[:, 2:]
        return super().healthy(d) & _within(state, self.env._healthy_state_range).all(axis=1)


class Ant(Task):
    fields = ("xpos",)
    contact_forces = True

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.main_body = env.data.body(env._main_body).id

    def position(self, d: Any) -> Array:
        return d.xpos[..., self.main_body, 0]

    def observe(self, d: Any) -> list[Array]:
        parts = _state(self.env, d, hidden=2)
        if self.env._include_cfrc_ext_in_observation:
            parts.append(_bodies(self._contact_forces(d)))
        return parts

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        env = self.env
        low, high = env._healthy_z_range
        healthy = _finite(d) & (low <= d.qpos[:, 2]) & (d.qpos[:, 2] <= high)
        rewards = velocity * env._forward_reward_weight + healthy * env._healthy_reward
        contact = env._contact_cost_weight * _squares(self._contact_forces(d))
        return (
            rewards - (env._ctrl_cost_weight * _squares(action) + contact),
            _ended(env, healthy),
        )

    def _contact_forces(self, d: Any) -> Array:
        return np.clip(d.cfrc_ext, *self.env._contact_force_range)


class HumanoidStandup(Task):
    fields: ClassVar[tuple[str, ...]] = ("cinert", "cvel", "qfrc_actuator")
    contact_forces = True

    def observe(self, d: Any) -> list[Array]:
        env = self.env
        parts = _state(env, d, hidden=2)
        if env._include_cinert_in_observation is True:
            parts.append(_bodies(d.cinert))
        if env._include_cvel_in_observation is True:
            parts.append(_bodies(d.cvel))
        if env._include_qfrc_actuator_in_observation is True:
            parts.append(d.qfrc_actuator[..., 6:])
        if env._include_cfrc_ext_in_observation is True:
            parts.append(_bodies(d.cfrc_ext))
        return parts

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        env = self.env
        up = d.qpos[:, 2] / env.model.opt.timestep
        control = env._ctrl_cost_weight * _squares(d.ctrl)
        impact = np.clip(env._impact_cost_weight * _squares(d.cfrc_ext), *env._impact_cost_range)
        return up - control - impact + 1, np.zeros(len(up), bool)


class Humanoid(HumanoidStandup):
    fields = (*HumanoidStandup.fields, "xipos")

    def position(self, d: Any) -> Array:
        mass = self.env.model.body_mass
        # One by one: einsum over all at once may add in another order, or fuse operations that this does not.
        places = d.xipos.reshape(-1, *d.xipos.shape[-2:])
        moment = np.array([np.einsum("b,bj->j", mass, place)[0] for place in places])
        return moment.reshape(d.xipos.shape[:-2]) / mass.sum()

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        env, healthy = self.env, _within(d.qpos[:, 2], self.env._healthy_z_range)
        rewards = env._forward_reward_weight * velocity + healthy * env._healthy_reward
        contact = np.clip(env._contact_cost_weight * _squares(d.cfrc_ext), *env._contact_cost_range)
        return (
            rewards - (env._ctrl_cost_weight * _squares(d.ctrl) + contact),
            _ended(env, healthy),
        )


class InvertedPendulum(Task):
    def observe(self, d: Any) -> list[Array]:
        return [d.qpos, d.qvel]

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        terminated = ~_finite(d) | (np.abs(d.qpos[:, 1]) > 0.2)
        return 1.0 - terminated, terminated


class InvertedDoublePendulum(Task):
    fields = ("site_xpos", "qfrc_constraint")

    def observe(self, d: Any) -> list[Array]:
        angles = np.ascontiguousarray(d.qpos[..., 1:])
        force = np.clip(d.qfrc_constraint, -10, 10)[..., :1]
        return [d.qpos[..., :1], np.sin(angles), np.cos(angles), np.clip(d.qvel, -10, 10), force]

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        tip = d.site_xpos[:, 0]
        terminated = tip[:, 2] <= 1
        distance = 0.01 * _powers(tip[:, 0]) + _powers(tip[:, 2] - 2)
        speed = 1e-3 * _powers(d.qvel[:, 1]) + 5e-3 * _powers(d.qvel[:, 2])
        return self.env._healthy_reward * ~terminated - distance - speed, terminated


class Reacher(Task):
    fields = ("xpos",)

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.fingertip, self.target = (env.data.body(name).id for name in ("fingertip", "target"))

    def observe(self, d: Any) -> list[Array]:
        angles = np.ascontiguousarray(d.qpos[..., :2])
        return [np.cos(angles), np.sin(angles), d.qpos[..., 2:], d.qvel[..., :2], self._miss(d)[..., :2]]

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        env = self.env
        reward = -_norms(self._miss(d)) * env._reward_dist_weight + -_squares(action) * env._reward_control_weight
        return reward, np.zeros(len(reward), bool)

    def _miss(self, d: Any) -> Array:
        return d.xpos[..., self.fingertip, :] - d.xpos[..., self.target, :]


class Pusher(Task):
    fields = ("xpos",)

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.tip, self.object, self.goal = (env.data.body(name).id for name in ("tips_arm", "object", "goal"))

    def observe(self, d: Any) -> list[Array]:
        places = [d.xpos[..., body, :] for body in (self.tip, self.object, self.goal)]
        return [d.qpos[..., :7], d.qvel[..., :7], *places]

    def judge(self, d: Any, action: Array, velocity: Array) -> tuple[Array, Array]:
        env, there = self.env, d.xpos[:, self.object]
        near = -_norms(there - d.xpos[:, self.tip]) * env._reward_near_weight
        distance = -_norms(there - d.xpos[:, self.goal]) * env._reward_dist_weight
        control = -_squares(action) * env._reward_control_weight
        return distance + control + near, np.zeros(len(near), bool)


def _within(values: Array, bounds: tuple[float, float]) -> Array:
    low, high = bounds
    return (low < values) & (values < high)


def _bodies(values: Array) -> Array:
    """Of [..., bodies, k] all bodies but the world, a row for each simulation."""
    kept = values[..., 1:, :]
    return kept.reshape(*kept.shape[:-2], -1)


# By Gymnasium's class of each: what another class computes, a subclass too, is not known here.
TASKS: dict[str, type[Task]] = {
    "gymnasium.envs.mujoco.ant_v5:AntEnv": Ant,
    "gymnasium.envs.mujoco.half_cheetah_v5:HalfCheetahEnv": HalfCheetah,
    "gymnasium.envs.mujoco.hopper_v5:HopperEnv": Hopper,
    "gymnasium.envs.mujoco.humanoid_v5:HumanoidEnv": Humanoid,
    "gymnasium.envs.mujoco.humanoidstandup_v5:HumanoidStandupEnv": HumanoidStandup,
    "gymnasium.envs.mujoco.inverted_double_pendulum_v5:InvertedDoublePendulumEnv": InvertedDoublePendulum,
    "gymnasium.envs.mujoco.inverted_pendulum_v5:InvertedPendulumEnv": InvertedPendulum,
    "gymnasium.envs.mujoco.pusher_v5:PusherEnv": Pusher,
    "gymnasium.envs.mujoco.reacher_v5:ReacherEnv": Reacher,
    "gymnasium.envs.mujoco.swimmer_v5:SwimmerEnv": Swimmer,
    "gymnasium.envs.mujoco.walker2d_v5:Walker2dEnv": Walker2d,
}
