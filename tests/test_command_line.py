import dataclasses
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from config.constraints import ConfigError
from config.loader import format_config, read_command_line
from config.recipe import inline_yaml, load_recipe
from config.schema import (
    AdapterConfig,
    DataConfig,
    HubConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrackingConfig,
    TrainingConfig,
)
from config.validation import field_names, to_config, to_dict
from tests.field_reads import all_fields
from tests.test_config import VALID, read, refused, write

ROOT = Path(__file__).parents[1]

TRICKY_TEXTS = [
    "1e-4",
    "1.5",
    ".5e3",
    "null",
    "yes",
    "~",
    "a: b # c",
    "- x",
    "2024-01-01",
    "0x1F",
    "1_000",
    "é\n\t'\"",
    "🙂",
]


COMMIT = "0123456789" * 4


def test_options_are_typed_by_the_schema_in_both_spellings(tmp_path):
    command = read(
        tmp_path,
        "--optim.learning-rate 1e-4 --data.packing False --training.max_steps=300 --training.save-every-steps None "
        "--adapter.kind lora --adapter.target_modules q_proj v_proj --optim.max_grad_norm null "
        "--data.eval.0.max_rows 5 --tracking.report_to --model.trust_remote_code true "
        f"--model.revision {COMMIT} --resume",
    )
    config = command.config
    assert config.optim == OptimConfig(learning_rate=0.0001, max_grad_norm=None)
    assert config.data.packing is False
    assert config.training == TrainingConfig(max_steps=300, save_every_steps=None)
    assert config.adapter == AdapterConfig(kind="lora", target_modules=("q_proj", "v_proj"))
    assert config.data.eval == (SourceConfig(path="someone/rows", split="test", max_rows=5),)
    assert config.model.trust_remote_code is True
    assert config.model.revision == COMMIT
    assert (command.resume, command.print_config) == (True, False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--resume", (True, None)),
        ("--resume outputs/run/checkpoint-4", (True, Path("outputs/run/checkpoint-4"))),
        ("--resume=outputs/run/checkpoint-4", (True, Path("outputs/run/checkpoint-4"))),
        ("--resume --optim.learning_rate 1e-4", (True, None)),
        ("", (False, None)),
    ],
)
def test_resume_takes_a_checkpoint_or_nothing(tmp_path, options, expected):
    command = read(tmp_path, options)
    assert (command.resume, command.resume_from) == expected


def test_resume_with_an_empty_path_is_refused(tmp_path):
    for options in ("--resume=", "--resume ''"):
        assert "--resume was given an empty path; name a checkpoint" in refused(tmp_path, options)


def test_options_reach_sources_and_keys_of_mappings(tmp_path):
    config = read(
        tmp_path,
        "--data.train.0.path x.jsonl --data.train.1.path y.jsonl --data.train.1.columns.prompt question "
        "--data.eval '[{path: z.jsonl}]' --model.special-tokens.eos_token=--end--",
    ).config
    assert config.data.train == (
        SourceConfig(path="x.jsonl"),
        SourceConfig(path="y.jsonl", columns={"prompt": "question"}),
    )
    assert config.data.eval == (SourceConfig(path="z.jsonl"),)
    assert config.model.special_tokens == {"eos_token": "--end--"}


