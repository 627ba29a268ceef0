"""Checkpoints: exact round trips, and every way in which a disk, a crash or an attacker can spoil one."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors.torch
import torch
from forks import fork
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from trpo.errors import CheckpointError
from trpo.run.checkpoint import (
    CheckpointStore,
    checkpoint_paths,
    load_state,
    newest_checkpoint,
    remove_stale,
    save_state,
)

SAMPLE = {"weights": torch.arange(6.0).reshape(2, 3), "steps": 12, "random": {"state": 1 << 127, "kind": "PCG64"}}


def identical(a: Any, b: Any) -> bool:
    """Same types, key order, dtypes, shapes and bits: stricter than ==, and true for NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(identical(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and b.device.type == "cpu" and b.is_contiguous()
        return (
            same
            and a.clone(memory_format=torch.contiguous_format).untyped_storage().tolist()
            == b.untyped_storage().tolist()
        )
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return np.float64(a).tobytes() == np.float64(b).tobytes()
    return bool(a == b)


def round_trip(state: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        save_state(Path(directory) / "x", state)
        return load_state(Path(directory) / "x")


NUMBERS = (
    hnp.boolean_dtypes() | hnp.integer_dtypes() | hnp.unsigned_integer_dtypes() | hnp.floating_dtypes(sizes=(32, 64))
)
ARRAYS = hnp.arrays(
    NUMBERS | hnp.complex_number_dtypes(sizes=(64, 128)),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
TENSORS = ARRAYS.map(lambda array: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))))
SCALARS = hnp.arrays(NUMBERS, ()).map(lambda array: array[()])
NAMES = st.text(max_size=6) | st.text("$/.~_ae0", max_size=4) | st.sampled_from(["__metadata__", "$tensor", "$$int"])
LEAVES = st.none() | st.booleans() | st.integers() | st.integers().map(lambda i: i**9) | st.floats() | NAMES
STATES = st.recursive(
    LEAVES | ARRAYS | TENSORS | SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(NAMES, children, max_size=4),
    max_leaves=12,
)


# --- what goes in comes out ---


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STATES)
def test_any_state_comes_back_to_the_bit(state: Any) -> None:
    assert identical(state, round_trip(state))


def test_every_dtype_comes_back() -> None:
    names = (
        "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128"
    )
    bits = torch.arange(64, dtype=torch.uint8) % 2  # zeros and ones: valid as bool too
    state: dict[str, Any] = {name: bits.clone().view(getattr(torch, name)) for name in names.split()}
    state |= {f"numpy.{name}": tensor.numpy() for name, tensor in state.items() if name != "bfloat16"}
    assert identical(state, round_trip(state))


def test_values_that_json_would_change() -> None:
    nan_with_payload = np.array([0xFFF8_0000_0000_1234], np.uint64).view(np.float64).item()
    state = {
        "floats": [float("inf"), -float("inf"), nan_with_payload, -0.0, 5e-324, 0.1 + 0.2, 1e308],
        "integers": [2**53 + 1, -(2**64), 3**20000, True, 1],
        "tuple": (1, [2, (3,)], ()),
        "keys": {"b": 1, "a": {"/": 1, ".": 2, "~1": 3, "": 4}, "$tensor": "x", "$": {"$$": None}},
    }
    assert identical(state, round_trip(state))


def test_keys_that_spell_the_same_path_stay_apart() -> None:
    state = {
        "a/b": torch.zeros(1),
        "a": {"b": torch.ones(1), "~1b": torch.full((1,), 2.0)},
        "a~1b": torch.full((1,), 3),
    }
    assert identical(state, round_trip(state))


def test_generator_and_optimiser_states_restore_their_owners(tmp_path: Path) -> None:
    numpy_random, torch_random = np.random.default_rng(5), torch.Generator().manual_seed(5)
    save_state(tmp_path / "x", {"numpy": numpy_random.bit_generator.state, "torch": torch_random.get_state()})
    expected = numpy_random.random(4), torch.rand(4, generator=torch_random)
    state = load_state(tmp_path / "x")
    numpy_random.bit_generator.state = state["numpy"]
    torch_random.set_state(state["torch"])
    assert np.array_equal(numpy_random.random(4), expected[0])
    assert torch.equal(torch.rand(4, generator=torch_random), expected[1])


