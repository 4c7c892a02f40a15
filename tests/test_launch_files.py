"""What `accelerate launch` makes of the files in config/accelerate, by its own loader, parser and plugins.

No run stands behind the files for several GPUs; their own comments say so. What is compared here is what each file says
it does with what Accelerate would start.
"""

import re
import shlex

import pytest
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin, ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import patch_environment
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import CPUOffloadPolicy

from tests.tiny_run import ROOT

FILES = sorted((ROOT / "config" / "accelerate").glob("*.yaml"))
ONE_MACHINE = {"nproc_per_node": "8"}
SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_MIXED_PRECISION": "bf16"}
# By name: what torch's launcher is given, and the variables that the processes get, by hand from each file's comments.
STARTED = {
    "context_parallel": (
        ONE_MACHINE,
        SHARDS
        | {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_CP_SIZE": "4",
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
            "PARALLELISM_CONFIG_CP_COMM_STRATEGY": "allgather",
        },
    ),
    "ddp": (ONE_MACHINE, {"ACCELERATE_MIXED_PRECISION": "no"}),
    "ddp_cpu": ({"nproc_per_node": "2"}, {"ACCELERATE_MIXED_PRECISION": "no"}),
    "deepspeed_zero2": (
        ONE_MACHINE,
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        },
    ),
    "deepspeed_zero3": (
        ONE_MACHINE,
        {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
        },
    ),
    "fsdp2": (ONE_MACHINE, SHARDS | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
    "fsdp2_full_state": (ONE_MACHINE, SHARDS | {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}),
    "fsdp2_qlora": (ONE_MACHINE, SHARDS | {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}),
    "multi_node": (
        # Accelerate does not read a file's `same_network`, and so names the address as an endpoint, which is the same.
        {"nproc_per_node": "8", "nnodes": "2", "node_rank": 1, "rdzv_endpoint": "10.0.0.1:29500"},
        {"ACCELERATE_MIXED_PRECISION": "no"},
    ),
}


def command_of(path):
    """The `accelerate launch` command in a file's comments, as words behind `launch`."""
    text = re.sub(r" \\\n# *", " ", path.read_text("utf-8"))
    command = re.search(r"accelerate launch (--config_file [^\n]*)", text)[1]
    words = shlex.split(command)
    if "--machine_rank" in words:  # the comment shows the first machine; here it is the second one's turn
        words[words.index("--machine_rank") + 1] = "1"
    return words if "train.py" in words else [*words, "train.py"]


def started(path):
    """The namespace that torch's launcher is given, and the environment, for the command in a file's comments."""
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command_of(path)))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        command, environment = prepare_deepspeed_cmd_env(args)
        assert command is None, "DeepSpeed's own launcher would start it"
        return args, environment
    assert args.multi_gpu or args.use_fsdp, "Accelerate would start one process"
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_launch_file_is_accelerates(path):
    config = load_config_from_file(str(path))  # which refuses an unknown key beside the sections
    known = vars(launch_command_parser().parse_args(["train.py"])).keys()
    for section in (config.fsdp_config, config.deepspeed_config, config.parallelism_config):
        assert section.keys() <= known
    assert not any((config.megatron_lm_config, config.fp8_config, config.mpirun_config, config.dynamo_config))
    assert config.use_cpu is False  # with it, Accelerate starts one process whatever else the file says


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launch_file_starts_what_its_comments_say(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert command_of(path)[:2] == ["--config_file", f"config/accelerate/{path.name}"]
    args, environment = started(path)
    asked, told = STARTED[path.stem]
    assert {name: getattr(args, name) for name in asked} == asked
    assert {name: environment.get(name) for name in told} == told


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_full_state", "fsdp2_qlora", "context_parallel"])
def test_accelerates_own_plugin_reads_the_sharding_of_a_file(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, environment = started(ROOT / "config" / "accelerate" / f"{name}.yaml")
    with patch_environment(**environment):
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_mixed_precision("bf16")
        sizes = ParallelismConfig()
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.state_dict_type.name == ("FULL" if name == "fsdp2_full_state" else "SHARDED") + "_STATE_DICT"
    assert plugin.cpu_ram_efficient_loading == (name != "fsdp2_qlora")
    assert not isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    assert sizes.total_size == (8 if name == "context_parallel" else 1)


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerates_own_plugin_reads_the_stage_of_a_file(stage, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, environment = started(ROOT / "config" / "accelerate" / f"deepspeed_zero{stage}.yaml")
    with patch_environment(**environment):
        plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == plugin.deepspeed_config["zero_optimization"]["stage"] == stage
    assert plugin.zero3_init_flag == plugin.zero3_save_16bit_model == (stage == 3)
    # What the recipe decides is left to Trainer.
    assert {plugin.deepspeed_config[name] for name in ("train_batch_size", "gradient_accumulation_steps")} == {"auto"}
    assert plugin.gradient_clipping == "auto"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launch_file_for_several_gpus_says_where_it_was_tried(path):
    assert path.stem == "ddp_cpu" or re.search(r"^# Tried: ", path.read_text("utf-8"), re.MULTILINE)
