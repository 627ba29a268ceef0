"""The compiled functions against the same formulas in torch, in float64."""

from __future__ import annotations

import copy
import math
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import fork
from gymnasium import spaces
from helpers import randn, relative_error, seeded
from torch import Tensor

from trpo import native
from trpo.distributions import Ordinal
from trpo.native import library
from trpo.networks.mlp import MLP, MlpLinearization, NativeLinearization
from trpo.networks.parameters import FlatParameters

SOURCE = Path(native.__file__).with_name("mlp.c")
COMPILER = shutil.which("cc")
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC", "-pthread"]
# Vectors of 16, 8 and 4 numbers, whichever this processor has; "installed" is what the package was built with.
MACHINES = {
    "installed": None,
    "AVX-512": ["-march=x86-64-v4"],
    "AVX2": ["-march=x86-64-v3"],
    # As compilers are tuned for some processors: sums of products in one register are not made of fused operations.
    "AVX2, sums apart": ["-march=x86-64-v3", "--param", "avoid-fma-max-bits=512"],
    "plain": [],
}
# Less than a vector, one that is no whole number of them, more than a product keeps in registers; deep and flat.
SIZES = [(3, 2), (1, 1, 1), (11, 64, 64, 3), (17, 5, 33), (70, 130, 200, 65), (4, 8, 8, 8, 8, 2)]
ROWS = [1, 7, native.BLOCK, native.BLOCK + 1, 300]
# Sums of up to 300 float32 products of size 1, over three layers: some tens of units of 6e-8.
TOLERANCE = 1e-5

needs_native = pytest.mark.skipif(not native.available(), reason="the compiled functions were not built")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """mlp.c as compiled for each kind of processor that this one can stand for."""
    found = {"installed": library.LIBRARY}
    for name, flags in MACHINES.items():
        if flags is None or COMPILER is None or (flags and platform.machine() != "x86_64"):
            continue
        file = tmp_path_factory.mktemp("native") / f"{name}.so"
        built = subprocess.run([COMPILER, *FLAGS, *flags, str(SOURCE), "-o", str(file)], check="--param" not in flags)
        if built.returncode == 0:  # else the compiler does not know the parameter
            found[name] = library.load(str(file))
    return found


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, libraries: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = libraries.get(request.param)
    if loaded is None:
        pytest.skip("not built, or not for this processor")
    monkeypatch.setattr(library, "LIBRARY", loaded)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pair(sizes: tuple[int, ...], activation: str = "tanh") -> tuple[MLP, MLP]:
    """A float32 network with nothing at zero, and the same in float64."""
    mlp = MLP(sizes, activation=activation, head_scale=1.0, generator=seeded())
    with torch.no_grad():
        for i, layer in enumerate(mlp.linears):
            layer.bias.copy_(0.5 * randn(*layer.bias.shape, seed=i))
    return mlp, copy.deepcopy(mlp).double()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@torch.no_grad()
def test_the_network_and_its_products(sizes: tuple[int, ...], rows: int, activation: str) -> None:
    mlp, exact = pair(sizes, activation)
    x, v, u = randn(rows, sizes[0]), randn(mlp.layout.total, seed=1), randn(rows, sizes[-1], seed=2)
    expected, actual = exact.linearize(x), mlp.linearize(x.float())
    assert isinstance(expected, MlpLinearization) and isinstance(actual, NativeLinearization)
    assert relative_error(mlp(x.float()).double(), exact(x)) <= TOLERANCE
    assert relative_error(actual.output.double(), expected.output) <= TOLERANCE
    assert relative_error(actual.vjp(u.float()).double(), expected.vjp(u)) <= TOLERANCE
    assert relative_error(actual.jvp(v.float()).double(), expected.jvp(v)) <= TOLERANCE
    assert relative_error(actual.vjp(u.float()).double(), expected.vjp(u)) <= TOLERANCE  # after another product
    for ours, theirs in zip(actual.kronecker_factors(u.float()), expected.kronecker_factors(u), strict=True):
        assert relative_error(ours.inputs.double(), theirs.inputs) <= TOLERANCE
        assert relative_error(ours.outputs.double(), theirs.outputs) <= TOLERANCE


