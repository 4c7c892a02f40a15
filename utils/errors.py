"""The error of a run that cannot be right: the user can mend its cause.

raise UserError(f"data.max_length={n} exceeds the model's context of {m}; lower it to {m} or less")
"""

import sys
from collections.abc import Iterable

from utils.redaction import redact


class UserError(ValueError):
    """Says what was given, what is allowed and what to change.

    Commands print it without a traceback and exit with 2.
    """


def tell_error(error: object) -> None:
    """Print what ended a command, as every command does: on standard error, without secrets."""
    sys.stderr.write(redact(f"error: {error}\n"))


def some(values: Iterable[object], limit: int = 8) -> str:
    """The first values of many, in order, short enough to be read."""
    found = sorted(map(str, values))
    shown = [value if len(value) <= 100 else value[:100] + "..." for value in found[:limit]]
    return f"{shown}" + (f" and {len(found) - limit} more" if len(found) > limit else "")


def in_one_line(error: Exception) -> str:
    """What another library says, short enough to be read."""
    return " ".join(str(error).split())[:500]
