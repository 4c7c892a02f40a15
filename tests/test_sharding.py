"""Runs whose weights are sharded take the steps of one process; so do their checkpoints, resumes and results.

Two processes over gloo run `train.py` through Accelerate's own FSDP2: torch's `fully_shard` for each layer, the
embeddings and the head. What cannot train so is refused before anything loads.
"""

import itertools
import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from config.schema import AdapterConfig, ModelConfig, OptimConfig
from src.adapter_probe import probe_adapter
from src.adapters import add_adapter
from src.sharding import PART_BY_PART, check_sharding, sum_gradients_in_float32
from tests.processes import start_processes
from tests.sharded_run import train_sharded
from tests.tiny_run import (
    ARCHITECTURE,
    assert_same_run,
    chat_rows,
    from_checkpoint,
    metrics_of,
    run_train,
    stop_after,
    weights_of,
    write_checkpoint,
    write_recipe,
    write_rows,
)
from tests.toy_tokenizer import toy_tokenizer
from utils.checkpointing import newest_valid_checkpoint, state_bytes
from utils.distributed import leave_group
from utils.errors import UserError

# 20 rows in steps of 8: in the third of an epoch, half of the micro-batches have fewer rows or none.
EPOCHS = {"max_steps": None, "epochs": 2.0, "micro_batch_rows": 2, "accumulation_steps": 2, "keep_checkpoints": 9}
TIED = {"architecture": ARCHITECTURE | {"tie_word_embeddings": True}}


def recipes(folder):
    """All weights of a model whose head is its embeddings, and LoRA beside another."""
    base = from_checkpoint(write_checkpoint(folder / "base", vocabulary=304))
    lora = {"kind": "lora", "rank": 2, "dropout": 0.0}
    return {
        "full": write_recipe(folder, "full.yaml", training=EPOCHS, evaluation={"every_steps": 4}, model=TIED),
        "lora": write_recipe(folder, "lora.yaml", training=EPOCHS, model=base, adapter=lora),
    }