def test_options_set_keys_of_an_architecture(tmp_path):
    text = """
        model:
          architecture: {model_type: llama, hidden_size: 64, rope-scaling: {factor: 2}}
          tokenizer: tokens.json
        data: {train: [{path: rows.jsonl}]}
    """
    options = "--model.architecture.hidden_size 256 --model.architecture.rope_scaling.factor 8.5"
    options += " --model.architecture.tie_word_embeddings true --model.architecture.new.inner 1e-4"
    config = read(tmp_path, options, text=text).config
    assert config.model.architecture == {
        "model_type": "llama",
        "hidden_size": 256,
        "rope-scaling": {"factor": 8.5},
        "tie_word_embeddings": True,
        "new": {"inner": 0.0001},
    }
    assert "64 there, a whole number" in refused(tmp_path, "--model.architecture.hidden_size wide", text=text)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--optim.lerning_rate 3", ["--optim.lerning_rate is no option; did you mean --optim.learning_rate?"]),
        ("--learning-rate 3", ["--learning-rate is no option; did you mean --optim.learning_rate?"]),
        ("--data.train.0.pth x", ["did you mean --data.train.0.path?"]),
        ("--optim.lr 3", ["--optim.lr is no option; optim is a section with name, learning_rate, schedule"]),
        ("--zzz", ["--zzz is no option", "--help"]),
        ("--optim.learning_rate abc", ["--optim.learning_rate was given abc; it takes a number"]),
        ("--optim.learning_rate", ["was given nothing; it takes a number"]),
        ("--data.packing falsch", ["was given falsch; it takes true or false"]),
        ("--training.seed 1 2", ["was given 1 2; it takes a whole number"]),
        ("--training.precision fp8", ["was given fp8; it takes one of auto, float32, bf16, fp16"]),
        ("--optim.beta2 1", ["optim.beta2=1 is out of range", "below 1"]),
        ("--optim 3", ["--optim is a section"]),
        ("--data.train.2.path x", ["skips sources; data.train has 1, so the next one is data.train.1"]),
        ("--data.train 3", ["data.train=3 is a whole number"]),
        ("--data.train [", ["--data.train was given ["]),
        ("3 --optim.beta1 0.5", ["3 follows no option"]),
        (
            "--zzz 1 --optim.eps x --data.train.0.max_rows y --optim.beta1 2",
            ["4 problems", "--zzz", "--optim.eps was given x", "--data.train.0.max_rows was given y", "optim.beta1=2"],
        ),
    ],
)
def test_a_wrong_option_is_refused(tmp_path, options, parts):
    message = refused(tmp_path, options)
    assert [part for part in parts if part not in message] == []


def test_a_recipe_given_without_its_option_is_told_from_a_missing_one():
    for argv, part in (
        (["config/smol.py"], "did you mean --config config/smol.py?"),
        ([], "name one with --config"),
        (["--config"], "--config takes the recipe's path"),
    ):
        with pytest.raises(ConfigError, match=re.escape(part)):
            read_command_line(argv)


def test_origins_name_every_value_that_is_not_the_default(tmp_path):
    sources = read(tmp_path, "--optim.beta1 0.8 --data.train.0.max_rows 3 --data.eval.0.split train").sources
    assert sources == {
        "model.path": "recipe",
        "data.train.0.path": "recipe",
        "data.train.0.max_rows": "command line",
        "data.eval.0.path": "recipe",
        "optim.beta1": "command line",
    }


def nasty_config(kind="none"):
    """A valid configuration with text that YAML could take for something else, in every place that holds text.

    `lora` has a checkpoint in place of an architecture, since an adapter needs one.
    """
    keys = {text: index for index, text in enumerate(TRICKY_TEXTS)}
    lora = AdapterConfig(kind="lora", target_modules=tuple(TRICKY_TEXTS))
    return RunConfig(
        model=ModelConfig(
            path="yes/no" if kind == "lora" else None,
            architecture={}
            if kind == "lora"
            else {"model_type": "llama", "deep": {"list": [1, 2.5, None, TRICKY_TEXTS], "empty": {}}, **keys},
            tokenizer="1e5",
            special_tokens={text: text for text in TRICKY_TEXTS},
        ),
        adapter=lora if kind == "lora" else AdapterConfig(),
        data=DataConfig(train=tuple(SourceConfig(path=text, columns={text: text}) for text in TRICKY_TEXTS)),
        optim=OptimConfig(learning_rate=0.1 + 0.2, eps=1e-300, max_grad_norm=None),
        tracking=TrackingConfig(report_to=("wandb", "trackio"), project="2024-01-01"),
        hub=HubConfig(license="no", private=False),
    )


