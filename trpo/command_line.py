"""What all commands share: their arguments, and the one place that turns errors into an exit status."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from trpo.errors import UserError


class CommandParser(argparse.ArgumentParser):
    """Reports a bad argument in one line, as everything else that is wrong with a command."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("action", None, _Once)  # of all arguments for which nothing else is said

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            bare = hasattr(found, "set") and any("=" in word and not word.startswith("-") for word in unknown)
            hint = "; every KEY=VALUE needs a --set of its own" if bare else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    def add_policy(self) -> None:
        """The policy that a command is about, and whether code that it names may be run."""
        self.add_argument("policy", type=Path, metavar="RUN_OR_POLICY", help="a run's directory, or a saved policy")
        self.add_argument(
            "--trust-code", action="store_true", help="let the policy's settings name modules to import and thereby run"
        )

    def add_changes(self, what: str) -> None:
        """`--set KEY=VALUE`, which may be repeated, as a list."""
        self.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"{what}; may be repeated")


class _Once(argparse._StoreAction):
    """One value: of two, one would be lost without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: str | None = None,
    ) -> None:
        given = namespace.__dict__.setdefault("options_given", set())
        if option is not None and self.dest in given:
            parser.error(f"{option} was given twice")
        given.add(self.dest)
        super().__call__(parser, namespace, values, option)


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `least` up."""

    def integer(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"give a whole number from {least} to {2**32 - 1}, not {text!r}")
        return int(text)

    return integer


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        _before(kind, error, trace)


_before = sys.excepthook
# Ctrl-C while a command still imports what it needs, which takes seconds: commands import this module first of all.
sys.excepthook = _quiet_interrupt


def run_command(main: Callable[[], int | None]) -> None:
    """Runs a command; a ``UserError`` or ``OSError`` becomes one line on stderr and exit status 2, without a traceback.

    Modules that settings name are also looked for in the working directory, as with `python -m`, but there last.
    """
    sys.path.append("")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed by who called the command
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where there is no ± it says ?
    try:
        status = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; without this Python complains once more while it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:  # what may not be read, say
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error or type(error).__name__}", file=sys.stderr)
        status = 2
    sys.exit(status)
