"""JSON that others wrote, read with one kind of error for all that can be wrong with it.

parse_json('{"a": 1}')     # {"a": 1}
"""

import json
from typing import Any

NESTING = 100
"""Lists and objects within each other, beyond which code that goes down into a value may come to Python's limit."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested beyond what Python reads, or holds an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("lists and objects are nested too deeply") from error


def is_nested_beyond(value: Any, limit: int = NESTING) -> bool:
    """Whether more than `limit` lists and objects stand within each other."""
    level = [value]
    for _ in range(limit):
        inner = [item for item in level if isinstance(item, dict | list | tuple)]
        if not inner:
            return False
        level = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
    return any(isinstance(item, dict | list | tuple) for item in level)
