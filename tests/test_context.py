"""Context: rotary positions scaled as the recipe says and no more, and lengths that fit it."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from config.schema import ModelConfig
from src.context import check_length, context_length, generation_length, scale_context
from src.generation import generate
from src.model import load_model, load_settings, load_tokenizer
from tests.tiny_run import conversation, from_checkpoint, run_train, write_checkpoint, write_recipe, write_rows
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

KINDS = ("linear", "dynamic", "yarn", "llama3")
LLAMA_31 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def settings_of(**fields):
    """A Llama's config of 256 positions, or as `fields` say."""
    return AutoConfig.for_model("llama", **{"max_position_embeddings": 256} | fields)


def scaled(kind, *, factor=4.0, **fields):
    settings = settings_of()
    scale_context(settings, {"rope_type": kind, "factor": factor, **fields})
    return settings


def load(path, **fields):
    config = ModelConfig(path=str(path), **fields)
    tokenizer = load_tokenizer(config)
    return load_model(config, load_settings(config, tokenizer), tokenizer, trains_all=True), tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_loads_a_scaled_model_with_equal_logits(tmp_path, kind):
    base = write_checkpoint(tmp_path / "base", vocabulary=320)
    scaling = {"rope_type": kind, "factor": 4.0}
    model, _ = load(base, rope_scaling=scaling, attention="eager")
    model.eval().save_pretrained(tmp_path / "saved")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager").eval()
    unscaled = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    torch.manual_seed(0)
    ids_BT = torch.randint(320, (1, 400))  # above the 256 of the base, below four times that
    with torch.no_grad():
        logits, other, before = (each(ids_BT).logits for each in (model, served, unscaled))
    assert torch.equal(logits, other)
    assert not torch.allclose(logits, before, atol=1e-2)
    assert served.config.rope_parameters["rope_type"] == kind
    assert generation_length(served.config) == 1024


def test_no_scaling_is_written_unless_the_recipe_has_it(tmp_path):
    base = write_checkpoint(tmp_path / "base")
    model, _ = load(base)
    assert model.config.rope_parameters == AutoConfig.from_pretrained(base).rope_parameters
    assert model.config.rope_parameters["rope_type"] == "default"


def test_linear_scaling_sees_every_fourth_position_as_the_base_saw_each(tmp_path):
    # Chen et al. 2023 (arXiv:2306.15595): position m becomes m / factor.
    base = write_checkpoint(tmp_path / "base", vocabulary=320)
    model, _ = load(base, rope_scaling={"rope_type": "linear", "factor": 4.0}, attention="eager")
    plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()
    ids_BT = torch.arange(60)[None]
    with torch.no_grad():
        ours = model.eval()(ids_BT, position_ids=4 * torch.arange(60)[None]).logits
        theirs = plain(ids_BT).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # angles of another product, float32


def test_each_kind_writes_what_its_formula_needs():
    theta = settings_of().rope_parameters["rope_theta"]
    common = {"rope_theta": theta, "factor": 4.0}
    old = {"original_max_position_embeddings": 256}
    assert scaled("linear").rope_parameters == common | {"rope_type": "linear"}
    assert scaled("dynamic").rope_parameters == common | {"rope_type": "dynamic"}
    assert scaled("yarn", beta_fast=16).rope_parameters == common | old | {"rope_type": "yarn", "beta_fast": 16}
    assert scaled("llama3").rope_parameters == (
        common | old | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    )
    assert [scaled(kind).max_position_embeddings for kind in KINDS] == [1024, 256, 1024, 1024]


def test_the_models_own_scaling_may_be_repeated_and_grow():
    settings = settings_of(max_position_embeddings=65_536, rope_parameters=dict(LLAMA_31))
    scale_context(settings, {"rope_type": "llama3", "factor": 8})
    assert (settings.rope_parameters, settings.max_position_embeddings) == (LLAMA_31, 65_536)
    scale_context(settings, {"rope_type": "llama3", "factor": 16})
    assert settings.rope_parameters == LLAMA_31 | {"factor": 16.0}
    assert settings.max_position_embeddings == 131_072  # 16 x 8192


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"rope_type": "yarn", "factor": 16}, "rope_type=yarn contradicts the model, which was made with .*llama3"),
        ({"rope_type": "llama3", "factor": 4}, r"factor=4.0 would shorten the context of 65536 .* a factor of 8.0"),
        ({"rope_type": "llama3", "factor": 16, "low_freq_factor": 2.0}, r"low_freq_factor=2.0 contradicts .* has 1.0"),
        (
            {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings=4096 contradicts .* has 8192",
        ),
    ],
)
def test_a_scaling_that_contradicts_the_models_own_is_named(scaling, told):
    settings = settings_of(max_position_embeddings=65_536, rope_parameters=dict(LLAMA_31))
    with pytest.raises(UserError, match=told):
        scale_context(settings, scaling)
    assert settings.rope_parameters == LLAMA_31


