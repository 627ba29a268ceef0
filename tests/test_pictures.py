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
    for solution in real["solutions"].values():
        found, exact = solution["by_cg"], solution["exact"]
        assert found[0] == pytest.approx(real["plain_gradient"], rel=1e-12)
        # CG climbs in the damped metric; measured in F alone it may overshoot the damped solution by a little.
        assert all(later > earlier - 1e-3 * exact for earlier, later in pairwise(found))
        assert found[-1] == pytest.approx(exact, rel=1e-2)
    along = real["along_the_step"]
    full = along["scale"].index(1.0)
    assert along["quadratic_kl"][full] == pytest.approx(along["kl"][full], rel=0.2)
    assert 0 < along["gain"][full] < along["linear_gain"][full] * 1.2


def test_docs_quote_what_was_recorded() -> None:
    recorded = json.loads((ROOT / "benchmarks" / "natural_gradient.json").read_text())
    text = " ".join((ROOT / "docs" / "natural-gradient.md").read_text().replace("−", "-").split())
    narrow, wide = recorded["shifts"]
    natural, plain, _, in_other_units = (line["last_reward"] for line in recorded["paths"].values())
    steps = len(next(iter(recorded["paths"].values()))["points"]) - 1
    real, along = recorded["real_policy"], recorded["real_policy"]["along_the_step"]
    full, twice, taken = (along["scale"].index(scale) for scale in (1.0, 2.0, along["taken"]))
    damped = list(real["damped"].values())

    def table(key: str, form: str, count: int, *, after: int = 0) -> str:
        return " | ".join(f"{row[key]:{form}}" for row in damped[after : after + count])

    weak, middle, strong = (real["solutions"][damping] for damping in ("0.01", "0.1", "1"))
    for quoted in (
        f"If σ is {narrow['std']:g}, it now does what it almost never did: the KL divergence of the two is "
        f"{narrow['kl']:.2f}. If σ is {wide['std']:g}, hardly anybody would notice: {wide['kl']:.3f}.",
        f"After {steps} steps of the natural gradient the expected reward is {natural:.6f}, where the plain gradient "
        f"has {plain:.3f}",
        f"swings from side to side, and gets to {in_other_units:.2f}",
        f"a policy of {real['parameters']} parameters",
        f"{real['zero_eigenvalues']} of its eigenvalues are zero",
        f"promises an improvement of {real['plain_gradient']:.3f}, whatever λ",
        f"promises {weak['exact']:.3f} with λ = 0.01, {middle['exact']:.3f} with 0.1 and {strong['exact']:.3f} with 1",
        f"after {weak['iterations_to_0.999']}, {middle['iterations_to_0.999']} and {strong['iterations_to_0.999']}",
        f"{weak['eigenvalues_above_damping']}, {middle['eigenvalues_above_damping']} and "
        f"{strong['eigenvalues_above_damping']} lie above it",
        f"The true KL there is {along['kl'][full]:.4f}, and twice as far it is {along['kl'][twice]:.3f} where the "
        f"model says {along['quadratic_kl'][twice]:g}.",
        f"the second try passes, with a KL of {along['kl'][taken]:.4f} and an improvement of "
        f"{along['gain'][taken]:.3f}, where the linear prediction is {along['linear_gain'][taken]:.3f}.",
        f"| length of s | {table('length', '.1f', 3)} | {table('length', '.2f', 4, after=3)} |",
        *(
            f"| {name} | {table(key, '.3f', 7)} |"
            for name, key in (
                ("promised improvement gᵀs", "promised_gain"),
                ("true improvement", "gain"),
                ("true KL", "kl"),
            )
        ),
    ):
        assert quoted in text, quoted
    assert along["tried"] == [1, along["taken"]] == [1, 0.8]
    assert real["product_error"] < 2e-15
