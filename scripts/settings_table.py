"""Writes docs/settings.md from the settings' own types, ranges and descriptions; `--check` only compares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trpo.config_file import settings_table
from trpo.errors import CommandParser, UserError, run_command

INTRODUCTION = """\
# Settings

Generated from `trpo/config.py` by `python scripts/settings_table.py`: change the text there.

A YAML file lists only departures from these defaults, and `--set key.path=value` departs from the file:

```yaml
env:
  id: Hopper-v5
natural_gradient:
  max_kl: {start: 0.02, end: 0.005}   # a schedule, where a setting takes a number or a mapping
```

Only `env.id` is required. Values are YAML 1.2 scalars: `1e-3`, `0.001` and `1_000_000` are numbers, `true` and `false`
the only booleans, and what looks like neither (`on`, `0x10`, `010`) is text, which a number or boolean refuses. A key
given twice, an unknown key, a tag, an anchor or an alias is an error that names the file, the line and the key path.
`env.kwargs` and a wrapper's `kwargs` hold anything; every other value is checked before the run starts.

"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page, or with ``--check`` raises ``UserError`` where it is out of date."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 2 if the page is out of date")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "settings.md")
    options = parser.parse_args(arguments)
    page = INTRODUCTION + settings_table()
    if not options.check:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page, encoding="utf-8")
    elif not options.out.is_file() or options.out.read_text(encoding="utf-8") != page:
        raise UserError(f"{options.out}: out of date; run python scripts/settings_table.py")


if __name__ == "__main__":
    run_command(main)