@pytest.mark.usefixtures("machine")
@torch.no_grad()
def test_tanh_over_all_magnitudes() -> None:
    mlp = MLP((1, 1, 1), activation="tanh", head_scale=1.0, generator=seeded())
    for layer in mlp.linears:
        layer.weight.fill_(1.0)
    magnitudes = torch.cat([torch.logspace(-30, 3, 2000), torch.linspace(0, 12, 2000)])
    x = torch.cat([magnitudes, -magnitudes])
    actual, expected = mlp(x[:, None]).squeeze(1).double(), x.double().tanh()
    # 4 units in the last place: two for the exponential, one each for the sum and the quotient.
    torch.testing.assert_close(actual, expected, rtol=4 * 2.0**-23, atol=0)
    ends = mlp(torch.tensor([[math.inf], [-math.inf], [math.nan]])).flatten().tolist()
    assert ends[:2] == [1.0, -1.0] and math.isnan(ends[2])


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@torch.no_grad()
def test_what_is_not_finite_stays_so_and_in_its_row(activation: str) -> None:
    mlp, _ = pair((3, 20, 2), activation)
    x = randn(200, 3, dtype=torch.float32)
    clean = mlp(x)
    x[130, 1] = math.nan
    out = mlp(x)
    assert out[130].isnan().all()
    others = torch.arange(200) != 130
    assert torch.equal(out[others], clean[others])


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@torch.no_grad()
def test_a_network_in_a_rollout_normalises_and_keeps_to_its_parameters(
    sizes: tuple[int, ...], rows: int, activation: str
) -> None:
    mlp, exact = pair(sizes, activation)
    assert mlp.native is not None
    shift, scale, x = (
        1e3 + randn(sizes[0], seed=1),
        0.1 + randn(sizes[0], seed=2).abs(),
        1e3 + 2 * randn(rows, sizes[0]),
    )
    for dtype in (torch.float64, torch.float32):
        x = x.to(dtype)
        expected = exact(((x.double() - shift) * scale).clamp(-1.5, 1.5))
        obs = torch.full((3, *x.shape), math.nan, dtype=dtype)
        actor = mlp.native.actor(shift, scale, 1.5, obs)
        parameters = [p.clone() for p in mlp.parameters()]
        for changed in (*mlp.parameters(), shift, scale):
            changed.mul_(2)
        obs[1] = obs[2] = x
        obs[2, -1, 0] = math.nan
        assert actor is not None
        actual, again = actor.outputs(1).clone(), actor.outputs(2)
        assert relative_error(actual.double(), expected) <= TOLERANCE
        assert again[-1].isnan().all() and torch.equal(again[:-1], actual[:-1])
        assert actor.outputs(0).isnan().all()
        for changed, before in zip(mlp.parameters(), parameters, strict=True):
            changed.copy_(before)
        shift, scale = shift / 2, scale / 2


@needs_native
@torch.no_grad()
def test_what_does_not_fit_in_a_rollout_is_left_to_torch() -> None:
    mlp, exact = pair((3, 20, 6))
    shift, scale, obs = randn(3), randn(3, seed=1), randn(5, 20, 3)
    assert mlp.native is not None and exact.native is not None
    assert exact.native.actor(shift, scale, 1.0, obs) is None
    for wrong in (shift.float(), shift[:2], shift[:1], torch.cat([shift, shift]), shift[None]):
        assert mlp.native.actor(wrong, scale, 1.0, obs) is None and mlp.native.actor(shift, wrong, 1.0, obs) is None
    for wrong in (obs[..., :2], obs[0], obs.transpose(0, 1), obs[:, ::2], obs.half(), obs.to("meta")):
        assert mlp.native.actor(shift, scale, 1.0, wrong) is None
    actor = mlp.native.actor(shift, scale, 1.0, obs)
    assert actor is not None
    action, std = torch.zeros(5, 20, 6), torch.ones(6)
    assert actor.draws_normal(std, action, action)
    for wrong in (action[1:], action[:, 1:], action[..., :3], action.double(), action[0], action[..., ::2]):
        assert not actor.draws_normal(std, wrong, action) and not actor.draws_normal(std, action, wrong)
        assert not actor.draws_normal(std, wrong, wrong)
    assert not actor.draws_normal(std[:3], action, action) and not actor.draws_normal(std.double(), action, action)
    three, _ = ordinal(3, 2)
    assert actor.draws_ordinal(three, action[..., :3], action[..., 3:].contiguous())
    assert not actor.draws_ordinal(three, action[..., :3], action[..., :3])  # whose rows lie apart
    for components, bins in ((6, 1), (3, 3), (2, 3)):
        other, _ = ordinal(components, bins)
        assert not actor.draws_ordinal(other, action[..., :3], action[..., :3].contiguous())


