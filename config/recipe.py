"""Recipe files: a Python file that defines `config`, or a YAML file of the same tree.

    config = load_recipe(Path("config/smol.py"))

YAML is read as version 1.2 has it where the usual 1.1 surprises: 1e-4 is a number, a date is text, and a key given
twice or given nothing is an error.
"""

import difflib
import json
import re
import runpy
import traceback
from pathlib import Path
from typing import Any

import yaml

from config.constraints import ConfigError
from config.schema import RunConfig
from config.validation import did_you_mean, to_config, to_tree

SUFFIXES = (".py", ".yaml", ".yml")

MOST_NODES = 100_000
"""Values of a recipe, far beyond any that a person or a program writes."""

_FLOAT = re.compile(r"^(?:[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+|[-+]?\.\d[\d_]*([eE][-+]?\d+)?)$")
_DEFINITION = re.compile(r"^config\b.*=", re.MULTILINE)
_UNEXPECTED_KEYWORD = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def _resolvers(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's rules for plain scalars by their first character, less dates, plus YAML 1.2's floats."""
    rules = {
        first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
        for first, pairs in kind.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        rules.setdefault(first, []).append(("tag:yaml.org,2002:float", _FLOAT))
    return rules


class YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader with YAML 1.2's floats, without dates, and strict about keys."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeLoader)

    def get_single_node(self) -> yaml.Node | None:
        """The document's root.

        Raises:
            yaml.constructor.ConstructorError: with its aliases written out, the document would not end, or be of more
                than MOST_NODES values: each alias of aliases multiplies.
        """
        root = super().get_single_node()
        sizes: dict[int, int] = {}
        if root is not None and _size(root, sizes, set()) > MOST_NODES:
            problem = f"with its aliases written out, this holds more than {MOST_NODES:,} values; shorten it"
            raise yaml.constructor.ConstructorError(None, None, problem, root.start_mark)
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys each come once and have a value.

        Raises:
            yaml.constructor.ConstructorError: a key is given twice, or is followed by nothing.
        """
        self.flatten_mapping(node)
        seen: set[Any] = set()
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, list | dict | set) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            if _is_nothing(value_node):
                problem = f"{key}: has nothing after it; give it a value, write null for none, or take the line out"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_sequence(self, node: yaml.SequenceNode, deep: bool = False) -> list[Any]:
        """A list whose items are all there.

        Raises:
            yaml.constructor.ConstructorError: a `-` is followed by nothing.
        """
        for item in node.value:
            if _is_nothing(item):
                problem = "a list item is empty; give it a value, or take the - out"
                raise yaml.constructor.ConstructorError(None, None, problem, item.start_mark)
        return super().construct_sequence(node, deep=deep)


def read_yaml(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        yaml.YAMLError: it is none, or holds more than a recipe can.
    """
    try:
        return yaml.load(text, YamlLoader)
    except RecursionError as error:
        raise yaml.YAMLError("lists and mappings are nested too deeply") from error
    # A tag, as !!int has it, asks for values that the text need not have; so do escapes of characters.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise yaml.YAMLError(f"a value is not what its tag or form says: {error}") from error


class YamlDumper(yaml.SafeDumper):
    """PyYAML's safe dumper that quotes text which `YamlLoader` would read as a number."""

    yaml_implicit_resolvers = _resolvers(yaml.SafeDumper)

    def ignore_aliases(self, data: Any) -> bool:
        """True: a value that stands in two places is written twice."""
        return True


def _size(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Values below a node, each alias counted as what it stands for; `sizes` are those that are known, by id.

    Raises:
        yaml.constructor.ConstructorError: the node holds itself.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise yaml.constructor.ConstructorError(None, None, "an alias stands within its own anchor", node.start_mark)
    if id(node) not in sizes:
        above.add(id(node))
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_size(part, sizes, above) for part in parts)
        above.remove(id(node))
    return sizes[id(node)]


def _is_nothing(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and node.value == ""


def inline_yaml(value: Any) -> str:
    """A plain value as YAML on one line."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)
    text = yaml.dump(value, Dumper=YamlDumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").strip()


def load_recipe(path: Path) -> RunConfig:
    """The configuration that a recipe file holds, each field valid by itself.

    Raises:
        ConfigError: no such file, a wrong ending, a file that cannot be read or run, or a field that is not valid.
    """
    _check_file(path)
    tree = _python_tree(path) if path.suffix == ".py" else _yaml_tree(path)
    return to_config(tree, where=str(path))


def _check_file(path: Path) -> None:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{path} ends in {path.suffix or 'nothing'}; a recipe ends in {', '.join(SUFFIXES)}")
        return
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; name one of the recipes in it: {_names(path)}")
    near = recipes_in(path.parent)
    same = [file for file in near if file.stem == path.stem]
    names = difflib.get_close_matches(path.name, [file.name for file in near], n=3, cutoff=0.5)
    found = same or [path.parent / name for name in names]
    hint = (
        f"did you mean {' or '.join(map(str, found))}?"
        if found
        else f"the recipes in config are {_names(Path('config'))}"
    )
    raise ConfigError(f"the recipe {path} does not exist; {hint}")


def recipes_in(folder: Path) -> list[Path]:
    """The recipes of a folder, in order: its YAML files, and its Python files that define `config`."""
    files = [file for file in sorted(folder.glob("*")) if file.suffix in SUFFIXES and file.is_file()]
    return [file for file in files if file.suffix != ".py" or _DEFINITION.search(file.read_text("utf-8", "replace"))]


def _names(folder: Path) -> str:
    return ", ".join(map(str, recipes_in(folder))) or "none"


def _python_tree(path: Path) -> dict[str, Any]:
    try:
        defined = runpy.run_path(str(path))
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}; mend the recipe") from error
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"{path}, line {lines[-1]}" if lines else str(path)
        raise ConfigError(f"{place}: {type(error).__name__}: {error}{_keyword_hint(error)}") from error
    if "config" not in defined:
        raise ConfigError(f"{path} defines no `config`; a recipe defines `config = RunConfig(...)`")
    if not isinstance(defined["config"], RunConfig):
        kind = type(defined["config"]).__name__
        raise ConfigError(f"{path} defines `config` as {kind}; a recipe defines `config = RunConfig(...)`")
    return to_tree(defined["config"])


def _keyword_hint(error: BaseException) -> str:
    """The nearest field, where the error is a config class's unknown keyword."""
    found = _UNEXPECTED_KEYWORD.search(str(error))
    if not found:
        return ""
    section = {"SourceConfig": "data.train.0."}.get(found[1], found[1].removesuffix("Config").lower() + ".")
    return "; " + did_you_mean(("" if section == "run." else section) + found[2])


def _yaml_tree(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{place}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        found = "empty" if tree is None else f"a {type(tree).__name__}"
        raise ConfigError(f"{path} is {found}; a recipe is a mapping of sections such as model:, data: and optim:")
    return tree
