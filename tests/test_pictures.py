"""The pictures of the natural gradient: their numbers by hand and by torch.distributions, and those that docs quote."""

from __future__ import annotations

import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributions as td

ROOT = Path(__file__).parents[1]
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out, threads = tmp_path_factory.mktemp("pictures"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["natural_gradient.py", "--out", str(out)])
        try:
            runpy.run_path(str(ROOT / "benchmarks" / "natural_gradient.py"), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
    assert (out / "natural_gradient.png").stat().st_size > 10_000
    numbers: dict[str, Any] = json.loads((out / "natural_gradient.json").read_text())
    return numbers


def test_the_same_shift_is_far_for_a_narrow_policy(made: dict[str, Any]) -> None:
    for shift in made["shifts"]:
        assert shift["kl"] == pytest.approx(1 / (2 * shift["std"] ** 2), rel=1e-12)  # by hand


def test_natural_paths_do_not_depend_on_how_a_policy_is_written(made: dict[str, Any]) -> None:
    natural, plain = (
        [torch.tensor(line["points"]) for name, line in made["paths"].items() if name.startswith(kind)]
        for kind in ("F", "g")
    )
    assert (natural[0] - natural[1]).abs().max() < 1e-9  # float64 rounding, carried through sixty steps
    assert (plain[0] - plain[1]).abs().max() > 0.1


def test_every_step_of_a_path_has_the_kl_it_is_said_to_have(made: dict[str, Any]) -> None:
    for line in made["paths"].values():
        policies = [td.Normal(mean, std) for mean, std in torch.tensor(line["points"], dtype=torch.float64)]
        for old, new in pairwise(policies):
            # 0.02 by the quadratic model; log σ moves by up to 0.14, and the third order is about that share of it.
            assert float(td.kl_divergence(old, new)) == pytest.approx(0.02, rel=0.2)


def test_of_a_real_policy_the_fast_product_is_the_matrix_and_cg_comes_to_the_exact_solution(
    made: dict[str, Any],
) -> None:
    real = made["real_policy"]
    assert real["product_error"] < 1e-12  # float64 rounding
    for damping, fractions in real["of_the_exact_improvement"].items():
        # CG climbs in the damped metric; measured in F alone it may overshoot the damped solution by a little.
        assert all(later > earlier - 1e-3 for earlier, later in pairwise(fractions))
        assert fractions[0] < 0.95 and fractions[-1] == pytest.approx(1, abs=1e-2 if damping == "0.01" else 1e-4)
    along = real["along_the_step"]
    full = along["scale"].index(1.0)
    assert along["quadratic_kl"][full] == pytest.approx(along["kl"][full], rel=0.2)
    assert 0 < along["gain"][full] < along["linear_gain"][full] * 1.2


def test_docs_quote_what_was_recorded() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "natural_gradient.json").read_text())
    text = (ROOT / "docs" / "natural-gradient.md").read_text()
    real, along = recorded["real_policy"], recorded["real_policy"]["along_the_step"]
    full, twice = along["scale"].index(1.0), along["scale"].index(2.0)
    rewards = [line["last_reward"] for line in recorded["paths"].values()]
    first, tenth = ([f[k] for f in real["of_the_exact_improvement"].values()] for k in (0, 9))
    assert min(tenth) > 0.999
    for quoted in (
        f"{recorded['shifts'][0]['kl']:.2f}",
        f"{recorded['shifts'][1]['kl']:.3f}",
        f"{rewards[0]:.6f}".replace("-", "−"),
        f"{rewards[1]:.3f}".replace("-", "−"),
        f"{rewards[3]:.2f}".replace("-", "−"),
        f"{real['parameters']} parameters",
        f"Only {real['eigenvalues_above_a_hundredth_of_it']} of the {real['parameters']} eigenvalues",
        *(f"{share:.2f}" for share in first),
        f"{along['kl'][full]:.4f}",
        f"{along['gain'][full]:.3f}",
        f"{along['linear_gain'][full]:.3f}",
        f"{along['kl'][twice]:.3f}",
    ):
        assert quoted in text, quoted
    assert real["product_error"] < 2e-15
