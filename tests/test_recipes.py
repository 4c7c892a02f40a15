"""Every recipe in config/ loads, and its model, built on the meta device, is the model it names.

Sizes are those of the checkpoints' own config.json files, and parameter counts those of their model cards; the counts
are computed by hand from the sizes as well.
"""

import os
import re
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from transformers import AutoConfig, AutoModelForCausalLM

from config.constraints import check_constraints
from config.recipe import load_recipe, recipes_in
from config.schema import AdapterConfig
from src.adapters import add_adapter

ROOT = Path(__file__).parents[1]
RECIPES = [path.relative_to(ROOT) for path in recipes_in(ROOT / "config")]
LAUNCH_FILES = sorted((ROOT / "config/accelerate").glob("*.yaml"))

LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5}
CHECKPOINTS = {
    "HuggingFaceTB/SmolLM2-135M": (
        LLAMA
        | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
        134_515_008,
    ),
    "HuggingFaceTB/SmolLM3-3B-Base": (
        {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
        | {"num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "tie_word_embeddings": True}
        | {"max_position_embeddings": 65536, "no_rope_layer_interval": 4}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0}},
        3_075_098_624,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        LLAMA
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True}
        | {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        1_235_814_400,
    ),
    "meta-llama/Llama-3.1-8B": (
        LLAMA
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
        | {"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        8_030_261_248,
    ),
    "outputs/stories260k": (
        LLAMA
        | {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
        | {"num_key_value_heads": 4, "vocab_size": 512, "tie_word_embeddings": True, "max_position_embeddings": 512}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        260_032,
    ),
}


def linear_shapes(sizes):
    """(inputs, outputs) of a layer's seven matrices: q, k, v, o, gate, up, down."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head = sizes.get("head_dim", width // sizes["num_attention_heads"])
    heads = sizes["num_attention_heads"]
    queries, keys = head * heads, head * sizes.get("num_key_value_heads", heads)
    return [(width, queries), (width, keys), (width, keys), (queries, width)] + 2 * [(width, inner)] + [(inner, width)]


def on_meta(sizes):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_is_valid(recipe):
    config = load_recipe(ROOT / recipe)
    check_constraints(config)
    assert config.output.name != "run"


@pytest.mark.parametrize("path", CHECKPOINTS)
def test_parameters_are_those_of_the_model_card(path):
    sizes, count = CHECKPOINTS[path]
    tables = 1 if sizes["tie_word_embeddings"] else 2
    norms = (2 * sizes["num_hidden_layers"] + 1) * sizes["hidden_size"]
    matrices = sizes["num_hidden_layers"] * sum(map(prod, linear_shapes(sizes)))
    assert tables * sizes["vocab_size"] * sizes["hidden_size"] + norms + matrices == count
    assert on_meta(sizes).num_parameters() == count


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_builds_its_model_with_rows_and_adapter_that_fit(recipe):
    config = load_recipe(ROOT / recipe)
    if config.model.architecture:
        sizes = {"vocab_size": 512} | config.model.architecture
    elif config.model.path in CHECKPOINTS:
        sizes = CHECKPOINTS[config.model.path][0]
    else:
        assert config.model.path.startswith("outputs/smol/"), f"write down the sizes of {config.model.path}"
        sizes = {"vocab_size": 512} | load_recipe(ROOT / "config/smol.py").model.architecture
    assert config.data.max_length <= sizes["max_position_embeddings"]
    model = on_meta(sizes)
    adapter = config.adapter
    if adapter.kind == "none":
        return
    trained = add_adapter(model, adapter)
    if not adapter.modules_to_save:
        expected = sizes["num_hidden_layers"] * (adapter.rank or 16) * sum(map(sum, linear_shapes(sizes)))
        assert sum(weight.numel() for weight in trained.parameters() if weight.requires_grad) == expected


def test_adapter_of_llama_32_1b_has_the_known_number_of_parameters():
    """11,272,192 is what public fine-tuning logs of this model print for rank 16 on all seven projections."""
    model = on_meta(CHECKPOINTS["meta-llama/Llama-3.2-1B-Instruct"][0])
    trained = add_adapter(model, AdapterConfig(kind="lora", rank=16))
    assert sum(weight.numel() for weight in trained.parameters() if weight.requires_grad) == 11_272_192


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_tells_its_tokens_per_step(recipe):
    """The comment's factors are the recipe's own, and their product is right."""
    config = load_recipe(ROOT / recipe)
    text = (ROOT / recipe).read_text("utf-8")
    found = re.search(r"# (.*) = ([\d,]+) tokens/step", text)
    assert found, "no comment such as `# 8 rows x 2048 length x 4 accumulation x 1 device = 65,536 tokens/step`"
    factors = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", found[1])]
    training = config.training
    assert factors[:3] == [training.micro_batch_rows, config.data.max_length, training.accumulation_steps]
    assert prod(factors) == int(found[2].replace(",", ""))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_recipe_shows_the_command_that_runs_it(recipe):
    text = (ROOT / recipe).read_text("utf-8")
    found = re.search(rf"accelerate launch .*--config {re.escape(str(recipe))}", text)
    assert found
    launch_file = re.search(r"--config_file (\S+)", found[0])
    if launch_file:
        devices = int(re.search(r"x (\d+) devices?", text)[1])
        assert yaml.safe_load((ROOT / launch_file[1]).read_text())["num_processes"] == devices


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.name)
def test_launch_file_holds_only_what_accelerate_knows(path):
    content = yaml.safe_load(path.read_text("utf-8"))
    known = vars(launch_command_parser().parse_args(["train.py"]))
    plugin = content.pop("fsdp_config", {}) | content.pop("deepspeed_config", {})
    assert [key for key in plugin if key not in known] == []
    assert all(
        content[key] == value for key, value in {"compute_environment": "LOCAL_MACHINE", "use_cpu": False}.items()
    )


def test_cpu_launch_file_starts_two_processes_that_add_up(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, and the file is for one that has none")
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch\n"
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)\n"  # what transformers' TrainingArguments(use_cpu=True) makes
        "total = torch.ones(1) * (state.process_index + 1)\n"
        "torch.distributed.all_reduce(total)\n"
        "print(f'rank {state.process_index} of {state.num_processes}: {total.item():g}', flush=True)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    accelerate = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
    done = subprocess.run(
        [accelerate, "launch", "--config_file", str(ROOT / "config/accelerate/ddp_cpu.yaml"), str(script)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Two processes write to one pipe, so that their lines may run into each other.
    assert sorted(re.findall(r"rank \d of 2: 3", done.stdout)) == ["rank 0 of 2: 3", "rank 1 of 2: 3"]
