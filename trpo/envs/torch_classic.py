"""Gymnasium's Pendulum-v1 and CartPole-v1 as pure functions on batches: N states are one float64 tensor [S, N].

The arithmetic is Gymnasium's own, operation by operation, in float64 where that is (NumPy 2: products of the float32
torque with constants stay float32). So on the CPU results agree to the bit wherever neither sine, cosine nor NumPy's
scalar power enters, as those may differ from torch's in the last place; a GPU may also round a division by a constant
otherwise. What agrees, from the same state and action:

- CartPole: reward, the new x and θ, and with them `terminated`, to the bit; ẋ and θ̇ to rounding.
- Pendulum: θ̇ and θ to rounding, and to the bit where sin θ agrees; the reward to rounding.
- Observations, float32 of the state as in Gymnasium, to one unit in the last place, mostly to the bit.

Over an episode the differences grow as the system amplifies any other: little in a pendulum that swings, about e^(4t)
for a pole that falls for t seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, Space
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TorchTask:
    """An environment as functions of states [S, N]; all work on any device and never wait for it.

    Attributes:
        observation_space: flat, [D].
        action_space: Box or Discrete.
        state_size: S, also how many random numbers a new state takes.
        time_limit: steps after which an episode is truncated.
        begin: uniform numbers in [0, 1) [S, N] → states of new episodes.
        observe: states → observations [N, D].
        advance: states, actions [N, A] in the action space's dtype and bounds → (new states, reward [N] float64,
            terminated [N] bool).
        pure: whether the three depend on their arguments and on nothing else, so that on a GPU their operations can be
            recorded once and repeated. A number of Python's that changes meanwhile would stay what it was.
    """

    observation_space: Box
    action_space: Space[Any]
    state_size: int
    time_limit: int
    begin: Callable[[Tensor], Tensor]
    observe: Callable[[Tensor], Tensor]
    advance: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    pure: bool = False


GRAVITY, TIME_STEP, MAX_SPEED, MAX_TORQUE = 10.0, 0.05, 8.0, 2.0  # of the pendulum, whose mass and length are 1


def pendulum_begin(uniform: Tensor) -> Tensor:
    """θ ∈ [−π, π), θ̇ ∈ [−1, 1)."""
    angle, speed = uniform
    return torch.stack([-math.pi + 2 * math.pi * angle, -1.0 + 2.0 * speed])


def pendulum_observe(state: Tensor) -> Tensor:
    """(cos θ, sin θ, θ̇)."""
    angle, speed = state
    return torch.stack([torch.cos(angle), torch.sin(angle), speed], -1).float()


def pendulum_advance(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """θ̈ = 3g/2l · sin θ + 3/ml² · u by semi-implicit Euler; reward −(θ² + 0.1 θ̇² + 0.001 u²), θ from upright."""
    angle, speed = state
    torque = action[:, 0]
    from_upright = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    cost = from_upright**2 + 0.1 * speed**2 + 0.001 * torque**2
    acceleration = 3 * GRAVITY / 2 * torch.sin(angle) + 3.0 * torque
    new_speed = (speed + acceleration * TIME_STEP).clamp(-MAX_SPEED, MAX_SPEED)
    new_angle = angle + new_speed * TIME_STEP
    return torch.stack([new_angle, new_speed]), -cost, torch.zeros_like(angle, dtype=torch.bool)


POLE_MASS, TOTAL_MASS, HALF_LENGTH, FORCE, TAU = 0.1, 1.1, 0.5, 10.0, 0.02  # SI units
X_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * math.pi / 360
POLE_MASS_LENGTH = POLE_MASS * HALF_LENGTH


def cart_pole_begin(uniform: Tensor) -> Tensor:
    """x, ẋ, θ, θ̇ ∈ [−0.05, 0.05)."""
    return -0.05 + 0.1 * uniform


def cart_pole_observe(state: Tensor) -> Tensor:
    """(x, ẋ, θ, θ̇)."""
    return state.T.float()


def cart_pole_advance(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Barto, Sutton & Anderson 1983 without friction, by explicit Euler; reward 1 a step."""
    x, x_speed, angle, angle_speed = state
    force = torch.where(action[:, 0] == 1, FORCE, -FORCE).double()
    cosine, sine = torch.cos(angle), torch.sin(angle)
    push = (force + POLE_MASS_LENGTH * angle_speed**2 * sine) / TOTAL_MASS
    angle_acceleration = (9.8 * sine - cosine * push) / (HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cosine**2 / TOTAL_MASS))
    x_acceleration = push - POLE_MASS_LENGTH * angle_acceleration * cosine / TOTAL_MASS
    new_x, new_angle = x + TAU * x_speed, angle + TAU * angle_speed
    new_state = torch.stack([new_x, x_speed + TAU * x_acceleration, new_angle, angle_speed + TAU * angle_acceleration])
    return new_state, torch.ones_like(x), (new_x.abs() > X_LIMIT) | (new_angle.abs() > ANGLE_LIMIT)


def _bounds(*high: float) -> Box:
    bound = np.array(high, np.float32)
    return Box(-bound, bound, dtype=np.float32)


TASKS = {
    "Pendulum-v1": TorchTask(
        observation_space=_bounds(1.0, 1.0, MAX_SPEED),
        action_space=_bounds(MAX_TORQUE),
        state_size=2,
        time_limit=200,
        begin=pendulum_begin,
        observe=pendulum_observe,
        advance=pendulum_advance,
        pure=True,
    ),
    "CartPole-v1": TorchTask(
        observation_space=_bounds(2 * X_LIMIT, np.inf, 2 * ANGLE_LIMIT, np.inf),
        action_space=Discrete(2),
        state_size=4,
        time_limit=500,
        begin=cart_pole_begin,
        observe=cart_pole_observe,
        advance=cart_pole_advance,
        pure=True,
    ),
}
