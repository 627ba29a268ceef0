"""Layers of a user's own, by the name that settings give them: imported, made, and looked at before they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trpo.config import BodyConfig
from trpo.errors import ConfigError, imported, raised
from trpo.networks.autograd_linearization import AutogradLinearization
from trpo.networks.parameters import free_parameters


def make_body(
    settings: BodyConfig,
    inputs: int,
    *,
    key: str,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[nn.Module, int]:
    """The module that settings name, and how many features [B, F] it makes of observations [B, `inputs`].

    Args:
        settings: what to call, and with what.
        inputs: D.
        key: the setting's name, for messages.
        dtype: what it computes in.
        device: where.
        generator: source of its weights, through torch's own generator.

    Raises:
        ConfigError: it cannot be imported or called, or gives no module that fits, or one that cannot be differentiated
            twice, or that is another function from one call to the next: then what acted would not be what is updated.
    """
    name = f"{key}.body: the module of {settings.name}"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Before there is a seed: a module that draws random numbers does so when it is imported first, not again.
        factory = imported(settings.name, key=f"{key}.body.name", kind=ConfigError)
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        # A copy: whoever makes one module for all calls would have policies share it, and V.
        body = copy.deepcopy(_made(factory, settings, inputs, key)).to(dtype)
        if any(map(is_lazy, body.parameters())):  # of a copy that is called here: the same weights on every device
            called = copy.deepcopy(body)
            _looked_at(called, _probe(inputs, dtype, torch.device("cpu")), name)
            body.load_state_dict(called.state_dict())
        x = _probe(inputs, dtype, device)
        features = _looked_at(body.to(device), x, name)
    _differentiated(body, x, name)
    return body, features


def _probe(inputs: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Observations [5, `inputs`] to look at a module with, no two alike."""
    return torch.linspace(-1, 1, 5 * inputs, dtype=dtype, device=device).view(5, inputs)


def _made(factory: Callable[..., Any], settings: BodyConfig, inputs: int, key: str) -> nn.Module:
    try:
        made: Any = factory(inputs, **settings.kwargs)
    except Exception as error:
        problem = f"cannot be called with {inputs} and kwargs {settings.kwargs}: {raised(error)}"
        raise ConfigError(f"{key}.body: {settings.name} {problem}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{key}.body: {settings.name} gave {made!r:.60}, not a torch.nn.Module")
    return made


@torch.no_grad()
def _looked_at(body: nn.Module, x: Tensor, name: str) -> int:
    """The number of features of a module that is a function of single observations [5, D], and nothing else."""
    try:
        body(x.clone())  # what it makes when it is called first, as lazy layers do
        before = {key: value.clone() for key, value in body.state_dict().items()}
        out, again = body(x.clone()), body(x.clone())
        apart = torch.cat([body(x[:2].clone()), body(x[2:].clone())]) if isinstance(out, Tensor) else None
    except Exception as error:
        raise ConfigError(f"{name} takes no observations [B, {x.shape[1]}] of {x.dtype}: {raised(error)}") from error
    if apart is None or out.dim() != 2 or len(out) != len(x) or not out.shape[1] or out.dtype != x.dtype:
        given = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ConfigError(
            f"{name} gives {given} for observations {x.dtype} {list(x.shape)}, not [5, features] of those"
        )
    if not out.isfinite().all():
        raise ConfigError(f"{name} gives NaN or infinity for observations between -1 and 1")
    same = all(torch.allclose(out, other, rtol=1e-4, atol=1e-5, equal_nan=True) for other in (again, apart))
    if not same or any(not torch.equal(value, before[key]) for key, value in body.state_dict().items()):
        raise ConfigError(
            f"{name} gives different outputs for the same input: leave out what draws random numbers (dropout), looks "
            "at other rows of a batch (batch normalisation), and what changes when it is called (running statistics)"
        )
    return int(out.shape[1])


def _differentiated(body: nn.Module, x: Tensor, name: str) -> None:
    """Refuses what has no second derivatives, and what has wrong ones and says nothing: ⟨u, Jv⟩ is not ⟨Jᵀu, v⟩."""
    if not free_parameters(body):
        return
    problem = f"{name} cannot be differentiated twice, as Fisher products need"
    try:
        linearization = AutogradLinearization(body, x)
        u = torch.sin(torch.arange(linearization.output.numel()).to(x)).view_as(linearization.output)
        v = torch.sin(torch.arange(1.0, linearization.size + 1).to(x))
        forward, backward = u * linearization.jvp(v), linearization.vjp(u) * v
    except Exception as error:
        raise ConfigError(f"{problem}: {raised(error)}") from error
    tolerance = 1e-3 * max(forward.abs().sum(), backward.abs().sum())
    if not (forward.sum() - backward.sum()).abs() <= tolerance:
        raise ConfigError(f"{problem}: what it gives for Jv is not what its gradients say")