def test_views_of_one_buffer_are_saved_alone_and_come_back_independent(tmp_path: Path) -> None:
    flat = torch.arange(100_000.0, requires_grad=True)
    views = {"a": flat[:4].view(2, 2).T, "b": flat[2:6], "again": flat[2:6]}
    save_state(tmp_path / "x", views)
    assert (tmp_path / "x" / "tensors.safetensors").stat().st_size < 1000, "the whole buffer was written"
    loaded = load_state(tmp_path / "x")
    assert torch.equal(loaded["a"], torch.tensor([[0.0, 2.0], [1.0, 3.0]]))
    loaded["b"].zero_()
    assert torch.equal(loaded["again"], torch.arange(2.0, 6.0)) and not loaded["b"].requires_grad


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_lazily_conjugated_and_negated_tensors_are_saved_as_they_read(dtype: torch.dtype) -> None:
    conjugate = torch.tensor([1 + 2j], dtype=dtype).conj()
    loaded = round_trip({"conjugate": conjugate, "negative": conjugate.imag})
    assert loaded["conjugate"].tolist() == [1 - 2j] and loaded["negative"].tolist() == [-2.0]


def test_loaded_arrays_can_be_written_to() -> None:
    loaded = round_trip({"native": np.zeros(2), "raw": np.zeros(2, complex), "big": np.zeros(2, ">f4")})
    for array in loaded.values():
        array += 1


def test_a_module_state_dict_loads_as_dict() -> None:
    loaded = round_trip(OrderedDict(w=torch.nn.Parameter(torch.ones(2))))
    assert type(loaded) is dict and type(loaded["w"]) is torch.Tensor


@pytest.mark.parametrize(
    "bad",
    [
        {1, 2},
        b"bytes",
        object(),
        np.array(["text"]),
        np.array([object()]),
        np.str_("text"),
        np.longdouble(1),
        np.ma.masked_array([1.0]),
        np.zeros(2, dtype=[("a", "f4")]),
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        signal.SIGINT,
        "\ud800",
        {"\udfff": 1},
        {3: "integer key"},
        lambda: None,
    ],
    ids=lambda bad: type(bad).__name__,
)
def test_an_unsupported_value_names_its_place_and_touches_nothing(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(TypeError, match=r"^state/outer/1/in~1ner"):
        save_state(tmp_path / "x", {"outer": [0, {"in/ner": bad}]})
    assert list(tmp_path.iterdir()) == []


def test_a_state_within_itself_is_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(TypeError, match="nested deeper than 100 levels"):
        save_state(tmp_path / "x", state)


# --- existing paths ---


def test_an_existing_path_is_not_overwritten_unasked(tmp_path: Path) -> None:
    save_state(tmp_path / "x", {"n": 1})
    with pytest.raises(CheckpointError, match="exists already"):
        save_state(tmp_path / "x", {"n": 2})
    assert load_state(tmp_path / "x") == {"n": 1}
    save_state(tmp_path / "x", {"n": 2}, replace=True)
    assert load_state(tmp_path / "x") == {"n": 2}
    assert os.listdir(tmp_path) == ["x"]


def test_replace_never_deletes_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    for name in ("home", "file"):
        with pytest.raises(CheckpointError, match="is not a checkpoint"):
            save_state(tmp_path / name, {}, replace=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years" and (tmp_path / "file").read_text() == "text"


def test_a_path_below_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for action in (
        lambda: save_state(tmp_path / "file" / "x", {}),
        lambda: load_state(tmp_path / "file" / "x"),
        lambda: CheckpointStore(tmp_path / "file", keep=1),
    ):
        with pytest.raises(CheckpointError) as caught:
            action()
        assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)


# --- crashes ---


def stamped(step: int) -> dict[str, Any]:
    """A state that shows whether it is whole: all its parts derive from `step`."""
    return {"step": step, "tensor": torch.full((2000,), float(step)), "text": str(step) * 500}


def count_or_kill(at: int) -> list[int]:
    """Makes this process kill itself when it is about to do its `at`-th system operation that changes a directory."""
    calls = [0]

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counting

    for name in ("open", "mkdir", "fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, wrapped(getattr(os, name)))
    return calls


def killed_at_every_operation(directory: Path, prepare: Callable[[Path], None], act: Callable[[Path], None]) -> Any:
    """Yields one directory for each operation of `act`, in which `act` was killed just before it."""
    for at in range(1, 1000):
        place = directory / str(at)
        place.mkdir()
        prepare(place)

        def child(place: Path = place, at: int = at) -> None:
            count_or_kill(at)
            act(place)

        _, status = os.waitpid(fork(child), 0)
        if not os.WIFSIGNALED(status):
            assert at > 8, "the save was not interrupted often enough to mean anything"
            return
        yield place


def test_replacing_survives_a_kill_before_each_operation(tmp_path: Path) -> None:
    seen = set()

    def act(place: Path) -> None:
        save_state(place / "x", stamped(2), replace=True)

    for place in killed_at_every_operation(tmp_path, lambda place: save_state(place / "x", stamped(1)), act):
        state = load_state(place / "x")
        assert identical(state, stamped(state["step"]))
        seen.add(state["step"])
        save_state(place / "x", stamped(3), replace=True)
        remove_stale(place)  # the dead process has another number, or this one's
        assert load_state(place / "x")["step"] == 3 and os.listdir(place) == ["x"]
    assert seen == {1, 2}


def test_the_store_survives_a_kill_before_each_operation(tmp_path: Path) -> None:
    def prepare(place: Path) -> None:
        store = CheckpointStore(place, keep=2)
        store.save(stamped(1), env_steps=1)
        store.save(stamped(2), env_steps=2)

    def act(place: Path) -> None:
        CheckpointStore(place, keep=2).save(stamped(3), env_steps=3)

    for place in killed_at_every_operation(tmp_path, prepare, act):
        found = newest_checkpoint(place, on_warning=pytest.fail)
        assert found and found[1]["step"] in (2, 3) and identical(found[1], stamped(found[1]["step"]))
        assert len(checkpoint_paths(place)) >= 2, "pruned before the new one was durable"
        CheckpointStore(place, keep=2)
        assert not [name for name in os.listdir(place) if name.startswith(".")]


def test_a_save_killed_at_random_50_times(tmp_path: Path) -> None:
    rng = random.Random(0)
    last = 0
    for _ in range(50):
        reader, writer = os.pipe()

        def child(start: int = last, writer: int = writer) -> None:
            store = CheckpointStore(tmp_path, keep=2)
            for step in range(start + 1, start + 1000):
                store.save(stamped(step), env_steps=step)
                os.write(writer, step.to_bytes(4, "big"))

        pid = fork(child)
        os.close(writer)
        os.read(reader, 4)  # the first save is through; the kill falls into a later one
        time.sleep(rng.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with open(reader, "rb") as pipe:
            rest = pipe.read()
        durable = int.from_bytes(rest[-4:], "big") if rest else last + 1
        found = newest_checkpoint(tmp_path, on_warning=pytest.fail)
        assert found and found[1]["step"] >= durable and identical(found[1], stamped(found[1]["step"]))
        last = found[1]["step"]


def test_temporary_directories_of_dead_processes_only_are_removed(tmp_path: Path) -> None:
    dead = fork(lambda: None)
    os.waitpid(dead, 0)
    alive = os.getppid()
    names = {pid: f".step-000000001.tmp-{pid}-0123abcd" for pid in (dead, alive, os.getpid())}
    for name in (*names.values(), ".hidden", ".other.tmp-x"):
        (tmp_path / name).mkdir()
    CheckpointStore(tmp_path, keep=1)
    assert set(os.listdir(tmp_path)) == {names[alive], ".hidden", ".other.tmp-x"}


# --- the store ---


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.newest() is None
    for step in (9, 10, 999_999_999, 1_000_000_000):  # ten digits: more than the padding, so names do not sort as text
        path = store.save({"n": step}, env_steps=step)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-1000000000", "step-999999999"]
    assert store.newest() == (path, {"n": 1_000_000_000})


def test_the_same_step_again_replaces_even_a_damaged_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save({"n": 1}, env_steps=5)
    (tmp_path / "step-000000005" / "manifest.json").unlink()
    store.save({"n": 2}, env_steps=5)
    assert store.newest() == (tmp_path / "step-000000005", {"n": 2})


def test_a_damaged_newest_is_skipped_with_a_warning(tmp_path: Path) -> None:
    warned: list[str] = []
    store = CheckpointStore(tmp_path, keep=3, on_warning=warned.append)
    for step in (1, 2, 3):
        store.save({"n": step, "t": torch.zeros(3)}, env_steps=step)
    flip_bit(tmp_path / "step-000000003" / "tensors.safetensors", 200)
    (tmp_path / "step-000000002" / "manifest.json").unlink()
    found = store.newest()
    assert found and found[0].name == "step-000000001" and found[1]["n"] == 1
    assert len(warned) == 2 and "step-000000003" in warned[0] and "checksum" in warned[0]
    with warnings.catch_warnings(record=True) as default:
        warnings.simplefilter("always")
        newest_checkpoint(tmp_path)
    assert [str(warning.message) for warning in default] == warned


def test_saving_after_a_return_to_an_older_checkpoint_drops_the_future_that_was_left(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20):
        store.save({"n": step}, env_steps=step)
    path = store.save({"n": 15}, env_steps=15)
    assert store.newest() == (path, {"n": 15})
    assert [p.name for p in checkpoint_paths(tmp_path)] == ["step-000000015", "step-000000010"]


def test_a_checkpoint_set_aside_by_a_replacement_cut_short_is_found_and_pruned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    path = store.save({"n": 1}, env_steps=1)
    path.rename(tmp_path / ".step-000000001.old")
    assert checkpoint_paths(tmp_path) == [path] and store.newest() == (path, {"n": 1})
    store.save({"n": 2}, env_steps=2)
    assert os.listdir(tmp_path) == ["step-000000002"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    store = CheckpointStore(tmp_path, keep=1, on_warning=warned.append)
    store.save({"n": 1}, env_steps=1)

    def refuse(path: Path) -> NoReturn:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    store.save({"n": 2}, env_steps=2)
    assert len(warned) == 1 and "step-000000001: Read-only file system" in warned[0]
    assert (found := store.newest()) and found[1] == {"n": 2}


def test_keep_has_to_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, keep=0)


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    import torch
    from trpo.run.checkpoint import CheckpointStore
    from trpo.errors import CheckpointError

    store = CheckpointStore(Path(sys.argv[1]), keep=1)
    store.save({"n": 1, "t": torch.zeros(10)}, env_steps=1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        store.save({"n": 2, "t": torch.zeros(100_000)}, env_steps=2)
    except CheckpointError as error:
        assert isinstance(error.__cause__, OSError), error.__cause__
        print(error)
"""


def test_a_full_disk_prunes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "c")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "File too large" in result.stdout and result.stdout.count("\n") == 1
    assert os.listdir(tmp_path / "c") == ["step-000000001"]
    assert (found := newest_checkpoint(tmp_path / "c")) and found[1]["n"] == 1


@pytest.mark.parametrize("operation", ["mkdir", "fsync", "rename"])
def test_any_refusal_of_the_disk_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    save_state(tmp_path / "x", {"n": 1})

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, refuse)
        with pytest.raises(CheckpointError, match="No space left on device; free space"):
            save_state(tmp_path / "x", {"n": 2}, replace=True)
    assert os.listdir(tmp_path) == ["x"] and load_state(tmp_path / "x") == {"n": 1}


# --- damage and malice ---


def flip_bit(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def refused(path: Path) -> str:
    """The message with which loading is refused: one line that names the checkpoint, whatever the cause."""
    with pytest.raises(CheckpointError) as caught:
        load_state(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    return message


def forge(
    path: Path, state: str, *, schema: str = "1", tensors: bytes | None = None, listed: str | None = None
) -> None:
    """Writes a checkpoint with right checksums and any content, as an attacker can."""
    path.mkdir(exist_ok=True)
    data = safetensors.torch.save({}) if tensors is None else tensors
    (path / "tensors.safetensors").write_bytes(data)
    listed = listed or json.dumps({"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    body = f'{{"format": "trpo-checkpoint", "schema": {schema}, "tensors": {listed}, "state": {state}}}'.encode()
    digest = hashlib.sha256(body).hexdigest().encode()
    (path / "manifest.json").write_bytes(b'{"sha256": "' + digest + b'", "body": ' + body + b"}\n")


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    save_state(tmp_path / "x", SAMPLE)
    body = json.loads((tmp_path / "x" / "manifest.json").read_text())["body"]
    data = (tmp_path / "x" / "tensors.safetensors").read_bytes()
    assert body["format"] == "trpo-checkpoint" and body["schema"] == 1 and body["state"]["steps"] == 12
    assert body["state"]["random"]["state"] == {"$int": hex(1 << 127)}, "other readers hold numbers as float64"
    assert body["tensors"]["sha256"] == hashlib.sha256(data).hexdigest() and body["tensors"]["size"] == len(data)


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_truncation_anywhere_is_detected(tmp_path: Path, name: str) -> None:
    save_state(tmp_path / "x", SAMPLE)
    content = (tmp_path / "x" / name).read_bytes()
    for length in range(len(content)):
        (tmp_path / "x" / name).write_bytes(content[:length])
        message = refused(tmp_path / "x")
        assert name in message and ("bytes instead of" in message or "truncated" in message)
    (tmp_path / "x" / name).write_bytes(content + b"\n")
    refused(tmp_path / "x")


@pytest.mark.parametrize("name", ["manifest.json", "tensors.safetensors"])
def test_a_flipped_bit_is_detected(tmp_path: Path, name: str) -> None:
    save_state(tmp_path / "x", SAMPLE)
    file = tmp_path / "x" / name
    for bit in range(0, 8 * file.stat().st_size, 7):  # 7 is coprime to 8: each bit of the byte gets its turn
        flip_bit(file, bit)
        refused(tmp_path / "x")
        flip_bit(file, bit)
    assert identical(load_state(tmp_path / "x"), SAMPLE)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    assert "no such directory" in refused(tmp_path / "nowhere")
    assert "manifest.json is missing" in refused(tmp_path)
    save_state(tmp_path / "x", SAMPLE)
    (tmp_path / "x" / "tensors.safetensors").unlink()
    assert "tensors.safetensors is missing" in refused(tmp_path / "x")
    os.mkfifo(tmp_path / "x" / "tensors.safetensors")
    assert "tensors.safetensors is missing" in refused(tmp_path / "x")


def test_a_newer_schema_says_to_update(tmp_path: Path) -> None:
    forge(tmp_path / "x", "{}")
    assert load_state(tmp_path / "x") == {}
    forge(tmp_path / "x", '{"$new": 1}', schema="2")
    assert "schema 2 is newer than 1" in refused(tmp_path / "x") and "update trpo" in refused(tmp_path / "x")


ONE_TENSOR = safetensors.torch.save({"/a": torch.zeros(3, dtype=torch.uint8)})


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ('{"a": {"$tensor": "/b"}}', "/b"),
        ('[{"$tensor": "/a"}, {"$tensor": "/a"}]', "/a"),
        ('{"$class": "os.system"}', r"unknown kind '\$class'"),
        ("[" * 100_000, "recursion"),
        ("[" * 100_000 + "]" * 100_000, "recursion"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "recursion"),
        ("9" * 100_000, "digits"),
        ("[NaN", "Expecting"),
        ('{"$int": "x"}', "invalid literal"),
        ('{"$float": "00"}', "unpack"),
        ('{"$array": "/a", "dtype": "O", "shape": [1]}', "dtype"),
        ('{"$array": "/a", "dtype": "<f8", "shape": [1]}', "divisor|size|multiple"),
        ('{"$array": "/a", "dtype": "<u1", "shape": [1000000000000]}', "reshape"),
        ('{"$scalar": "/a"}', "reshape"),
    ],
    ids=range(14),
)
def test_forged_manifests_are_refused(tmp_path: Path, state: str, why: str) -> None:
    forge(tmp_path / "x", state, tensors=ONE_TENSOR)
    with pytest.raises(CheckpointError, match=why):
        load_state(tmp_path / "x")
    refused(tmp_path / "x")


@pytest.mark.parametrize("listed", ["null", "{}", '{"size": -1, "sha256": ""}', '{"size": "1", "sha256": 1}', "[1]"])
def test_forged_tensor_lists_are_refused(tmp_path: Path, listed: str) -> None:
    forge(tmp_path / "x", "{}", listed=listed)
    refused(tmp_path / "x")


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_hostile_pickle_is_never_executed(tmp_path: Path, protocol: int) -> None:
    sprung = tmp_path / "sprung"
    hostile = pickle.dumps(Trap(sprung), protocol)
    pickle.loads(hostile).close()
    assert sprung.exists(), "the trap does not work"
    sprung.unlink()
    torch.save(Trap(sprung), tmp_path / "saved.pt")
    for content in (hostile, (tmp_path / "saved.pt").read_bytes()):
        forge(tmp_path / "x", '{"a": {"$tensor": "/a"}}', tensors=content)
        refused(tmp_path / "x")
        (tmp_path / "x" / "manifest.json").write_bytes(content)
        refused(tmp_path / "x")
        (tmp_path / "y").write_bytes(content)
        refused(tmp_path / "y")
    assert not sprung.exists()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.binary(max_size=200), st.booleans())
def test_random_bytes_are_only_ever_a_checkpoint_error(manifest: bytes, data: bytes, signed: bool) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        if signed:
            manifest = b'{"sha256": "%b", "body": %b}\n' % (hashlib.sha256(manifest).hexdigest().encode(), manifest)
        (path / "manifest.json").write_bytes(manifest)
        (path / "tensors.safetensors").write_bytes(data)
        refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["$tensor", "$array", "$scalar", "$int", "$float", "$tuple", "dtype", "shape", "a", "$x"]),
            children | st.sampled_from(["/a", "<f4", "|u1", [3], [-1]]),
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(JSON)
def test_any_tree_loads_or_is_a_checkpoint_error(tree: Any) -> None:
    path = Path(tempfile.mkdtemp())
    try:
        forge(path, json.dumps(tree), tensors=ONE_TENSOR)
        load_state(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(path)
