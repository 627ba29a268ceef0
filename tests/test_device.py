"""Runs on a GPU, as far as a pretended one shows them: nothing is on the wrong device, and nothing waits without need.

What a real one does with the numbers, and how fast, is not to be seen here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import on_gpu, randn, relative_error
from torch.utils import backend_registration

from trpo.config import Config
from trpo.errors import UserError
from trpo.runtime.device import exact_convolutions, training_device
from trpo.runtime.distributed import Group

CASES = Path(__file__).with_name("on_pretended_gpu.py")
RUN = "total_steps: 1024, batch_size: 256, dtype: float64, checkpoint: {every_steps: 0}"
RUN += ", evaluation: {every_steps: 512, episodes: 1, final_episodes: 1}"
PENDULUM = "env: {id: Pendulum-v1, backend: torch, num_envs: 4}"
READ_IN_A_STEP = 3  # the gradient's norm, CG, and xᵀFx with what else is known of x

can_pretend = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets no device be written in Python",
)


def run(case: str, *arguments: str) -> Any:
    # In a process of its own: the pretended GPU is there for good.
    done = subprocess.run([sys.executable, str(CASES), case, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@can_pretend
def test_the_pretended_gpu_refuses_and_waits_as_a_real_one() -> None:
    *refused, one, mask, there, back, nonzero, many, last = run("refusals")
    assert [text.split(":")[0] for text in refused] == ["aten", "aten", "aten"]
    assert all("on pretended:0 and on the CPU" in text for text in refused)
    assert [one, mask, there, back] == ["aten::_local_scalar_dense", "aten::index.Tensor", "a copy", "a copy"]
    assert [nonzero, many, last] == ["aten::nonzero", "tolist", "a copy"]


@can_pretend
@pytest.mark.parametrize(
    "settings",
    [
        PENDULUM,
        "env: {id: CartPole-v1, backend: torch, num_envs: 4}",
        "env: {id: Pendulum-v1, num_envs: 4}, policy: {bins: null}, natural_gradient: {preconditioner: kronecker}",
        f"{PENDULUM}, policy: {{bins: null, std: 0.5}}, value: {{fit: gauss_newton, fit_first: true}}",
        f"{PENDULUM}, natural_gradient: {{fisher_subsample: 0.5}}, value: {{adam: {{minibatch_size: 64}}}}",
    ],
)
def test_a_run_learns_what_it_learns_on_the_cpu(settings: str) -> None:
    # The pretended GPU computes as the CPU does; CG is written otherwise for it, so it may round otherwise, which four
    # updates in float64 do not raise above this.
    assert run("training", f"{{{settings}, {RUN}}}") < 1e-8


@can_pretend
def test_cg_is_read_once_and_a_candidate_once() -> None:
    by_policy = run("step_waits")
    for policy, steps in by_policy.items():
        assert {waits for waits, _ in steps.values()} == {READ_IN_A_STEP}, policy
    assert max(steps["too long a step"][1] for steps in by_policy.values()) > 2  # candidates


@can_pretend
@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
def test_a_rollout_waits_only_before_and_after_its_steps(env_id: str) -> None:
    settings = f"{{env: {{id: {env_id}, backend: torch, num_envs: 4}}, total_steps: 10_000}}"
    short, long = run("rollout_waits", settings, "250", "500")  # episodes end in both
    assert short == long


@can_pretend
def test_where_environments_are_on_the_cpu_nothing_waits_for_a_step() -> None:
    # A small policy acts beside them; one that learns with other layers, or is large, has its answers waited for.
    settings = "env: {id: CartPole-v1, num_envs: 4}, total_steps: 10_000"
    short, long = run("rollout_waits", f"{{{settings}}}", "40", "80")
    assert short == long
    for large in ("hidden_sizes: [2000, 2000]", "body: {name: 'bodies:Gated'}"):
        short, long = run("rollout_waits", f"{{{settings}, policy: {{{large}}}}}", "40", "80")
        assert long - short >= 2 * 40  # observations there, actions back


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "cpu"),
        ({"env": {"id": "Hopper-v5", "num_envs": 64}, "device": "cuda"}, "cuda:0"),
        ({"env": {"id": "Pendulum-v1", "backend": "torch"}, "batch_size": 4096}, "cuda:0"),
        ({"env": {"id": "Pendulum-v1", "backend": "torch"}, "batch_size": 4080}, "cpu"),
        ({"env": {"id": "Pendulum-v1", "backend": "torch"}, "batch_size": 4096, "device": "cpu"}, "cpu"),
        ({"batch_size": 4096}, "cpu"),
        ({"policy": {"hidden_sizes": [64, 128]}}, "cuda:0"),
        ({"value": {"hidden_sizes": [127]}}, "cpu"),
        ({"value": {"body": {"name": "bodies:mlp"}}}, "cuda:0"),
    ],
)
def test_auto_takes_a_gpu_that_has_work(
    settings: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = Config.model_validate({"env": {"id": "Hopper-v5"}, **settings})
    assert str(training_device(config)) == expected


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:  # in the words of NCCL
        raise RuntimeError("ncclInvalidUsage … Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 50")

    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    with pytest.raises(UserError, match="two processes have been given one GPU: start as many as there are, or set"):
        Group(0, 2).all_sum(torch.ones(1))


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wide = Config.model_validate({"env": {"id": "Hopper-v5"}, "policy": {"hidden_sizes": [512]}})
    assert str(training_device(wide)) == "cpu"


def of_cudnn() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    choices = cudnn.enabled, cudnn.deterministic, cudnn.benchmark
    return *choices, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


@pytest.fixture
def cudnn() -> Iterator[Any]:
    cudnn = torch.backends.cudnn
    yield cudnn
    cudnn.allow_tf32, cudnn.benchmark = True, False  # the former under its newer names, too
    assert of_cudnn() == (True, False, False, "tf32", "tf32")


@pytest.mark.parametrize("tf32", [True, False])
def test_convolutions_on_a_gpu_are_exact_within_and_torch_is_as_it_was(tf32: bool, cudnn: Any) -> None:
    cudnn.allow_tf32, cudnn.benchmark = tf32, True
    before = of_cudnn()
    with exact_convolutions(torch.device("cpu")):
        assert of_cudnn() == before
    with exact_convolutions(torch.device("cuda")):
        assert of_cudnn() == (True, True, False, "ieee", "ieee")
        assert cudnn.allow_tf32 is False  # by its older name, too
    assert of_cudnn() == before


def test_who_speaks_of_precision_by_its_newer_name_is_understood(cudnn: Any) -> None:
    cudnn.conv.fp32_precision = "ieee"  # of recurrent layers it is tf32: asked by the older name, torch raises
    with exact_convolutions(torch.device("cuda")):
        assert of_cudnn()[-2:] == ("ieee", "ieee")
    assert of_cudnn()[-2:] == ("ieee", "tf32")


@on_gpu
def test_on_a_gpu_a_convolutions_gradient_is_exact_and_the_same_each_time() -> None:
    """Of a size at which cuDNN sums by atomic operations, and rounds to TF32, unless it is told."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 8, stride=4), torch.nn.Tanh(), torch.nn.Conv2d(16, 32, 4))
    layers, x = layers.double().cuda(), randn(2048, 1, 64, 64).cuda()

    def gradient() -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(layers(x).square().mean(), [*layers.parameters()])])

    expected = gradient()
    layers, x = layers.float(), x.float()
    with exact_convolutions(torch.device("cuda")):
        actual = [gradient() for _ in range(10)]
    assert all(torch.equal(g, actual[0]) for g in actual)
    assert relative_error(actual[0].double(), expected) < 1e-5  # of TF32 1e-4 or more: rounding to 10 bits is 5e-4
