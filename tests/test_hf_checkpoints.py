"""Hugging Face folders of any family are read, rounded, split and evaluated layer by layer without a change."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from src.checkpoints import evaluation, hf
from src.checkpoints.checkpoint import ReadOptions, WriteOptions
from src.checkpoints.convert import convert
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

SIZES = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=128)
FAMILIES = {
    "llama": LLAMA,
    "gpt2": GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=48, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, intermediate_size=48, head_dim=8),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, intermediate_size=48, num_local_experts=4),
}


def save(folder, config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return model.eval()


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_is_the_same_in_other_shards(family, tmp_path):
    model = save(tmp_path / "a", FAMILIES[family])
    record = convert(tmp_path / "a", tmp_path / "b", "hf", writing=WriteOptions(shard_bytes=20_000))
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    before, after = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.randint(320, (1, 20))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()(ids).logits, model(ids).logits)
    assert record["check"]["tensors_equal"] == len(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_rounded_to_the_dtype_asked_for_and_the_loss_of_it_is_told(family, tmp_path):
    save(tmp_path / "a", FAMILIES[family])
    record = convert(tmp_path / "a", tmp_path / "b", "hf", writing=WriteOptions(dtype="bfloat16"))
    before, after = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert all(torch.equal(before[name].to(torch.bfloat16), after[name]) for name in before)
    assert json.loads((tmp_path / "b" / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"
    check = record["check"]
    assert 0 < check["largest_relative_rounding_of_a_tensor"] <= 2**-8  # half the spacing of 8 significant bits
    assert check["max_logit_difference_by_rounding_weights"] > 10 * check["max_logit_difference"]


def test_pickles_of_tensors_are_read_and_code_in_them_is_not_run(tmp_path):
    save(tmp_path / "a", LLAMA)
    tensors = stored(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "a" / "pytorch_model.bin")
    convert(tmp_path / "a", tmp_path / "b", "hf")
    assert all(torch.equal(tensor, stored(tmp_path / "b")[name]) for name, tensor in tensors.items())

    class Runs:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save(tensors | {"extra": Runs()}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin holds .*, which is neither a plain value nor a tensor"):
        convert(tmp_path / "a", tmp_path / "c", "hf")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_layer_by_layer_gives_the_logits_of_the_whole_model(tied, tmp_path, monkeypatch):
    config = LlamaConfig(**LLAMA.to_diff_dict() | {"tie_word_embeddings": tied})
    model = save(tmp_path / "a", config)
    monkeypatch.setattr(evaluation, "WHOLE_BYTES", 0)
    monkeypatch.setattr(evaluation, "_whole", None)  # calling it would be an error
    rows = [[5, 9, 200, 3], [7]]
    found = hf.read(tmp_path / "a", ReadOptions()).logits(rows)
    for row, logits in zip(rows, found, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([row])).logits[0], rtol=0, atol=1e-6)
    rounded = hf.read(tmp_path / "a", ReadOptions()).logits(rows, lambda name, weight: weight.to(torch.bfloat16))
    expected = model.to(torch.bfloat16).float()(torch.tensor([rows[0]])).logits[0]
    torch.testing.assert_close(rounded[0], expected, rtol=0, atol=1e-6)


def test_options_without_meaning_are_refused(tmp_path):
    save(tmp_path / "a", LLAMA)
    with pytest.raises(UserError, match="--dtype bfloat16 is not for --to llama2c, whose number format is fixed"):
        convert(tmp_path / "a", tmp_path / "b", "llama2c", writing=WriteOptions(dtype="bfloat16"))
    with pytest.raises(UserError, match="--shard-bytes has no meaning from hf to llama2c"):
        convert(tmp_path / "a", tmp_path / "b", "llama2c", writing=WriteOptions(shard_bytes=100))


def test_the_record_has_the_digests_of_inputs_and_outputs(tmp_path):
    save(tmp_path / "a", LLAMA)
    record = convert(tmp_path / "a", tmp_path / "b", "hf", check="tensors")
    for folder, digests in (("a", record["inputs_sha256"]), ("b", record["outputs_sha256"])):
        content = (tmp_path / folder / "model.safetensors").read_bytes()
        assert digests["model.safetensors"] == hashlib.sha256(content).hexdigest()
    assert "max_logit_difference" not in record["check"]
