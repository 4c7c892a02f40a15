"""Packages that only some formats need.

tiktoken = optional("tiktoken", "a tokenizer.model of ranks")
"""

import importlib
from types import ModuleType

from utils.errors import UserError


def optional(module: str, what: str) -> ModuleType:
    """Import a module that `requirements/convert.txt` lists.

    Args:
        what: what needs it, for the message.
    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module}, which cannot be imported ({error}); pip install -r requirements/convert.txt"
        ) from error
