import shlex

import pytest
import yaml

from config.constraints import ConfigError, check_constraints
from config.overrides import override
from config.validation import to_config

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
NO_EVAL = "model: {path: a/b}\ndata: {train: [{path: x.jsonl}]}\n"
NEW = """
model:
  architecture: {model_type: llama, max_position_embeddings: 512, hidden_size: 64, num_attention_heads: 8}
  tokenizer: tokens.json
data: {train: [{path: x.jsonl}], max_length: 512}
"""


def check(text, options):
    """Check a recipe's text with options in place."""
    check_constraints(override(to_config(yaml.safe_load(text)), shlex.split(options)))


@pytest.mark.parametrize(
    ("text", "options", "parts"),
    [
        ("data: {train: [{path: x.jsonl}]}", "", ["model.path and model.architecture are both left out"]),
        (NEW, "--model.path a/b", ["model.path=a/b and model.architecture exclude each other"]),
        (VALID, "--data.train.0.roles.bot robot", ["data.train.0.roles: bot: robot is no role", "function_call"]),
        (VALID, "--data.eval.0.weight 2.0", ["data.eval.0.weight=2.0", "measured once each"]),
        (
            VALID,
            "--data.train.0.path logs/*.jsonl.gz --data.train.0.split dev",
            ["data.train.0.split=dev", "local file"],
        ),
        (
            "model: {path: a/b}\ndata: {train: [{path: x.csv, weight: 1}, {path: y.csv}]}",
            "",
            ["data.train.1 has no weight and others have"],
        ),
        (NEW, "--model.revision v1", ["model.revision=v1", "model.path"]),
        (VALID, "--model.path /models/x --model.revision v1", ["model.revision=v1", "model.path=/models/x"]),
        ("model: {architecture: {x: 1}, tokenizer: t}\ndata: {train: [{path: x.txt}]}", "", ["model_type"]),
        (NEW, "--model.tokenizer None", ["model.architecture needs model.tokenizer"]),
        (NEW, "--data.max_length 513", ["data.max_length=513", "max_position_embeddings=512"]),
        (NEW, "--model.architecture.hidden_size 65", ["hidden_size=65", "num_attention_heads=8"]),
        (NEW, "--model.architecture.num_key_value_heads 3", ["num_attention_heads=8", "num_key_value_heads=3"]),
        (NEW, "--model.quantization nf4 --adapter.kind lora", ["adapter.kind=lora", "model.architecture"]),
        (VALID, "--model.quantization nf4", ["model.quantization=nf4", "adapter.kind=none"]),
        (VALID, "--model.quantization int8 --adapter.kind lora --model.dtype float64", ["int8", "model.dtype=float64"]),
        (VALID, "--model.double_quant False", ["model.double_quant=false", "model.quantization=none"]),
        (VALID, "--model.qat int4 --adapter.kind lora", ["qat=int4", "adapter.kind=lora"]),
        (VALID, "--freeze.train norms --adapter.kind lora", ["freeze.train given with adapter.kind=lora"]),
        (VALID, "--freeze.last_layers 2 --freeze.train all_but_embeddings", ["freeze.last_layers=2", "no effect"]),
        (VALID, "--adapter.rank 8 --adapter.rslora True", ["adapter.rank, adapter.rslora", "adapter.kind=none"]),
        (VALID, "--adapter.target_modules q_proj", ["adapter.target_modules", "adapter.kind=none"]),
        (VALID, "--adapter.kind lora --adapter.target_modules all-linear q_proj", ["adapter.target_modules"]),
        (VALID, "--adapter.kind oft --adapter.dora True", ["adapter.dora", "adapter.kind=oft"]),
        (VALID, "--adapter.kind lora --adapter.layers 3..5", ["adapter.layers=3..5", "0-7, 8-, 3,5 or last 4"]),
        (VALID, "--adapter.kind lora --adapter.init pisa", ["adapter.init=pisa", "pissa_niter_N"]),
        (VALID, "--adapter.kind lora --adapter.init corda", ["corda needs a covariance"]),
        (VALID, "--adapter.kind lora --adapter.init loftq", ["adapter.init=loftq", "model.quantization=none"]),
        (
            VALID,
            "--adapter.kind lora --adapter.init pissa --model.quantization nf4",
            ["adapter.init=pissa", "model.quantization=nf4"],
        ),
        (VALID, "--adapter.kind lora --adapter.init olora --adapter.dora True", ["adapter.init=olora", "adapter.dora"]),
        (VALID, "--adapter.kind lora --adapter.path x --adapter.layers 0-1", ["adapter.path=x", "adapter.layers"]),
        (
            VALID,
            "--adapter.kind lora --adapter.dropout 0.1 --adapter.target_parameters mlp.experts.down_proj",
            ["adapter.dropout=0.1", "adapter.target_parameters"],
        ),
        (VALID, "--adapter.kind lora --adapter.export_as_lora True", ["adapter.export_as_lora", "one already"]),
        (VALID, "--model.dtype float16", ["model.dtype=float16", "adapter.kind=none", "training.precision=fp16"]),
        (
            VALID,
            "--model.dtype bfloat16 --training.precision fp16",
            ["training.precision=fp16", "model.dtype=bfloat16"],
        ),
        (VALID, "--model.dtype float64 --training.precision bf16", ["training.precision=bf16", "model.dtype=float64"]),
        (
            VALID,
            "--model.attention flash_attention_2 --training.precision float32",
            ["model.attention=flash_attention_2", "training.precision=float32"],
        ),
        (
            VALID,
            "--training.activation_offload True --training.gradient_checkpointing selective",
            ["training.activation_offload=true", "training.gradient_checkpointing=selective", "use", "full or none"],
        ),
        (
            VALID,
            "--optim.warmup_steps 1 --optim.warmup_fraction 0.1",
            ["optim.warmup_steps=1", "optim.warmup_fraction"],
        ),
        (
            VALID,
            "--optim.warmup_steps 300 --training.max_steps 300",
            ["optim.warmup_steps=300", "training.max_steps=300"],
        ),
        (
            VALID,
            "--optim.schedule constant --optim.min_lr_fraction 0.1",
            ["optim.min_lr_fraction=0.1", "optim.schedule=constant"],
        ),
        (VALID, "--optim.decay_fraction 0.1", ["optim.decay_fraction=0.1", "optim.schedule=cosine"]),
        (
            VALID,
            "--optim.schedule warmup_stable_decay --optim.warmup_fraction 0.6 --optim.decay_fraction 0.5",
            ["optim.warmup_fraction=0.6 and optim.decay_fraction=0.5 are more than all steps"],
        ),
        (VALID, "--optim.name schedule_free_adamw", ["optim.name=schedule_free_adamw", "give optim.schedule=constant"]),
        (
            VALID,
            "--optim.name schedule_free_adamw --optim.schedule constant --optim.warmup_fraction 0.1",
            ["optim.warmup_steps", "optim.warmup_fraction=0.1"],
        ),
        (VALID, "--optim.name rmsprop_bnb --optim.beta1 0.8", ["optim.beta1 given with optim.name=rmsprop_bnb"]),
        (VALID, "--optim.name paged_lion_8bit --optim.eps 1e-6", ["optim.eps given with optim.name=paged_lion_8bit"]),
        (VALID, "--optim.name apollo_adamw --optim.weight_decay 0.1", ["optim.weight_decay", "apollo_adamw"]),
        (VALID, "--optim.lora_plus_ratio 16", ["optim.lora_plus_ratio=16", "adapter.kind=none"]),
        (
            VALID,
            "--optim.name lomo --optim.max_grad_norm null --training.save_every_steps null "
            "--training.accumulation_steps 2",
            ["training.accumulation_steps=2 cannot be kept with optim.name=lomo", "training.accumulation_steps=1"],
        ),
        (
            VALID,
            "--optim.name galore_adamw_layerwise --training.save_every_steps null",
            ["optim.max_grad_norm=1.0 cannot be kept with optim.name=galore_adamw_layerwise", "max_grad_norm=null"],
        ),
        (
            VALID,
            "--training.tokens_per_micro_batch 4096 --training.micro_batch_rows 2",
            ["training.tokens_per_micro_batch=4096 and training.micro_batch_rows=2", "leave one of them out"],
        ),
        (
            VALID,
            "--training.tokens_per_micro_batch 2047",
            ["training.tokens_per_micro_batch=2047 has no room", "data.max_length=2048"],
        ),
        (VALID, "--data.streaming True", ["data.streaming", "give training.max_steps"]),
        (
            NO_EVAL,
            "--data.streaming True --training.max_steps 9 --data.eval_fraction 0.1",
            ["data.eval_fraction=0.1", "data.streaming", "name sources in data.eval"],
        ),
        (VALID, "--data.stream_window_rows 9", ["data.stream_window_rows=9", "without data.streaming"]),
        (VALID, "--optim.name sgd --optim.beta2 0.9", ["optim.beta2", "optim.name=sgd"]),
        (VALID, "--data.eval_fraction 0.1", ["data.eval", "data.eval_fraction=0.1"]),
        ("model: {path: a/b}", "", ["data.train is empty"]),
        (VALID, "--data.train.1.max_rows 3", ["data.train.1.path is empty"]),
        (VALID, "--data.train.0.subset x", ["data.train.0.subset=x", "data.train.0.path=rows.jsonl"]),
        (VALID, "--data.train.0.revision x", ["data.train.0.revision=x", "a local file"]),
        (VALID, "--data.train.0.split test", ["data.train.0.split=test", "a local file"]),
        (NO_EVAL, "--evaluation.exact_match True", ["evaluation.exact_match", "data.eval"]),
        (NO_EVAL, "--evaluation.every_steps 5", ["evaluation.every_steps=5", "data.eval_fraction"]),
        (VALID, "--evaluation.patience 2", ["evaluation.patience=2", "evaluation.every_steps is left out"]),
        (
            VALID,
            "--evaluation.patience 2 --evaluation.every_steps 5 --training.save_every_steps null",
            ["evaluation.patience=2", "training.save_every_steps=null writes none"],
        ),
        (VALID, "--hub.repo_id name", ["hub.repo_id=name", "owner/name"]),
        (VALID, "--tracking.project x", ["tracking.project=x", "tracking.report_to"]),
        (VALID, "--tracking.report_to wandb wandb", ["tracking.report_to=wandb, wandb"]),
        (VALID, "--hub.license=", ["hub.license is empty"]),
        (VALID, "--optim.learning_rate inf", ["optim.learning_rate=inf"]),
    ],
)
def test_fields_that_contradict_each_other_are_refused(text, options, parts):
    with pytest.raises(ConfigError) as caught:
        check(text, options)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == []
    assert "problems" not in message