def ordinal(components: int, bins: int) -> tuple[native.NativeOrdinal, Ordinal]:
    """The compiled functions of a distribution, and its formulas, which float64 leaves to torch."""
    low = randn(components, seed=2).float()
    high = low + 1 + randn(components, seed=3).abs().float()
    family = Ordinal(spaces.Box(low.numpy(), high.numpy()), bins)
    return family.native, family


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("bins", [2, 3, 11, 100])
@pytest.mark.parametrize("components", [1, 3, 17])
@pytest.mark.parametrize("rows", [1, 16, 77])
@torch.no_grad()
def test_ordinal_distributions(rows: int, components: int, bins: int) -> None:
    compiled, exact = ordinal(components, bins)
    eta, u = randn(rows, components * bins).float(), randn(rows, components * bins, seed=1).float()
    for spread in (1.0, bins**-0.5):  # some values next to impossible, or none
        log_p, expected = compiled.log_probabilities(spread * eta), exact._log_probabilities(spread * eta.double())
        assert log_p is not None
        # Sums of up to 100 float32 numbers, which reach some hundreds.
        torch.testing.assert_close(log_p.double(), expected, rtol=1e-5, atol=1e-4)
    product = compiled.metric(log_p.exp(), u)
    assert product is not None
    assert relative_error(product.double(), exact.metric(spread * eta.double())(u.double())) <= 10 * TOLERANCE


@pytest.mark.usefixtures("machine")
@torch.no_grad()
def test_an_ordinal_row_is_the_same_numbers_whatever_is_computed_beside_it() -> None:
    """Alone it is part of a vector, in a batch of a whole one: of compilers' choices none may show."""
    compiled, _ = ordinal(3, 11)
    eta, u, noise = randn(17, 3 * 11).float(), randn(17, 3 * 11, seed=1).float(), randn(17, 3, seed=2).float()
    log_p, drawn = compiled.log_probabilities(eta), compiled.sample(eta, noise)
    assert log_p is not None and drawn is not None
    p = log_p.exp()
    product = compiled.metric(p, u)
    assert product is not None
    for i in range(len(eta)):
        row = slice(i, i + 1)
        for whole, alone in (
            (log_p[:, row], compiled.log_probabilities(eta[row])),
            (drawn[row], compiled.sample(eta[row], noise[row])),
            (product[row], compiled.metric(p[:, row].contiguous(), u[row])),
        ):
            assert alone is not None and torch.equal(whole, alone)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("bins", [2, 3, 11, 100])
@pytest.mark.parametrize("components", [1, 3, 17])
@pytest.mark.parametrize("rows", [1, 16, 77])
@torch.no_grad()
def test_ordinal_samples(rows: int, components: int, bins: int) -> None:
    compiled, exact = ordinal(components, bins)
    eta, noise = randn(rows, components * bins).float(), randn(rows, components, seed=1).float()
    actual = compiled.sample(eta, noise)
    assert actual is not None
    index, expected = exact._index(actual), exact._index(exact.sample(eta.double(), noise.double()))
    # A sum of up to 100 float32 exponentials: where Φ(noise) lies that near an edge, either neighbour is right.
    edges = exact._log_probabilities(eta.double()).exp().cumsum(0)[:-1]
    near = ((edges - torch.special.ndtr(noise.double())).abs() < 1e-5).any(0)
    assert (index == expected)[~near].all() and ((index - expected).abs() <= 1).all()
    assert near.double().mean() < 0.02
    torch.testing.assert_close(actual.double(), exact._value(index.double()), rtol=1e-6, atol=1e-6)