def test_learned_positions_cannot_be_scaled():
    settings = GPT2Config(n_positions=128)
    with pytest.raises(UserError, match=r"rotary positions, and gpt2 has none.*128 tokens"):
        scale_context(settings, {"rope_type": "yarn", "factor": 2})
    with pytest.raises(UserError, match=r"max_length=129 exceeds the model's context of 128 tokens; lower .* less$"):
        check_length(settings, 129)


def test_rows_longer_than_the_context_are_refused_with_the_scaling_that_holds_them():
    settings = settings_of()
    check_length(settings, 256)
    with pytest.raises(UserError) as refused:
        check_length(settings, 700)
    assert "data.max_length=700 exceeds the model's context of 256 tokens" in str(refused.value)
    advised = re.search(r"model\.rope_scaling=\{rope_type: (\w+), factor: (\d+)\}", str(refused.value))
    scale_context(settings, {"rope_type": advised[1], "factor": int(advised[2])})
    check_length(settings, 700)
    assert context_length(settings) == 768


def test_dynamic_scaling_trains_no_longer_rows():
    settings = scaled("dynamic")
    assert (context_length(settings), generation_length(settings)) == (256, 1024)
    with pytest.raises(UserError, match="rope_type=dynamic turns all rows of a batch by its longest one"):
        check_length(settings, 257)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--model.rope_scaling.factor 2", "model.rope_scaling has no rope_type"),
        ("--model.rope_scaling.rope_type ntk", "rope_type=ntk is not known; .*linear, dynamic, yarn, llama3"),
        ("--model.rope_scaling.rope_type yarn", "model.rope_scaling.factor=None is no number"),
        ("--model.rope_scaling.rope_type yarn --model.rope_scaling.factor 0.5", "factor=0.5 would not lengthen"),
        (
            "--model.rope_scaling.rope_type linear --model.rope_scaling.factor 2 --model.rope_scaling.beta_fast 8",
            "beta_fast is nothing that rope_type=linear takes",
        ),
        (
            "--model.rope_scaling.rope_type llama3 --model.rope_scaling.factor 2 "
            "--model.rope_scaling.low_freq_factor 4",
            "low_freq_factor=4 is not below model.rope_scaling.high_freq_factor=4",
        ),
        (
            "--model.rope_scaling.rope_type llama3 --model.rope_scaling.factor 2 "
            "--model.rope_scaling.low_freq_factor x",
            "low_freq_factor=x is no number",
        ),
        (
            "--model.rope_scaling.rope_type yarn --model.rope_scaling.factor 2 --adapter.kind lora",
            "adapter.kind=lora saves the adapter alone, and its base would be loaded again without",
        ),
    ],
)
def test_a_scaling_that_says_nothing_clear_is_refused_before_the_model_is_read(tmp_path, options, told):
    done = run_train("--config", write_recipe(tmp_path), *options.split())
    assert done.code == 2
    assert re.search(told, done.stderr), done.stderr


def test_a_scaled_run_trains_documents_that_fill_its_context_and_not_longer_ones(tmp_path):
    base = write_checkpoint(tmp_path / "base", vocabulary=320)
    rows = [conversation("x", "y" * count) for count in (700, 3)]
    recipe = write_recipe(
        tmp_path,
        model=from_checkpoint(base, rope_scaling={"rope_type": "yarn", "factor": 3}),
        data={"train": [{"path": str(write_rows(tmp_path / "long.jsonl", rows))}], "max_length": 768},
        training={"max_steps": 1},
    )
    done = run_train("--config", recipe)
    assert done.code == 0, done.stderr
    saved = AutoConfig.from_pretrained(tmp_path / "outputs" / "run" / "model")
    assert saved.max_position_embeddings == 768
    assert saved.rope_parameters["rope_type"] == "yarn"
    assert saved.rope_parameters["original_max_position_embeddings"] == 256
    refused = run_train("--config", recipe, "--data.max_length", "769", "--output.name", "longer")
    assert refused.code == 2
    assert "data.max_length=769 exceeds the model's context of 768 tokens" in refused.stderr


def test_answers_end_where_the_context_does(caplog):
    tokenizer = toy_tokenizer()
    tokenizer.pad_token = "<|im_start|>"
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    prompts = ["x" * 14, "x", "x" * 16, "y" * 13, "xy"]  # of 14, 1, 16, 13 and 2 tokens
    answers = generate(model, tokenizer, prompts, max_new_tokens=10)
    assert answers[2] == ""
    for prompt, answer, room in zip(prompts, answers, (2, 10, None, 3, 10), strict=True):
        if room is not None:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            alone = model.generate(ids, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            assert alone.shape[1] == len(prompt) + room
            assert answer == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert "context of 16 tokens ends the answers to prompts of more than 6 early" in caplog.text