@pytest.mark.parametrize("kind", ["none", "lora"])
def test_printed_configuration_is_a_recipe_of_the_same_run(tmp_path, kind):
    config = nasty_config(kind)
    python = tmp_path / "nasty.py"
    python.write_text(f"from tests.test_command_line import nasty_config\nconfig = nasty_config({kind!r})\n")
    command = read_command_line(["--config", str(python), "--training.seed", "7"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(format_config(command), encoding="utf-8")
    assert load_recipe(printed) == command.config
    assert command.config == dataclasses.replace(config, training=TrainingConfig(seed=7))


def test_printed_configuration_marks_values_that_are_not_the_default(tmp_path):
    lines = format_config(read(tmp_path, "--training.seed 7")).splitlines()
    assert "  path: someone/model  # recipe" in lines
    assert "    - path: rows.jsonl  # recipe" in lines
    assert "  seed: 7  # command line" in lines
    assert "  epochs: 1.0" in lines
    leaves = [line for line in lines[1:] if not line.endswith(":")]
    assert len([line for line in leaves if "  # " in line]) == 5


def test_text_stays_text_through_yaml():
    for text in TRICKY_TEXTS:
        assert "\n" not in inline_yaml(text)


def test_plain_dict_holds_json_types_and_no_credentials():
    source = SourceConfig(path="https://user:secret1@host/rows.jsonl?x=1&access_token=secret2#end")
    content = to_dict(RunConfig(data=DataConfig(train=(source,))))
    text = json.dumps(content)
    assert "secret" not in text
    assert content["data"]["train"][0]["path"] == "https://***@host/rows.jsonl?x=1&access_token=***#end"
    assert json.loads(text) == content
    assert to_config(to_dict(nasty_config())) == nasty_config()


def program(*arguments, **environment):
    """Run train.py: the finished process, and the processor time that it took in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    done.stderr = "".join(line + "\n" for line in done.stderr.splitlines() if not line.startswith("import time:"))
    return done, imported, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_tells_every_field_with_type_default_and_meaning_at_once():
    done, imported, seconds = program("--help", COLUMNS="100", NO_COLOR="1")
    assert done.returncode == 0
    assert "torch" not in imported
    assert seconds < 1.5
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stdout).split())
    for name in field_names():
        if name.startswith("data.eval.N"):
            continue  # the help says that its fields are those of data.train.N
        assert f"--{name} " in text
    parts = ("model_schema.py", "data_schema.py", "schema.py")
    schema = "".join((ROOT / "config" / name).read_text() for name in parts)
    meanings = re.findall(r'^    \w+: [^\n]*(?:\n        [^\n]*)*(?:\n    \))?\n    """(.*?)"""$', schema, re.M | re.S)
    assert len(meanings) >= len(all_fields()) - len(dataclasses.fields(RunConfig))
    sections = {
        "One training run.",
        *(kind.__doc__ for kind in vars(sys.modules["config.schema"]).values() if kind.__doc__),
    }
    missing = [meaning for meaning in (" ".join(m.split()) for m in meanings) if meaning not in text]
    assert [meaning for meaning in missing if meaning not in sections] == []
    assert text.count("(default: ") >= len(field_names()) - len(dataclasses.fields(SourceConfig))


def test_a_mistake_ends_the_program_with_2_and_one_message_before_torch_is_imported(tmp_path):
    path = write(tmp_path, VALID)
    done, imported, _ = program("--config", str(path), "--optim.lerning_rate", "3", "--optim.beta1", "x")
    assert done.returncode == 2
    assert "torch" not in imported
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "did you mean --optim.learning_rate?" in done.stderr
    assert not re.search("[╭│╰─]", done.stderr)


def test_print_config_needs_no_torch(tmp_path):
    done, imported, _ = program("--config", str(write(tmp_path, VALID)), "--print-config", "--training.seed", "3")
    assert done.returncode == 0
    assert "torch" not in imported
    assert yaml.safe_load(done.stdout)["training"]["seed"] == 3


def test_importing_the_loader_takes_under_half_a_second():
    code = "import time; import config.loader; print(time.process_time())"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(2)]
    assert min(float(run.stdout) for run in runs) < 0.5
