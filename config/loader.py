"""The command line: a recipe and dotted overrides made into one validated configuration.

    command_line = read_command_line(sys.argv[1:])  # --config config/smol.py --optim.learning_rate 1e-4
    command_line.config.optim.learning_rate

Torch is not imported, so that a mistake and `--help` answer at once.
"""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from config.checks import CHECKS
from config.constraints import ConfigError, check_constraints
from config.overrides import TYPES, RefusedError, override, parse_arguments
from config.recipe import inline_yaml, load_recipe
from config.recorded import RECORD, recorded_config
from config.schema import RunConfig, SourceConfig
from config.validation import flatten, to_dict, to_tree

Origin = Literal["recipe", "command line"]


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for."""

    config: RunConfig
    """The recipe with the overrides merged in, every field and constraint checked."""

    recipe: Path
    """The recipe's file, as it was given."""

    resume: bool = False
    """Whether the run goes on from a checkpoint of its own."""

    resume_from: Path | None = None
    """The checkpoint that it goes on from; None: the newest that is whole."""

    print_config: bool = False
    """Whether the configuration is only printed."""

    plan: bool = False
    """Whether the run is only planned: what it will do is printed, and nothing trains."""

    force: tuple[str, ...] = ()
    """Checks of `config.checks` that do not stop the run."""

    trial: Path | None = None
    """The folder of a trial of the run, in place of the run itself; None: the run."""
    reproduce: Path | None = None
    """The directory of the run that is repeated, from whose record the configuration is; None: none is."""

    sources: Mapping[str, Origin] = field(default_factory=dict)
    """Where each value that is not the default comes from, by its dotted name."""


@dataclass(frozen=True)
class _Command:
    """The options that are no part of the configuration."""

    config: Path | None = None
    """The recipe: a .py file that defines `config`, or a .yaml file. Needed, but with `--reproduce`."""

    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on from the newest checkpoint of this run that is whole, or from `--resume PATH`, instead of starting it."""

    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the configuration as YAML, with where each value comes from, and stop. The output is a recipe too."""

    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Make all checks, print what the run will do and what would go wrong, and stop. Nothing trains."""

    force: str | None = None
    """A check that shall not stop the run, by the name that its finding has; several are parted by commas, or each has
    a `--force` of its own. It is recorded."""

    trial: Path | None = None
    """An empty folder, for a trial of the run in place of the run: its worst steps, an evaluation and a save, measured.
    It is what measures the costs of a run; its report.json is no more than the figures."""
    reproduce: Path | None = None
    """Repeat the run of this directory from its record, beside it as NAME-reproduced, and compare the weights. Takes
    `--output.folder` and `--output.name` alone."""


@dataclass(frozen=True)
class _Everything:
    """One training run: a recipe, and the values that differ from it. Words are split by `_` or `-` alike."""

    command: Annotated[_Command, tyro.conf.arg(name="")]
    run: Annotated[RunConfig, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    source: Annotated[SourceConfig, tyro.conf.arg(name="data.train.N"), tyro.conf.FlagConversionOff]
    """One field of source N, counted from 0; the N after the last source adds one. data.eval.N has the same fields."""


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Read `--config RECIPE [--resume [PATH]] [--print_config] [--plan] [--force CHECK] [--trial FOLDER]
    [--section.field value ...]`, or `--reproduce RUN`.

    An option may be written with `_` or `-`. `--data.train.N.field` with N one above the last source adds a source;
    `--model.architecture.key` sets one key of a mapping; `--data.eval '[]'` replaces a whole list.

    Args:
        argv: the arguments, without the program's name.
    Raises:
        ConfigError: the recipe or an option is wrong, or fields contradict each other; every problem is listed.
        SystemExit: with 0, after `--help` was printed.
    """
    argv, forced = _without_forced(argv)
    argv, resume_from = _without_checkpoint(argv)
    try:
        command, rest = parse_arguments(_Command, _Command(), argv, flags=True)
    except RefusedError:
        problem = (
            "--config takes the recipe's path, such as --config config/smol.py; --resume takes none or a checkpoint's, "
            "such as --resume outputs/smol/checkpoint-100; --print_config and --plan take none; --trial "
            "takes an empty folder's, and --reproduce a run's directory"
        )
        raise ConfigError(problem) from None
    if any(argument in ("-h", "--help") for argument in rest):
        recipe = load_recipe(command.config) if command.config else RunConfig()
        everything = _Everything(command, recipe, SourceConfig())
        tyro.cli(
            _Everything, prog="train.py", default=everything, args=["--help"], use_underscores=True, registry=TYPES
        )
    if command.reproduce is not None:
        return _reproduction(command, rest, forced)
    if command.config is None:
        given = next((text for text in rest if text.endswith((".py", ".yaml", ".yml"))), None)
        hint = f"did you mean --config {given}?" if given else "such as --config config/smol.py"
        raise ConfigError(f"no recipe is given; name one with --config, {hint}")
    recipe = load_recipe(command.config)
    config = override(recipe, rest)
    try:
        check_constraints(config)
    except ConfigError as error:
        raise ConfigError(error.problems, where=str(command.config)) from None
    return CommandLine(
        config=config,
        recipe=command.config,
        resume=command.resume,
        resume_from=resume_from,
        print_config=command.print_config,
        plan=command.plan,
        force=forced,
        trial=command.trial,
        sources=_origins(config, recipe),
    )


