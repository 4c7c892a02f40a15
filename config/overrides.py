"""Dotted options, such as `--optim.learning_rate 1e-4`, put into a configuration.

    config = override(recipe, ["--optim.learning_rate", "1e-4", "--data.train.0.path=rows.jsonl"])

tyro types each value by the schema. What it cannot know is done here: sources that are added, keys of mappings, and
messages that list every problem.
"""

import contextlib
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from config.constraints import ConfigError
from config.recipe import inline_yaml, read_yaml
from config.schema import RunConfig, SourceConfig
from config.validation import HELP_HINT, describe, did_you_mean, field_type, is_index, kind_of, to_config, to_tree

LONGEST_SHOWN = 200
"""Characters of a value that a message repeats."""

_Parsed = TypeVar("_Parsed")


class RefusedError(Exception):
    """tyro would not take these arguments."""


def _yaml_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """tyro's rule for mappings and for lists of sources: one argument, in YAML."""
    if get_origin(info.type) is not dict and info.type != tuple[SourceConfig, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{KEY: VALUE, ...}" if get_origin(info.type) is dict else "[{path: PATH, ...}, ...]",
        instance_from_str=lambda arguments: _read_yaml(arguments[0]),
        is_instance=lambda value: isinstance(value, dict | tuple),
        str_from_instance=lambda value: [inline_yaml(to_tree(value))],
    )


TYPES = ConstructorRegistry()
TYPES.primitive_rule(_yaml_rule)


def _read_yaml(text: str) -> Any:
    """What a YAML text of one line holds.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        return read_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text[:LONGEST_SHOWN]} is no YAML") from error


def parse_arguments(
    kind: type[_Parsed], default: _Parsed, arguments: Sequence[str], flags: bool = False
) -> tuple[_Parsed, list[str]]:
    """Run tyro, silently: the parsed object and the arguments that it does not know.

    Args:
        flags: whether a boolean is a flag without a value.

    Raises:
        RefusedError: an argument has a value that tyro cannot use.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return tyro.cli(
                kind,
                default=default,
                args=arguments,
                use_underscores=True,
                add_help=False,
                return_unknown_args=True,
                config=() if flags else (tyro.conf.FlagConversionOff,),
                registry=TYPES,
            )
    except SystemExit as error:
        raise RefusedError from error


@dataclass(frozen=True)
class _Option:
    """One option as it was given: `--optim.learning-rate=1e-4`, or `--optim.learning-rate` and the values after it."""

    arguments: tuple[str, ...]

    @property
    def path(self) -> tuple[str, ...]:
        """The parts of its dotted name, with underscores."""
        return tuple(self.arguments[0][2:].partition("=")[0].replace("-", "_").split("."))

    @property
    def values(self) -> tuple[str, ...]:
        """What was given to it."""
        _, inline, value = self.arguments[0].partition("=")
        return ((value,) if inline else ()) + self.arguments[1:]

    def arguments_below(self, depth: int) -> list[str]:
        """Its arguments for tyro, without the first `depth` parts of its name.

        YAML's true, false and null are spelled as Python's where the field has them.
        """
        expected = field_type(self.path)
        spellings = {"true": "True", "false": "False"} if expected is bool else {}
        if type(None) in get_args(expected):
            spellings = {"null": "None"}
        name = "--" + ".".join(self.path[depth:])
        values = [spellings.get(value, value) for value in self.values]
        return [f"{name}={values[0]}", *values[1:]] if "=" in self.arguments[0] else [name, *values]

    def refusal(self) -> str:
        """The problem of a value that the field does not take."""
        name, given = "--" + ".".join(self.path), " ".join(self.values) or "nothing"
        given = given if len(given) <= LONGEST_SHOWN else given[:LONGEST_SHOWN] + "..."
        return f"{name} was given {given}; it takes {describe(field_type(self.path))}"


def _options(arguments: Sequence[str]) -> list[_Option]:
    """Cut arguments into options, each with the values that follow it.

    Raises:
        ConfigError: a value comes before any option.
    """
    groups: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            groups.append([argument])
        elif groups:
            groups[-1].append(argument)
        else:
            raise ConfigError(f"{argument} follows no option; write --section.field {argument}. {HELP_HINT}")
    return [_Option(tuple(group)) for group in groups]


def override(recipe: RunConfig, arguments: Sequence[str]) -> RunConfig:
    """The recipe with the values of `--section.field value` options in place of its own.

    Raises:
        ConfigError: an option is unknown, or a value is of the wrong type or out of range; all are listed.
    """
    options = _options(arguments)
    if not options:
        return recipe
    tree = to_tree(recipe)
    problems: list[str] = []
    keys: list[_Option] = []
    groups: dict[tuple[str, ...], list[_Option]] = {(): []}
    for option in options:
        if problem := _misplaced(option):
            problems.append(problem)
        elif _mapping_depth(option.path):
            keys.append(option)
        else:
            groups.setdefault(_source_prefix(option.path), []).append(option)
    # The whole lists under () come first, and each list's sources in order, since each one may be new.
    for prefix in sorted(groups, key=lambda prefix: (prefix[:2], *map(int, prefix[2:]))):
        problems += _set_fields(tree, prefix, groups[prefix])
    for option in keys:
        problems += _set_key(tree, option)
    try:
        config = to_config(tree)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems, where="command line")
    return config


