"""Metrics come back from CSV and TensorBoard as they were written, also after a resume and on a full disk."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console as RichConsole
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trpo.errors import UserError
from trpo.run.console import LiveConsole, PlainConsole, Progress, open_console
from trpo.run.metric_files import read_table
from trpo.run.metrics import MetricsWriter
from trpo.runtime.timers import PhaseTimers


class FakeClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class BrokenStream(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Any file of this process can grow to `size` bytes only; a write across it is cut short, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def read_scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag as TensorBoard shows it, over all event files of a directory."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def event_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("events.out.tfevents.*"))


def quiet(directory: Path, *, resume_step: int | None = None) -> MetricsWriter:
    return MetricsWriter(directory, total_steps=100, console=False, resume_step=resume_step)


# Phase timers


def test_timers_sum_each_phase_and_start_anew_after_pop() -> None:
    clock = FakeClock()
    timers = PhaseTimers(clock)
    for seconds in (2.0, 3.0):
        with timers("rollout"):
            clock.now_s += seconds
    with timers("update"):
        clock.now_s += 1.0
        with timers("cg"):
            clock.now_s += 4.0
    assert timers.pop() == {"rollout": 5.0, "cg": 4.0, "update": 5.0}  # sums of integers: exact
    assert timers.pop() == {}


def test_timers_count_a_phase_that_fails() -> None:
    clock = FakeClock()
    timers = PhaseTimers(clock)
    with pytest.raises(KeyError), timers("rollout"):
        clock.now_s += 2.0
        raise KeyError
    assert timers.pop() == {"rollout": 2.0}


# CSV


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (0.1 + 0.2, "0.30000000000000004"),
        (np.float64(1 / 3), "0.3333333333333333"),
        (np.float32(0.1), "0.10000000149011612"),
        (2**60 + 1, "1152921504606846977"),
        (np.int64(7), "7"),
        (True, "1"),
        (1e-300, "1e-300"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (None, ""),
    ],
)
def test_csv_cells_read_back_to_the_same_number(tmp_path: Path, value: float | None, cell: str) -> None:
    with quiet(tmp_path) as writer:
        writer.write({"a/b": value}, env_steps=8)
    assert read_csv(tmp_path / "progress.csv") == [{"env_steps": "8", "a/b": cell}]


def test_csv_columns_grow_and_rows_are_on_disk_before_close(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        writer.write({"b": 1.0}, env_steps=10)
        writer.write({"a": 2.0, "b": 3.0}, env_steps=20)
        writer.write({"a": 4.0}, env_steps=30)
        text = (tmp_path / "progress.csv").read_text()
    assert text == "env_steps,b,a\n10,1.0,\n20,3.0,2.0\n30,,4.0\n"
    assert {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name} == {
        "progress.csv",
        "evaluations.csv",
        "log.txt",
    }


def test_messages_are_kept_with_the_step_they_came_at(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        writer.write({"a": 1.0}, env_steps=64)
        writer.message("update 2 left the policy unchanged: zero gradient")
    (line,) = (tmp_path / "log.txt").read_text().splitlines()
    assert line.endswith("step 64: update 2 left the policy unchanged: zero gradient")


def test_csv_stays_whole_if_growing_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with quiet(tmp_path) as writer:
        writer.write({"a": 1.0}, env_steps=1)
        before = (tmp_path / "progress.csv").read_bytes()
        monkeypatch.setattr(os, "fsync", fail)
        writer.write({"a": 2.0, "b": 2.0}, env_steps=2)
    assert (tmp_path / "progress.csv").read_bytes() == before
    assert read_scalars(tmp_path, "b") == [(2, 2.0)]
    assert not list(tmp_path.glob(".*")), "a half-written file was left behind"


def test_a_new_run_never_writes_over_another(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        writer.write({"a": 1.0}, env_steps=1)
    before = (tmp_path / "progress.csv").read_bytes()
    with pytest.raises(UserError, match=r"progress\.csv exists"):
        quiet(tmp_path)
    assert (tmp_path / "progress.csv").read_bytes() == before


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write metrics in .*file"):
        quiet(tmp_path / "file")


def test_resume_refuses_a_file_that_is_no_table_of_metrics(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("step,reward\n1,2\n")
    with pytest.raises(UserError, match="first column is not env_steps"):
        quiet(tmp_path, resume_step=1)
    assert (tmp_path / "progress.csv").read_text() == "step,reward\n1,2\n"


# Resume


def test_resume_drops_csv_rows_beyond_the_checkpoint_and_a_torn_last_line(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        for step in (100, 200, 300):
            writer.write({"a": step / 3}, env_steps=step)
        writer.write_evaluation({"eval/mean_reward": -1.0}, env_steps=200)
        writer.write_evaluation({"eval/mean_reward": -2.0}, env_steps=300)
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("150,3.1")  # of "150,3.14": the end of its process cut the row, not its number of cells
    with quiet(tmp_path, resume_step=200) as writer:
        writer.write({"a": 0.5, "new": 1.0}, env_steps=300)
    progress = (tmp_path / "progress.csv").read_text()
    assert progress == f"env_steps,a,new\n100,{100 / 3!r},\n200,{200 / 3!r},\n300,0.5,1.0\n"
    assert (tmp_path / "evaluations.csv").read_text() == "env_steps,eval/mean_reward\n200,-1.0\n"


def test_resume_voids_tensorboard_points_beyond_the_checkpoint_and_no_other(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        for step in (100, 200, 300, 400):
            writer.write({"a": float(step), "only/before": 1.0}, env_steps=step)
    with quiet(tmp_path, resume_step=200) as writer:
        writer.write({"a": -300.0}, env_steps=300)
    # Exact: the values are integers, which float32 holds.
    assert read_scalars(tmp_path, "a") == [(100, 100.0), (200, 200.0), (300, -300.0)]
    assert read_scalars(tmp_path, "only/before") == [(100, 1.0), (200, 1.0)]


def test_resume_works_when_the_clock_went_backwards(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        for step in (100, 200):
            writer.write({"a": float(step)}, env_steps=step)
    (old,) = event_files(tmp_path)
    old.rename(tmp_path / f"events.out.tfevents.{int(time.time()) + 3600}.another-host.1")
    with quiet(tmp_path, resume_step=100) as writer:
        writer.write({"a": -200.0}, env_steps=200)
    assert read_scalars(tmp_path, "a") == [(100, 100.0), (200, -200.0)]


# TensorBoard


def test_tensorboard_holds_scalars_at_environment_steps_without_none_and_nan(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        writer.write({"train/std": 0.5, "train/n_updates": 1, "missing": None}, env_steps=1000)
        writer.write({"train/std": math.nan}, env_steps=2000)
        writer.write_evaluation({"eval/mean_reward": 12.0}, env_steps=2000)
        # Read before close: whoever watches a run sees every update.
        assert read_scalars(tmp_path, "train/std") == [(1000, 0.5)]
        assert read_scalars(tmp_path, "train/n_updates") == [(1000, 1.0)]
        assert read_scalars(tmp_path, "eval/mean_reward") == [(2000, 12.0)]
        assert read_scalars(tmp_path, "missing") == []


def test_tensorboard_holds_texts(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        writer.add_text("config", "max_kl: 0.01 # δ")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Tensors("config/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "max_kl: 0.01 # δ"
    assert events.SummaryMetadata("config/text_summary").plugin_data.plugin_name == "text"


# Full disk


def test_full_disk_in_the_table_costs_the_table_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide: dict[str, float | None] = {f"column/{index}": None for index in range(500)}  # many bytes in CSV only
    with MetricsWriter(tmp_path, total_steps=100) as writer:
        writer.write(wide | {"a": 1.0}, env_steps=1)
        whole = (tmp_path / "progress.csv").read_bytes()
        with file_size_limit(len(whole) + 10):  # ten bytes of the next row fit: it is written in part
            writer.write(wide | {"a": 2.0}, env_steps=2)
        writer.write(wide | {"a": 3.0}, env_steps=3)
        writer.write_evaluation({"eval/mean_reward": 4.0}, env_steps=3)
    assert (tmp_path / "progress.csv").read_bytes() == whole
    assert read_scalars(tmp_path, "a") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert read_csv(tmp_path / "evaluations.csv") == [{"env_steps": "3", "eval/mean_reward": "4.0"}]
    warnings = [line for line in capsys.readouterr().out.splitlines() if "progress.csv" in line]
    assert len(warnings) == 1 and "training goes on" in warnings[0]


def test_full_disk_in_tensorboard_costs_tensorboard_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with quiet(tmp_path) as writer, caplog.at_level(logging.WARNING):
        writer.add_text("config", "x" * 10_000)  # makes the event file the longest
        writer.write({"a": 1.0}, env_steps=1)
        (events,) = event_files(tmp_path)
        with file_size_limit(events.stat().st_size + 10):
            writer.write({"a": 2.0}, env_steps=2)
        writer.write({"a": 3.0}, env_steps=3)
        writer.add_text("more", "text")
    assert read_scalars(tmp_path, "a") == [(1, 1.0)]
    assert [row["a"] for row in read_csv(tmp_path / "progress.csv")] == ["1.0", "2.0", "3.0"]
    assert [record.message.startswith("warning: TensorBoard events") for record in caplog.records] == [True]
    assert capsys.readouterr().out == ""


def test_a_quote_that_nothing_closes_damages_its_line_only(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        for step in range(4):
            writer.write({"a, b": step, 'c "d"': 0.5}, env_steps=step)
    path = tmp_path / "progress.csv"
    path.write_text(path.read_text().replace("1,1,0.5", '1,"1,0.5' + "x" * 200_000))  # more than a field may have
    columns, rows = read_table(path)
    assert columns == ["env_steps", "a, b", 'c "d"'] and [row[0] for row in rows] == ["0", "2", "3"]
    with MetricsWriter(tmp_path, total_steps=100, console=False, resume_step=2) as writer:
        writer.write({"a, b": 9}, env_steps=3)
    assert [row["a, b"] for row in read_csv(path)] == ["0", "2", "9"]


def test_a_name_that_would_break_the_table_is_refused(tmp_path: Path) -> None:
    with quiet(tmp_path) as writer:
        writer.write_recorded({"mine/a": 1.0}, env_steps=1)
        with pytest.raises(UserError, match=r"has a line break: 'mine/b\\nc'; write it in one line"):
            writer.write_recorded({"mine/b\nc": 1.0}, env_steps=2)
        writer.write_recorded({"mine/a": 3.0}, env_steps=3)
    assert read_csv(tmp_path / "recorded.csv") == [
        {"env_steps": "1", "mine/a": "1.0"},
        {"env_steps": "3", "mine/a": "3.0"},
    ]


def test_a_table_of_recorded_numbers_that_cannot_be_begun_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with quiet(tmp_path) as writer, caplog.at_level(logging.WARNING):
        (tmp_path / "recorded.csv").mkdir()  # in its place
        for step in (1, 2):
            writer.write_recorded({"mine/a": float(step)}, env_steps=step)
    assert read_scalars(tmp_path, "mine/a") == [(1, 1.0), (2, 2.0)]
    assert [record.message.startswith("warning: recorded.csv can no longer be") for record in caplog.records] == [True]


def test_an_end_that_is_ages_away_is_not_dated() -> None:
    now = iter([0.0, 1.0])
    progress = Progress(2**63 - 1, clock=lambda: next(now))
    progress.update({}, 1000)
    assert progress.pace() == "1,000 steps/s  -:--:-- left"


def test_a_console_whose_reader_has_gone_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdout", BrokenStream())
    with MetricsWriter(tmp_path, total_steps=100) as writer:
        writer.write({"a": 1.0}, env_steps=1)
        writer.message("saved")
        writer.write({"a": 2.0}, env_steps=2)
    assert len(read_csv(tmp_path / "progress.csv")) == 2
    assert ["console" in record.message for record in caplog.records] == [True]


# Console


def plain_console(clock: FakeClock, stream: io.StringIO, *, start_step: int = 0) -> PlainConsole:
    return PlainConsole(Progress(1000, start_step=start_step, clock=clock), stream=stream, interval_s=5.0)


def test_plain_console_shows_the_first_update_the_last_and_one_every_five_seconds() -> None:
    clock, stream = FakeClock(), io.StringIO()
    console = plain_console(clock, stream)
    for second in range(1, 13):
        clock.now_s += 1.0
        console.update({"rollout/ep_rew_mean": -float(second)}, env_steps=second * 10)
    console.close()
    steps = [line.partition("/")[0] for line in stream.getvalue().splitlines()]
    assert steps == ["10", "60", "110", "120"]


def test_plain_console_shows_no_update_twice() -> None:
    clock, stream = FakeClock(), io.StringIO()
    console = plain_console(clock, stream)
    clock.now_s += 1.0
    console.update({}, env_steps=10)
    console.close()
    assert len(stream.getvalue().splitlines()) == 1


def test_console_speed_and_time_left_count_this_process_only() -> None:
    clock, stream = FakeClock(), io.StringIO()
    console = plain_console(clock, stream, start_step=400)
    clock.now_s += 10.0
    console.update(
        {"rollout/ep_rew_mean": -1234.56, "train/kl_divergence_loss": 0.00953, "train/std": 1.0}, env_steps=500
    )
    # 100 steps in 10 s: 500 more take 50 s.
    expected = "500/1,000 steps  10 steps/s  0:00:50 left  return -1,234.6  KL 0.00953\n"
    assert stream.getvalue() == expected


def test_console_keeps_the_last_evaluation_and_the_last_known_return() -> None:
    progress = Progress(1000)
    progress.update({"rollout/ep_rew_mean": 5.0}, 10)
    progress.update({"eval/mean_reward": 7.0}, 10)
    progress.update({"rollout/ep_rew_mean": None, "train/kl_divergence_loss": 0.01}, 20)
    assert progress.results() == "return 5  KL 0.01  eval 7"


def test_plain_console_survives_an_encoding_without_greek() -> None:
    buffer = io.BytesIO()
    with io.TextIOWrapper(buffer, encoding="ascii") as stream:
        PlainConsole(Progress(1), stream=stream).message("δ = 0.01")
        assert buffer.getvalue() == b"? = 0.01\n"  # flushed, too


def test_piped_output_has_no_control_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with MetricsWriter(tmp_path, total_steps=100) as writer:
        writer.write({"rollout/ep_rew_mean": 1.0}, env_steps=50)
        writer.message("checkpoint [step 50]")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\r" not in out
    assert [line.partition(" ")[0] for line in out.splitlines()] == ["50/100", "checkpoint"]


def test_no_console_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with quiet(tmp_path) as writer:
        writer.write({"rollout/ep_rew_mean": 1.0}, env_steps=50)
        writer.write_evaluation({"eval/mean_reward": 1.0}, env_steps=50)
        writer.message("saved")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("term", "kind"), [("xterm", LiveConsole), ("dumb", PlainConsole)])
def test_a_terminal_gets_the_live_display_unless_it_is_dumb(
    monkeypatch: pytest.MonkeyPatch, term: str, kind: type[LiveConsole | PlainConsole]
) -> None:
    monkeypatch.setenv("TERM", term)
    keeper, terminal = os.openpty()
    with open(keeper, "rb"), open(terminal, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        console = open_console(100)
        console.close()
        monkeypatch.undo()
    assert isinstance(console, kind)


def test_live_display_shows_progress_and_messages_and_gives_the_cursor_back() -> None:
    clock, screen = FakeClock(), io.StringIO()
    threads = threading.active_count()
    terminal = RichConsole(file=screen, force_terminal=True, width=100, _environ={})
    console = LiveConsole(Progress(1000, clock=clock), terminal)
    assert threading.active_count() == threads, "a refresh thread is not safe beside forked workers"
    clock.now_s += 10.0
    console.update({"rollout/ep_rew_mean": -321.0}, env_steps=250)
    console.message("sizes [64, 64]")
    console.update({"eval/mean_reward": 12.0}, env_steps=500)
    console.close()
    shown = screen.getvalue()
    for part in ("250/1,000 steps", "25 steps/s", "0:00:30 left", "return -321.0", "sizes [64, 64]", "eval 12.0"):
        assert part in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_live_display_redraws_ten_times_a_second_at_most() -> None:
    clock, screen = FakeClock(), io.StringIO()
    console = LiveConsole(
        Progress(1000, clock=clock), RichConsole(file=screen, force_terminal=True, width=100, _environ={})
    )
    for step in range(1, 101):
        clock.now_s += 0.03125  # a power of two: the sums are exact
        console.update({}, env_steps=step)
    console.close()
    # 0.1 s is reached at every fourth update; two more for the first picture and the last.
    assert len(set(screen.getvalue().split()) & {f"{step}/1,000" for step in range(1, 101)}) in (25, 26)