def _without_forced(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The arguments without each `--force`, and the checks that these name: tyro keeps the last of equal options.

    Raises:
        ConfigError: one names no check, or none at all.
    """
    rest: list[str] = []
    forced: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        option, inline, value = argument.partition("=")
        if option != "--force":
            rest.append(argument)
            continue
        given = value if inline else next(arguments, "")
        names = [name.strip().replace("-", "_") for name in given.split(",")]
        unknown = [name for name in names if name not in CHECKS]
        if unknown:
            near = difflib.get_close_matches(unknown[0], CHECKS, n=1)
            hint = f"did you mean {near[0]}? There are" if near else "there are"
            raise ConfigError(f"--force {given or '(nothing)'} names no check; {hint} {', '.join(CHECKS)}")
        forced += names
    return rest, tuple(dict.fromkeys(forced))


def _reproduction(command: _Command, rest: Sequence[str], forced: tuple[str, ...]) -> CommandLine:
    """The command line of a run that repeats another.

    Raises:
        ConfigError: an option is given that is not for it, or the record cannot be read.
    """
    if command.config or command.resume or command.print_config or command.plan or command.trial:
        raise ConfigError(
            "--reproduce repeats a run from its own record; leave --config, --resume, --print_config, --plan and "
            "--trial out"
        )
    recorded = recorded_config(command.reproduce)
    config = override(recorded, rest)
    before, after = flatten(to_tree(recorded)), flatten(to_tree(config))
    other = [name for name in before.keys() | after.keys() if before.get(name, ()) != after.get(name, ())]
    other = sorted(name for name in other if not name.startswith("output."))
    if other:
        raise ConfigError(
            f"--reproduce repeats a run with its own settings, and {', '.join(other)} would change them; give only "
            "--output.folder and --output.name, or start a run of its own with --config"
        )
    check_constraints(config)
    return CommandLine(config, command.reproduce / RECORD, reproduce=command.reproduce, force=forced)


def _without_checkpoint(argv: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments with `--resume` as a flag, and the path given to it: tyro has no option with a value or none.

    Raises:
        ConfigError: the path is empty, as that of a shell's variable that is not set.
    """
    for index, argument in enumerate(argv):
        name, inline, path = argument.partition("=")
        if name != "--resume":
            continue
        rest = list(argv[index + 1 :])
        if not inline:
            if not rest or rest[0].startswith("-"):
                break
            path = rest.pop(0)
        if not path:
            raise ConfigError("--resume was given an empty path; name a checkpoint, or leave it out to take the newest")
        return [*argv[:index], name, *rest], Path(path)
    return list(argv), None


def _origins(config: RunConfig, recipe: RunConfig) -> dict[str, Origin]:
    """Where each value that differs from its default comes from, by dotted name."""
    defaults, in_recipe = flatten(to_tree(RunConfig())), flatten(to_tree(recipe))
    source_defaults = dataclasses.asdict(SourceConfig())
    origins: dict[str, Origin] = {}
    for name, value in flatten(to_tree(config)).items():
        default = defaults.get(name, ())
        if name.startswith(("data.train.", "data.eval.")):
            default = source_defaults.get(name.split(".")[3], ())
        if value != default:
            origins[name] = "recipe" if name in in_recipe and in_recipe[name] == value else "command line"
    return origins


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
