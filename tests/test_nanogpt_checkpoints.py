"""nanoGPT's checkpoints become GPT-2 in Hugging Face's form: logits, ids and what cannot be read."""

import json
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.checkpoints.checkpoint import ReadOptions, WriteOptions
from src.checkpoints.convert import convert, recognised_source
from tests import nanogpt_reference as reference
from tests.llama2c_reference import DATA
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

CHARACTERS = "\n !,.'abcdefghijklmnopqrstuvwxyzOLé日"
GPT2 = DATA / "tokenizers" / "gpt2"


def save(path, weights, prefix="", **settings):
    """A ckpt.pt as train.py writes it: the head is the embedding's own tensor, the optimizer and more beside it."""
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    rows = len(weights["transformer.wte.weight"])
    content = {
        "model": {prefix + name: tensor for name, tensor in tensors.items()},
        "optimizer": optimizer.state_dict(),
        "model_args": reference.SIZES | {"vocab_size": rows, "dropout": 0.2} | settings,
        "iter_num": 5000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "init_from": "scratch", "learning_rate": 1e-3, "compile": True},
    }
    torch.save(content, path)
    return content


def write_meta(path, characters=CHARACTERS, **change):
    ids = {character: index for index, character in enumerate(characters)}
    itos = {index: character for character, index in ids.items()}
    path.write_bytes(pickle.dumps({"vocab_size": len(ids), "itos": itos, "stoi": ids} | change))


@pytest.fixture
def small(tmp_path):
    """A character-level model with its meta.pkl beside it."""
    weights = reference.arrays(len(CHARACTERS), bias=False)
    save(tmp_path / "ckpt.pt", weights, bias=False)
    write_meta(tmp_path / "meta.pkl")
    return tmp_path / "ckpt.pt"


def logits_of(folder, tokens):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return model(torch.tensor([tokens])).logits[0].double().numpy()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_logits_equal_a_float64_evaluation_of_the_file(bias, prefix, activation, tmp_path):
    weights = reference.arrays(len(CHARACTERS), bias)
    save(tmp_path / "ckpt.pt", weights, prefix, bias=bias)
    write_meta(tmp_path / "meta.pkl")
    record = convert(tmp_path / "ckpt.pt", tmp_path / "out", "hf", reading=ReadOptions(activation=activation))
    tokens = np.random.default_rng(1).integers(0, len(CHARACTERS), 64).tolist()
    expected = reference.logits(weights, tokens, exact=activation == "gelu")
    # float32 rounding; the two GELUs differ by 100 times as much
    assert np.abs(logits_of(tmp_path / "out", tokens) - expected).max() < 1e-5 * np.abs(expected).max()
    other = reference.logits(weights, tokens, exact=activation != "gelu")
    assert np.abs(other - expected).max() > 1e-4 * np.abs(expected).max()
    assert record["from"] == "nanogpt"
    assert record["check"]["greedy_tokens_equal"] > 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    assert (settings["activation_function"], settings["tie_word_embeddings"]) == (activation, True)
    assert (settings["resid_pdrop"], settings["n_positions"]) == (0.2, 64)


def test_an_activation_that_nobody_named_is_told(small, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="smolfactory"):
        convert(small, tmp_path / "out", "hf", check="none")
    assert "--activation gelu_new" in caplog.text
    caplog.clear()
    convert(small, tmp_path / "named", "hf", reading=ReadOptions(activation="gelu"), check="none")
    assert caplog.text == ""
    with pytest.raises(UserError, match="--activation has no meaning from hf to hf"):
        convert(tmp_path / "out", tmp_path / "b", "hf", reading=ReadOptions(activation="gelu"))


