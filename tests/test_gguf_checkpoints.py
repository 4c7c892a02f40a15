"""A GGUF file holds the model that it was made from: every tensor, the rotary scaling, the tokenizer, the logits."""

import contextlib
import dataclasses
import logging
import shutil
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from src.checkpoints import gguf as gguf_format
from src.checkpoints import hf
from src.checkpoints.certificate import CertificateError, compare
from src.checkpoints.checkpoint import ReadOptions, WriteOptions
from src.checkpoints.convert import convert
from src.checkpoints.gguf_families import FAMILIES, family_of, tensor_names
from src.checkpoints.gguf_files import kept
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True),
    "llama-wide-heads": LlamaConfig(**SIZES, head_dim=16),
    "llama3": LlamaConfig(**SIZES, head_dim=32, rope_parameters=LLAMA3),
    "linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "yarn": LlamaConfig(**SIZES, head_dim=16, rope_parameters=YARN),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2-tied-yarn": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}


def save(folder, config, tokenizer=None, dtype=torch.float32):
    """A random model whose norms and biases are not ones and zeros, so that none can be left out unseen."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.data = ("norm" in name) + 0.2 * torch.randn(weight.shape)
        else:
            weight.data = 0.2 * torch.randn(weight.shape)
    model.to(dtype).save_pretrained(folder)
    tokenizer = tokenizer or toy_tokenizer()
    if config.model_type.startswith("qwen"):
        # AutoTokenizer gives every folder of these models Qwen's steps, whatever its tokenizer.json says.
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        split = pre_tokenizers.Split(Regex(words + r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder)
    return model.eval()


def logits_of(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0] for row in rows]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_comes_back_from_gguf_as_it_was(kind, tmp_path):
    save(tmp_path / "a", CONFIGS[kind])
    record = convert(tmp_path / "a", tmp_path / "b", "gguf")
    assert record["check"]["greedy_tokens_equal"] > 0
    convert(tmp_path / "b" / "model.gguf", tmp_path / "c", "hf")
    before, after = (hf.read(tmp_path / name, ReadOptions()).tensors for name in "ac")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].load(), after[name].load()) for name in before)
    rows = [[5, 9, 200, 3, 77, *range(100, 150)]]
    assert torch.equal(logits_of(tmp_path / "a", rows)[0], logits_of(tmp_path / "c", rows)[0])
    first, second = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in "ac")
    for name in (*SIZES, "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        assert first[name] == second[name], name
    assert second["model_type"] == ("llama" if kind == "mistral" else first["model_type"])


@pytest.mark.parametrize("kind", ["llama-tied", "llama3", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_rounded_weights_are_kept_to_the_bit(kind, dtype, tmp_path):
    save(tmp_path / "a", CONFIGS[kind])
    check = convert(tmp_path / "a", tmp_path / "b", "gguf", writing=WriteOptions(dtype=dtype))["check"]
    assert check["tensors_equal"] == len(hf.read(tmp_path / "a", ReadOptions()).tensors)
    assert 1e-5 < check["largest_relative_rounding_of_a_tensor"] < 2e-2
    written = gguf.GGUFReader(tmp_path / "b" / "model.gguf")
    kinds = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    assert {tensor.tensor_type.name for tensor in written.tensors if len(tensor.shape) > 1} == {kinds[dtype]}
    assert {tensor.tensor_type.name for tensor in written.tensors if len(tensor.shape) == 1} == {"F32"}


def q8_0_by_hand(values):
    """Blocks of 32 after ggml's quantize_row_q8_0_ref: multiples of max|x|/127, halves away from zero."""
    out = []
    for start in range(0, len(values), 32):
        block = np.asarray(values[start : start + 32], np.float32)
        scale = np.float32(np.abs(block).max()) / np.float32(127)
        inverse = np.float32(1) / scale if scale else np.float32(0)
        small = [int(np.sign(x)) * int(np.floor(np.abs(np.float32(x * inverse)) + np.float32(0.5))) for x in block]
        out += [np.float32(q) * np.float32(np.float16(scale)) for q in small]
    return np.array(out, np.float32)


