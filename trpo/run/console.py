"""The console of a run: a live display on a terminal, plain lines in a pipe or a log file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Protocol, TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trpo.evaluation.result import short

Clock = Callable[[], float]  # seconds, monotonic

SHOWN = {"rollout/ep_rew_mean": "return", "train/kl_divergence_loss": "KL", "eval/mean_reward": "eval"}
PLAIN_INTERVAL_S = 5.0
LIVE_INTERVAL_S = 0.1


class Console(Protocol):
    """What a run says while it trains."""

    def update(self, metrics: Mapping[str, float | None], *, env_steps: int) -> None:
        """Takes note of new metrics, and shows them if enough time has passed since the last ones were shown."""

    def message(self, text: str) -> None:
        """Shows a line at once, above the live display where there is one."""

    def close(self) -> None:
        """Shows the last update if it was not shown yet, and gives the terminal back."""


def open_console(total_steps: int, *, start_step: int = 0) -> Console:
    """A live display if stdout is a terminal that can move its cursor, plain lines otherwise."""
    progress = Progress(total_steps, start_step=start_step)
    if sys.stdout.isatty():
        terminal = RichConsole()
        if not terminal.is_dumb_terminal:
            return LiveConsole(progress, terminal)
    return PlainConsole(progress)


class Progress:
    """How far the run is, how fast it goes, and the last known value of the metrics in `SHOWN`."""

    def __init__(self, total_steps: int, *, start_step: int = 0, clock: Clock = time.monotonic) -> None:
        """
        Args:
            total_steps: environment steps of the whole run.
            start_step: steps that were done before this process began; they do not count towards the speed.
            clock: seconds, monotonic.
        """
        self.total_steps = total_steps
        self.env_steps = start_step
        self.clock = clock
        self._start_step = start_step
        self._start_s = clock()
        self._values: dict[str, float] = {}

    def update(self, metrics: Mapping[str, float | None], env_steps: int) -> None:
        self.env_steps = env_steps
        for tag in SHOWN:
            if (value := metrics.get(tag)) is not None:
                self._values[tag] = float(value)

    @property
    def steps_per_s(self) -> float:
        """Environment steps per second since this process began, evaluations and checkpoints included."""
        elapsed_s = self.clock() - self._start_s
        return (self.env_steps - self._start_step) / elapsed_s if elapsed_s > 0 else 0.0

    def done(self) -> str:
        return f"{self.env_steps:,}/{self.total_steps:,} steps"

    def pace(self) -> str:
        rate = self.steps_per_s
        left_s = (self.total_steps - self.env_steps) / rate if rate > 0 else math.inf
        left = str(timedelta(seconds=round(left_s))) if left_s < 1e9 else "-:--:--"
        return f"{rate:,.0f} steps/s  {left} left"

    def results(self) -> str:
        return "  ".join(f"{name} {short(self._values[tag])}" for tag, name in SHOWN.items() if tag in self._values)


class PlainConsole:
    """Single lines without control codes: the first update, the last, and between them one every few seconds."""

    def __init__(
        self, progress: Progress, *, stream: TextIO | None = None, interval_s: float = PLAIN_INTERVAL_S
    ) -> None:
        self._progress = progress
        self._stream = stream
        self._interval_s = interval_s
        self._shown_s = -float("inf")
        self._pending = False

    def update(self, metrics: Mapping[str, float | None], *, env_steps: int) -> None:
        self._progress.update(metrics, env_steps)
        self._pending = True
        if self._progress.clock() - self._shown_s >= self._interval_s:
            self._show()

    def message(self, text: str) -> None:
        stream = self._stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        # A log in ASCII must not end a run because a message holds a Greek letter.
        print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)

    def close(self) -> None:
        if self._pending:
            self._show()

    def _show(self) -> None:
        self._shown_s = self._progress.clock()
        self._pending = False
        parts = (self._progress.done(), self._progress.pace(), self._progress.results())
        self.message("  ".join(part for part in parts if part))


class LiveConsole:
    """A progress bar with the last results beneath it, redrawn in place.

    There is no refresh thread: an environment may fork this process, and a lock that such a thread holds at that moment
    would stay locked in the child for ever.
    """

    def __init__(
        self, progress: Progress, terminal: RichConsole | None = None, *, interval_s: float = LIVE_INTERVAL_S
    ) -> None:
        self._progress = progress
        self._interval_s = interval_s
        self._shown_s = -float("inf")
        self._live = Live(console=terminal, auto_refresh=False, get_renderable=self._render)
        self._live.start(refresh=True)

    def update(self, metrics: Mapping[str, float | None], *, env_steps: int) -> None:
        self._progress.update(metrics, env_steps)
        now_s = self._progress.clock()
        if now_s - self._shown_s >= self._interval_s:
            self._shown_s = now_s
            self._live.refresh()

    def message(self, text: str) -> None:
        # `Text`, because square brackets in a plain string are markup to rich and would vanish.
        self._live.console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> Group:
        row = Table.grid(padding=(0, 2), expand=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=self._progress.total_steps, completed=self._progress.env_steps)
        row.add_row(bar, self._progress.done(), self._progress.pace())
        return Group(row, Text(self._progress.results(), no_wrap=True, overflow="ellipsis"))