@needs_native
@torch.no_grad()
def test_what_is_not_finite_spoils_its_own_component() -> None:
    compiled, _ = ordinal(2, 5)
    eta, noise = torch.zeros(4, 2 * 5), torch.zeros(4, 2)
    eta[0, 2], eta[1, 5], eta[2, 9], noise[3, 1] = math.nan, math.inf, -math.inf, math.nan
    spoilt = [[True, False], [False, True], [False, True], [False, False]]
    log_p, samples = compiled.log_probabilities(eta), compiled.sample(eta, noise)
    assert log_p is not None and samples is not None
    assert log_p.isnan().any(0).tolist() == spoilt
    assert samples.isnan().tolist() == [*spoilt[:3], [False, True]]
    product = compiled.metric(log_p.exp(), torch.ones(4, 2 * 5))
    assert product is not None and product.view(4, 2, 5).isnan().any(-1).tolist() == spoilt


@needs_native
@torch.no_grad()
def test_ordinal_distributions_of_anything_else_are_left_to_torch() -> None:
    compiled, _ = ordinal(2, 5)
    eta, noise, p = torch.zeros(4, 2 * 5), torch.zeros(4, 2), torch.full((5, 4, 2), 0.2)
    assert compiled.log_probabilities(eta) is not None
    assert compiled.sample(eta, noise) is not None and compiled.metric(p, eta) is not None
    for wrong in (eta.double(), eta[:, :9], eta[None], eta[0]):
        assert compiled.log_probabilities(wrong) is None
        assert compiled.sample(wrong, noise) is None and compiled.metric(p, wrong) is None
    for wrong in (noise.double(), noise[:3], noise[:, :1]):
        assert compiled.sample(eta, wrong) is None
    for wrong in (p.double(), p[:4], p[:, :3], p[..., :1]):
        assert compiled.metric(wrong, eta) is None


@torch.no_grad()
def test_torch_func_sees_operations_of_torch() -> None:
    _, family = ordinal(2, 5)
    p, q = randn(3, 4, 2 * 5).float(), randn(3, 4, 2 * 5, seed=1).float()
    # Sums of 10 float32 products.
    torch.testing.assert_close(torch.func.vmap(family.kl)(p, q), family.kl(p, q), rtol=1e-4, atol=1e-5)


@needs_native
@torch.no_grad()
def test_a_linearisation_keeps_to_the_parameters_it_was_made_at_until_it_is_moved() -> None:
    mlp, _ = pair((3, 20, 2))
    x, u, v = randn(50, 3, dtype=torch.float32), randn(50, 2).float(), randn(mlp.layout.total).float()
    linearization = mlp.linearize(x)
    before = linearization.output.clone(), linearization.vjp(u), linearization.jvp(v)
    for p in mlp.parameters():
        p.mul_(1.5)
    assert all(map(torch.equal, before, (linearization.output, linearization.vjp(u), linearization.jvp(v))))
    other = randn(50, 3, seed=1, dtype=torch.float32)
    linearization.move(other)
    again = mlp.linearize(other)
    assert torch.equal(linearization.output, again.output) and torch.equal(linearization.vjp(u), again.vjp(u))


@needs_native
@torch.no_grad()
def test_rows_far_apart_in_memory_are_taken_as_they_are() -> None:
    mlp, exact = pair((3, 20, 2))
    x = randn(3, 50).T
    assert not x.is_contiguous()
    assert relative_error(mlp(x.float()).double(), exact(x)) <= TOLERANCE
    u = randn(2, 50, seed=1).T
    assert relative_error(mlp.linearize(x.float()).vjp(u.float()).double(), exact.linearize(x).vjp(u)) <= TOLERANCE


def everything(rows: int) -> list[Tensor]:
    """What all functions that share rows among threads say of one network and one ordinal distribution."""
    mlp, _ = pair((17, 40, 33))
    x, v, u = randn(rows, 17).float(), randn(mlp.layout.total, seed=1).float(), randn(rows, 33, seed=2).float()
    compiled, _ = ordinal(3, 11)
    with torch.no_grad():
        linearization = mlp.linearize(x)
        assert isinstance(linearization, NativeLinearization) and mlp.native is not None
        actor = mlp.native.actor(randn(17, seed=3), randn(17, seed=4), 2.0, x[None])
        log_p, noise = compiled.log_probabilities(linearization.output), randn(1, rows, 3, seed=5).float()
        action = torch.empty_like(noise)
        assert actor is not None and log_p is not None
        assert actor.draws_ordinal(compiled, noise, action)
        found = [
            *(mlp(x), linearization.output, linearization.jvp(v), linearization.vjp(u), actor.outputs(0), log_p),
            compiled.metric(log_p.exp(), u),
            compiled.sample(linearization.output, noise[0]),
            action,
        ]
    assert all(isinstance(part, Tensor) and part.isfinite().all() for part in found)
    return [part for part in found if part is not None]


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("rows", [1, native.BLOCK, native.BLOCK + 1, 1000, 5000])
def test_the_number_of_threads_changes_no_bit(rows: int) -> None:
    one = everything(rows)
    for threads in (2, 3, native.MOST_THREADS, native.MOST_THREADS + 1):
        with native.spare_threads(threads - 1):
            for actual, expected in zip(everything(rows), one, strict=True):
                assert torch.equal(actual, expected)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("rows", [native.BLOCK + 1, 2 * native.BLOCK + 1, 300, 900])
