"""Numbers and tables of the benchmarks' reports, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"## {title}", "", *("| " + " | ".join(row) + " |" for row in (header, *rows))]
    lines.insert(3, "|" + "---|" * len(header))
    return "\n".join(lines) + "\n"


def number(value: float, digits: int = 0) -> str:
    return "–" if math.isnan(value) else f"{value:,.{digits}f}"


def milliseconds(value: float) -> str:
    return number(1000 * value, 1)
