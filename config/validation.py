"""Plain values to a typed configuration and back, with errors that name the field and what it takes.

A tree is what YAML and JSON hold: a dict of sections with text, numbers, booleans, None, lists and dicts. Types are
strict: "3" and True are no whole number, though 3 is a number.

    config = to_config({"optim": {"learning_rate": 1e-4}})
    json.dumps(to_dict(config))
"""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from config.constraints import ConfigError
from config.schema import RunConfig

HELP_HINT = "`python train.py --help` lists every field"

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SECRET_PARAMETERS = re.compile(r"(?i)(?<=[?&])([^=&\s]*(?:token|key|secret|password|signature|sig)[^=&\s]*=)[^&\s#]+")
_PLAIN_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_LIMITS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def to_config(tree: dict[str, Any], where: str = "") -> RunConfig:
    """The configuration that a tree describes; fields it leaves out have their defaults.

    Args:
        tree: sections by name; a tuple counts as a list.
        where: what the tree was read from, for messages.
    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or one that JSON cannot hold; all of
            them are listed.
    """
    if problems := list(_foreign_values(tree, "")):
        raise ConfigError(problems, where)
    try:
        # The JSON mode is the strict one that takes a dict for a dataclass and a list for a tuple.
        return _adapter().validate_json(json.dumps(tree), strict=True, extra="forbid")
    except ValidationError as error:
        problems = [_problem(detail) for detail in error.errors(include_url=False)]
        raise ConfigError(problems, where) from None


