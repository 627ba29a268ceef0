"""Where a run's numbers go: TensorBoard, CSV tables and the console.

A full disk costs the curves, never the run: a file that cannot be written is named once and left alone from then on.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trpo.errors import UserError
from trpo.run.console import Console, open_console
from trpo.run.metric_files import AppendFile, CsvTable, EventFile

PROGRESS_FILE = "progress.csv"
EVALUATIONS_FILE = "evaluations.csv"
RECORDED_FILE = "recorded.csv"  # of a run whose user records numbers
TABLES = (PROGRESS_FILE, EVALUATIONS_FILE, RECORDED_FILE)
LOG_FILE = "log.txt"

_EVENTS = "TensorBoard events"

logger = logging.getLogger(__name__)


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
                for name in TABLES:
                    at_once = name != RECORDED_FILE  # of most runs nobody records anything
                    table = CsvTable(directory / name, resume_step=resume_step, at_once=at_once)
                    self._sinks[name] = table
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

    def write_recorded(self, metrics: Mapping[str, float | None], *, env_steps: int) -> None:
        """Numbers of a user's: TensorBoard scalars and a row of `recorded.csv`; the display does not show them."""
        self._write(RECORDED_FILE, metrics, env_steps)

    def message(self, text: str) -> None:
        """A line for the console and `log.txt`, such as a warning or why an update was refused."""
        line = f"{self._stamp()}: {text}\n"
        self._attempt(LOG_FILE, lambda sink: sink.append(line.encode()))
        self._show(lambda console: console.message(text))

    def failure(self, error: Exception) -> None:
        """The traceback of what ends the run, for `log.txt` alone: a run nobody watches has to say why it ended."""
        text = f"{self._stamp()}: ended by\n{''.join(traceback.format_exception(error))}"
        self._attempt(LOG_FILE, lambda sink: sink.append(text.encode()))

    def _stamp(self) -> str:
        return f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} step {self._env_steps}"

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
        values = self._write(table, metrics, env_steps)
        self._show(lambda console: console.update(values, env_steps=env_steps))

    def _write(self, table: str, metrics: Mapping[str, float | None], env_steps: int) -> dict[str, float | None]:
        """To the table and TensorBoard; the numbers as plain ones."""
        values = {tag: _python_number(value) for tag, value in metrics.items()}
        for name in (table, _EVENTS):
            self._attempt(name, lambda sink: sink.write(values, env_steps=env_steps))
        return values

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


def _python_number(value: Any) -> float | None:
    """A plain int or float, whatever the library it comes from: numpy's `repr` is not a number."""
    if value is None:
        return None
    return int(value) if isinstance(value, Integral) else float(value)