def test_q8_0_keeps_what_a_quantization_by_hand_keeps():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0
    weight[1, :32] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, *[3.0] * 26])  # halves, of a scale of 1
    found = kept(weight, "Q8_0")
    np.testing.assert_array_equal(found.flatten().numpy(), q8_0_by_hand(weight.flatten().tolist()))
    assert found[1, :6].tolist() == [127.0, 1.0, 2.0, 3.0, -1.0, -2.0]
    assert torch.equal(kept(weight.to(torch.bfloat16), "Q8_0"), kept(weight.to(torch.bfloat16).float(), "Q8_0"))


def test_rows_that_are_no_multiple_of_32_stay_float16_and_are_named(tmp_path, caplog):
    save(tmp_path / "a", LlamaConfig(**SIZES | {"intermediate_size": 48}))
    with caplog.at_level(logging.WARNING):
        convert(tmp_path / "a", tmp_path / "b", "gguf", writing=WriteOptions(dtype="q8_0"))
    assert "model.layers.0.mlp.down_proj.weight, model.layers.1.mlp.down_proj.weight stay float16" in caplog.text
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "b" / "model.gguf").tensors}
    assert [name for name, kind in kinds.items() if kind == "F16"] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]


def test_a_source_in_bfloat16_keeps_its_bits(tmp_path):
    save(tmp_path / "a", CONFIGS["llama"], dtype=torch.bfloat16)
    convert(tmp_path / "a", tmp_path / "b", "gguf")
    reader = gguf.GGUFReader(tmp_path / "b" / "model.gguf")
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"BF16", "F32"}
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16


def test_llama3_scaling_survives_where_the_reader_of_transformers_drops_it(tmp_path):
    save(tmp_path / "a", CONFIGS["llama3"])
    convert(tmp_path / "a", tmp_path / "b", "gguf")
    factors = {each.name: each.data for each in gguf.GGUFReader(tmp_path / "b" / "model.gguf").tensors}
    # Llama 3.1's own rule, pair by pair.
    expected = []
    for pair in range(16):
        wavelength = 2 * np.pi * 500000.0 ** (2 * pair / 32)
        smooth = (64 / wavelength - 1) / (4 - 1)
        share = 1 if wavelength < 64 / 4 else 1 / 8 if wavelength > 64 else (1 - smooth) / 8 + smooth
        expected.append(1 / share)
    np.testing.assert_allclose(factors["rope_freqs.weight"], expected, rtol=1e-6)
    read = gguf_format.read(tmp_path / "b" / "model.gguf", ReadOptions())
    assert read.architecture.rope_parameters == LLAMA3
    theirs = AutoConfig.from_pretrained(tmp_path / "b", gguf_file="model.gguf").rope_parameters
    assert theirs.get("rope_type") != "llama3"
    rows = [[5, 9, 200, 3, 77, *range(100, 150)]]
    plain = dataclasses.replace(
        read.architecture, rope_parameters={"rope_type": "default", "rope_theta": LLAMA3["rope_theta"]}
    )
    expected = logits_of(tmp_path / "a", rows)[0]
    assert float((read.logits(rows)[0] - expected).abs().max()) < 1e-4
    dropped = read.logits.func(plain, read.logits.args[1], rows)[0]
    assert float((dropped - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", CONFIGS)
def test_tensor_names_are_those_of_the_gguf_package(kind, tmp_path):
    save(tmp_path / "a", CONFIGS[kind])
    convert(tmp_path / "a", tmp_path / "b", "gguf", check="none")
    source = hf.read(tmp_path / "a", ReadOptions())
    family, sizes = family_of(source.architecture)
    [arch] = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.name]
    names = gguf.get_tensor_name_map(arch, sizes.num_hidden_layers)
    expected = {names.get_name(name, try_suffixes=(".weight", ".bias")) for name in source.tensors}
    assert set(tensor_names(family, sizes)) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma2Config(**SIZES), "model_type=gemma2 cannot be held by gguf here, which holds llama, mistral, qwen2"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "hidden_act=gelu cannot be held"),
        (LlamaConfig(**SIZES, mlp_bias=True), "mlp_bias=True cannot be held"),
        (MistralConfig(**SIZES, sliding_window=64), "sliding_window=64 is below"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_parameters=.*dynamic.* holds the types default, linear, llama3, yarn",
        ),
        (LlamaConfig(**SIZES, rope_parameters=YARN | {"beta_fast": 8}), "rope_parameters.beta_fast=8 cannot be held"),
        (LlamaConfig(**SIZES | {"vocab_size": 200}), r"tokenizer.json has \d+ ids, but .* has 200 rows"),
        (LlamaConfig(**SIZES, eos_token_id=[2, 3, 4, 5]), "generation.stop_token_ids="),
    ],
)
def test_what_gguf_cannot_hold_is_refused_by_name(config, message, tmp_path):
    save(tmp_path / "a", config)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a", tmp_path / "b", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_weights_beyond_float16_are_refused_and_nothing_is_left(tmp_path):
    model = save(tmp_path / "a", CONFIGS["llama"])
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = 1e5
    model.save_pretrained(tmp_path / "a")
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight has a weight of 1e\+05, and F16 holds up to 6\.55e"):
        convert(tmp_path / "a", tmp_path / "b", "gguf", writing=WriteOptions(dtype="float16"))
    convert(tmp_path / "a", tmp_path / "b", "gguf", writing=WriteOptions(dtype="q8_0"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_full_disk_is_told_with_file_and_tensor(tmp_path):
    """The size of files is limited instead, which fails a write as a full disk does."""
    resource = pytest.importorskip("resource")
    save(tmp_path / "a", CONFIGS["llama"])
    source = hf.read(tmp_path / "a", ReadOptions())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        (tmp_path / "b").mkdir()
        with pytest.raises(UserError, match=r"model\.gguf: \S+\.weight could not be written .*make room"):
            gguf_format.write(source, tmp_path / "b", WriteOptions())


@pytest.fixture
def written(tmp_path):
    save(tmp_path / "a", CONFIGS["llama3"])
    convert(tmp_path / "a", tmp_path / "b", "gguf", check="none")
    shutil.rmtree(tmp_path / "a")
    return tmp_path / "b" / "model.gguf"


def test_a_file_cut_anywhere_is_refused(written, tmp_path):
    content = written.read_bytes()
    for share in (0.0001, 0.01, 0.02, 0.1, 0.3, 0.6, 0.9, 0.999):
        (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
        with pytest.raises(UserError, match=r"cut\.gguf"):
            convert(tmp_path / "cut.gguf", tmp_path / "out", "hf", source="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "cut.gguf"]


def rewritten(path, out, changes=(), left_out=(), architecture="llama"):
    """A copy of a GGUF file, by the gguf package, with other values."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, architecture)
    changes = dict(changes)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, changes.pop(name, field.contents()), kind, sub)
    for name, value in changes.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for tensor in reader.tensors:
        if tensor.name not in left_out:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"left_out": ["blk.1.ffn_up.weight"]}, r"lacks the tensors \['blk\.1\.ffn_up\.weight'\]"),
        ({"left_out": ["token_embd.weight"]}, r"lacks token_embd\.weight"),
        ({"architecture": "gemma2"}, r"general\.architecture=gemma2 is not served, only llama, qwen2, qwen3"),
        ({"changes": {"llama.block_count": 1}}, r"has \['blk\.1\.attn_k\.weight'"),
        ({"changes": {"llama.feed_forward_length": 32}}, r"mlp\.gate_proj\.weight has shape \(64, 32\).* \(32, 32\)"),
        ({"changes": {"llama.rope.dimension_count": 4}}, r"rope\.dimension_count=4 is not the head size 32"),
        ({"changes": {"llama.rope.scaling.type": "longrope"}}, r"rope\.scaling\.type=longrope is not served"),
        ({"changes": {"llama.rope.freq_base": 100.0}}, r"rope_freqs\.weight is not llama3's scaling"),
        ({"changes": {"tokenizer.ggml.pre": "tekken"}}, r"tokenizer\.ggml\.pre=tekken is not served, only gpt-2"),
        ({"changes": {"tokenizer.ggml.model": "t5"}}, r"tokenizer\.ggml\.model=t5 is not served"),
        ({"changes": {"tokenizer.ggml.eos_token_id": 999}}, r"eos_token_id=999 is none of its 320 tokens"),
        ({"changes": {"tokenizer.ggml.tokens": ["a", "b"]}}, "has 2 tokens, but its embedding 320 rows"),
        ({"changes": {"tokenizer.ggml.tokens": ["a"] * 320}}, "tokens under several ids"),
        ({"changes": {"tokenizer.ggml.merges": ["zz yy"]}}, "merges do not fit its tokens"),
        ({"changes": {"split.count": 3}}, r"is one of 3 parts; join them"),
    ],
)
def test_a_damaged_file_is_refused_by_name(written, options, message, tmp_path):
    rewritten(written, tmp_path / "bad.gguf", **options)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "bad.gguf", tmp_path / "out", "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "bad.gguf"]


def test_a_file_that_only_begins_like_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(100))
    with pytest.raises(UserError, match=r"x\.gguf is no whole GGUF file"):
        convert(tmp_path / "x.gguf", tmp_path / "out", "hf")


def test_weights_in_other_blocks_are_read_as_the_gguf_package_reads_them(written, tmp_path):
    reader = gguf.GGUFReader(written)
    [weight] = [tensor.data for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight"]
    blocks = gguf.quants.quantize(np.array(weight), gguf.GGMLQuantizationType.Q4_0)
    writer = gguf.GGUFWriter(tmp_path / "q4.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(
                name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    for tensor in reader.tensors:
        if tensor.name == "blk.0.ffn_up.weight":
            writer.add_tensor(tensor.name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert(tmp_path / "q4.gguf", tmp_path / "out", "hf")
    found = hf.read(tmp_path / "out", ReadOptions()).tensors["model.layers.0.mlp.up_proj.weight"].load()
    np.testing.assert_array_equal(found.numpy(), gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0))


def test_an_absent_package_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    save(tmp_path / "a", CONFIGS["llama"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install -r requirements/convert\.txt"):
        convert(tmp_path / "a", tmp_path / "b", "gguf")
    assert not (tmp_path / "b").exists()


def test_the_certificate_finds_rows_left_in_halves(tmp_path, monkeypatch):
    save(tmp_path / "a", CONFIGS["llama"])
    wrong = dataclasses.replace(FAMILIES["llama"], in_pairs=False)
    source = hf.read(tmp_path / "a", ReadOptions())
    (tmp_path / "b").mkdir()
    with monkeypatch.context() as patch:
        patch.setitem(FAMILIES, "llama", wrong)
        gguf_format.write(source, tmp_path / "b", WriteOptions())
    with pytest.raises(CertificateError, match=r"[qk]_proj\.weight of .* differs"):
        compare(source, gguf_format.read_back(tmp_path / "b"), None, "logits")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_llama_cpp_computes_the_same_logits(kind, dtype, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    save(tmp_path / "a", CONFIGS[kind])
    convert(tmp_path / "a", tmp_path / "b", "gguf", writing=WriteOptions(dtype=dtype))
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # else keys are kept in float16
    path = str(tmp_path / "b" / "model.gguf")
    model = llama_cpp.Llama(path, n_ctx=128, logits_all=True, verbose=False, **exact)
    row = [5, 9, 200, 3, 77, *range(100, 170)]
    model.eval(row)
    found = torch.from_numpy(np.array(model.scores[: len(row)]))
    [expected] = gguf_format.read(tmp_path / "b" / "model.gguf", ReadOptions()).logits([row])
    # llama.cpp rounds activations to the weights' format before each product: in float32 at most 2e-6 was seen, with 8
    # bits for 32 of them at most 0.08, where queries left in halves give more than 0.3 in every format.
    tolerance = {None: 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "q8_0": 0.15}[dtype]
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())
