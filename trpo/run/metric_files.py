"""The files of a run's metrics: CSV tables and TensorBoard events, grown by whole records and taken up again."""

from __future__ import annotations

import csv
import io
import math
import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from trpo.errors import UserError
from trpo.run.whole_file import replace_durably

STEP_COLUMN = "env_steps"
EVENT_FILE_PREFIX = "events.out.tfevents."


class CsvTable:
    """A CSV file: `env_steps` first, one line a row, columns that may grow while it is written.

    A cell holds the `repr` of its number, so that reading it gives the same bits. It is empty where the value is None
    or the column came later. Every row is on its way to the disk when `write` returns.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None, at_once: bool = True) -> None:
        """Begins a table, or takes up an existing one without the rows beyond `resume_step`.

        With `at_once` off a table that does not exist begins with its first row.

        Raises:
            UserError: `path` exists and `resume_step` is None, or `path` is no such table.
            OSError: it cannot be written.
        """
        self._path = path
        self._columns, rows = [STEP_COLUMN], list[list[str]]()
        self._file: AppendFile | None = None
        if path.exists():
            if resume_step is None:
                raise UserError(f"{path} exists: resume that run, or choose another directory for this one")
            self._columns, rows = read_table(path)
        elif not at_once:
            return
        self._file = self._rewrite(row for row in rows if resume_step is not None and int(row[0]) <= resume_step)

    def write(self, values: Mapping[str, float | None], *, env_steps: int) -> None:
        """Appends a row; a tag that is new to the table becomes its last column.

        Raises:
            UserError: such a tag has a line break, and no table would be found again in the file.
        """
        new = [tag for tag in values if tag not in self._columns]
        if broken := [tag for tag in new if {"\n", "\r"} & {*tag}]:
            raise UserError(f"the name of a metric has a line break: {broken[0]!r}; write it in one line")
        if new or self._file is None:
            self.close()
            _, rows = read_table(self._path) if self._file else ([], [])
            self._columns += new
            self._file = self._rewrite(row + [""] * len(new) for row in rows)
        cells = ("" if (value := values.get(tag)) is None else repr(value) for tag in self._columns[1:])
        self._file.append(_csv_lines([[str(env_steps), *cells]]))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _rewrite(self, rows: Iterable[list[str]]) -> AppendFile:
        replace_durably(self._path, _csv_lines([self._columns, *rows]))
        return AppendFile(self._path)


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
                replace_durably(path, _events_until(resume_step, path.read_bytes()))
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
    # Line by line: a quote that nothing closes damages the line that it is in.
    lines = [_cells(line) for line in text[: text.rfind("\n") + 1].split("\n")[:-1]]
    if not lines or lines[0][:1] != [STEP_COLUMN]:
        raise UserError(f"{path} is not a table of metrics: its first column is not {STEP_COLUMN}; move it away")
    columns, *rows = lines
    return columns, [row for row in rows if len(row) == len(columns) and row[0].isdecimal()]


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line.removesuffix("\r")]), [])
    except csv.Error:
        return []


def _csv_lines(rows: Iterable[Iterable[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


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
