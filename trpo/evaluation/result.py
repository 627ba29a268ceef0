"""Episode returns, and what is said of them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


def short(value: float) -> str:
    """One digit after the point, or three in all of what is small."""
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3g}"


@dataclass(frozen=True)
class Evaluation:
    """Episode returns (sums of unscaled rewards), lengths in environment steps, and successes where reported."""

    returns: list[float]
    lengths: list[int]
    successes: list[float] = field(default_factory=list)
    cut: int = 0  # episodes that would have gone on: the environment has no time limit
    info: dict[str, list[float]] = field(default_factory=dict)  # by name of `env.info`, where reported

    @property
    def mean(self) -> float:
        return statistics.fmean(self.returns)

    @property
    def std(self) -> float:
        """Population standard deviation over episodes."""
        return statistics.pstdev(self.returns)

    @property
    def median(self) -> float:
        return statistics.median(self.returns)

    @property
    def mean_length(self) -> float:
        return statistics.fmean(self.lengths)

    def metrics(self) -> dict[str, float]:
        """Under the tags sb3 users know."""
        out = {
            "eval/mean_reward": self.mean,
            "eval/std_reward": self.std,
            "eval/median_reward": self.median,
            "eval/mean_ep_length": self.mean_length,
            "eval/episodes": float(len(self.returns)),
        }
        if self.successes:
            out["eval/success_rate"] = statistics.fmean(self.successes)
        out |= {f"eval/info/{name}": statistics.fmean(numbers) for name, numbers in self.info.items() if numbers}
        if self.cut:
            out["eval/cut_episodes"] = float(self.cut)
        return out

    def __str__(self) -> str:
        cut = f", {self.cut} of them cut after {max(self.lengths)} steps" if self.cut else ""
        success = f", success {statistics.fmean(self.successes):.0%}" if self.successes else ""
        info = "".join(f", {name} {statistics.fmean(given):.4g}" for name, given in self.info.items() if given)
        return (
            f"return {short(self.mean)} ± {short(self.std)} (median {short(self.median)}), "
            f"length {self.mean_length:.0f}, {len(self.returns)} episodes{cut}{success}{info}"
        )
