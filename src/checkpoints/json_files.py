"""JSON files that a checkpoint comes with, written by others."""

from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.json_text import parse_json


def read_json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: the file is missing, is no JSON in UTF-8, or holds something else than an object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give a complete checkpoint") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object; fetch it again")
    return content
