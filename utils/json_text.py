"""JSON that others wrote, read with one kind of error for all that can be wrong with it.

parse_json('{"a": 1}')     # {"a": 1}
"""

import json
from pathlib import Path
from typing import Any

from utils.errors import UserError, in_one_line

ANOTHER_CHECKPOINT = "bring it back as it was, or name another checkpoint of the run with --resume PATH"
"""What to do about a damaged file of a checkpoint."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested beyond what Python reads, or holds an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deeply") from error


def read_json_file(path: Path, remedy: str, kind: type = object) -> Any:
    """The value of a JSON file that this project wrote.

    Args:
        remedy: what to do where it is damaged, for the message.
        kind: what it holds, `dict` or `list`.
    Raises:
        UserError: it is no JSON in UTF-8, or holds something else.
        OSError: it cannot be read.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({in_one_line(error)}); {remedy}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__} and not a {kind.__name__}; {remedy}")
    return value
