"""A field of a dataclass with a default and limits, which `config.validation` enforces.

rank: int = limited(16, ge=1)
"""

from dataclasses import field
from typing import Any


def limited(default: Any, **limits: Any) -> Any:
    """A field with a default and pydantic's names of its limits: gt, ge, lt, le, min_length, pattern."""
    return field(default=default, metadata=limits)
