"""The network and both linearisations against plain torch modules and dense Jacobians by autograd."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import F64, OBS_DIM, make_mlp, randn, relative_error, seeded
from torch import Tensor, nn

from trpo.networks.autograd_linearization import AutogradLinearization
from trpo.networks.linearization import Linearization
from trpo.networks.mlp import ACTIVATIONS, MLP, MlpLinearization
from trpo.networks.parameters import FlatParameters, Layout

MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}
HIDDEN = [(), (6,), (5, 4, 3)]
KINDS = {"closed form": MlpLinearization, "autograd": AutogradLinearization}
# Sums of some tens of float64 products of size 1: a few units of 2.2e-16, taken a thousandfold.
TOLERANCE = 1e-12


def dense_jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """J [B, K, P] by torch.func.jacrev."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    parts = torch.func.jacrev(lambda values: torch.func.functional_call(module, values, (x,)))(parameters)
    return torch.cat([part.flatten(2) for part in parts.values()], -1)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_forward_is_the_network_it_says(activation: str, hidden: tuple[int, ...]) -> None:
    mlp = make_mlp([OBS_DIM, *hidden, 2], activation=activation)
    layers: list[nn.Module] = []
    for layer in mlp.layers:
        layers += [layer, MODULES[activation]()]
    x = randn(7, OBS_DIM)
    assert torch.equal(mlp(x), nn.Sequential(*layers[:-1])(x))


def test_initialisation_is_orthogonal_with_the_stated_gains() -> None:
    mlp = MLP([8, 6, 5, 3], activation="tanh", head_scale=0.01, generator=seeded())
    for layer, gain in zip(mlp.layers, (math.sqrt(2), math.sqrt(2), 0.01), strict=True):
        gram = layer.weight @ layer.weight.T
        # float32 orthogonalisation: 1e-5 of the scale.
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), rtol=1e-5, atol=1e-5 * gain**2)
        assert (layer.bias == 0).all()


def test_initialisation_follows_its_generator() -> None:
    a, b, c = (MLP([3, 4, 2], activation="tanh", head_scale=1.0, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(a.layers[0].weight, b.layers[0].weight)
    assert not torch.equal(a.layers[0].weight, c.layers[0].weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_the_derivatives_of_the_activations(activation: str) -> None:
    function, through = ACTIVATIONS[activation]
    z = torch.linspace(-5, 5, 101, dtype=F64).requires_grad_()  # holds 0, where relu and elu have their corner
    h = function(z)
    (expected,) = torch.autograd.grad(h.sum(), z)
    torch.testing.assert_close(through(torch.ones_like(z), z, h).detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_products_agree_with_the_dense_jacobian(kind: str, activation: str, hidden: tuple[int, ...]) -> None:
    mlp = make_mlp([OBS_DIM, *hidden, 2], activation=activation)
    x, v, u = randn(7, OBS_DIM, seed=1), randn(count(mlp), seed=2), randn(7, 2, seed=3)
    linearization = KINDS[kind](mlp, x)
    jacobian = dense_jacobian(mlp, x)
    assert relative_error(linearization.output, mlp(x).detach()) <= TOLERANCE
    assert not linearization.output.requires_grad
    assert relative_error(linearization.jvp(v), jacobian @ v) <= TOLERANCE
    assert relative_error(linearization.vjp(u), torch.einsum("bkp,bk->p", jacobian, u)) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_products_describe_the_old_parameters_after_these_moved(kind: str) -> None:
    mlp = make_mlp([OBS_DIM, 5, 4, 2])
    theta = FlatParameters(mlp)  # writes go past autograd's version counters, as in the line search
    x, v, u = randn(7, OBS_DIM, seed=1), randn(count(mlp), seed=2), randn(7, 2, seed=3)
    linearization = KINDS[kind](mlp, x)
    output, jv, ju = linearization.output.clone(), linearization.jvp(v).clone(), linearization.vjp(u).clone()
    theta.assign_(theta.vector + 1)
    assert torch.equal(linearization.output, output)
    assert torch.equal(linearization.jvp(v), jv)
    assert torch.equal(linearization.vjp(u), ju)


@pytest.mark.parametrize("kind", KINDS)
def test_calls_do_not_disturb_each_other_or_their_arguments(kind: str) -> None:
    mlp = make_mlp([OBS_DIM, 5, 4, 2])
    x, v, u = randn(7, OBS_DIM, seed=1), randn(count(mlp), seed=2), randn(7, 2, seed=3)
    arguments = [t.clone() for t in (x, v, u)]
    linearization: Linearization = KINDS[kind](mlp, x)
    jv, ju = linearization.jvp(v), linearization.vjp(u)
    kept = jv.clone(), ju.clone()
    linearization.jvp(2 * v), linearization.vjp(3 * u)
    assert torch.equal(jv, kept[0]) and torch.equal(ju, kept[1])  # results own their memory
    assert torch.equal(linearization.jvp(v), jv) and torch.equal(linearization.vjp(u), ju)
    for argument, before in zip((x, v, u), arguments, strict=True):
        assert torch.equal(argument, before)


def test_closed_form_accepts_non_contiguous_cotangents() -> None:
    mlp = make_mlp([OBS_DIM, 5, 2])
    linearization, wide = MlpLinearization(mlp, randn(7, OBS_DIM)), randn(7, 4)
    assert torch.equal(linearization.vjp(wide[:, ::2]), linearization.vjp(wide[:, ::2].contiguous()))


def test_autograd_linearisation_takes_any_module() -> None:
    module = nn.Sequential(nn.Linear(OBS_DIM, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)).to(F64)
    x, v, u = randn(7, OBS_DIM, seed=1), randn(count(module), seed=2), randn(7, 2, seed=3)
    linearization, jacobian = AutogradLinearization(module, x), dense_jacobian(module, x)
    assert relative_error(linearization.jvp(v), jacobian @ v) <= TOLERANCE
    assert relative_error(linearization.vjp(u), torch.einsum("bkp,bk->p", jacobian, u)) <= TOLERANCE


def test_autograd_linearisation_of_a_parameter_without_effect_is_zero_there() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(OBS_DIM, 2, dtype=F64), nn.Linear(2, 1, dtype=F64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    module = Partly()
    gradient = AutogradLinearization(module, randn(4, OBS_DIM)).vjp(torch.ones(4, 2, dtype=F64))
    assert (gradient[:8] != 0).all() and (gradient[8:] == 0).all()


def test_flat_parameters_are_the_modules_own_memory() -> None:
    module = nn.Linear(3, 2, dtype=F64)
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    theta = FlatParameters(module)
    assert torch.equal(theta.vector, torch.cat([weight.flatten(), bias]))
    theta.assign_(torch.arange(8, dtype=F64))
    assert torch.equal(module.weight.detach(), torch.arange(6, dtype=F64).view(2, 3))
    with torch.no_grad():
        module.bias.fill_(-1)
    assert (theta.vector[6:] == -1).all()
    module.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(theta.vector, torch.cat([weight.flatten(), bias]))


def test_a_layout_splits_into_views_in_order() -> None:
    vector = torch.arange(8.0)
    a, b = Layout([torch.Size((2, 3)), torch.Size((2,))]).split(vector)
    b.zero_()
    assert a.shape == (2, 3) and vector.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
