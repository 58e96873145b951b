"""Numbers as text for people."""

from __future__ import annotations

import math


def figure(value: float) -> str:
    """A perplexity or a loss: about four digits, never in exponent notation."""
    if not math.isfinite(value):
        return "infinite" if value == math.inf else "not a number"
    decimals = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{decimals}f}"


def share(value: float) -> str:
    """A share as a percentage: `0.5` -> `50.0%`."""
    return f"{value:,.1%}" if math.isfinite(value) else figure(value)


def size(count: float) -> str:
    """A number of bytes in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """A time as `0.42 s`, `59.9 s`, `3 min 20 s` or `2 h 05 min`."""
    if not math.isfinite(seconds):
        return figure(seconds)
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"
