"""A tokenizer whose class gives other ids than its file is refused, and those that agree are not."""

import json

import pytest
from transformers import AutoTokenizer

from config.schema import ModelConfig
from src.checkpoints.llama2c_tokenizer import read_pieces
from src.model import load_tokenizer
from src.tokenizer_check import TEXTS, check_ids
from tests.toy_tokenizer import shared_file, toy_tokenizer
from utils.errors import UserError


@pytest.fixture
def llama2(tmp_path):
    """Llama 2's vocabulary as a tokenizer.json whose ids are SentencePiece's, of the class that is named."""

    def folder(class_name):
        pieces = read_pieces(shared_file("tokenizers/llama2/tokenizer.bin"), 32000)
        pieces.to_tokenizer().save(str(tmp_path / "tokenizer.json"))
        settings = {"tokenizer_class": class_name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return str(tmp_path)

    return folder


def test_a_class_that_overrides_its_file_is_refused_with_text_and_ids(llama2):
    folder = llama2("LlamaTokenizer")
    assert AutoTokenizer.from_pretrained(folder)(" ").input_ids != AutoTokenizer.from_pretrained(folder)("").input_ids
    with pytest.raises(UserError, match=r"loaded as LlamaTokenizer, which reads .* but its tokenizer.json as"):
        load_tokenizer(ModelConfig(path=folder, tokenizer=folder))


def test_the_file_as_it_is_passes(llama2):
    folder = llama2("PreTrainedTokenizerFast")
    load_tokenizer(ModelConfig(path=folder, tokenizer=folder))


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_stock_tokenizers_agree_with_their_files(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared_file(f"tokenizers/{name}"))
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    check_ids(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))


def test_one_changed_merge_is_seen(tmp_path):
    tokenizer = toy_tokenizer(merges_from=" ".join(TEXTS))
    tokenizer.save_pretrained(tmp_path)
    check_ids(tokenizer, str(tmp_path))
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"which reads .* but its tokenizer.json as"):
        check_ids(tokenizer, str(tmp_path))


def test_what_a_file_truncates_or_pads_to_is_no_difference(tmp_path):
    tokenizer = toy_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(tmp_path)
    check_ids(AutoTokenizer.from_pretrained(tmp_path), str(tmp_path))
