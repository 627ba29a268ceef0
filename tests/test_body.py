"""Layers of a user's own in whole runs: what they compute, and that they learn, resume and open like built-in ones."""

from __future__ import annotations

import copy
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bodies import Gated, Looking
from commands import PROJECT, config_for, one_line, run_script
from gymnasium import spaces
from helpers import F64, on_gpu, randn, relative_error, seeded, torch_kl
from test_resume import assert_same_run

from trpo.agent import Agent
from trpo.config import Config
from trpo.config.difference import without_effect
from trpo.config.file import parse_config
from trpo.errors import CheckpointError, ConfigError
from trpo.natural_gradient import fisher_product
from trpo.natural_gradient.explicit import eta_function, fisher_matrix
from trpo.networks.network import BodyAndHead, linearize
from trpo.policy import build_policy
from trpo.run.checkpoint import load_state
from trpo.run.saved_policy import load_policy
from trpo.run.trust import UntrustedCodeError
from trpo.runtime.distributed import join_group
from trpo.trainer import Trainer
from trpo.value import AdamFit, FitReport, GaussNewtonFit, ValueFunction, build_value

CPU = torch.device("cpu")
OBS = randn(64, 3)
TARGET = OBS[:, 0] * OBS[:, 1].sigmoid()  # which these layers can be
BODY = {"name": "bodies:Gated", "kwargs": {"width": 5}}


def config(
    env_id: str = "Pendulum-v1",
    *,
    body: Any = BODY,
    fit: str = "adam",
    minibatch_size: int = 16,
    policy: Any = None,
    **changes: Any,
) -> Config:
    settings = {
        "env": {"id": env_id, "num_envs": 2},
        "total_steps": 192,
        "batch_size": 64,
        "device": "cpu",
        "policy": {"body": body, **(policy or {})},
        "value": {"body": body, "fit": fit, "adam": {"epochs": 2, "minibatch_size": minibatch_size}},
        "evaluation": {"every_steps": 0, "final_episodes": 1},
    }
    return config_for(env_id, **{**settings, **changes})


def test_the_last_layer_is_put_on_the_body_and_starts_as_the_built_in_one_does() -> None:
    box, actions = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-2, 2, (1,))
    policy = build_policy(config(dtype="float64"), box, actions, generator=seeded(), device=CPU)
    network = policy.network
    assert isinstance(network, BodyAndHead) and isinstance(network.body, Gated)
    # Gain 0.01 on orthogonal rows; the bias of a Gaussian of σ 0.4 around the middle, as ever.
    gram = network.head.weight @ network.head.weight.T
    assert network.head.weight.shape == (11, 3 + 5)
    torch.testing.assert_close(gram.diagonal().sum(), torch.tensor(8 * 1e-4, dtype=F64), rtol=1e-5, atol=0)
    torch.testing.assert_close(network.head.bias, policy.distribution.normal(0.4), rtol=1e-6, atol=1e-6)  # of float32
    x = randn(7, 3)
    by_hand = torch.cat([x, (x @ network.body.value.weight.T + network.body.value.bias)
                         * torch.sigmoid(x @ network.body.gate.weight.T + network.body.gate.bias)], -1)  # fmt: skip
    expected = by_hand @ network.head.weight.T + network.head.bias
    torch.testing.assert_close(policy(x), expected, rtol=1e-12, atol=1e-12)
    torch.manual_seed(8)  # nothing hangs on torch's own generator
    again = build_policy(config(dtype="float64"), box, actions, generator=seeded(), device=CPU)
    other = build_policy(config(dtype="float64"), box, actions, generator=seeded(1), device=CPU)
    assert torch.equal(again.theta.vector, policy.theta.vector)
    assert not torch.equal(other.network.body.value.weight, network.body.value.weight)


def test_weights_do_not_hang_on_what_a_module_draws_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    box, actions = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-2, 2, (1,))
    policy = build_policy(config(), box, actions, generator=seeded(), device=CPU)
    monkeypatch.delitem(sys.modules, "bodies")  # which makes a layer at once
    again = build_policy(config(), box, actions, generator=seeded(), device=CPU)
    assert type(again.network.body) is not type(policy.network.body)
    assert torch.equal(again.theta.vector, policy.theta.vector)


