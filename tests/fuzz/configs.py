"""Readers of a run's description: recipes, and options of the command line."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from random import Random

import yaml

from config.constraints import check_constraints
from config.loader import CommandLine, format_config, read_command_line, to_dict
from config.recipe import load_recipe
from config.schema import RunConfig
from config.validation import field_names, to_tree
from tests.fuzz.mutations import INTEGERS, TEXTS, WORDS
from tests.fuzz.reader import BATCH, Reader

RECIPES = (
    "smol.yaml",
    "smol.py",
    "smol_lora.py",
    "smollm3_3b_qlora.py",
    "llama31_8b_fsdp2.py",
    "stories260k_alpaca.py",
)


def _recipes(folder: Path) -> None:
    """Recipes of this project as YAML: one as it stands, others with the fields that they name, two with every one."""
    defaults = to_tree(RunConfig())
    for name in RECIPES:
        path, place = Path("config") / name, folder / name
        place.mkdir()
        tree = to_tree(load_recipe(path))
        changed = {
            section: {key: value for key, value in part.items() if value != defaults[section][key]}
            for section, part in tree.items()
        }
        text = yaml.safe_dump({section: part for section, part in changed.items() if part}, sort_keys=False)
        (place / "recipe.yaml").write_text(path.read_text("utf-8") if name.endswith("yaml") else text, "utf-8")
    (folder / "every").mkdir()
    command = read_command_line(["--config", "config/smol.py"])
    (folder / "every" / "recipe.yaml").write_text(format_config(command), "utf-8")
    (folder / "json").mkdir()
    (folder / "json" / "recipe.yaml").write_text(json.dumps(to_tree(command.config)), "utf-8")


def read_recipe(folder: Path) -> None:
    """Read a recipe as train.py does, print it, and read what was printed, which is a recipe too."""
    config = load_recipe(folder / "recipe.yaml")
    check_constraints(config)
    (folder / "printed.yaml").write_text(format_config(CommandLine(config, folder / "recipe.yaml")), "utf-8")
    assert to_dict(load_recipe(folder / "printed.yaml")) == to_dict(config), "what is printed is another recipe"


def _options(folder: Path) -> None:
    (folder / "a").mkdir()
    arguments = [
        "--optim.learning_rate",
        "1e-4",
        "--data.train.0.path=rows.jsonl",
        "--model.architecture.hidden_size",
        "96",
    ]
    arguments += [
        "--data.eval",
        "[]",
        "--data.eval_fraction",
        "0.5",
        "--data.train.1.path",
        "b.jsonl",
        "--output.name",
        "x",
        "--training.max-steps",
        "3",
    ]
    (folder / "a" / "arguments.json").write_text(json.dumps(arguments), "utf-8")


def read_options(folder: Path) -> None:
    """Read options over a recipe of this project; what is no list of texts is no command line."""
    try:
        arguments = json.loads((folder / "arguments.json").read_bytes())
    except (ValueError, RecursionError):
        return
    if isinstance(arguments, list) and "--help" not in arguments and "-h" not in arguments:
        texts = [argument for argument in arguments if isinstance(argument, str) and "\x00" not in argument]
        command = read_command_line(["--config", "config/smol.py", *texts])
        format_config(command)


def option_files(seed: int) -> Iterator[dict[str, bytes]]:
    """Options with names of fields, or nearly, and values of any kind."""
    random = Random(seed)
    sections = [part.name for part in fields(RunConfig)]
    values: list[Callable[[], str]] = [
        lambda: random.choice(TEXTS[:4] + TEXTS[5:]),
        lambda: str(random.choice(INTEGERS)),
        lambda: random.choice(WORDS["yaml"]),
        lambda: random.choice(
            ("true", "false", "null", "None", "1e-4", "[]", "{}", "{a: 1}", "[{path: x}]", "auto", "-1", "0.5")
        ),
    ]
    for _ in range(BATCH):
        arguments: list[str] = []
        for _ in range(random.choice((1, 1, 2, 3))):
            name = random.choice(field_names()).replace(
                ".N", random.choice((".0", ".1", ".7", ".²", ".-1", ".٣", "." + "9" * 30))
            )
            if random.random() < 0.2:
                name += random.choice((".", ".x", "..x", ".x.y", "-", "=", ".0", "\ud800"))
            if random.random() < 0.1:
                name = random.choice((*sections, "", "-", "x", name.replace(".", "", 1), name.upper()))
            arguments.append("--" + (name.replace("_", "-") if random.random() < 0.3 else name))
            arguments += [random.choice(values)().replace("\x00", "") for _ in range(random.choice((0, 1, 1, 1, 1, 2)))]
        yield {"arguments.json": json.dumps(arguments).encode()}


READERS = (
    Reader("recipes", _recipes, read_recipe, 20),
    Reader("options", _options, read_options, 3, makes=option_files),
)
