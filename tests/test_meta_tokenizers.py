"""Tokenizers, special tokens, stops and chat templates of Meta's folders are those that are published."""

import json
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from src.checkpoints import meta
from src.checkpoints.checkpoint import ReadOptions
from src.checkpoints.convert import convert
from src.checkpoints.llama2c_tokenizer import write_pieces
from src.checkpoints.optional import optional
from src.checkpoints.tiktoken_ranks import read_ranks
from tests import meta_reference as reference
from utils.errors import UserError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LLAMA2, LLAMA3 = DATA / "tokenizers" / "llama2", DATA / "tokenizers" / "llama3"
needs_llama3 = pytest.mark.skipif(not LLAMA3.is_dir(), reason="../shared/data/tokenizers/llama3 is absent")


def told(release, instruct=False, template=None):
    version = release if release in ("1", "2", "3.1", "3.2") else None
    return ReadOptions(meta_version=version, instruct=instruct, chat_template=template)


def write_narrow(folder, release, tokenizer, vocab):
    """A model of width 8 with a published tokenizer's vocabulary, whose text alone matters."""
    folder.mkdir()
    content = reference.params(release, kv_heads=1, layers=1) | {"dim": 8, "n_heads": 1, "vocab_size": vocab}
    content |= {"ffn_dim_multiplier": 1.0, "multiple_of": 112}
    (folder / "params.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    torch.save(reference.weights(content, vocab), folder / "consolidated.00.pth")


def vectors(name):
    """llama.cpp's texts with the ids that they have, begin token left out."""
    texts = (DATA / "tokenizer_vectors" / f"{name}.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    lines = (DATA / "tokenizer_vectors" / f"{name}.out").read_text("utf-8").split("\n")
    assert len(texts) == len(lines) == 47
    return [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=True)]


@needs_llama3
@pytest.mark.parametrize(
    ("release", "published"), [pytest.param("3", "hf_base", marks=pytest.mark.slow), ("3.1", "hf_3.1_instruct")]
)
def test_llama_3_tokenizer_travels(release, published, tmp_path):
    instruct = "instruct" in published
    write_narrow(tmp_path / "meta", release, LLAMA3 / "tokenizer.model", 128256)
    options = told(release, instruct)
    convert(tmp_path / "meta", tmp_path / "hf", "hf", reading=options, check="none")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = meta.read(tmp_path / "meta", options).encode
    for text, ids in vectors("ggml-vocab-llama-bpe.gguf"):
        assert loaded(text).input_ids == own(text) == [128000, *ids], text
    special = json.loads((LLAMA3 / published / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    found = {str(index): token.content for index, token in loaded.added_tokens_decoder.items()}
    assert found == {index: token["content"] for index, token in special.items()}
    text = "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|end_of_text|>"
    assert loaded(text).input_ids == own(text) == [128000, 128006, 882, 128007, 271, 9906, 128009, 128001]
    assert loaded.eos_token_id == (128009 if instruct else 128001)
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    assert set(stops) == ({128001, 128008, 128009} if instruct else {128001})
    convert(tmp_path / "hf", tmp_path / "back", "meta", check="none")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (LLAMA3 / "tokenizer.model").read_bytes()
    reading = json.loads((tmp_path / "back" / "reading.json").read_text("utf-8"))
    assert reading == {"meta_version": release, "instruct": instruct}


@pytest.mark.skipif(not LLAMA2.is_dir(), reason="../shared/data/tokenizers/llama2 is absent")
def test_llama_2_tokenizer_travels(tmp_path):
    write_narrow(tmp_path / "meta", "2", LLAMA2 / "tokenizer.model", 32000)
    convert(tmp_path / "meta", tmp_path / "hf", "hf", reading=told("2"), check="tensors")
    convert(tmp_path / "hf", tmp_path / "back", "meta", check="tensors")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "back" / "tokenizer.model"))
    own = meta.read(tmp_path / "meta", told("2")).encode
    for text, ids in vectors("ggml-vocab-llama-spm.gguf"):
        assert loaded(text).input_ids == own(text) == [1, *ids], text
        assert written.encode(text) == ids, text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)
    assert (written.bos_id(), written.eos_id(), written.unk_id(), written.pad_id()) == (1, 2, 0, -1)


