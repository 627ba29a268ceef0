"""A child process that shares what its parent has open, for tests of what outlives a process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable


def fork(child: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python ≥ 3.12 warns of any fork beside other threads
        pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid
