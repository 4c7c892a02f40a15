"""llama2.c's training checkpoints are read as its exported files are, and int8 files are written as export.py does."""

import dataclasses
import struct

import numpy as np
import pytest
import torch

from src.checkpoints import llama2c
from src.checkpoints.checkpoint import ReadOptions
from src.checkpoints.convert import convert, recognised_source
from tests import llama2c_reference as reference
from tests.test_checkpoints import STORIES, TOKENIZER, made_up, needs_stories
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

NAMES = {"wq": "attention.wq", "wk": "attention.wk", "wv": "attention.wv", "wo": "attention.wo"}
NAMES |= {"w1": "feed_forward.w1", "w2": "feed_forward.w2", "w3": "feed_forward.w3"}
NAMES |= {"attention_norm": "attention_norm", "ffn_norm": "ffn_norm"}


def save_training(path, header, weights, prefix="", **settings):
    """The ckpt.pt of an exported model, as llama2.c's train.py writes it."""
    tensors = {
        f"layers.{layer}.{name}.weight": weights[short][layer]
        for short, name in NAMES.items()
        for layer in range(header["layers"])
    }
    tensors |= {"norm.weight": weights["norm"], "tok_embeddings.weight": weights["embedding"]}
    tensors["output.weight"] = weights["head"]
    sizes = {"dim": header["dim"], "n_layers": header["layers"], "n_heads": header["heads"], "dropout": 0.0}
    sizes |= {"n_kv_heads": header["kv_heads"], "vocab_size": header["vocab"], "max_seq_len": header["context"]}
    model = {prefix + name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    content = {"model": model, "model_args": sizes | settings, "iter_num": 10, "config": {"out_dir": "out"}}
    torch.save(content, path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_training_checkpoint_gives_the_files_that_were_exported_from_it(tied, prefix, tmp_path):
    model, tokenizer = made_up(tmp_path, tied)
    save_training(tmp_path / "ckpt.pt", *reference.read_legacy(model), prefix, hidden_dim=24)
    assert recognised_source(tmp_path / "ckpt.pt") == "llama2c-training"
    convert(tmp_path / "ckpt.pt", tmp_path / "out", "llama2c", reading=ReadOptions(tokenizer))
    written, exported = (path.read_bytes() for path in (tmp_path / "out" / "model.bin", model))
    tables = 64 * 2 * 4  # float32 cosines or sines, in the test's file to float64's precision
    end = len(exported) - 2 * tables - (0 if tied else 300 * 16 * 4)
    assert written[:end] == exported[:end]
    assert written[end + 2 * tables :] == exported[end + 2 * tables :]
    record = convert(tmp_path / "ckpt.pt", tmp_path / "hf", "hf", reading=ReadOptions(tokenizer))
    assert record["check"]["tensors_equal"] == 20 + (not tied)


@needs_stories
def test_a_real_model_saved_as_in_training_gives_its_published_file(tmp_path):
    header, weights = reference.read_legacy(STORIES / "stories260K.bin")
    save_training(tmp_path / "ckpt.pt", header, weights, "_orig_mod.", multiple_of=4)  # 8 * 64 // 3 = 170, up to 172
    convert(tmp_path / "ckpt.pt", tmp_path / "out", "llama2c", reading=ReadOptions(TOKENIZER))
    assert (tmp_path / "out" / "model.bin").read_bytes() == (STORIES / "stories260K.bin").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layers": 3}, r"lacks 9 tensors \['model.layers.2"),
        ({"n_layers": 1}, r"has 9 \['layers.1.attention.wk.weight'"),
        (
            {"hidden_dim": 28},
            r"layers.0.feed_forward.w1.weight has shape \(24, 16\), its model_args ask for \(28, 16\)",
        ),
        ({"n_heads": 3}, "n_heads=3 must divide dim=16"),
        ({"vocab_size": None}, r"model_args\['vocab_size'\]=None is no positive integer"),
        ({"vocab_size": 301}, r"tok_embeddings.weight has shape \(300, 16\)"),
    ],
)
def test_a_wrong_description_is_refused_by_name(settings, message, tmp_path):
    model, tokenizer = made_up(tmp_path, tied=True)
    save_training(tmp_path / "ckpt.pt", *reference.read_legacy(model), **{"hidden_dim": 24} | settings)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "ckpt.pt", tmp_path / "out", "hf", "llama2c-training", ReadOptions(tokenizer))
    assert not (tmp_path / "out").exists()