def to_tree(value: Any) -> Any:
    """The plain tree of a configuration or a part of it: dataclasses as dicts, tuples as lists, nothing masked."""
    if dataclasses.is_dataclass(value):
        return {part.name: to_tree(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_tree(item) for item in value]
    return value


def flatten(tree: Any, name: str = "") -> dict[str, Any]:
    """The values of a tree by dotted name; a list counts as one value, unless it holds dicts."""
    inner = tree.items() if isinstance(tree, dict) else ()
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        inner = enumerate(tree)
    if not inner:
        return {name: tree}
    values: dict[str, Any] = {}
    for key, item in inner:
        values.update(flatten(item, f"{name}.{key}" if name else str(key)))
    return values


def to_dict(config: RunConfig) -> dict[str, Any]:
    """What a run directory's config.json holds: every field, as JSON's own types.

    Text that carries credentials inside a URL (`https://user:password@host`, `?token=...`) has them replaced by `***`.
    """
    return _masked(to_tree(config))


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    if isinstance(value, str):
        return _SECRET_PARAMETERS.sub(r"\1***", _CREDENTIALS.sub("***", value))
    return value


def _foreign_values(value: Any, name: str) -> Iterator[str]:
    """Problems of values that a YAML file could not hold either."""
    if isinstance(value, dict):
        for key, item in value.items():
            inner = f"{name}.{key}" if name else str(key)
            if isinstance(key, str):
                yield from _foreign_values(item, inner)
            else:
                yield f"{inner}: the key {key!r} is {type(key).__name__}, and keys are text; put it in quotes"
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _foreign_values(item, f"{name}.{index}")
    elif not isinstance(value, str | int | float | None):
        expected = field_type(name.split("."))
        takes = "plain text, numbers, lists and dicts" if expected in (None, Any) else describe(expected)
        yield f"{name}={value!r} is {type(value).__name__}; {name} takes {takes}"


def _problem(detail: Any) -> str:
    """One sentence for one of pydantic's error details."""
    name = ".".join(str(part) for part in detail["loc"])
    kind, context, given = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "unexpected_keyword_argument":
        return f"{name} is no field; {did_you_mean(name)}"
    if not name:
        return f"the configuration is {_shown(given)}; it takes sections such as model, data and optim"
    shown = f"{name}={_shown(given)}"
    if kind in _LIMITS:
        word, limit = _LIMITS[kind]
        return f"{shown} is out of range; {name} must be {word} {_shown(context[limit])}"
    if kind in ("too_short", "string_too_short"):
        return f"{name} is empty; give at least {context['min_length']}, or leave it out for the default"
    if kind == "string_pattern_mismatch":
        return f"{shown} does not match {context['pattern']}; change {name}"
    expected = field_type([str(part) for part in detail["loc"]])
    takes = describe(expected) if expected is not None else detail["msg"].removeprefix("Input should be ")
    return f"{shown} is {_mismatch(given, expected)}; {name} takes {takes}"


def _shown(value: Any) -> str:
    """A value as YAML would have it, cut to a line."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        value = int(value)
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _mismatch(value: Any, expected: Any) -> str:
    if isinstance(value, str) and any(get_origin(option) is Literal for option in _options(expected)):
        return "no choice"
    return kind_of(value)


def kind_of(value: Any) -> str:
    """What a plain value is, in words."""
    names = {dict: "a mapping", list: "a list", type(None): "nothing"}
    return (_PLAIN_NAMES | names).get(type(value), type(value).__name__)


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation itself."""
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return get_args(annotation)
    return (annotation,)


def describe(annotation: Any) -> str:
    """What a field of this type takes, in words, such as `a whole number, or null`."""
    if annotation is Any:
        return "any value"
    if annotation is type(None):
        return "null"
    if annotation in _PLAIN_NAMES:
        return _PLAIN_NAMES[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if origin is tuple:
        return f"a list, each item {describe(arguments[0])}"
    if origin is dict:
        return f"a mapping from text to {describe(arguments[1])}"
    if dataclasses.is_dataclass(annotation):
        return "a section with " + ", ".join(part.name for part in dataclasses.fields(annotation))
    return ", or ".join(describe(option) for option in _options(annotation))


def is_index(part: str) -> bool:
    """Whether a part of a dotted name counts items of a list: `²` is a digit to Python too, and no number."""
    return part.isascii() and part.isdigit() and len(part) < 10


def field_type(path: Sequence[str]) -> Any:
    """The annotation at a dotted path of the schema, through list indices and dict keys; None where there is none."""
    annotation: Any = RunConfig
    for part in path:
        origin, arguments = get_origin(annotation), get_args(annotation)
        if dataclasses.is_dataclass(annotation):
            annotation = typing.get_type_hints(annotation).get(part)
        elif origin is tuple and is_index(part):
            annotation = arguments[0]
        elif origin is dict:
            annotation = arguments[1]
        elif annotation is not Any:
            return None
    return annotation


@functools.cache
def field_names() -> tuple[str, ...]:
    """The dotted name of every field below the sections, in the schema's order; `N` stands for a list's index."""
    return tuple(_names(RunConfig, ""))


def _names(section: Any, prefix: str) -> Iterator[str]:
    for name, annotation in typing.get_type_hints(section).items():
        dotted = prefix + name
        if dataclasses.is_dataclass(annotation):
            yield from _names(annotation, f"{dotted}.")
            continue
        yield dotted
        if get_origin(annotation) is tuple and dataclasses.is_dataclass(get_args(annotation)[0]):
            yield from _names(get_args(annotation)[0], f"{dotted}.N.")


def did_you_mean(name: str) -> str:
    """A question with the nearest field's name, for a name that is no field; where none is near, those to choose from.

    A field of the same last part in another section is nearer than one that is spelled alike.
    """
    index = re.search(r"\.(\d+)(?=\.|$)", name)
    given = re.sub(r"\.\d+(?=\.|$)", ".N", name)
    sections = [part.name for part in dataclasses.fields(RunConfig)]
    names = [*field_names(), *(() if "." in given else sections)]
    parent, _, leaf = given.rpartition(".")
    siblings = {own.rpartition(".")[2]: own for own in names if own.rpartition(".")[0] == parent}
    leaves = {own.rpartition(".")[2]: own for own in reversed(names)}
    same = [own for own in names if own.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    anywhere = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.75)
    if same:
        found = max(same, key=lambda own: difflib.SequenceMatcher(None, own, given).ratio())
    elif close or anywhere:
        found = siblings[close[0]] if close else leaves[anywhere[0]]
    else:
        section = field_type(name.split(".")[:-1])
        is_section = "." in name and dataclasses.is_dataclass(section)
        return f"{name.rpartition('.')[0]} is {describe(section)}" if is_section else HELP_HINT
    return f"did you mean {found.replace('.N', '.' + (index[1] if index else '0'))}?"
