import re
import shlex
import textwrap
from pathlib import Path

import pytest

from config.constraints import ConfigError
from config.loader import read_command_line
from config.recipe import load_recipe
from config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)

ROOT = Path(__file__).parents[1]

VALID = """
model:
  path: someone/model
data:
  train:
    - path: rows.jsonl
  eval:
    - path: someone/rows
      split: test
"""


def write(folder, text, name="recipe.yaml"):
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def read(folder, options="", text=VALID, name="recipe.yaml"):
    """The command line of a recipe with this text and of options written as in a shell."""
    return read_command_line(["--config", str(write(folder, text, name)), *shlex.split(options)])


def refused(folder, options="", text=VALID, name="recipe.yaml"):
    """The message with which it is refused."""
    with pytest.raises(ConfigError) as caught:
        read(folder, options, text=text, name=name)
    message = str(caught.value)
    assert not re.search("[╭│╰─]|Traceback", message)
    return message


def test_python_and_yaml_recipes_give_equal_configurations(tmp_path):
    python = """
        from config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, SourceConfig, TrainingConfig

        config = RunConfig(
            model=ModelConfig(architecture={"model_type": "llama", "rope": {"theta": 1e4}}, tokenizer="tokens.json"),
            data=DataConfig(train=[SourceConfig(path="a.jsonl", columns={"prompt": "question"})], packing=False),
            optim=OptimConfig(learning_rate=1e-4, weight_decay=1),
            training=TrainingConfig(max_steps=300),
        )
    """
    tree = """
        model:
          architecture: {model_type: llama, rope: {theta: 1e4}}
          tokenizer: tokens.json
        data:
          train:
            - path: a.jsonl
              columns: {prompt: question}
          packing: false
        optim: {learning_rate: 1e-4, weight_decay: 1}
        training: {max_steps: 300}
    """
    expected = RunConfig(
        model=ModelConfig(architecture={"model_type": "llama", "rope": {"theta": 10000.0}}, tokenizer="tokens.json"),
        data=DataConfig(train=(SourceConfig(path="a.jsonl", columns={"prompt": "question"}),), packing=False),
        optim=OptimConfig(learning_rate=0.0001, weight_decay=1.0),
        training=TrainingConfig(max_steps=300),
    )
    for name, text in (("recipe.py", python), ("recipe.yaml", tree)):
        config = load_recipe(write(tmp_path, text, name))
        assert config == expected
        assert isinstance(config.optim.weight_decay, float)
        assert isinstance(config.data.train, tuple)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E+3", 1000.0), ("-.5", -0.5), ("2.5e-3", 0.0025), ("1_0e1", 100.0)]
)
def test_yaml_reads_a_number_in_scientific_notation(tmp_path, text, value):
    path = write(tmp_path, f"model: {{architecture: {{x: {text}}}}}")
    assert load_recipe(path).model.architecture == {"x": value}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["is empty", "sections"]),
        ("- a\n", ["is a list", "sections"]),
        ("optim:\n", ["line 1", "optim: has nothing after it"]),
        ("model:\n  path: x\n  revision:\n", ["line 3", "revision: has nothing after it", "null"]),
        ("data:\n  train:\n    -\n", ["line 3", "a list item is empty"]),
        ("optim:\n  beta1: 0.5\n  beta1: 0.6\n", ["line 3", "beta1 is given twice"]),
        ("optim: [\n", ["line 2"]),
        ("optim: null\n", ["optim=null is nothing", "a section with name, learning_rate"]),
        ("1: 2\n", ["the key 1 is int"]),
        ("optim: !!python/object:os.system {}\n", ["line 1"]),
    ],
)
def test_yaml_without_a_usable_tree_is_refused_with_its_line(tmp_path, text, parts):
    message = refused(tmp_path, text=text)
    assert "recipe.yaml" in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1\n", ["defines no `config`", "config = RunConfig(...)"]),
        ("config = {}\n", ["defines `config` as dict"]),
        ("x = 1\ny = (\n", ["line 2", "never closed"]),
        ("x = 1\n\nraise OSError('disk')\n", ["line 3", "OSError: disk"]),
        ("import nosuchmodule\n", ["line 1", "nosuchmodule"]),
        (
            "from config.schema import *\nconfig = RunConfig(\n  optim=OptimConfig(lerning_rate=1e-4))\n",
            ["line 3", "'lerning_rate'", "did you mean optim.learning_rate?"],
        ),
        (
            "from config.schema import *\nconfig = RunConfig(optim=OptimConfig(eps='1e-8'))\n",
            ['optim.eps="1e-8" is text'],
        ),
        (
            "from pathlib import Path\nfrom config.schema import *\n"
            "config = RunConfig(model=ModelConfig(path=Path('x')))\n",
            ["model.path=PosixPath('x')", "takes text, or null"],
        ),
    ],
)
def test_python_recipe_without_a_usable_config_is_refused_with_its_line(tmp_path, text, parts):
    message = refused(tmp_path, text=text, name="recipe.py")
    assert "recipe.py" in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("training.max_steps", '"3"', "a whole number, or null"),
        ("training.max_steps", "3.0", "a whole number, or null"),
        ("training.seed", "true", "a whole number"),
        ("optim.eps", '"1e-8"', "a number"),
        ("optim.eps", "true", "a number"),
        ("data.packing", "1", "true or false"),
        ("data.packing", '"true"', "true or false"),
        ("hub.license", "3", "text, or null"),
        ("training.gradient_checkpointing", "true", "one of none, full, selective"),
        ("data.too_long", "cut", "one of auto, drop, truncate, split, error"),
        ("tracking.report_to", "wandb", "a list, each item one of trackio, tensorboard, wandb"),
        ("tracking.report_to", "[mlflow]", "one of trackio, tensorboard, wandb"),
        ("model.architecture", "[1]", "a mapping from text to any value"),
        ("model.special_tokens", "{eos_token: 3}", "text"),
        ("data.train", "{path: x}", "a list, each item a section with path"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_what_the_field_takes(tmp_path, field, value, expected):
    section, name = field.split(".")
    message = refused(tmp_path, text=f"{section}:\n  {name}: {value}\n")
    assert field in message
    assert message.endswith(f" takes {expected}") or f" takes {expected}" in message


@pytest.mark.parametrize(
    ("field", "value", "bound"),
    [
        ("data.max_length", "7", "at least 8"),
        ("optim.beta2", "1", "below 1"),
        ("optim.beta2", ".nan", "below 1"),
        ("training.epochs", "0", "above 0"),
        ("data.eval_fraction", "0.6", "at most 0.5"),
        ("output.name", "a b", "[A-Za-z0-9]"),
        ("output.folder", '""', "empty"),
        ("adapter.target_modules", "[]", "empty"),
    ],
)
def test_a_value_out_of_range_is_refused_with_the_bound(tmp_path, field, value, bound):
    section, name = field.split(".")
    message = refused(tmp_path, text=f"{section}:\n  {name}: {value}\n")
    assert field in message
    assert bound in message


@pytest.mark.parametrize(
    ("field", "nearest"),
    [
        ("optim.lerning_rate", "optim.learning_rate"),
        ("optim.max_steps", "training.max_steps"),
        ("optimizer", "optim"),
        ("data.max_lenght", "data.max_length"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_field(tmp_path, field, nearest):
    *section, name = field.split(".")
    text = f"{section[0]}:\n  {name}: 3\n" if section else f"{name}: 3\n"
    assert f"{field} is no field; did you mean {nearest}?" in refused(tmp_path, text=text)


def test_an_unknown_key_of_a_source_names_its_index(tmp_path):
    message = refused(tmp_path, text="data:\n  train:\n    - path: a.jsonl\n    - pth: b.jsonl\n")
    assert "data.train.1.pth is no field; did you mean data.train.1.path?" in message


def test_every_problem_of_a_recipe_is_listed(tmp_path):
    message = refused(tmp_path, text="optim: {beta1: 2, eps: x}\ntraining: {sed: 3}\n")
    assert "3 problems" in message
    assert all(name in message for name in ("optim.beta1=2", 'optim.eps="x"', "training.sed"))


def test_a_missing_recipe_is_refused_with_near_names(tmp_path):
    write(tmp_path, "config = None", "smol.py")
    write(tmp_path, "x = 1", "smoke.py")
    for name, parts in (("smoll.py", ["smol.py"]), ("smol.yaml", ["smol.py"]), ("", ["is a folder", "smol.py"])):
        with pytest.raises(ConfigError) as caught:
            read_command_line(["--config", str(tmp_path / name)])
        assert all(part in str(caught.value) for part in parts)
        assert "smoke.py" not in str(caught.value)


@pytest.mark.parametrize("name", ["recipe.json", "recipe"])
def test_a_recipe_with_another_ending_is_refused(tmp_path, name):
    assert "a recipe ends in .py, .yaml" in refused(tmp_path, name=name)
