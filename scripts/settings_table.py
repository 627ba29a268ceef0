"""Writes docs/settings.md and the README's table from the settings' own types, ranges and descriptions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trpo.command_line import CommandParser, run_command
from trpo.config.schema import settings_table
from trpo.errors import UserError

INTRODUCTION = """\
# Settings

Generated from `trpo/config/settings.py` by `python scripts/settings_table.py`: change the text there.

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
`env.kwargs`, `env.options` and the `kwargs` of wrappers and bodies hold anything; every other value is checked before
the run starts.

"""


BEGIN, END = "<!-- settings: made by scripts/settings_table.py -->", "<!-- end of settings -->"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes page and README, or with ``--check`` raises ``UserError`` where one is out of date."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 2 if a file is out of date")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout")
    options = parser.parse_args(arguments)
    readme = options.root / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{readme}: the marks {BEGIN} and {END} are missing; put them where the table belongs")
    table = settings_table()
    wanted = {
        options.root / "docs" / "settings.md": INTRODUCTION + table,
        readme: f"{before}{BEGIN}\n\n{table}\n{END}{after}",
    }
    for path, text in wanted.items():
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            raise UserError(f"{path}: out of date; run python scripts/settings_table.py")


if __name__ == "__main__":
    run_command(main)
