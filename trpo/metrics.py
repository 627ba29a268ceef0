"""Where a run's numbers go: TensorBoard, CSV tables and the console. And the seconds that each phase takes.

A full disk costs the curves, never the run: a file that cannot be written is named once and left alone from then on.
"""

from __future__ import annotations

import csv
import io
import logging
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from trpo.console import Console, open_console
from trpo.errors import UserError

STEP_COLUMN = "env_steps"
PROGRESS_FILE = "progress.csv"
EVALUATIONS_FILE = "evaluations.csv"
LOG_FILE = "log.txt"
EVENT_FILE_PREFIX = "events.out.tfevents."

_EVENTS = "TensorBoard events"

logger = logging.getLogger(__name__)


class PhaseTimers:
    """Wall-clock seconds by phase, summed over every time the phase is entered.

    A phase inside another one counts in both. Work still queued on a GPU when a phase ends counts in the phase that
    waits for it.

    >>> timers = PhaseTimers()
    >>> with timers("rollout"):
    ...     pass
    >>> sorted(timers.pop()), timers.pop()
    (['rollout'], {})
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start_s = self._clock()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + self._clock() - start_s

    def pop(self) -> dict[str, float]:
        """Seconds by phase since the last call, in the order in which the phases were first entered; starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class MetricsWriter:
    """One run's metrics, in its directory and on the console.

    Keys are TensorBoard tags such as `rollout/ep_rew_mean`. Whatever is passed is written; `None` means that there is
    nothing to report (an empty cell, no TensorBoard point), NaN that the result was not a number (`nan`, no point).
    """

    def __init__(
        self, directory: Path, *, total_steps: int, console: bool = True, resume_step: int | None = None
    ) -> None:
        """Opens the files of a new run, or takes up those of one that goes on.

        Args:
            directory: the run's directory; made if it does not exist.
            total_steps: environment steps of the whole run, for the display.
            console: False for no display at all. What would be a warning there goes to `logging` then.
            resume_step: environment steps of the checkpoint that the run goes on from: what was written after it is
                dropped, since the run is about to write it again.

        Raises:
            UserError: the directory cannot be written, or holds another run's metrics and `resume_step` is not given.
        """
        with ExitStack() as opened:
            self._sinks: dict[str, CsvTable | EventFile | AppendFile] = {}
            try:
                directory.mkdir(parents=True, exist_ok=True)
                self._sinks[LOG_FILE] = log = AppendFile(directory / LOG_FILE)
                opened.callback(log.close)
                for name in (PROGRESS_FILE, EVALUATIONS_FILE):
                    self._sinks[name] = table = CsvTable(directory / name, resume_step=resume_step)
                    opened.callback(table.close)
                self._sinks[_EVENTS] = EventFile(directory, resume_step=resume_step)
            except OSError as error:
                raise UserError(f"cannot write metrics in {directory}: {error.strerror or error}") from error
            opened.pop_all()
        self._start_step = self._env_steps = resume_step or 0
        self._console: Console | None = None
        if console:
            self._console = open_console(total_steps, start_step=self._start_step)

    def write(self, metrics: Mapping[str, float | None], *, env_steps: int) -> None:
        """One update: its TensorBoard scalars, a row of `progress.csv`, and the display.

        Args:
            metrics: value by tag; integers, floats, booleans and scalar arrays or tensors.
            env_steps: environment steps done when the update was complete.
        """
        self._record(PROGRESS_FILE, metrics, env_steps)

    def write_evaluation(self, evaluation: Mapping[str, float | None], *, env_steps: int) -> None:
        """One evaluation: its TensorBoard scalars and a row of `evaluations.csv`; the display shows it from now on."""
        self._record(EVALUATIONS_FILE, evaluation, env_steps)

    def message(self, text: str) -> None:
        """A line for the console and `log.txt`, such as a warning or why an update was refused."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} step {self._env_steps}: {text}\n"
        self._attempt(LOG_FILE, lambda sink: sink.append(line.encode()))
        self._show(lambda console: console.message(text))

    def add_text(self, tag: str, text: str) -> None:
        """A text (Markdown) in TensorBoard, such as the configuration."""
        self._attempt(_EVENTS, lambda sink: sink.write_text(tag, text, env_steps=self._start_step))

    def close(self) -> None:
        """Shows the last update and closes all files; may be called twice."""
        for name in list(self._sinks):
            self._attempt(name, lambda sink: sink.close())
        self._sinks.clear()
        self._show(lambda console: console.close())
        self._console = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _record(self, table: str, metrics: Mapping[str, float | None], env_steps: int) -> None:
        self._env_steps = env_steps
        values = {tag: _python_number(value) for tag, value in metrics.items()}
        for name in (table, _EVENTS):
            self._attempt(name, lambda sink: sink.write(values, env_steps=env_steps))
        self._show(lambda console: console.update(values, env_steps=env_steps))

    def _attempt(self, name: str, action: Callable[[Any], None]) -> None:
        """Acts on a file that is still written; drops the file for the rest of the run if that fails."""
        if name not in self._sinks:
            return
        try:
            action(self._sinks[name])
        except OSError as error:
            with suppress(OSError):
                self._sinks.pop(name).close()
            self._alert(f"warning: {name} can no longer be written ({error.strerror or error}); training goes on")

    def _show(self, action: Callable[[Console], None]) -> None:
        """Acts on the console; drops it if its reader is gone (a closed pipe, a log file on a full disk)."""
        if self._console is None:
            return
        try:
            action(self._console)
        except (OSError, ValueError) as error:
            self._console = None
            self._alert(f"warning: the console can no longer be written ({error}); training goes on")

    def _alert(self, text: str) -> None:
        if self._console is None:
            logger.warning(text)
        else:
            self.message(text)


class CsvTable:
    """A CSV file: `env_steps` first, one line a row, columns that may grow while it is written.

    A cell holds the `repr` of its number, so that reading it gives the same bits. It is empty where the value is None
    or the column came later. Every row is on its way to the disk when `write` returns.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        """Begins a table, or takes up an existing one without the rows beyond `resume_step`.

        Raises:
            UserError: `path` exists and `resume_step` is None, or `path` is no such table.
            OSError: it cannot be written.
        """
        self._path = path
        self._columns, rows = [STEP_COLUMN], list[list[str]]()
        if path.exists():
            if resume_step is None:
                raise UserError(f"{path} exists: resume that run, or choose another directory for this one")
            self._columns, rows = read_table(path)
        self._rewrite(row for row in rows if resume_step is not None and int(row[0]) <= resume_step)

    def write(self, values: Mapping[str, float | None], *, env_steps: int) -> None:
        """Appends a row; a tag that is new to the table becomes its last column."""
        if new := [tag for tag in values if tag not in self._columns]:
            self._file.close()
            _, rows = read_table(self._path)
            self._columns += new
            self._rewrite(row + [""] * len(new) for row in rows)
        cells = ("" if (value := values.get(tag)) is None else repr(value) for tag in self._columns[1:])
        self._file.append(_csv_lines([[str(env_steps), *cells]]))

    def close(self) -> None:
        self._file.close()

    def _rewrite(self, rows: Iterable[list[str]]) -> None:
        _replace_file(self._path, _csv_lines([self._columns, *rows]))
        self._file = AppendFile(self._path)


