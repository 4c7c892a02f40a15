"""Every setting of a run, as config/schema.py states it: meaning, default, type, range, section.

Nothing here names a field, so a field that is added to the schema is asked about from the next generation on.

    for setting in read_settings(RunConfig):
        print(setting.path, setting.default, setting.meaning)
"""

import ast
import dataclasses
import inspect
import itertools
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

_LIMIT_WORDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of the schema, in words."""

    path: str
    """Name that addresses it: `optim.beta1`, or `SourceConfig.split` for a field of a class that stands in lists."""

    sentences: tuple[str, ...]
    """Its docstring, a sentence each."""

    default: str
    """Its default, as a recipe would write it; `empty` for an empty list or dictionary."""

    type_words: str
    """Its type: `float`, `int or None`."""

    limits: str
    """Its range, such as `above 0`; empty where it has none."""

    choices: tuple[str, ...]
    """The values it may take, where they are a fixed few; else empty."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]

    @property
    def section(self) -> str:
        """What comes before the name in the path; empty for a section of the run itself."""
        return self.path.rpartition(".")[0]

    @property
    def meaning(self) -> str:
        """The first sentence of the docstring."""
        return self.sentences[0]

    def meanings_of_values(self) -> Iterator[tuple[str, str]]:
        """Values that the docstring gives a sentence to, such as `None: all.`, each with what it says of them."""
        for sentence in self.sentences:
            match = re.fullmatch(r"(None|Empty|`[^`]+`): (.+)", sentence)
            if match:
                yield match[1].strip("`"), match[2]


def read_settings(root: type) -> list[Setting]:
    """Every field of the dataclass `root` and of the dataclasses below it, in the schema's order.

    Raises:
        ValueError: a field has no docstring.
    """
    return list(_walk(root, "", set()))


def _walk(cls: type, section: str, seen: set[type]) -> Iterator[Setting]:
    docstrings = field_docstrings(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in docstrings:
            raise ValueError(f"{cls.__name__}.{field.name} has no docstring; write one under the field")
        path = f"{section}.{field.name}" if section else field.name
        hint = hints[field.name]
        yield Setting(
            path=path,
            sentences=_sentences(docstrings[field.name]),
            default="" if dataclasses.is_dataclass(hint) else _in_words(_default(field)),
            type_words="" if dataclasses.is_dataclass(hint) else _type_words(hint),
            limits=_limits(field.metadata),
            choices=_choices(hint),
        )
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, path, seen)
        for inner in typing.get_args(hint):
            if dataclasses.is_dataclass(inner) and inner not in seen:
                seen.add(inner)
                yield from _walk(inner, inner.__name__, seen)


def field_docstrings(cls: type) -> dict[str, str]:
    """The string that stands under each field of a class, its line breaks folded into spaces."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0].body
    found = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(text.value.value.split())
    return found


def _sentences(text: str) -> tuple[str, ...]:
    return tuple(re.split(r"(?<=[.!?])\s+(?=[A-Z`])", text))


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _in_words(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "not set, so it must be given"
    if isinstance(value, tuple | list | dict | str) and not value:
        return "empty"
    if isinstance(value, tuple | list):
        return listed([_in_words(item) for item in value], "and")
    if isinstance(value, str):
        return value
    return re.sub(r"e-0(\d)", r"e-\1", repr(value))


def _type_words(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("None" if one is type(None) else _type_words(one) for one in arguments)
    if typing.get_origin(hint) is typing.Literal:
        return "one of a few names"
    if typing.get_origin(hint) is tuple:
        inner = arguments[0]
        if dataclasses.is_dataclass(inner):
            return f"list of {inner.__name__}"
        return "list of fixed names" if typing.get_origin(inner) is typing.Literal else f"list of {inner.__name__}"
    if typing.get_origin(hint) is dict:
        return "dictionary"
    return {str: "string", int: "int", float: "float", bool: "True or False"}.get(hint, str(hint))


def _choices(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return tuple(str(value) for value in typing.get_args(hint))
    return next(filter(None, map(_choices, typing.get_args(hint))), ())


def _limits(metadata: typing.Mapping[str, Any]) -> str:
    return " and ".join(f"{word} {metadata[key]}" for key, word in _LIMIT_WORDS.items() if key in metadata)


def listed(words: typing.Sequence[str], last: str) -> str:
    """Words in a row, with `last` before the last of them: `a, b or c`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