@needs_stories
def test_groups_are_rounded_as_in_the_published_int8_file():
    """The published file has groups of 8, so each tensor is rounded here with that size."""
    content = (STORIES / "stories260K-q8.bin").read_bytes()
    assert struct.unpack_from("<i", content, 37) == (8,)
    _, weights = reference.read_legacy(STORIES / "stories260K.bin")
    start = 256 + 4 * 64 * 11  # the header, then the norms of 5 layers and the last one
    tensors = [weights["embedding"], *(layer for name in list(NAMES)[:7] for layer in weights[name])]
    for tensor in tensors:
        integers, scales = llama2c.quantized(torch.from_numpy(tensor.copy()), 8)
        expected = np.frombuffer(content, "i1", tensor.size, start).reshape(-1, 8)
        of_groups = np.frombuffer(content, "<f4", tensor.size // 8, start + tensor.size)
        assert np.array_equal(integers.numpy(), expected)
        assert np.array_equal(scales.numpy(), of_groups)
        start += tensor.size + 4 * len(of_groups)
    assert start == len(content)


@pytest.mark.parametrize("tied", [True, False])
def test_an_int8_file_holds_what_its_own_layout_says(tied, tmp_path):
    """Read here by plain struct and numpy: each weight is within half a scale of the source's."""
    model, tokenizer = made_up(tmp_path, tied)
    record = convert(model, tmp_path / "out", "llama2c-v2", reading=ReadOptions(tokenizer))
    content = (tmp_path / "out" / "model.bin").read_bytes()
    assert struct.unpack_from("<Ii7iBi", content) == (0x616B3432, 2, 16, 24, 2, 4, 2, 300, 64, tied, 8)
    _, weights = reference.read_legacy(model)
    norms = np.concatenate([weights["attention_norm"].ravel(), weights["ffn_norm"].ravel(), weights["norm"]])
    assert content[256 : 256 + norms.nbytes] == norms.tobytes()
    start = 256 + norms.nbytes
    tensors = [weights["embedding"], *(layer for name in list(NAMES)[:7] for layer in weights[name])]
    for tensor in [*tensors, *([] if tied else [weights["head"]])]:
        groups = tensor.reshape(-1, 8)
        integers = np.frombuffer(content, "i1", tensor.size, start).reshape(-1, 8)
        scales = np.frombuffer(content, "<f4", len(groups), start + tensor.size)
        assert np.array_equal(scales, np.abs(groups).max(1) / np.float32(127))
        assert (np.abs(integers).max(1) == 127).all()
        assert (np.abs(integers * scales[:, None] - groups) <= scales[:, None] * (0.5 + 1e-5)).all()
        start += tensor.size + scales.nbytes
    assert start == len(content)
    check = record["check"]
    assert check["max_logit_difference"] < check["max_logit_difference_by_rounding_weights"] / 10
    # What was rounded once stays: the certificate of the next conversion has no rounding.
    again = convert(
        tmp_path / "out" / "model.bin", tmp_path / "hf", "hf", reading=ReadOptions(tmp_path / "out" / "tokenizer.bin")
    )
    assert again["check"]["largest_relative_rounding_of_a_tensor"] == 0


def test_a_group_of_zeros_stays_zero():
    integers, scales = llama2c.quantized(torch.zeros(2, 8), 8)
    assert not integers.any()
    assert not scales.any()


@pytest.mark.parametrize(
    ("width", "wide", "group"), [(4096, 11008, 64), (288, 768, 32), (64, 172, 4), (48, 96, 16), (10, 6, 2)]
)
def test_a_group_divides_the_rows_of_every_matrix(width, wide, group, tmp_path):
    """By hand: 172 is 4 x 43; export.py takes 64 there, whose groups cross the ends of rows."""
    model, tokenizer = made_up(tmp_path, tied=True)
    small = llama2c.read(model, ReadOptions(tokenizer)).architecture
    found = dataclasses.replace(small, hidden_size=width, intermediate_size=wide)
    assert llama2c.group_size(found) == group


@pytest.mark.parametrize("target", ["llama2c", "llama2c-v1", "llama2c-v2"])
def test_a_byte_level_tokenizer_is_refused_with_the_reason(target, tmp_path):
    model, tokenizer = made_up(tmp_path, tied=True)
    convert(model, tmp_path / "hf", "hf", reading=ReadOptions(tokenizer))
    toy_tokenizer().save_pretrained(tmp_path / "toy")
    with pytest.raises(UserError, match=r"model.type=BPE with byte_fallback=False is no SentencePiece BPE"):
        convert(tmp_path / "hf", tmp_path / "out", target, reading=ReadOptions(tmp_path / "toy"))
    assert not (tmp_path / "out").exists()