@torch.no_grad()
def test_whoever_takes_the_last_block_that_is_no_whole_one(rows: int) -> None:
    """Widths at which a block in the wrong place would lie on the next layer's inputs and weights; often, since which
    thread takes which block is chance."""
    mlp, _ = pair((40, 33, 2, 2))
    x = randn(rows, 40).float()
    expected = mlp(x)
    for threads in (2, 3, native.MOST_THREADS):
        with native.spare_threads(threads - 1):
            assert all(torch.equal(mlp(x), expected) for _ in range(100))


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_threads_are_as_many_as_are_free() -> None:
    """In a process of its own, where nothing has made any: they stay."""
    code = """
import os, torch
torch.set_num_threads(1)
from test_native import everything
from trpo import native
from trpo.native import library
def more(): everything(1000); return len(os.listdir("/proc/self/task")) - before
everything(1000); before = len(os.listdir("/proc/self/task"))
counts = [more()]
with native.spare_threads(2):
    with native.spare_threads(-1) as over:
        counts.append(more()); over(); counts.append(more())
    counts.append(more())
with native.spare_threads(-3): few = library.threads()
with native.spare_threads(1000): many = library.threads()
print(counts, few, library.threads(), many)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    # Threads stay once they are there.
    assert done.stdout.split("\n")[0] == f"[0, 1, 2, 2] 1 1 {native.MOST_THREADS}"


@needs_native
def test_a_fork_has_threads_of_its_own() -> None:
    with native.spare_threads(2):  # torch's own would hang in a fork
        expected = everything(1000)

        def child() -> None:
            assert all(map(torch.equal, everything(1000), expected))

        pid = fork(child)
        for _ in range(200):  # threads that are not there would be waited for without end
            if (ended := os.waitpid(pid, os.WNOHANG)) != (0, 0):
                break
            time.sleep(0.1)
        else:
            os.kill(pid, signal.SIGKILL)
        assert ended == (pid, 0)
        assert all(map(torch.equal, everything(1000), expected))


@needs_native
def test_several_may_want_threads_at_once() -> None:
    expected = everything(1000)

    def ask(_: int) -> bool:
        torch.set_num_threads(3)
        return all(all(map(torch.equal, everything(1000), expected)) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(8)))


@needs_native
def test_threads_may_ask_the_same_network_at_once() -> None:
    """Calls hold no lock of the interpreter: what one writes must not be read by another."""
    mlp, _ = pair((11, 64, 64, 3))
    inputs = [randn(100, 11, seed=i, dtype=torch.float32) for i in range(8)]

    def ask(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [mlp(x) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        for x, answers in zip(inputs, pool.map(ask, inputs), strict=True):
            with torch.no_grad():
                assert all(torch.equal(answer, mlp(x)) for answer in answers)


@needs_native
def test_torch_does_what_the_compiled_functions_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, exact = pair((3, 20, 2))
    x = randn(200, 3, dtype=torch.float32)
    assert mlp(x).requires_grad  # a graph is wanted
    with torch.no_grad():
        assert isinstance(mlp.linearize(x), NativeLinearization)
        assert isinstance(exact.linearize(x.double()), MlpLinearization)
        assert isinstance(pair((3, 20, 2), "silu")[0].linearize(x), MlpLinearization)
        assert isinstance(pair((3, *[4] * native.MOST_LAYERS, 2))[0].linearize(x), MlpLinearization)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            mlp(x[:, :2])
        with pytest.raises(RuntimeError, match="dtype"):
            exact(x)
        monkeypatch.setattr(library, "LIBRARY", None)
        assert isinstance(mlp.linearize(x), MlpLinearization)


@needs_native
@torch.no_grad()
def test_what_does_not_fit_is_an_error_before_c_sees_it() -> None:
    mlp, _ = pair((3, 20, 2))
    linearization = mlp.linearize(randn(50, 3).float())
    v, u = randn(mlp.layout.total).float(), randn(50, 2).float()
    for call, wrong in (
        (linearization.jvp, (v[:-1], v.double(), v[None])),
        (linearization.vjp, (u[:-1], u.double(), u[:, 0])),
        (linearization.kronecker_factors, (u[:-1], u.double())),
        (linearization.move, (randn(51, 3).float(), randn(50, 3), randn(50, 2).float())),
    ):
        for x in wrong:
            with pytest.raises(ValueError, match="not float32"):
                call(x)  # type: ignore[operator]
    mlp.double()
    with pytest.raises(ValueError, match="the network's parameters are no longer"):
        linearization.move(randn(50, 3).float())


@needs_native
@torch.no_grad()
def test_parameters_that_lie_otherwise_or_are_made_on_the_way_are_left_to_torch() -> None:
    x = randn(50, 3)
    mlp, exact = pair((3, 20, 2))
    mlp.linears[0].weight.data = mlp.linears[0].weight.T.contiguous().T
    assert relative_error(mlp(x.float()).double(), exact(x)) <= TOLERANCE
    assert isinstance(mlp.linearize(x.float()), MlpLinearization)
    mlp, exact = pair((3, 20, 2))
    torch.nn.utils.parametrizations.weight_norm(mlp.linears[1])
    assert relative_error(mlp(x.float()).double(), exact(x)) <= TOLERANCE
    mlp, _ = pair((3, 20, 2))
    mlp.linears[1].double()
    with pytest.raises(RuntimeError, match="dtype"):
        mlp(x.float())


@torch.no_grad()
def test_a_network_can_be_pickled_and_copied() -> None:
    mlp, _ = pair((3, 20, 2))
    x = randn(5, 3).float()
    for other in (pickle.loads(pickle.dumps(mlp)), copy.deepcopy(mlp)):
        assert torch.equal(other(x), mlp(x))
        other.linears[0].weight.mul_(2)
        assert not torch.equal(other(x), mlp(x))  # it reads parameters of its own


@pytest.mark.usefixtures("machine")
@torch.no_grad()
def test_adam_takes_the_steps_of_torchs() -> None:
    theta, mean, square = (torch.zeros(1000) for _ in range(3))
    parameter = torch.nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=1e-3, eps=1e-8)
    for step in range(1, 21):
        gradient = randn(1000, seed=step)
        parameter.grad = gradient
        optimizer.step()
        correction = math.sqrt(1 - 0.999**step)
        native.adam_step(
            theta, gradient.float(), mean, square,
            betas=(0.9, 0.999), epsilon=1e-8 * correction, rate=1e-3 * correction / (1 - 0.9**step),
        )  # fmt: skip
    # Twenty steps of 1e-3, each rounded to float32.
    torch.testing.assert_close(theta.double(), parameter.detach(), rtol=0, atol=20e-3 * 1e-5)
    strided = torch.zeros(2000)[::2]
    assert native.takes_vectors(theta, mean, square) or not native.available()
    for other in (strided, theta[:-1], theta.double(), theta[:, None]):
        assert not native.takes_vectors(theta, other)


@pytest.mark.skipif(COMPILER is None, reason="no compiler")
def test_an_installation_with_a_compiler_has_them_and_the_environment_can_leave_them_out() -> None:
    say = "from trpo import native; print(native.available())"
    for value, expected in (("1", "True"), ("0", "False")):
        run = subprocess.run(
            [sys.executable, "-c", say], env={"TRPO_NATIVE": value}, capture_output=True, text=True, check=True
        )
        assert run.stdout.strip() == expected


def test_a_file_that_is_no_library_or_of_another_version_is_left_out(tmp_path: Path) -> None:
    assert library.load(None) is None
    assert library.load(str(tmp_path / "missing.so")) is None
    (tmp_path / "text.so").write_text("text")
    assert library.load(str(tmp_path / "text.so")) is None
    if COMPILER is not None:
        for i, source in enumerate(("int mlp_version(void) { return 0; }", "int other(void) { return 0; }")):
            (tmp_path / f"{i}.c").write_text(source)
            subprocess.run(
                [COMPILER, "-shared", "-fPIC", str(tmp_path / f"{i}.c"), "-o", str(tmp_path / f"{i}.so")], check=True
            )
            assert library.load(str(tmp_path / f"{i}.so")) is None


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("sizes", [(11, 64, 64, 1), (5, 33, 1), (3, 7, 2)], ids=str)
@torch.no_grad()
def test_a_fit_in_one_call_takes_the_steps_of_torchs_adam(sizes: tuple[int, ...]) -> None:
    mlp, exact = pair(sizes)
    theta = FlatParameters(mlp).vector
    mean, square = torch.zeros_like(theta), torch.zeros_like(theta)
    rows = [50, 49, 1, 130]
    # Columns apart in memory: C has to be given others.
    (x, x32), (y, y32) = (
        (wide[:, ::2], wide.float()[:, ::2])
        for wide in (randn(sum(rows), 2 * sizes[0]), randn(sum(rows), 2 * sizes[-1], seed=1))
    )
    order = torch.randperm(sum(rows), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(exact.parameters(), lr=1e-3, eps=1e-5)
    with torch.enable_grad():
        for some in order.split(rows):
            optimizer.zero_grad()
            (exact(x[some]) - y[some]).square().sum(1).mean().backward()
            optimizer.step()
    corrections = [math.sqrt(1 - 0.999**t) for t in range(1, 5)]
    assert mlp.native is not None and mlp.native.fits_to(x32, y32, theta, mean, square)
    mlp.native.adam(
        x32, y32, order, rows, theta, mean, square, betas=(0.9, 0.999),
        epsilons=[1e-5 * c for c in corrections],
        rates=[1e-3 * c / (1 - 0.9**t) for t, c in enumerate(corrections, 1)],
    )  # fmt: skip
    # Four steps of 1e-3; gradients are good to `TOLERANCE` of the largest, and Adam weighs small ones as much.
    expected = torch.cat([p.detach().flatten() for p in exact.parameters()])
    torch.testing.assert_close(theta.double(), expected, rtol=0, atol=4e-3 * 1e-2)
    assert (theta.double() - expected).abs().median() <= 4e-3 * 1e-4


@needs_native
@torch.no_grad()
def test_what_cannot_be_fitted_in_one_call_is_refused_before_c_sees_it() -> None:
    mlp, _ = pair((3, 20, 1))
    theta = FlatParameters(mlp).vector
    mean, square, x, y = torch.zeros_like(theta), torch.zeros_like(theta), randn(50, 3).float(), randn(50, 1).float()
    assert mlp.native is not None
    fits_to, adam = mlp.native.fits_to, mlp.native.adam
    assert fits_to(x, y, theta, mean, square)
    assert not fits_to(x[:, :2], y, theta, mean, square)
    assert not fits_to(x.double(), y, theta, mean, square)
    assert not fits_to(x, y[:-1], theta, mean, square)
    assert not fits_to(x, y[:, 0], theta, mean, square)
    assert not fits_to(x, y.double(), theta, mean, square)
    assert not fits_to(x, y, theta.clone(), mean, square)  # not what the network reads
    assert not fits_to(x, y, theta, mean[:-1], square)
    before, order = theta.clone(), torch.arange(50)
    for some, rows, rates in (
        (order, [50, 1], [1.0, 1.0]),
        (order, [50], [1.0, 1.0]),
        (order, [50, 0], [1.0, 1.0]),
        (order + 1, [50], [1.0]),
        (order - 1, [50], [1.0]),
        (order.int(), [50], [1.0]),
        (order[:49], [50], [1.0]),
    ):
        with pytest.raises(ValueError, match="minibatches"):
            adam(x, y, some, rows, theta, mean, square, betas=(0.9, 0.999), epsilons=rates, rates=rates)
    assert torch.equal(theta, before)
    longer = torch.cat([theta, theta])
    assert not fits_to(x, y, longer, torch.zeros_like(longer), torch.zeros_like(longer))
