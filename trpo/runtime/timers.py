"""The seconds that each phase of training takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimers:
    """Wall-clock seconds by phase, summed over every time the phase is entered.

    A phase inside another one, or beside it in another thread, counts in both. Work still queued on a GPU when a phase
    ends counts in the phase that waits for it.

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
        """Seconds by phase since the last call, in the order in which the phases first ended; starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds
