"""The error of a run that cannot be right: the user can mend its cause.

raise UserError(f"data.max_length={n} exceeds the model's context of {m}; lower it to {m} or less")
"""


class UserError(ValueError):
    """Says what was given, what is allowed and what to change.

    Commands print it without a traceback and exit with 2.
    """


def in_one_line(error: Exception) -> str:
    """What another library says, short enough to be read."""
    return " ".join(str(error).split())[:500]