def fitted(fit: str, epochs: int, times: int) -> tuple[ValueFunction, ValueFunction, FitReport]:
    """V before and after so many fits to a product of an observation with a sigmoid of another."""
    settings = config(fit=fit, dtype="float64")
    adam = settings.value.adam.model_copy(update={"epochs": epochs, "minibatch_size": 64})
    settings = settings.model_copy(update={"value": settings.value.model_copy(update={"adam": adam})})
    box, actions = spaces.Box(-np.inf, np.inf, (3,)), spaces.Box(-2, 2, (1,))
    agent = Agent(settings, box, actions, num_envs=2, group=join_group(CPU), device=CPU)
    before = copy.deepcopy(agent.value)
    for _ in range(times):
        report = agent.value_fit.fit(agent.value, OBS, TARGET, progress=0.0)
    return before, agent.value, report


def test_v_is_fitted_as_torchs_own_adam_would() -> None:
    expected, value, _ = fitted("adam", epochs=4, times=2)
    assert isinstance(value.network, BodyAndHead)
    optimiser = torch.optim.Adam(expected.parameters(), lr=1e-3, eps=1e-5)
    for _ in range(8):  # one minibatch an epoch, in another order
        optimiser.zero_grad()
        (expected(OBS) - TARGET).square().mean().backward()
        optimiser.step()
    # Steps of 1e-3 that sums in another order change by rounding alone.
    torch.testing.assert_close(value.theta.vector, expected.theta.vector, rtol=0, atol=1e-11)


def test_v_is_fitted_by_gauss_newton_where_no_straight_line_is() -> None:
    _, _, report = fitted("gauss_newton", epochs=1, times=30)
    straight = torch.cat([OBS, torch.ones(64, 1, dtype=F64)], -1)
    residual = straight @ torch.linalg.lstsq(straight, TARGET[:, None]).solution - TARGET[:, None]
    assert report.loss_after < 0.2 * float(residual.square().mean())


POLICIES = {
    "ordinal": ("Pendulum-v1", {}),
    "gaussian": ("Pendulum-v1", {"bins": None}),
    "gaussian_state_std": ("Pendulum-v1", {"bins": None, "std": {"state_dependent": True}}),
    "gaussian_given_std": ("Pendulum-v1", {"bins": None, "std": 0.5}),
    "categorical": ("CartPole-v1", {}),
}


@pytest.mark.parametrize("fit", ["adam", "gauss_newton"])
@pytest.mark.parametrize("kind", POLICIES)
def test_it_trains_resumes_to_the_bit_and_is_opened(kind: str, fit: str, tmp_path: Path) -> None:
    env_id, policy = POLICIES[kind]
    settings = config(env_id, policy=policy, fit=fit)
    whole = Trainer(settings, root=tmp_path / "a", console=False).train().directory
    run = Trainer(settings, root=tmp_path / "b", console=False).train(max_updates=1).directory
    first = load_state(next((run / "checkpoints").iterdir()))["agent"]
    Trainer(settings, resume=run, console=False).train()
    assert_same_run(whole, run)
    last = load_policy(run, trust_code=True)
    for name in ("value", "gate"):
        key = next(key for key in first["policy"] if key.endswith(f"body.{name}.weight"))
        assert not torch.equal(last.policy.state_dict()[key], first["policy"][key])
    assert last.action_space.contains(last.act(np.zeros(last.obs_dim, np.float32)))


UNUSUAL = ["Twice", "Attention", "Recurrent", "Keeping", "Frozen", "lazy", "convolution"]


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_ones_train_and_resume_to_the_bit_too(name: str, tmp_path: Path) -> None:
    body = {"body": {"name": f"bodies:{name}"}}
    settings = config(policy=body, fit="gauss_newton").model_copy(update={"value": config().value})
    whole = Trainer(settings, root=tmp_path / "a", console=False).train().directory
    run = Trainer(settings, root=tmp_path / "b", console=False).train(max_updates=1).directory
    first = load_state(next((run / "checkpoints").iterdir()))["agent"]["policy"]
    Trainer(settings, resume=run, console=False).train()
    assert_same_run(whole, run)
    last = load_policy(run, trust_code=True).policy
    moved = {key for key, value in last.state_dict().items() if "body" in key and not torch.equal(value, first[key])}
    assert {key for key, p in last.named_parameters() if p.requires_grad and "body" in key} <= moved
    assert all(not key.startswith("network.body.first") for key in moved) or name != "Frozen"


