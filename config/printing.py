"""A configuration as YAML, with where each value comes from; the text is itself a recipe.

print(format_config(command_line.config, command_line.sources, title=str(command_line.recipe)))
"""

from collections.abc import Iterator, Mapping
from typing import Any

from config.loader import CommandLine
from config.recipe import inline_yaml
from config.validation import to_dict


def format_config(command_line: CommandLine) -> str:
    """Every field as YAML, with a comment after each value that is not the default, saying where it comes from.

    Credentials inside URLs are masked, as in `to_dict`.
    """
    title = f"# {command_line.recipe}; a value without a comment is the default"
    lines = [title, *_lines(to_dict(command_line.config), "", "", command_line.sources)]
    return "\n".join(lines) + "\n"


def _lines(tree: Mapping[str, Any], name: str, indent: str, sources: Mapping[str, str]) -> Iterator[str]:
    for key, value in tree.items():
        inner = f"{name}.{key}" if name else key
        label = f"{indent}{inline_yaml(key)}:"
        if isinstance(value, dict) and value:
            yield label
            yield from _lines(value, inner, indent + "  ", sources)
        elif isinstance(value, list) and value and all(isinstance(item, dict) and item for item in value):
            yield label
            for index, item in enumerate(value):
                first, *rest = _lines(item, f"{inner}.{index}", indent + "    ", sources)
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            comment = f"  # {sources[inner]}" if inner in sources else ""
            yield f"{label} {inline_yaml(value)}{comment}"
