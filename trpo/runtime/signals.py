"""Stop signals as a list to look at, instead of a death in the middle of something."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SIGUSR1: how batch systems announce the end of a job


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Within, SIGTERM leaves by `SystemExit`, so that what is half written is removed as after any error."""

    def leave(number: int, frame: object) -> NoReturn:
        sys.exit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def caught_signals() -> Iterator[list[signal.Signals]]:
    """Collects stop signals while the block runs; a second SIGINT raises KeyboardInterrupt at once."""
    received: list[signal.Signals] = []

    def note(number: int, frame: object) -> None:
        received.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        previous = [signal.signal(number, note) for number in STOP_SIGNALS]
    except ValueError:  # not the main thread: signals are somebody else's business
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in zip(STOP_SIGNALS, previous, strict=True):
            signal.signal(number, handler)