def test_a_head_of_its_own_and_stored_masks_of_old_versions_are_read(tmp_path):
    weights = reference.arrays(len(CHARACTERS), bias=True)
    weights["lm_head.weight"] = reference.arrays(len(CHARACTERS), True, seed=9)["transformer.wte.weight"]
    masks = {
        f"transformer.h.{layer}.attn.bias": np.tril(np.ones((1, 1, 64, 64), "f4"))
        for layer in range(reference.SIZES["n_layer"])
    }
    save(tmp_path / "ckpt.pt", weights | masks)  # and without `bias` among its settings
    write_meta(tmp_path / "meta.pkl")
    convert(tmp_path / "ckpt.pt", tmp_path / "out", "hf")
    expected = reference.logits(weights, [3, 1, 2])
    assert np.abs(logits_of(tmp_path / "out", [3, 1, 2]) - expected).max() < 1e-5 * np.abs(expected).max()
    # The written folder is a checkpoint like any other.
    convert(tmp_path / "out", tmp_path / "again", "hf", writing=WriteOptions(shard_bytes=4000))
    assert np.array_equal(logits_of(tmp_path / "again", [3, 1, 2]), logits_of(tmp_path / "out", [3, 1, 2]))


def test_weights_rounded_to_bfloat16_are_those_of_the_transposed_file(small, tmp_path):
    record = convert(small, tmp_path / "out", "hf", writing=WriteOptions(dtype="bfloat16"))
    assert record["check"]["max_logit_difference"] < record["check"]["max_logit_difference_by_rounding_weights"] / 10


