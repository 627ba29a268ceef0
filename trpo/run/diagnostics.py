"""What a run reports: reports of updates and episodes as named numbers."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

from trpo.agent import UpdateReport
from trpo.collector import Episodes
from trpo.natural_gradient import Outcome, StepReport

WINDOW = 100  # episodes in the running means, as users know it from other libraries


class RecentEpisodes:
    """Running means over the last episodes; `info`: names of `env.info`."""

    def __init__(self, info: Sequence[str] = ()) -> None:
        self.returns: deque[float] = deque(maxlen=WINDOW)
        self.lengths: deque[float] = deque(maxlen=WINDOW)
        self.successes: deque[float] = deque(maxlen=WINDOW)
        self.info: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in info}

    def add(self, episodes: Episodes) -> None:
        self.returns.extend(episodes.returns)
        self.lengths.extend(episodes.lengths)
        self.successes.extend(episodes.successes)
        for name, window in self.info.items():
            window.extend(episodes.info[name])

    def metrics(self) -> dict[str, float | None]:
        """None where no episode has ended yet."""
        windows = {
            "ep_rew_mean": self.returns,
            "ep_len_mean": self.lengths,
            "success_rate": self.successes,
            **{f"info/{name}": window for name, window in self.info.items()},
        }
        return {f"rollout/{name}": statistics.fmean(window) if window else None for name, window in windows.items()}

    def state_dict(self) -> dict[str, Any]:
        info = {name: list(window) for name, window in self.info.items()}
        return {**{name: list(window) for name, window in self._windows().items()}, "info": info}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, window in self._windows().items():
            window.clear()
            window.extend(state[name])
        for name, window in self.info.items():
            window.clear()
            window.extend(state["info"].get(name, ()))  # none of a name that is new

    def _windows(self) -> dict[str, deque[float]]:
        return {"returns": self.returns, "lengths": self.lengths, "successes": self.successes}


def update_metrics(report: UpdateReport) -> dict[str, float | None]:
    """One update under the tags stable-baselines3 users know, and the trust region's own under `trust_region/`."""
    step, fit = _step_metrics(report.step), report.fit
    if report.step.outcome is Outcome.RESTED:
        step = dict.fromkeys(step)  # None: no step was tried
    return {
        **step,
        "train/std": None if math.isnan(report.std) else report.std,
        "train/value_loss": fit.loss_after,
        "train/explained_variance": report.explained_variance_before,
        "train/learning_rate": report.learning_rate,
        "value/loss_before": fit.loss_before,
        "value/explained_variance_after": report.explained_variance_after,
        "value/refused_steps": fit.refused,
        "trust_region/normalizer_kl": report.normalizer_kl,
        "trust_region/entropy": report.entropy,
        **({} if report.effective_share is None else {"trust_region/effective_share": report.effective_share}),
    }


def _step_metrics(step: StepReport) -> dict[str, float | None]:
    cg, search = step.cg, step.search
    return {
        "train/policy_objective": step.gain,
        "train/kl_divergence_loss": step.kl,
        "train/is_line_search_success": float(step.accepted),
        "trust_region/max_kl": step.max_kl,
        "trust_region/quadratic_kl": step.quadratic_kl,
        "trust_region/kl": step.kl,
        "trust_region/expected_improvement": step.expected_gain,
        "trust_region/actual_improvement": step.gain,
        "trust_region/step_scale": step.scale,
        "trust_region/backtracks": search.tries - 1 if search else None,
        "trust_region/gradient_norm": step.gradient_norm,
        "trust_region/step_norm": step.step_norm,
        "trust_region/cg_iterations": cg.iterations if cg else None,
        "trust_region/cg_residual": cg.relative_residual if cg else None,
        "trust_region/max_ritz_value": float(cg.ritz_values[-1]) if cg and len(cg.ritz_values) else None,
        "trust_region/condition": cg.condition if cg else None,
    }
