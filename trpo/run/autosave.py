"""How long a run may go without a checkpoint, and what it does where the disk refuses one."""

from __future__ import annotations

import time
from typing import Any

from trpo.config import CheckpointConfig
from trpo.errors import CheckpointError, TrainingError
from trpo.run.checkpoint import CheckpointStore
from trpo.run.messages import Messages

AFTER_S = 600.0  # a slow environment takes hours for `checkpoint.every_steps`


class Autosave:
    """Saves the state of a run.

    Attributes:
        saved_at_step: environment steps at the latest attempt to save, or of the checkpoint resumed from.
        failures_in_a_row: saves that the disk has refused since the last one that it took.
    """

    def __init__(self, store: CheckpointStore, settings: CheckpointConfig, messages: Messages) -> None:
        self.store = store
        self.settings = settings
        self.messages = messages
        self.saved_at_step = 0
        self._saved_at_s = time.monotonic()
        self.failures_in_a_row = 0

    @property
    def is_late(self) -> bool:
        """Whether the last one lies far back by the clock of this process."""
        return self.settings.every_steps > 0 and time.monotonic() - self._saved_at_s > AFTER_S

    def save(self, state: dict[str, Any], *, env_steps: int, leads: bool) -> None:
        """Saves, if this process leads.

        Raises:
            TrainingError: so many in a row could not be saved that training gives up.
        """
        self._saved_at_s = time.monotonic()  # or tried to: a disk that is full now is not asked again at once
        self.saved_at_step = env_steps
        if not leads:
            return
        try:
            self.store.save(state, env_steps=env_steps)
            self.failures_in_a_row = 0
        except CheckpointError as error:
            self.failures_in_a_row += 1
            count = f"failure {self.failures_in_a_row} in a row, given up at {self.settings.abort_after}"
            self.messages.warn(f"no checkpoint at {env_steps} steps: {error} ({count})")
            if self.failures_in_a_row >= self.settings.abort_after:
                raise TrainingError(f"{self.failures_in_a_row} checkpoints in a row failed: {error}") from error