def test_characters_become_a_tokenizer_that_refuses_what_it_does_not_know(small, tmp_path):
    convert(small, tmp_path / "out", "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("", "Once  upon\n\na time, Lily's é日!", "\n", "   "):
        expected = [CHARACTERS.index(character) for character in text]
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode(expected) == text
    assert len(tokenizer) == len(CHARACTERS)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (None, None, None)
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        tokenizer("a7")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    out = model.generate(**tokenizer("once", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 12)  # no token ends a text


@pytest.mark.skipif(not GPT2.is_dir(), reason="../shared/data/tokenizers/gpt2 is absent")
def test_gpt2_ids_are_those_of_llama_cpp_and_padded_ones_are_never_generated(tmp_path):
    weights = reference.arrays(50304, bias=True)
    weights["transformer.wte.weight"][50300] = 40 * weights["transformer.ln_f.bias"]  # the model's own favourite
    save(tmp_path / "ckpt.pt", weights)
    convert(tmp_path / "ckpt.pt", tmp_path / "out", "hf", reading=ReadOptions(GPT2))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    vectors = DATA / "tokenizer_vectors"
    texts = (vectors / "ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (vectors / "ggml-vocab-gpt-2.gguf.out").read_text(encoding="utf-8").split("\n")
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer(text).input_ids == [int(token) for token in line.split()], text
    assert tokenizer("a<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id == 50256
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[464, 3290]])
    assert model(ids).logits[0, -1].argmax() == 50300
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert out.max() < 50257
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text("utf-8"))
    assert (settings["eos_token_id"], settings["bos_token_id"]) == ([50256], 50256)


def change(path, **parts):
    torch.save(torch.load(path, weights_only=True) | parts, path)


def without(weights, name):
    return {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda model, args: (without(model, "transformer.wpe.weight"), args), r"lacks 1 tensors \['transformer.wpe"),
        (lambda model, args: (model | {"odd": torch.ones(2)}, args), r"has 1 \['odd'\] that its model_args do not"),
        (lambda model, args: (model, args | {"n_embd": 32}), r"transformer.wte.weight has shape \(36, 16\)"),
        (lambda model, args: (model, args | {"n_layer": 3}), r"lacks 6 tensors \['transformer.h.2"),
        (lambda model, args: (model, args | {"bias": True}), r"lacks 13 tensors \['transformer.h.0.attn.c_attn.bias'"),
        (lambda model, args: (model, args | {"n_head": 3}), "n_head=3 does not divide n_embd=16"),
        (lambda model, args: (model, args | {"block_size": "64"}), r"model_args\['block_size'\]='64' is no positive"),
        (lambda model, args: (model | {"odd": 5}, args), r"model\['odd'\] is int, not a tensor of floats"),
        (lambda model, args: (model, None), "has no model and model_args dictionaries"),
    ],
)
def test_a_wrong_description_is_refused_by_name(edit, message, small, tmp_path):
    content = torch.load(small, weights_only=True)
    model, settings = edit(content["model"], content["model_args"])
    change(small, model=model, model_args=settings)
    with pytest.raises(UserError, match=message):
        convert(small, tmp_path / "out", "hf", source="nanogpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "meta.pkl"]


class Runs:
    """Pickled, it would make a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_code_in_a_checkpoint_or_its_meta_file_is_named_and_not_run(small, tmp_path):
    meta = (tmp_path / "meta.pkl").read_bytes()
    write_meta(tmp_path / "meta.pkl", extra=Runs(tmp_path / "ran"))
    with pytest.raises(UserError, match=r"meta.pkl is no pickle of plain values \(it names posix.mkdir"):
        convert(small, tmp_path / "out", "hf")
    (tmp_path / "meta.pkl").write_bytes(meta)
    content = torch.load(small, weights_only=True)
    torch.save(content | {"config": {"out_dir": Runs(tmp_path / "ran")}}, small)
    with pytest.raises(UserError, match=r"ckpt.pt holds posix.mkdir, which is neither a plain value nor a tensor"):
        convert(small, tmp_path / "out", "hf", source="nanogpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt.pt", "meta.pkl"]


@pytest.mark.parametrize("kept", [0, 10, 5000, -1])
def test_a_file_that_is_cut_short_is_refused(kept, small, tmp_path):
    small.write_bytes(small.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"ckpt.pt is no whole file that torch"):
        convert(small, tmp_path / "out", "hf", source="nanogpt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"characters": CHARACTERS[:-1]}, r"has 35 characters, but transformer.wte.weight of .* has 36 rows"),
        ({"vocab_size": 65}, "vocab_size=65, but stoi has 36 characters"),
        ({"stoi": {"the": 0}}, "stoi is no table of single characters"),
        ({"itos": {0: "a"}}, "not each other's inverse over 0 to 35"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(meta, message, small, tmp_path):
    write_meta(tmp_path / "other.pkl", **meta)
    with pytest.raises(UserError, match=message):
        convert(small, tmp_path / "out", "hf", reading=ReadOptions(tmp_path / "other.pkl"))
    assert not (tmp_path / "out").exists()


def test_a_missing_or_cut_meta_file_and_a_tokenizer_of_another_size_are_refused(small, tmp_path):
    content = (tmp_path / "meta.pkl").read_bytes()
    (tmp_path / "meta.pkl").write_bytes(content[:-20])
    with pytest.raises(UserError, match=r"meta.pkl is no pickle of plain values"):
        convert(small, tmp_path / "out", "hf")
    (tmp_path / "meta.pkl").unlink()
    with pytest.raises(UserError, match=r"ckpt.pt holds no tokenizer and .*meta.pkl does not exist"):
        convert(small, tmp_path / "out", "hf")
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    with pytest.raises(UserError, match=r"tokenizer.json has \d+ ids, but transformer.wte.weight has 36 rows"):
        convert(small, tmp_path / "out", "hf", reading=ReadOptions(tmp_path / "toy"))


def test_the_two_kinds_of_ckpt_pt_are_told_apart(small, tmp_path):
    assert recognised_source(small) == "nanogpt"
    settings = {"dim": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 300, "max_seq_len": 16}
    torch.save({"model": {}, "model_args": settings}, tmp_path / "other.pt")
    assert recognised_source(tmp_path / "other.pt") == "llama2c-training"
    torch.save({"model": {}, "model_args": {"dim": 8}}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="recognised as none of"):
        recognised_source(tmp_path / "odd.pt")


def test_llamas_formats_refuse_gpt2_by_name(small, tmp_path):
    with pytest.raises(UserError, match="model_type=gpt2 cannot be held by llama2c"):
        convert(small, tmp_path / "out", "llama2c")
