"""What a run says, and what its parts warn of: to its log and console, as soon as there are any."""

from __future__ import annotations

import sys

from trpo.run.metrics import MetricsWriter
from trpo.runtime.distributed import Group


class Messages:
    """Lines of one process of a run. Until `open`, warnings are kept; of all processes the leading one shows them."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._writer: MetricsWriter | None = None
        self._unsaid: list[str] | None = []

    def say(self, text: str) -> None:
        """A line of the run's; dropped by all processes but the leading one."""
        if self._writer is not None:
            self._writer.message(text)

    def note(self, text: str) -> None:
        """A line of the run's about what one may not expect."""
        self.say(f"note: {text}")

    def warn(self, text: str) -> None:
        """A line of this process's, whichever it is."""
        where = "" if self._group.leads else f"process {self._group.rank}: "
        line = f"{where}warning: {text}"
        if self._unsaid is not None:
            self._unsaid.append(line)
        elif self._writer is not None:
            self.say(line)
        else:
            print(line, file=sys.stderr)

    def gather(self) -> None:
        """Collects the lines that every process has kept in the leading one; all call it before any of them writes."""
        gathered = [line for lines in self._group.gather_objects(self._unsaid) for line in lines]
        self._unsaid = gathered if self._group.leads else []

    def open(self, writer: MetricsWriter | None) -> None:
        """Lines go to `writer` from now on, which the leading process has; first those that were kept."""
        kept, self._unsaid, self._writer = self._unsaid or [], None, writer
        for line in kept:
            self.say(line)

    def abandon(self) -> None:
        """Prints what was kept by a run that cannot begin."""
        for line in self._unsaid or ():
            print(line, file=sys.stderr)
        self._unsaid = None
