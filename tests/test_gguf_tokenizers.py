"""A tokenizer travels through GGUF: llama.cpp's own vectors, special tokens and chat templates hold on both sides."""

import json

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from src.checkpoints.convert import convert
from src.checkpoints.llama2c_tokenizer import read_pieces
from tests.test_gguf_checkpoints import CONFIGS, SIZES, save
from tests.toy_tokenizer import CHATML, SHARED, shared_file
from utils.errors import UserError

VECTORS = SHARED / "tokenizer_vectors"


def vectors(name):
    texts = (VECTORS / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (VECTORS / f"ggml-vocab-{name}.gguf.out").read_text(encoding="utf-8").split("\n")
    pairs = [(text, [int(token) for token in line.split()]) for text, line in zip(texts, lines, strict=True)]
    assert len(pairs) == 47
    return pairs


def llama2():
    backend = read_pieces(shared_file("tokenizers/llama2/tokenizer.bin"), 32_000).to_tokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama2_chat():
    tokenizer = llama2()
    tokenizer.add_tokens([AddedToken("[INST]", special=True, normalized=False), AddedToken("[TOOL]", normalized=False)])
    tokenizer.chat_template = CHATML
    return tokenizer


def llama3():
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"]
    path = str(shared_file("tokenizers/llama3/tokenizer.model"))
    backend = TikTokenConverter(vocab_file=path, extra_special_tokens=special).converted()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[2])
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {
    "llama-spm": llama2,
    "llama-spm with tokens added": llama2_chat,
    "llama-bpe": llama3,
    "gpt-2": lambda: AutoTokenizer.from_pretrained(shared_file("tokenizers/gpt2")),
    "qwen2": lambda: AutoTokenizer.from_pretrained(shared_file("tokenizers/qwen2")),
}
SPECIAL = ("<s>", "</s>", "<|begin_of_text|>", "<|eot_id|>", "<|endoftext|>", "<|im_end|>", "[INST]", "[TOOL]")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in ("qwen2", "llama-bpe") else name for name in TOKENIZERS
    ],
)
def travelled(tmp_path_factory, request):
    """A tokenizer's vectors, its own folder, a GGUF file made from it, and a folder made from that."""
    if not VECTORS.is_dir():
        pytest.skip("../shared/data/tokenizer_vectors is absent")
    folder = tmp_path_factory.mktemp("travelled")
    tokenizer = TOKENIZERS[request.param]()
    small = SIZES | {"vocab_size": len(tokenizer) + 7, "hidden_size": 16, "num_hidden_layers": 1}
    small |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    save(folder / "a", LlamaConfig(**small), tokenizer)
    convert(folder / "a", folder / "b", "gguf", check="none")  # the next step reads it
    convert(folder / "b" / "model.gguf", folder / "c", "hf", check="tensors")
    return request.param, folder


def test_the_vectors_of_llama_cpp_hold_after_the_way_there_and_back(travelled):
    name, folder = travelled
    tokenizer = AutoTokenizer.from_pretrained(folder / "c")
    wrong = [
        text
        for text, expected in vectors(name.split()[0])
        if tokenizer(text, add_special_tokens=False).input_ids != expected
    ]
    assert wrong == []


def test_special_tokens_and_chat_template_travel(travelled):
    _, folder = travelled
    before, after = (AutoTokenizer.from_pretrained(folder / name) for name in "ac")
    for role in ("bos_token_id", "eos_token_id", "chat_template"):
        assert getattr(before, role) == getattr(after, role), role
    held = [token for token in SPECIAL if token in before.get_added_vocab()]
    assert held
    text = "a".join(held) + " b"
    assert before(text).input_ids == after(text).input_ids
    assert after.decode(after(f"x {held[0]} y").input_ids, skip_special_tokens=True).split() == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"pre_tokenizer=\[{'type': 'Whitespace'}\].* have no name"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer={'type': 'Lowercase'}"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(change, message, tmp_path):
    save(tmp_path / "a", CONFIGS["llama"])
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "a", tmp_path / "b", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.slow
def test_llama_cpp_gives_the_ids_of_its_own_vectors(travelled):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    name, folder = travelled
    model = llama_cpp.Llama(str(folder / "b" / "model.gguf"), vocab_only=True, verbose=False)
    for text, expected in vectors(name.split()[0]):
        assert model.tokenize(text.encode(), add_bos=False, special=False) == expected, text
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    for token in (token for token in SPECIAL if token in tokenizer.get_added_vocab()):
        assert model.tokenize(token.encode(), add_bos=False, special=True) == [tokenizer.get_vocab()[token]]
    assert model.token_bos() == tokenizer.bos_token_id or tokenizer.bos_token_id is None
    assert model.token_eos() == tokenizer.eos_token_id
