"""The natural gradient in four pictures: by definition (`explicit.py`) and, for a policy of CartPole, as it is trained.

    python benchmarks/natural_gradient.py [--out DIR]

Writes natural_gradient.json, the numbers that docs/natural-gradient.md quotes, and natural_gradient.png.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trpo import Trainer, load_config
from trpo.config import NaturalGradientConfig
from trpo.distributions import DiagonalGaussian
from trpo.natural_gradient import conjugate_gradient, fisher_product, trust_region_step
from trpo.natural_gradient.explicit import (
    eta_function,
    fisher_matrix,
    gaussian_kl,
    kl_from,
    natural_gradient,
    steepest_direction,
    to_boundary,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HERE = Path(__file__).parent
F64 = torch.float64

# --- one shift of the mean, two policies -----------------------------------------------------------------------------

SHIFT, STDS = 1.0, (0.3, 3.0)


def shifts() -> list[dict[str, float]]:
    """KL(N(0, σ²) ‖ N(1, σ²)) for a narrow and a wide policy."""
    zero, one = torch.zeros(1, dtype=F64), torch.full((1,), SHIFT, dtype=F64)
    widths = [torch.full((1,), std, dtype=F64) for std in STDS]
    return [{"std": float(std), "kl": float(gaussian_kl(zero, std, one, std))} for std in widths]


# --- steps of equal KL, in two ways to write the same policy ---------------------------------------------------------

GOAL = 3.0  # reward of an action a: −½ (a − 3)²
KL = 0.02  # of each step
STEPS = 60
GAUSSIAN = DiagonalGaussian(1)
# θ ↦ η = (μ, log σ): the second writes the mean in other units.
WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "θ = (μ, log σ)": lambda theta: theta,
    "θ = (μ/5, log σ)": lambda theta: theta * torch.tensor([5.0, 1.0], dtype=F64),
}


def expected_reward(eta: Tensor) -> Tensor:
    """E[−½ (a − 3)²] of a Gaussian with η = (μ, log σ) [..., 2]."""
    return -0.5 * ((eta[..., 0] - GOAL) ** 2 + (2 * eta[..., 1]).exp())


def path(written: Callable[[Tensor], Tensor], *, natural: bool) -> list[list[float]]:
    """(μ, σ) after each of `STEPS` steps from (0, 1), every one of quadratic KL `KL`, along F⁻¹g or g."""
    theta, found = torch.zeros(2, dtype=F64), []
    for _ in range(STEPS + 1):
        mean, log_std = written(theta).tolist()
        found.append([mean, math.exp(log_std)])
        leaf = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(expected_reward(written(leaf)), leaf)
        fisher = fisher_matrix(lambda t: written(t).unsqueeze(0), GAUSSIAN.kl, theta)
        direction = natural_gradient(fisher, gradient) if natural else gradient
        theta = theta + to_boundary(direction, fisher, radius=math.sqrt(2 * KL))
    return found


def paths() -> dict[str, dict[str, Any]]:
    found = {}
    for name, written in WRITTEN.items():
        for natural in (True, False):
            points = path(written, natural=natural)
            mean, std = points[-1]
            reward = float(expected_reward(torch.tensor([mean, math.log(std)], dtype=F64)))
            found[f"{'F⁻¹g' if natural else 'g'}, {name}"] = {"points": points, "last_reward": reward}
    return found


def kl_circle(mean: float, std: float) -> Tensor:
    """(μ, σ) [K, 2] of the policies at quadratic distance `KL` from one."""
    eta = torch.tensor([mean, math.log(std)], dtype=F64)
    fisher = fisher_matrix(lambda t: t.unsqueeze(0), GAUSSIAN.kl, eta)
    angles = torch.linspace(0, 2 * math.pi, 60, dtype=F64)
    # The farthest point along every "gradient" of the circle is the boundary of the ball of F.
    ball = [
        eta + steepest_direction(fisher, torch.stack([angle.cos(), angle.sin()]), radius=math.sqrt(2 * KL))
        for angle in angles
    ]
    points = torch.stack(ball)
    return torch.stack([points[:, 0], points[:, 1].exp()], -1)


# --- a real policy: how near CG comes, and how long the quadratic model holds ----------------------------------------

ITERATIONS = 15
DAMPINGS = (0.01, 0.1, 1.0)
FROM_NATURAL_TO_PLAIN = (1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, math.inf)
BOUND = 0.01
STEP = NaturalGradientConfig(damping=0.01, cg_iterations=ITERATIONS)
SCALES = [i / 20 for i in range(41)]


def real_policy() -> dict[str, Any]:
    """A batch of CartPole amid training: its Fisher matrix by definition, CG beside it, and the update of TRPO."""
    settings = ["dtype=float64", "device=cpu", "policy.hidden_sizes=[8]", "evaluation.every_steps=0"]
    one_rollout_each = ["reuse_rollouts=0", "learning_starts=0", "value.adam.epochs=10", "natural_gradient.damping=0.3"]
    config = load_config(HERE.parent / "configs" / "cartpole.yaml", settings + one_rollout_each)
    with tempfile.TemporaryDirectory() as root:
        trained = Trainer(config, root=root, console=False).train(max_updates=10)
        trainer = Trainer(config, root=root, resume=trained.directory, console=False)
        agent, policy = trainer.agent, trainer.agent.policy
        batch, _, _ = agent.prepare(trainer.collector.collect()[0], progress=trainer.progress)
        trainer.close()
    dist, theta = policy.distribution, policy.theta.vector.clone()
    eta_of = eta_function(policy, batch.obs)
    fisher = fisher_matrix(eta_of, dist.kl, theta)
    with torch.no_grad():
        old = dist.log_prob(eta_of(theta), batch.action)

    def surrogate(t: Tensor) -> Tensor:
        """L(θ): the mean of ratio times advantage."""
        return ((dist.log_prob(eta_of(t), batch.action) - old).exp() * batch.advantage).mean()

    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(leaf), leaf)
    product = fisher_product(policy.linearize(batch.obs), dist, count=len(batch.obs))
    by_definition, fast = fisher @ gradient, product(gradient)

    def improvement(x: Tensor) -> float:
        """gᵀs of the step s along x whose quadratic KL is `BOUND`."""
        return float(gradient @ to_boundary(x, fisher, radius=math.sqrt(2 * BOUND)))

    def by_cg(damping: float, iterations: int) -> Tensor:
        damped = lambda v: product(v) + damping * v  # noqa: E731
        return conjugate_gradient(damped, gradient, max_iterations=iterations, tolerance=0.0).x

    eigenvalues = torch.linalg.eigvalsh(fisher)
    solutions = {}
    for damping in DAMPINGS:
        exact = improvement(natural_gradient(fisher, gradient, damping=damping))
        found = [improvement(by_cg(damping, k)) for k in range(1, ITERATIONS + 1)]
        solutions[f"{damping:g}"] = {
            "by_cg": found,
            "exact": exact,
            "iterations_to_0.999": 1 + next(k for k, value in enumerate(found) if value >= 0.999 * exact),
            "eigenvalues_above_damping": int((eigenvalues > damping).sum()),
        }

    kl, start = kl_from(eta_of, dist.kl, theta), float(surrogate(theta))
    damped = {}
    for damping in FROM_NATURAL_TO_PLAIN:
        x = gradient if damping == math.inf else natural_gradient(fisher, gradient, damping=damping)
        s = to_boundary(x, fisher, radius=math.sqrt(2 * BOUND))
        with torch.no_grad():
            damped[f"{damping:g}"] = {
                "length": float(s.norm()),
                "promised_gain": float(gradient @ s),
                "kl": float(kl(theta + s)),
                "gain": float(surrogate(theta + s)) - start,
            }

    report = trust_region_step(policy, batch, max_kl=BOUND, settings=STEP)
    assert report.search is not None
    step = (policy.theta.vector - theta) / report.scale
    with torch.no_grad():
        along = {
            "scale": SCALES,
            "kl": [float(kl(theta + a * step)) for a in SCALES],
            "quadratic_kl": [a * a * BOUND for a in SCALES],
            "gain": [float(surrogate(theta + a * step)) - start for a in SCALES],
            "linear_gain": [a * float(gradient @ step) for a in SCALES],
            "tried": [STEP.line_search.shrink**i for i in range(report.search.tries)],
            "taken": report.scale,
        }
    return {
        "parameters": len(theta),
        "samples": len(batch.obs),
        "product_error": float((fast - by_definition).norm() / by_definition.norm()),
        "zero_eigenvalues": int((eigenvalues.abs() < 1e-12 * eigenvalues[-1]).sum()),
        "plain_gradient": improvement(gradient),
        "eigenvalues": eigenvalues.tolist(),
        "solutions": solutions,
        "damped": damped,
        "along_the_step": along,
    }


# --- pictures --------------------------------------------------------------------------------------------------------


def draw(numbers: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 10), dpi=110, layout="constrained")
    (one, two), (three, four) = figure.subfigures(2, 2)
    _draw_shifts(one.subplots(), numbers["shifts"])
    _draw_paths(two.subplots(), numbers["paths"])
    _draw_cg(*three.subplots(2, 1, height_ratios=[3, 1]), numbers["real_policy"])
    _draw_step(*four.subplots(2, 1, sharex=True), numbers["real_policy"]["along_the_step"])
    figure.savefig(file)


def _draw_shifts(axes: Axes, found: list[dict[str, float]]) -> None:
    actions = torch.linspace(-6, 7, 600, dtype=F64)
    for colour, shift in zip(("C0", "C1"), found, strict=True):
        for mean, style in ((0.0, "-"), (SHIFT, "--")):
            density = GAUSSIAN.log_prob(torch.tensor([[mean, math.log(shift["std"])]], dtype=F64), actions[:, None])
            label = f"σ = {shift['std']:g}: KL {shift['kl']:.3g}" if style == "-" else None
            axes.plot(actions, density.exp(), style, color=colour, label=label)
    axes.set(title="1. The mean moves by 1 (dashed): two distances", xlabel="action", ylabel="density")
    axes.legend()


def _draw_paths(axes: Axes, found: dict[str, Any]) -> None:
    means, stds = torch.linspace(-0.4, 3.4, 120, dtype=F64), torch.linspace(0.05, 1.4, 120, dtype=F64)
    grid = torch.stack(torch.meshgrid(means, stds.log(), indexing="xy"), -1)
    axes.contour(means, stds, expected_reward(grid), levels=18, colors="0.85", linestyles="solid", linewidths=1)
    styles = [("C2", "-", 5.0), ("C3", "-", 1.5), ("C0", "--", 2.0), ("C1", "-", 1.5)]
    for (name, line), (colour, style, width) in zip(found.items(), styles, strict=True):
        mean, std = zip(*line["points"], strict=True)
        axes.plot(mean, std, style, color=colour, linewidth=width, label=f"{name}: {line['last_reward']:.1g}")
        axes.plot(mean[::10], std[::10], "o", color=colour, markersize=2 + width)
    for mean, std in next(iter(found.values()))["points"][::12]:
        axes.plot(*kl_circle(mean, std).T, color="C2", linewidth=1)
    axes.set(title=f"2. {STEPS} steps of KL {KL} (dots: each 10th), last reward", xlabel="μ", ylabel="σ")
    axes.legend(fontsize="small")


def _draw_cg(axes: Axes, spectrum: Axes, found: dict[str, Any]) -> None:
    above = [value for value in found["eigenvalues"] if value > 1e-6]
    spectrum.vlines(above, 0, 1, color="0.4", linewidth=1)
    for i, (damping, solution) in enumerate(found["solutions"].items()):
        iterations = range(1, len(solution["by_cg"]) + 1)
        axes.plot(iterations, solution["by_cg"], marker=".", color=f"C{i}", label=f"λ = {damping}")
        axes.axhline(solution["exact"], color=f"C{i}", linewidth=1, linestyle=":")
        spectrum.axvline(float(damping), color=f"C{i}", linewidth=2)
    axes.plot(1, found["plain_gradient"], "o", color="black", label="plain gradient")
    axes.set(
        title="3. CartPole: CG, and the exact (F + λI)⁻¹g (dotted)",
        xlabel="iterations",
        ylabel=f"improvement gᵀs at ½ sᵀFs = {BOUND}",
    )
    axes.legend(loc="center right")
    spectrum.set(xscale="log", yticks=[], xlabel="eigenvalues of F above 1e-6 (grey), and each λ")


def _draw_step(kls: Axes, gains: Axes, found: dict[str, Any]) -> None:
    kls.plot(found["scale"], found["quadratic_kl"], "--", color="C0", label="quadratic: α² ½ sᵀFs")
    kls.plot(found["scale"], found["kl"], color="C0", label="true")
    kls.axhline(BOUND, color="0.5", linewidth=1, label="bound")
    gains.plot(found["scale"], found["linear_gain"], "--", color="C3", label="linear: α gᵀs")
    gains.plot(found["scale"], found["gain"], color="C3", label="true")
    for scale in found["tried"]:
        taken = scale == found["taken"]
        for axes, curve in ((kls, found["kl"]), (gains, found["gain"])):
            there = curve[found["scale"].index(scale)]
            axes.plot(
                scale, there, "o" if taken else "x", color="black", markersize=8, label="kept" if taken else "tried"
            )
    kls.set(title="4. CartPole: along the step s of an update", ylabel="KL", ylim=(0, 3 * BOUND))
    gains.set(xlabel="α, the share of s", ylabel="improvement of the surrogate")
    for axes in (kls, gains):
        axes.legend(loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    numbers = {"shifts": shifts(), "paths": paths(), "real_policy": real_policy()}
    (args.out / "natural_gradient.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    draw(numbers, args.out / "natural_gradient.png")
    print(f"written: {args.out / 'natural_gradient.json'} and .png")


if __name__ == "__main__":
    main()
