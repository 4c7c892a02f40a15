"""The tokenizer's padding, the size of embeddings, and where the exported model stops."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from config.schema import ModelConfig
from src.model import PAD_TOKEN, load_model, load_settings, load_tokenizer
from tests.tiny_run import from_checkpoint, run_train, weights_of, write_checkpoint, write_recipe
from tests.toy_tokenizer import CHATML, toy_tokenizer

OTHER_STOP = CHATML.replace("<|im_end|>", "<|eot_id|>")


def load(path, *, trains_all=True, **fields):
    config = ModelConfig(path=str(path), **fields)
    tokenizer = load_tokenizer(config)
    return load_model(config, load_settings(config, tokenizer), tokenizer, trains_all=trains_all), tokenizer


def saved_tokenizer(folder, *, pad=None, unk=None, **arguments):
    tokenizer = toy_tokenizer(**arguments)
    if unk:
        tokenizer.add_special_tokens({"unk_token": unk})
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("pad", "unk", "special", "expected"),
    [
        ("<|im_start|>", None, ("<|im_start|>",), "<|im_start|>"),  # the tokenizer's own
        (None, "<unk>", ("<unk>", "<|right_pad_id|>"), "<|right_pad_id|>"),  # made for padding
        ("<|im_end|>", "<unk>", ("<unk>", "<|pad_id|>"), "<|pad_id|>"),  # it padded with eos
        (None, "<unk>", ("<unk>", "<|reserved_0|>"), "<unk>"),
        (None, "<|im_end|>", ("<|reserved_0|>", "<|reserved_1|>"), "<|reserved_0|>"),  # unk is eos, as in GPT-2
        (None, None, ("<|im_start|>",), PAD_TOKEN),
        ("<|im_end|>", "<|im_end|>", ("<|im_start|>",), PAD_TOKEN),
    ],
)
def test_padding_is_never_the_eos_token(tmp_path, pad, unk, special, expected):
    before = saved_tokenizer(tmp_path, pad=pad, unk=unk, special=special)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)))
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == before.eos_token
    assert len(tokenizer) == len(before) + (expected == PAD_TOKEN)


def test_a_tokenizer_file_gets_its_special_tokens_from_the_config(tmp_path):
    toy_tokenizer().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = ModelConfig(tokenizer=str(tmp_path / "tokenizer.json"), special_tokens={"eos_token": "<|im_end|>"})
    tokenizer = load_tokenizer(config)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", PAD_TOKEN)
    assert tokenizer.eos_token_id == toy_tokenizer().eos_token_id


@pytest.mark.parametrize("spare", [0, 1, 30])
def test_embeddings_grow_only_when_needed_and_never_shrink(tmp_path, spare):
    tokenizer = toy_tokenizer()
    needed = len(tokenizer) + 1  # one for padding
    checkpoint = write_checkpoint(tmp_path, tokenizer=tokenizer, vocabulary=len(tokenizer) + spare)
    before = weights_of(checkpoint)
    model, loaded = load(checkpoint)
    rows = max(needed, len(tokenizer) + spare)
    assert loaded.pad_token_id == len(tokenizer)
    assert model.config.vocab_size == rows
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = model.state_dict()[name]
        assert len(weight) == rows
        assert torch.equal(weight[: len(before[name])], before[name])


def test_a_padded_vocabulary_stays_through_a_run(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base", vocabulary=320)
    done = run_train("--config", write_recipe(tmp_path, model=from_checkpoint(checkpoint), training={"max_steps": 1}))
    assert done.code == 0, done.stderr
    result = tmp_path / "outputs" / "run" / "model"
    assert json.loads((result / "config.json").read_text())["vocab_size"] == 320
    assert len(weights_of(result)["lm_head.weight"]) == 320
    assert len(AutoTokenizer.from_pretrained(result)) == len(toy_tokenizer()) + 1


@pytest.mark.parametrize(
    ("dtype", "trains_all", "expected"),
    [
        ("auto", True, torch.float32),
        ("auto", False, torch.bfloat16),
        ("bfloat16", True, torch.bfloat16),
        ("float64", True, torch.float64),
    ],
)
def test_weights_are_held_in_the_number_format_asked_for(tmp_path, dtype, trains_all, expected):
    checkpoint = write_checkpoint(tmp_path)
    AutoModelForCausalLM.from_pretrained(checkpoint).to(torch.bfloat16).save_pretrained(checkpoint)
    model, _ = load(checkpoint, dtype=dtype, trains_all=trains_all)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_the_result_stops_where_the_chat_template_ends_a_turn(tmp_path):
    # A base model's own end, and the chat template of its chat sibling, as with the Llama 3 family.
    tokenizer = toy_tokenizer(OTHER_STOP, eos="<|end_of_text|>", special=("<|eot_id|>", "<|im_start|>"))
    checkpoint = write_checkpoint(tmp_path / "base", tokenizer=tokenizer)
    done = run_train("--config", write_recipe(tmp_path, model=from_checkpoint(checkpoint), training={"max_steps": 1}))
    assert done.code == 0, done.stderr
    stops = GenerationConfig.from_pretrained(tmp_path / "outputs" / "run" / "model").eos_token_id
    assert stops == tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eot_id|>"])


def test_the_stops_and_sampling_of_the_checkpoint_are_kept(tmp_path):
    tokenizer = toy_tokenizer()
    checkpoint = write_checkpoint(tmp_path, tokenizer=tokenizer)
    GenerationConfig(eos_token_id=[7, 9], pad_token_id=3, do_sample=True, temperature=0.6).save_pretrained(checkpoint)
    model, loaded = load(checkpoint)
    generation = model.generation_config
    assert generation.eos_token_id == [7, 9, tokenizer.eos_token_id]
    assert generation.temperature == 0.6
    assert generation.pad_token_id == loaded.pad_token_id


def test_a_tokenizer_without_a_chat_template_stops_at_its_eos(tmp_path):
    model, tokenizer = load(write_checkpoint(tmp_path, tokenizer=toy_tokenizer(None)))
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("fields", "told"), [({}, True), ({"trains_all": True}, False), ({"dtype": "bfloat16"}, False)]
)
def test_frozen_weights_that_autocast_casts_in_every_micro_batch_are_told(tmp_path, caplog, fields, told):
    checkpoint = write_checkpoint(tmp_path, vocabulary=320)  # float32
    load(checkpoint, **{"trains_all": False} | fields)
    assert ("model.dtype=bfloat16 takes half their memory" in caplog.text) == told