@pytest.mark.parametrize("name", ["Attention", "Recurrent"])
def test_two_threads_do_not_take_turns_in_what_is_torchs_for_both(name: str, tmp_path: Path) -> None:
    """V is fitted beside the policy's step, and both need second derivatives."""
    cuda = torch.backends.cuda

    def torchs() -> tuple[bool, ...]:
        attention = (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
        return torch.backends.cudnn.enabled, *attention

    before, within, thetas = torchs(), set(), []
    for threads in (1, 2, 2, 2):
        settings = config(body={"name": f"bodies:{name}"}, threads=threads, total_steps=64 * 8)
        trainer = Trainer(settings, root=tmp_path, console=False, on_update=lambda *_: within.add(torchs()))
        trainer.train()
        thetas.append(torch.cat([trainer.agent.policy.theta.vector, trainer.agent.value.theta.vector]))
    assert before == torchs() and within == {before} and before[0]
    assert all(torch.equal(theta, thetas[0]) for theta in thetas)


def test_cudnn_is_left_out_where_recurrent_layers_are_differentiated() -> None:
    body = Looking(3)
    Looking.enabled.clear()
    body(torch.zeros(2, 3))
    assert Looking.enabled == {True}
    Looking.enabled.clear()
    linearize(body, torch.zeros(2, 3))
    assert Looking.enabled == {False}
    assert torch.backends.cudnn.enabled


@on_gpu
@pytest.mark.parametrize("name", UNUSUAL)
def test_on_a_gpu_they_learn_what_they_learn_on_a_cpu(name: str, tmp_path: Path) -> None:
    thetas = []
    for device in ("cpu", "cuda"):
        # One minibatch has no order, but for rounding.
        settings = config(body={"name": f"bodies:{name}"}, minibatch_size=64, device=device, dtype="float64")
        trainer = Trainer(settings, root=tmp_path, console=False)
        trainer.train()
        assert trainer.agent.policy.theta.vector.device.type == device
        thetas.append(torch.cat([part.theta.vector.cpu() for part in (trainer.agent.policy, trainer.agent.value)]))
    # A GPU sums in another order, and so does each of three updates. Recurrent layers act by cuDNN's formulas, and are
    # differentiated by torch's: 9e-5 apart in the end, where steps were of 1e-3.
    atol = 5e-4 if name == "Recurrent" else 1e-7
    torch.testing.assert_close(thetas[1], thetas[0], rtol=1e-5, atol=atol)


def test_a_layer_used_twice_takes_its_natural_gradient_step() -> None:
    """Against the dense Fisher matrix and gradient, by torch's own KL; a layer that has two names is one part of θ."""
    box, actions = spaces.Box(-np.inf, np.inf, (3,)), spaces.Discrete(3)
    settings = config("CartPole-v1", policy={"body": {"name": "bodies:Twice", "kwargs": {"width": 3}}}, dtype="float64")
    policy = build_policy(settings, box, actions, generator=seeded(), device=CPU)
    size = (3 + 1) * 3 + (3 + 1) * 3 + (3 + 1) * 3  # first, the one used twice, the head
    assert len(policy.theta.vector) == size
    policy.theta.assign_(randn(size, seed=4))
    obs = randn(30, 3)
    product = fisher_product(policy.linearize(obs), policy.distribution, count=30)
    fisher = fisher_matrix(
        eta_function(policy, obs), lambda p, q: torch_kl(policy.distribution, p, q), policy.theta.vector
    )
    v = randn(size, seed=3)
    assert relative_error(product(v), fisher @ v) <= 1e-10
    before = policy.network.body.b.weight.detach().clone()
    policy.theta.assign_(policy.theta.vector + 1)  # the module still has the parameters that θ is behind
    assert torch.equal(policy.network.body.b.weight, before + 1) and policy.network.body.b is policy.network.body.a


def test_a_factory_that_gives_one_module_to_all_has_it_copied(tmp_path: Path) -> None:
    shared = {"name": "bodies:always_the_same"}
    settings = config(policy={"body": shared})
    settings = settings.model_copy(update={"value": settings.value.model_copy(update={"body": settings.policy.body})})
    trainer = Trainer(settings, root=tmp_path, console=False)
    policy, value = trainer.agent.policy, trainer.agent.value
    assert policy.network.body is not value.network.body
    policy.theta.assign_(policy.theta.vector + 1)
    assert not torch.equal(policy.network.body.weight, value.network.body.weight)
    trainer.close()


def test_a_value_function_with_a_frozen_layer_is_fitted_without_it() -> None:
    for fit in ("adam", "gauss_newton"):
        settings = config(fit=fit, dtype="float64").model_copy(update={"value": Config.model_validate(
            {"env": {"id": "x"}, "value": {"fit": fit, "hidden_sizes": (6, 5)}}).value})  # fmt: skip
        value = build_value(settings, 3, generator=seeded(), device=CPU)
        value.network.linears[0].requires_grad_(False)
        value = ValueFunction(value.network)
        kept, moved = (value.network.linears[i].weight.detach().clone() for i in (0, 1))
        fitter = GaussNewtonFit(settings.value.gauss_newton) if fit == "gauss_newton" else AdamFit(
            settings.value.adam, value, generator=seeded(), learning_rate=lambda progress: 1e-3)  # fmt: skip
        report = fitter.fit(value, OBS, TARGET, progress=0.0)
        assert report.loss_after < report.loss_before
        assert torch.equal(value.network.linears[0].weight, kept)
        assert not torch.equal(value.network.linears[1].weight, moved)


def test_settings_of_layers_beside_a_body_are_without_effect() -> None:
    notes = without_effect(config(policy={"hidden_sizes": (9,), "activation": "relu"}))
    assert "policy.hidden_sizes, while policy.body is given" in notes
    assert "policy.activation, while policy.body is given" in notes
    assert not without_effect(config_for(policy={"hidden_sizes": (9,), "activation": "relu"}))


def test_a_saved_one_is_opened_only_by_who_trusts_it(tmp_path: Path, capsys, monkeypatch) -> None:
    run = Trainer(config(), root=tmp_path, console=False).train().directory
    with pytest.raises(UntrustedCodeError, match=r"its policy.body \('bodies:Gated'\) may make Python import code"):
        load_policy(run)
    arguments = ("evaluate.py", run, "--episodes", 1)
    refused = run_script(*arguments, capture=capsys, patch=monkeypatch)
    assert refused.status == 2 and "--trust-code" in one_line(refused.err)
    assert run_script(*arguments, "--trust-code", capture=capsys, patch=monkeypatch).status == 0
    # A run whose settings name the same code trusts it; others do not.
    new = Trainer(config(), root=tmp_path, console=False, start_from=run)
    assert torch.equal(new.agent.policy.theta.vector, load_policy(run, trust_code=True).policy.theta.vector)
    new.close()
    with pytest.raises(CheckpointError, match=r"is no policy to start from here: its policy.body is bodies:Gated, the"):
        Trainer(config(policy={"body": None, "hidden_sizes": (8,)}), root=tmp_path, console=False, start_from=run)


def test_one_that_no_longer_gives_the_same_layers_is_said(tmp_path: Path, monkeypatch) -> None:
    run = Trainer(config(), root=tmp_path, console=False).train().directory
    monkeypatch.setattr("bodies.Gated", lambda inputs, width: torch.nn.Linear(inputs, width))
    with pytest.raises(CheckpointError, match=r"not a policy this version can open \((Missing key|size mismatch)"):
        load_policy(run, trust_code=True)
    monkeypatch.delattr("bodies.Gated")
    with pytest.raises(ConfigError, match=r"policy.body.name: 'bodies:Gated' cannot be imported"):
        load_policy(run, trust_code=True)


@pytest.mark.parametrize(
    ("name", "kwargs", "problem"),
    [
        ("nowhere:Net", {}, r"policy.body.name: 'nowhere:Net' cannot be imported: No module named 'nowhere'"),
        ("bodies:Nothing", {}, r"policy.body.name: 'bodies:Nothing' cannot be imported"),
        ("bodies:Gated", {"depth": 2}, r"policy.body: bodies:Gated cannot be called with 3 and kwargs {'depth': 2}"),
        ("bodies:raises", {}, r"cannot be called with 3 .*: ZeroDivisionError: no layers left \(.*bodies.py:\d+\)"),
        ("bodies:number", {}, r"bodies:number gave 3, not a torch.nn.Module"),
        (
            "bodies:Flat",
            {},
            r"the module of bodies:Flat gives torch.float32 \[15\] for observations torch.float32 \[5, 3\]",
        ),
        (
            "bodies:Narrow",
            {},
            r"the module of bodies:Narrow takes no observations \[B, 3\] of torch.float32: RuntimeError",
        ),
        ("bodies:pair", {}, r"the module of bodies:pair gives a tuple for observations"),
        (
            "bodies:halved",
            {},
            r"the module of bodies:halved gives torch.float16 \[5, 4\] for observations torch.float32",
        ),
        ("bodies:diverges", {}, "gives NaN or infinity for observations between -1 and 1"),
        ("bodies:drops", {}, "the module of bodies:drops gives different outputs for the same input"),
        ("bodies:normalizes", {}, "gives different outputs for the same input"),
        ("bodies:Counting", {}, "gives different outputs for the same input"),
        ("bodies:Numbering", {}, "gives different outputs .* and what changes when it is called"),
        ("bodies:Noisy", {}, "gives different outputs for the same input"),
        ("bodies:Centred", {}, "gives different outputs for the same input"),
        (
            "bodies:NotTwice",
            {},
            "the module of bodies:NotTwice cannot be differentiated twice, as Fisher products need",
        ),
        ("broken_module:f", {}, r"'broken_module:f' cannot be imported: SyntaxError"),
    ],
)
def test_a_body_that_does_not_fit_is_one_line(
    name: str, kwargs: Any, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("def f(inputs:\n")
    monkeypatch.syspath_prepend(tmp_path)
    settings = config(policy={"body": {"name": name, "kwargs": kwargs}})
    with pytest.raises(ConfigError, match=problem):
        Trainer(settings, root=tmp_path / "runs", console=False)
    assert not (tmp_path / "runs").exists()


def test_a_preconditioner_needs_layers_it_knows() -> None:
    with pytest.raises(ValueError, match="must be null with layers of your own"):
        config(natural_gradient={"preconditioner": "kronecker"})


def test_a_copy_in_another_place_finds_its_module_in_the_working_directory(tmp_path: Path, capsys, monkeypatch) -> None:
    shutil.copy(Path(__file__).with_name("bodies.py"), tmp_path / "my_layers.py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(
        "env: {id: Pendulum-v1, num_envs: 2}\ntotal_steps: 64\nbatch_size: 64\n"
        "policy: {body: {name: 'my_layers:Gated', kwargs: {width: 3}}}\nevaluation: {final_episodes: 1}\n"
    )
    outcome = run_script("train.py", "--config", "c.yaml", capture=capsys, patch=monkeypatch)
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1].endswith("--trust-code")


def test_the_layers_and_settings_of_the_docs_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (PROJECT / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# my_layers.py.*?)```", page, re.DOTALL)
    (settings,) = re.findall(r"```yaml\n(policy: \{body: .*?)```", page, re.DOTALL)
    (tmp_path / "my_layers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_layers", raising=False)  # another test's
    given = parse_config("env: {id: CartPole-v1}\n" + settings)
    box = spaces.Box(0, 1, (256,))
    policy = build_policy(given, box, spaces.Discrete(2), generator=seeded(), device=CPU)
    assert policy.network.head.in_features == 4 * 4 * 4 and policy(randn(3, 256).float()).shape == (3, 2)
    assert build_value(given, 256, generator=seeded(), device=CPU).network.head.in_features == 8 * 4 * 4