class EventFile:
    """A TensorBoard event file, written at once by the caller.

    TensorBoard's own writer hands records to a thread, which on a full disk dies with a traceback and shows its error
    to a later, unrelated call. One record an update needs no thread.
    """

    def __init__(self, directory: Path, *, resume_step: int | None = None) -> None:
        """Begins a new file beside those of earlier processes, which lose their points beyond `resume_step`."""
        if resume_step is not None:
            # TensorBoard has a marker that voids such points, but its default loader heeds it tag by tag, so late.
            for path in directory.glob(f"{EVENT_FILE_PREFIX}*"):
                _replace_file(path, _events_until(resume_step, path.read_bytes()))
        self._file = AppendFile(directory / _next_event_file_name(directory))
        self._write(Event(file_version="brain.Event:2"))

    def write(self, values: Mapping[str, float | None], *, env_steps: int) -> None:
        """The scalars of one step, in one record; None and NaN are left out."""
        points = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if value is not None and not math.isnan(value)
        ]
        self._write(Event(step=env_steps, summary=Summary(value=points)))

    def write_text(self, tag: str, text: str, *, env_steps: int) -> None:
        one = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        point = Summary.Value(
            tag=f"{tag}/text_summary",
            metadata=create_summary_metadata(display_name=tag, description=""),
            tensor=TensorProto(dtype=DT_STRING, tensor_shape=one, string_val=[text.encode()]),
        )
        self._write(Event(step=env_steps, summary=Summary(value=[point])))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.append(record.getvalue())


class AppendFile:
    """A file that grows by whole records: a record that does not fit on the disk leaves nothing of itself behind."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)

    def append(self, record: bytes) -> None:
        rest = memoryview(record)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._size += len(record)

    def close(self) -> None:
        self._file.close()


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a `CsvTable`, cells as text. A line cut short by the end of its process is left out.

    Raises:
        UserError: the file does not begin with a header whose first column is `env_steps`.
        OSError: it cannot be read.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    if not lines or lines[0][:1] != [STEP_COLUMN]:
        raise UserError(f"{path} is not a table of metrics: its first column is not {STEP_COLUMN}")
    columns, *rows = lines
    return columns, [row for row in rows if len(row) == len(columns) and row[0].isdecimal()]


def _python_number(value: Any) -> float | None:
    """A plain int or float, whatever the library it comes from: numpy's `repr` is not a number."""
    if value is None:
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def _csv_lines(rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _replace_file(path: Path, content: bytes) -> None:
    """Writes a file beside `path` and moves it there, so that readers and crashes see the old or the new one whole."""
    beside = path.with_name(f".{path.name}.new")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _events_until(step: int, content: bytes) -> bytes:
    """The records of an event file that belong to `step` or before; a record cut short ends it.

    A record is its length (8 bytes), a checksum (4), that many bytes of an `Event`, a checksum (4).
    """
    kept, start = [], 0
    while start + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        stop = start + 12 + length + 4
        if stop > len(content):
            break
        try:
            event = Event.FromString(content[start + 12 : stop - 4])
        except DecodeError:
            break  # damaged: TensorBoard reads no further either
        if event.step <= step:
            kept.append(content[start:stop])
        start = stop
    return b"".join(kept)


def _next_event_file_name(directory: Path) -> str:
    """A name that sorts behind the event files in `directory`: TensorBoard reads them in the order of their names."""
    stamps = [
        path.name.removeprefix(EVENT_FILE_PREFIX).partition(".")[0] for path in directory.glob(f"{EVENT_FILE_PREFIX}*")
    ]
    after = max((int(stamp) + 1 for stamp in stamps if stamp.isdecimal()), default=0)
    return f"{EVENT_FILE_PREFIX}{max(int(time.time()), after):010d}.{socket.gethostname()}.{os.getpid()}"
