"""Published results, to stand beside ours; `benchmarks/published.md` says where each is from and what it is not.

Facts read from public sources at about 1M steps unless said otherwise: mean ± std over seeds, or over the episodes of
one agent. None is on Gymnasium's v5 tasks, which differ from v4 and v3 in rewards, friction and observations.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    trpo: str  # best of the TRPO family over several seeds on Gym's own tasks (classic control and Box2D: one agent)
    source: str
    ppo: str = "–"  # Tianshou's PPO at 1M


PUBLISHED = {
    "Ant-v5": Published("3554 ± 591", "sb3-contrib, 3 seeds", "3258 ± 1079"),
    "HalfCheetah-v5": Published("4471 ± 805", "Tianshou, 10 seeds", "5784 ± 1244"),
    "Hopper-v5": Published("3372 ± 215", "sb3-contrib, 3 seeds", "2609 ± 701"),
    "Humanoid-v5": Published("1030", "TRPO+ (Engstrom et al.)", "787 ± 194"),
    "InvertedDoublePendulum-v5": Published("9243 ± 276", "Tianshou NPG, 10 seeds", "9231 ± 270"),
    "InvertedPendulum-v5": Published("1000 ± 0", "Tianshou, 10 seeds", "1000 ± 0"),
    "Reacher-v5": Published("−4.5 ± 0.5", "Tianshou NPG, 10 seeds", "−4.1 ± 0.3"),
    "Swimmer-v5": Published("359 ± 2", "sb3-contrib, 3 seeds", "66.7 ± 99"),
    "Walker2d-v5": Published("4502 ± 234", "sb3-contrib, 3 seeds", "3589 ± 757"),
    "Acrobot-v1": Published("−83.1 ± 18.6", "rl-zoo, one agent, 100k"),
    "BipedalWalker-v3": Published("182 ± 146", "rl-zoo, one agent, 1M"),
    "CartPole-v1": Published("500 ± 0", "rl-zoo, one agent, 100k"),
    "LunarLander-v3": Published("133 ± 112", "rl-zoo, one agent, 200k"),
    "LunarLanderContinuous-v3": Published("262.4 ± 21.4", "rl-zoo, one agent, 200k"),
    "MountainCar-v0": Published("−107.3 ± 13.2", "rl-zoo, one agent, 100k"),
    "MountainCarContinuous-v0": Published("92.5 ± 0.4", "rl-zoo, one agent, 50k"),
    "Pendulum-v1": Published("−174.6 ± 127.6", "rl-zoo, one agent, 100k"),
}