def _misplaced(option: _Option) -> str | None:
    """Why an option is none, if it names no field or one that is set part by part."""
    name = option.arguments[0].partition("=")[0]
    expected = field_type(option.path)
    if expected is None:
        hint = did_you_mean(".".join(option.path)).replace("did you mean ", "did you mean --")
        return f"{name} is no option; {hint}"
    if dataclasses.is_dataclass(expected):
        fields = ", ".join(f"{name}.{part.name}" for part in dataclasses.fields(expected))
        return f"{name} is a section; its fields are {fields}"
    return None


def _mapping_depth(path: Sequence[str]) -> int:
    """How many parts of a path lead to a mapping that the rest is a key of; 0 if the path leads into none."""
    return next((depth for depth in range(1, len(path)) if get_origin(field_type(path[:depth])) is dict), 0)


def _source_prefix(path: Sequence[str]) -> tuple[str, ...]:
    """The part of a path that names one source, such as data, train, 0; empty if it is in none."""
    return tuple(path[:3]) if field_type(path[:3]) is SourceConfig else ()


def _add_source(tree: dict[str, Any], prefix: Sequence[str]) -> str | None:
    """Add the source that `prefix` names if it is the one after its list's last; a problem if it is a later one."""
    sources, index = tree[prefix[0]][prefix[1]], int(prefix[2])
    if isinstance(sources, list) and index == len(sources):
        sources.append(to_tree(SourceConfig()))
    elif not isinstance(sources, list) or index > len(sources):
        name, count = ".".join(prefix[:2]), len(sources)
        return f"--{'.'.join(prefix)} skips sources; {name} has {count}, so the next one is {name}.{count}"
    return None


def _set_fields(tree: dict[str, Any], prefix: tuple[str, ...], options: Sequence[_Option]) -> list[str]:
    """Put the values of options into the tree, typed by tyro; the problems of those that it refuses.

    Args:
        prefix: what the options' names have in common: empty, or the part that names one source.
    """
    if prefix and (problem := _add_source(tree, prefix)):
        return [problem]
    kind = SourceConfig if prefix else RunConfig
    arguments = [argument for option in options for argument in option.arguments_below(len(prefix))]
    try:
        parsed, unused = parse_arguments(kind, kind(), arguments)
    except RefusedError:
        unused = arguments
    if unused:
        if len(options) == 1:
            return [options[0].refusal()]
        return [problem for option in options for problem in _set_fields(tree, prefix, [option])]
    for option in options:
        value: Any = parsed
        holder: Any = tree
        for part in prefix:
            holder = holder[int(part) if is_index(part) else part]
        *parents, name = option.path[len(prefix) :]
        for part in parents:
            holder, value = holder[part], getattr(value, part)
        holder[name] = to_tree(getattr(value, name))
    return []


def _set_key(tree: dict[str, Any], option: _Option) -> list[str]:
    """Put one key's value into a mapping of the tree: YAML where the schema takes any value, else text as it stands."""
    path, depth = option.path, _mapping_depth(option.path)
    prefix = _source_prefix(path)
    if prefix and (problem := _add_source(tree, prefix)):
        return [problem]
    if len(option.values) != 1:
        return [option.refusal()]
    holder: Any = tree
    for part in path[:depth]:
        holder = holder[int(part) if is_index(part) else part]
    for part in path[depth:-1]:
        holder = holder.setdefault(_spelling(holder, part), {})
        if not isinstance(holder, dict):
            return [f"{option.arguments[0]} goes into {part}, which is {kind_of(holder)} and has no keys"]
    key = _spelling(holder, path[-1])
    if field_type(path) is str:
        holder[key] = option.values[0]
        return []
    try:
        value = _read_yaml(option.values[0])
    except ValueError as error:
        return [f"--{'.'.join(path)}: {error}"]
    before = holder.get(key)
    numbers = isinstance(before, int | float) and isinstance(value, int | float)
    if before is not None and value is not None and kind_of(before) != kind_of(value) and not numbers:
        return [f"--{'.'.join(path)} was given {option.values[0]}; the recipe has {before} there, {kind_of(before)}"]
    holder[key] = value
    return []


def _spelling(mapping: Mapping[str, Any], key: str) -> str:
    """The mapping's own spelling of a key whose hyphens became underscores."""
    return next((own for own in mapping if own.replace("-", "_") == key), key)