def asks(recipe, name, *more):
    """Arguments of a run in two processes that takes the steps of one process's with twice the accumulation."""
    return ["--config", recipe, "--output.name", name, "--training.accumulation_steps", "1", *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of runs: `full` and `lora` in one process, `sharded-full` and `sharded-lora` in two, and `resumed`."""
    folder = tmp_path_factory.mktemp("sharding")
    outputs, given = folder / "outputs", recipes(folder)
    outcomes = train_sharded(
        folder,
        asks(given["full"], "sharded-full"),
        partial(shutil.copytree, outputs / "sharded-full", outputs / "resumed"),
        partial(stop_after, outputs / "resumed", 4),
        asks(given["full"], "resumed", "--resume"),
        asks(given["lora"], "sharded-lora"),
    )
    assert outcomes == [""] * 5, (folder / "log-0").read_text()[-3000:]
    for name, recipe in given.items():
        done = run_train("--config", recipe, "--output.name", name)
        assert done.code == 0, done.stderr
    return outputs


def assert_same_steps(run, other):
    """Both took the same steps, but for the order of sums in float32."""
    compared = 0
    for line, other_line in zip(steps_of(run), steps_of(other), strict=True):
        assert line.keys() == other_line.keys()
        assert other_line == pytest.approx(line, rel=1e-5)
        compared += "grad_norm" in line
    assert compared > 0
    weights, others = weights_of(run / "model"), weights_of(other / "model")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-5, atol=1e-6)


def steps_of(run):
    """The figures of each training step and evaluation that do not depend on the clock."""
    named = ("step", "loss", "grad_norm", "eval_loss", "tokens", "learning_rate")
    lines = [{name: line[name] for name in named if name in line} for line in metrics_of(run)]
    return sorted(
        (line for line in lines if "loss" in line or "eval_loss" in line),
        key=lambda line: (line["step"], "loss" in line),
    )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_sharded_runs_take_the_clipped_steps_of_one_process(runs, kind):
    assert_same_steps(runs / kind, runs / f"sharded-{kind}")
    norms = [line["grad_norm"] for line in steps_of(runs / kind) if "grad_norm" in line]
    assert len(norms) == 6
    assert min(norms) > 1.0, "every step is clipped to optim.max_grad_norm of 1"


def test_a_sharded_run_that_was_stopped_ends_bit_for_bit_as_one_that_was_not(runs):
    (runs / "resumed" / "samples.jsonl").touch()  # sharded models give no answers
    (runs / "sharded-full" / "samples.jsonl").touch()
    assert_same_run(runs / "resumed", runs / "sharded-full")
    log = (runs.parent / "log-0").read_text()
    assert log.count("step 3/6") == 2, "the full run and that with LoRA; the resumed one began after step 4"
    assert log.count("step 5/6") == 3


def test_the_result_of_a_sharded_run_is_a_model_with_one_weight_for_embeddings_and_head(runs):
    assert "lm_head.weight" not in weights_of(runs / "sharded-full" / "model")
    model = AutoModelForCausalLM.from_pretrained(runs / "sharded-full" / "model")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_checkpoint_has_the_parts_of_all_processes_or_is_none(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs / "sharded-full", run)
    files = json.loads((run / "checkpoint-6" / "checkpoint.json").read_text())["files"]
    parts = {f"{folder}/__{rank}_0.distcp" for folder in ("pytorch_model_fsdp_0", "optimizer_0") for rank in (0, 1)}
    assert parts | {"rng_state_0.pth", "rng_state_1.pth", "optimizer_0/.metadata"} < files.keys()
    assert not (run / ".checkpoint").exists()

    dcp_to_torch_save(run / "checkpoint-6" / "pytorch_model_fsdp_0", tmp_path / "whole.pt")
    held = torch.load(tmp_path / "whole.pt")["model"]
    for name, tensor in weights_of(run / "model").items():
        assert torch.equal(held[name], tensor), name

    (run / "checkpoint-6" / "optimizer_0" / "__1_0.distcp").unlink()
    assert newest_valid_checkpoint(run) == run / "checkpoint-4"


def test_only_the_first_process_tells_how_a_sharded_run_goes(runs):
    assert "step " not in (runs.parent / "log-1").read_text()


# What trains otherwise, or not at all

BASE = ("--adapter.kind", "lora", "--adapter.rank", "2", "--adapter.dropout", "0")
VARIANTS = {
    "gradient checkpointing": ("plain", ("--training.gradient_checkpointing", "full")),
    "label smoothing and z-loss": ("plain", ("--training.label_smoothing", "0.1", "--training.z_loss", "1e-4")),
    "one trained layer": ("plain", ("--freeze.last_layers", "1")),
    "experts": ("experts", ()),
    "DoRA": ("base", (*BASE, "--adapter.dora", "True")),
    "LoRA+": ("base", (*BASE, "--optim.lora_plus_ratio", "4")),
    "LoRA beside the head": ("base", (*BASE, "--adapter.target_modules", "q_proj", "lm_head")),
    "a head in full": ("base", (*BASE, "--adapter.modules_to_save", "lm_head")),
    "rows of tokens": ("base", (*BASE, "--adapter.trainable_tokens", "<|im_end|>")),
    "PiSSA": ("base", (*BASE, "--adapter.init", "pissa")),
    "IA3": ("base", ("--adapter.kind", "ia3")),
    "a tied base": ("tied", BASE),
    "nf4": ("base", (*BASE, "--model.quantization", "nf4", "--model.dtype", "bfloat16")),
    **{name: ("plain", ("--optim.name", name)) for name in PART_BY_PART},
}


@pytest.mark.slow
def test_what_is_not_refused_trains_as_in_one_process(tmp_path):
    roomy = {"vocabulary": 304}
    sections = {
        "plain": {"architecture": ARCHITECTURE},
        "experts": {"architecture": ARCHITECTURE | {"model_type": "mixtral", "num_local_experts": 4}},
        "base": from_checkpoint(write_checkpoint(tmp_path / "base", **roomy)),
        "tied": from_checkpoint(write_checkpoint(tmp_path / "tied", tie_word_embeddings=True, **roomy)),
    }
    given = {name: write_recipe(tmp_path, f"{name}.yaml", model=model) for name, model in sections.items()}
    variants = {name.replace(" ", "-"): variant for name, variant in VARIANTS.items()}
    commands = [
        ["--config", given[base], "--output.name", f"{name}-2", *more] for name, (base, more) in variants.items()
    ]
    assert train_sharded(tmp_path, *commands) == [""] * len(commands)
    for name, (base, more) in variants.items():
        alone = ("--output.name", f"{name}-1", "--training.accumulation_steps", "2")
        done = run_train("--config", given[base], *alone, *more)
        assert done.code == 0, done.stderr
        assert_same_steps(tmp_path / "outputs" / f"{name}-1", tmp_path / "outputs" / f"{name}-2")


@pytest.mark.slow
def test_checkpoints_of_whole_weights_resume_a_sharded_run_too(tmp_path):
    run, recipe = tmp_path / "outputs" / "run", recipes(tmp_path)["full"]
    outcomes = train_sharded(
        tmp_path,
        asks(recipe, "run"),
        partial(shutil.copytree, run, tmp_path / "whole"),
        partial(stop_after, run, 4),
        asks(recipe, "run", "--resume"),
        state_dict_type="FULL_STATE_DICT",
    )
    assert outcomes == [""] * 4
    assert (run / "checkpoint-4" / "pytorch_model_fsdp.bin").is_file()
    weights, whole = weights_of(run / "model"), weights_of(tmp_path / "whole" / "model")
    assert weights.keys() == whole.keys()
    assert [name for name in weights if not torch.equal(weights[name], whole[name])] == []


def sum_of_two(rank, folder):
    """Both processes' gradients in bfloat16 are 1 and 2^-9, of which bfloat16 would keep the first alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    state = SimpleNamespace(fsdp_plugin=plugin)
    sum_gradients_in_float32(SimpleNamespace(is_fsdp_enabled=True, accelerator=SimpleNamespace(state=state)))
    model = torch.nn.Linear(1, 2, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=plugin.mixed_precision_policy)
    model(torch.tensor([[1.0 if rank == 0 else 2**-9]])).sum().backward()
    assert model.weight.grad.full_tensor().tolist() == [[(1 + 2**-9) / 2]] * 2
    leave_group()


@pytest.mark.slow
def test_gradients_of_products_in_bfloat16_are_added_up_in_float32(tmp_path):
    start_processes(sum_of_two, tmp_path)


@pytest.fixture
def fsdp(monkeypatch):
    """What `accelerate launch` says in a run that asks for FSDP."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")


@pytest.mark.parametrize("name", ["adafactor", "adagrad", "adamw_8bit", "galore_adamw", "lion_32bit", "muon"])
def test_optimizers_that_need_whole_weights_are_refused(fsdp, monkeypatch, name):
    with pytest.raises(UserError, match=rf"optim\.name={name} .*FSDP.*use adamw_torch_fused.*ddp\.yaml"):
        check_sharding(ModelConfig(), AdapterConfig(), OptimConfig(name=name))
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    check_sharding(ModelConfig(), AdapterConfig(), OptimConfig(name=name))


def test_bases_and_starts_that_need_whole_weights_are_refused(fsdp):
    check_sharding(ModelConfig(quantization="nf4"), AdapterConfig(kind="lora", init="pissa"), OptimConfig())
    with pytest.raises(UserError, match=r"model\.quantization=int8 .*nf4"):
        check_sharding(ModelConfig(quantization="int8"), AdapterConfig(kind="lora"), OptimConfig())
    with pytest.raises(UserError, match=r"adapter\.init=eva .*default"):
        check_sharding(ModelConfig(), AdapterConfig(kind="lora", init="eva"), OptimConfig())


@pytest.mark.parametrize(
    "adapter", [{"trainable_tokens": ("<|im_end|>",)}, {"modules_to_save": ("embed_tokens",)}], ids=["rows", "whole"]
)
def test_parts_of_a_tied_weight_are_refused(tmp_path, fsdp, monkeypatch, adapter):
    config, words = AdapterConfig(kind="lora", rank=2, **adapter), toy_tokenizer()
    folder = write_checkpoint(tmp_path, tokenizer=words, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"cannot train under FSDP in LlamaForCausalLM, which uses one weight"):
        add_adapter(AutoModelForCausalLM.from_pretrained(folder), config, tokenizer=words)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    add_adapter(AutoModelForCausalLM.from_pretrained(folder), config, tokenizer=words)


def test_an_adapter_is_found_to_train_beside_four_bits_that_stand_in_floats(fsdp):
    pytest.importorskip("bitsandbytes")
    # Bytes that are read as float32 or bfloat16 are NaNs in part, which are not equal to themselves.
    for dtype in ("auto", "bfloat16"):
        model = ModelConfig(path="nowhere", quantization="nf4", dtype=dtype)
        probe_adapter(AdapterConfig(kind="lora"), model, toy_tokenizer())


def test_the_recipe_decides_the_precision_and_not_the_launcher(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, training={"precision": "float32"}, data={"eval": None})
    assert run_train("--config", recipe, "--output.name", "plain").code == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    done = run_train("--config", recipe, "--output.name", "told")
    assert done.code == 0, done.stderr
    assert "warning: the launcher's mixed_precision: bf16 is passed over" in done.stderr
    plain, told = (weights_of(tmp_path / "outputs" / name / "model") for name in ("plain", "told"))
    assert [name for name in plain if not torch.equal(plain[name], told[name])] == []


def test_a_first_checkpoint_of_sharded_weights_needs_the_size_of_them_all(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = fully_shard(torch.nn.Linear(1000, 100, bias=False), mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 1000)).sum().backward()
        optimizer.step()
        assert state_bytes(model, optimizer) == 1_200_004, "the weights, two moments and a count of steps"
    finally:
        leave_group()


def test_a_bad_step_of_a_sharded_run_is_left_out_and_names_its_row_and_module(tmp_path):
    tokenizer = toy_tokenizer()
    base = write_checkpoint(tmp_path / "base", tokenizer=tokenizer)
    (poison,) = tokenizer("~", add_special_tokens=False)["input_ids"]
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][poison] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    rows = chat_rows()
    rows[16]["messages"][0]["content"] += "~"
    data = {"train": [{"path": str(write_rows(tmp_path / "poisoned.jsonl", rows))}]}
    recipe = write_recipe(tmp_path, training=EPOCHS, model=from_checkpoint(base), data=data)
    assert train_sharded(tmp_path, asks(recipe, "run")) == [""]
    run = tmp_path / "outputs" / "run"
    lines = [json.loads(line) for line in (run / "bad_batches.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [
        line["step"]
        for before, line in itertools.pairwise(
            [{"skipped_steps": 0}, *(one for one in metrics_of(run) if "loss" in one)]
        )
        if line["skipped_steps"] > before["skipped_steps"]
    ]
    assert len(lines) == 2, "once an epoch"
    for line in lines:
        assert (line["module"], line["place"]) == ("model.embed_tokens", "forward")
        assert [row["row"] for row in line["rows"]] == [f"{tmp_path / 'poisoned.jsonl'} line 17"]