@needs_llama3
def test_ranks_make_the_tokenizer_that_transformers_makes_of_them(monkeypatch):
    monkeypatch.setenv("DATA_GYM_CACHE_DIR", "")  # tiktoken would keep a copy of the file by its path
    expected = TikTokenConverter(str(LLAMA3 / "tokenizer.model")).converted()
    found = read_ranks(LLAMA3 / "tokenizer.model", ["<|begin_of_text|>"]).to_tokenizer()
    expected, found = json.loads(expected.to_str()), json.loads(found.to_str())
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        assert found[part] == expected[part], part


@pytest.mark.parametrize(
    ("release", "instruct", "stops", "pad"),
    [
        ("3", False, (1,), None),
        ("3", True, (9, 1), None),
        ("3.1", False, (1,), 4),
        ("3.1", True, (9, 1, 8), 4),
        ("3.2", True, (9, 1, 8), 4),
    ],
)
def test_stops_are_the_releases(release, instruct, stops, pad, tmp_path):
    """As offsets from the first special token, 128000 in Llama 3: end of text 1, end of message 8, end of turn 9."""
    reference.write(tmp_path / "meta", release)
    generation = meta.read(tmp_path / "meta", told(release, instruct)).generation
    first = 256 + len(reference.JOINS)
    assert generation.bos_token_id == first
    assert generation.stop_token_ids == tuple(first + stop for stop in stops)
    assert generation.pad_token_id == (None if pad is None else first + pad)


def test_a_chat_template_travels_or_is_told_to_be_missing(tmp_path, caplog):
    reference.write(tmp_path / "meta", "3.1")
    convert(tmp_path / "meta", tmp_path / "without", "hf", reading=told("3.1", True), check="tensors")
    assert "holds no chat template" in caplog.text
    assert not (tmp_path / "without" / "chat_template.jinja").exists()
    template = "{% for m in messages %}{{ m['content'] }}<|eot_id|>{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template, encoding="utf-8")
    options = told("3.1", True, tmp_path / "chat.jinja")
    convert(tmp_path / "meta", tmp_path / "with", "hf", reading=options, check="tensors")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "with")
    assert loaded.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the<|eot_id|>"
    assert (loaded.bos_token, loaded.eos_token) == ("<|begin_of_text|>", "<|eot_id|>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model_type='UNIGRAM'"),
        (b"\nabc", "no whole SentencePiece model"),
        (reference.sentencepiece_model(319), "has 319 tokens, but tok_embeddings.weight has 320 rows"),
    ],
)
def test_a_bad_sentencepiece_model_is_refused(content, message, tmp_path):
    reference.write(tmp_path / "meta", "2")
    (tmp_path / "meta" / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "meta", tmp_path / "hf", "hf", reading=told("2"))


def test_a_token_beyond_the_pieces_is_refused_by_name(tmp_path):
    reference.write(tmp_path / "meta", "2")
    convert(tmp_path / "meta", tmp_path / "hf", "hf", reading=told("2"), check="none")
    file = tmp_path / "hf" / "tokenizer.json"
    content = json.loads(file.read_text("utf-8"))
    last = next(piece for piece, index in content["model"]["vocab"].items() if index == 319)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 319, "content": last})
    file.write_text(json.dumps(content), encoding="utf-8")
    named = re.escape(repr([last]))
    with pytest.raises(UserError, match=f"added_tokens {named} cannot be held by SentencePiece's pieces"):
        convert(tmp_path / "hf", tmp_path / "back", "meta", check="none")
    assert not (tmp_path / "back").exists()


def test_ranks_are_refused_by_a_format_of_pieces(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(reference.ranks())
    ranks = read_ranks(tmp_path / "tokenizer.model", ["<|begin_of_text|>"])
    with pytest.raises(UserError, match="tokenizer=ranks of byte strings cannot be held by llama2c"):
        write_pieces(ranks, tmp_path / "tokenizer.bin", 273)


def test_an_absent_package_is_named_with_the_file_that_brings_it():
    with pytest.raises(UserError, match=r"a test needs no_such_package.* pip install -r requirements/convert.txt"):
        optional("no_such_package", "a test")