@pytest.mark.parametrize(
    ("text", "options"),
    [
        (VALID, ""),
        (NEW, ""),
        (NO_EVAL, "--data.eval_fraction 0.1 --evaluation.exact_match True --evaluation.every_steps 5"),
        (VALID, "--optim.warmup_steps 299 --training.max_steps 300"),
        (VALID, "--optim.schedule warmup_stable_decay --optim.warmup_fraction 0.6 --optim.decay_fraction 0.4"),
        (VALID, "--optim.schedule linear --optim.min_lr_fraction 0.1 --optim.name paged_lion_8bit --optim.beta2 0.9"),
        (VALID, "--optim.name schedule_free_adamw --optim.schedule constant --optim.warmup_steps 9"),
        (VALID, "--optim.name lomo --optim.max_grad_norm null --training.save_every_steps null"),
        (VALID, "--optim.name muon --optim.lora_plus_ratio 16 --adapter.kind lora --optim.beta2 0.9"),
        (VALID, "--model.quantization nf4 --adapter.kind lora --adapter.rank 8 --model.dtype bfloat16"),
        (VALID, "--model.quantization fp4 --model.double_quant False --adapter.kind lora"),
        (VALID, "--freeze.train lm_head.* --freeze.frozen *.bias"),
        (VALID, "--model.qat int8_int4 --freeze.last_layers 2"),
        (VALID, "--model.dtype float16 --adapter.kind lora --training.precision fp16"),
        (VALID, "--model.dtype float64 --training.precision float32"),
        (VALID, "--model.revision v1 --hub.repo_id me/x --hub.license mit"),
        (VALID, "--tracking.report_to wandb --tracking.project x"),
        (VALID, "--data.eval [] --data.eval_fraction 0.1"),
        (VALID, "--training.tokens_per_micro_batch 2048"),
        (VALID, "--data.streaming True --training.max_steps 9 --data.stream_window_rows 9"),
    ],
)
def test_fields_that_fit_each_other_are_accepted(text, options):
    check(text, options)


def test_all_broken_constraints_are_listed():
    with pytest.raises(ConfigError) as caught:
        check(VALID, "--adapter.rank 8 --hub.repo_id x --data.eval_fraction 0.1")
    assert "3 problems" in str(caught.value)
    assert len(caught.value.problems) == 3
