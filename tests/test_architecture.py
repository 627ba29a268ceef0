"""Imports point one way. Read from the sources, so that also imports inside functions and for types count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trpo"
SCRIPTS = PACKAGE.parent / "scripts"

# A room (a module, or a package such as envs) may import rooms of the layers before its own.
LAYERS = (
    {"batch", "colored_noise", "errors", "native"},
    {"carried_sums", "command_line", "config", "distributions"},
    {"runtime"},
    {"advantages", "earlier_rollouts", "envs", "normalizer"},
    {"networks"},
    {"natural_gradient", "policy"},
    {"collector", "evaluation", "value"},
    {"agent"},
    {"run"},
    {"analysis", "export", "trainer"},
    {"benchmark"},
    {"__init__"},  # the public names, imported on first use
)
LAYER = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
NATURAL_GRADIENT_MAY_USE = (
    "trpo.batch",
    "trpo.config",
    "trpo.distributions",
    "trpo.errors",
    "trpo.natural_gradient",
    "trpo.networks.linearization",
    "trpo.networks.parameters",
    "trpo.runtime.reduction",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported(source: str) -> Iterator[str]:
    """Full names of all imported modules, and of all names imported from packages."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """`trpo.envs.worker` → `envs`; the package itself → `__init__`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def sources(directory: Path = PACKAGE) -> dict[str, str]:
    return {module_name(path): path.read_text(encoding="utf-8") for path in sorted(directory.rglob("*.py"))}


def upward_arrows(name: str, source: str) -> list[str]:
    own = LAYER[room(name)]
    targets = {room(target) for target in imported(source) if target.split(".")[0] == "trpo"} - {room(name)}
    return [f"{name} → {target}" for target in sorted(targets) if LAYER.get(target, len(LAYERS)) >= own]


def test_every_room_has_a_layer() -> None:
    """A new module has to be given its place in LAYERS, and one that is gone leaves none."""
    assert {room(name) for name in sources()} == set(LAYER)


@pytest.mark.parametrize("name", sources())
def test_no_import_points_upwards(name: str) -> None:
    assert upward_arrows(name, sources()[name]) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("trpo.envs.shard", "from trpo.trainer import Trainer"),
        ("trpo.natural_gradient.step", "import trpo.policy"),
        ("trpo.policy", "def f():\n    from trpo import collector"),
        ("trpo.normalizer", "from trpo.advantages import gae"),  # of the same layer
        ("trpo.collector", "from trpo import Trainer"),  # not a room: the package's own public name
    ],
)
def test_the_check_sees_an_upward_arrow(name: str, source: str) -> None:
    assert len(upward_arrows(name, source)) == 1


def test_imports_have_no_cycle() -> None:
    modules = sources()
    graph = {}
    for name, source in modules.items():
        if name == "trpo.__init__":
            continue
        targets = {t if t in modules else t.rpartition(".")[0] for t in imported(source)}
        graph[name] = {t for t in targets if t in modules and t != name}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_natural_gradient_knows_nothing_of_reinforcement_learning() -> None:
    allowed = tuple(f"{module}." for module in NATURAL_GRADIENT_MAY_USE)
    for name, source in sources(PACKAGE / "natural_gradient").items():
        for target in imported(source):
            assert not target.startswith("trpo.") or f"{target}.".startswith(allowed), (name, target)
        assert not any(target.split(".")[0] == "gymnasium" for target in imported(source)), name


def test_only_one_file_names_torch_distributed() -> None:
    def names_it(source: str) -> bool:
        attributes = (ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute))
        names = [*imported(source), *attributes]
        return any(name == "torch.distributed" or name.startswith("torch.distributed.") for name in names)

    assert [name for name, source in sources().items() if names_it(source)] == ["trpo.runtime.distributed"]


def test_nothing_in_the_package_imports_scripts_or_tests() -> None:
    outside = {path.stem for path in SCRIPTS.glob("*.py")} | {"scripts", "tests"}
    standalone = outside - {room(name) for name in sources()}
    for name, source in sources().items():
        assert standalone.isdisjoint(target.split(".")[0] for target in imported(source)), name
