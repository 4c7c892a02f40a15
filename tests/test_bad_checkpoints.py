"""Damaged checkpoints are refused with the file and the tensor, in conversion and in training; nothing is left half."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from src.checkpoints.checkpoint import ReadOptions, WriteOptions
from src.checkpoints.convert import convert
from tests.test_checkpoints import made_up
from tests.test_hf_checkpoints import FAMILIES, save
from tests.toy_tokenizer import toy_tokenizer
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(params=["llama", "gpt2", "mixtral"])
def sharded(request, tmp_path):
    """A folder of a few shards, of a family in typed fields and of two in the words of their config.json."""
    save(tmp_path / "whole", FAMILIES[request.param])
    convert(tmp_path / "whole", tmp_path / "a", "hf", writing=WriteOptions(shard_bytes=20_000), check="none")
    shutil.rmtree(tmp_path / "whole")
    return tmp_path / "a"


def refused(folder, message, **options):
    with pytest.raises(UserError, match=message):
        convert(folder, folder.parent / "out", "hf", **options)
    assert not (folder.parent / "out").exists()
    assert not list(folder.parent.glob(".out*"))


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("kept", [0, 4, 100, -8])
def test_a_shard_that_is_cut_short_is_named(kept, sharded):
    file = shards(sharded)[1]
    file.write_bytes(file.read_bytes()[:kept])
    refused(sharded, f"{file.name} is no whole safetensors file")


def test_a_missing_shard_is_named(sharded):
    file = shards(sharded)[-1]
    file.unlink()
    refused(sharded, rf"lacks \['{file.name}'\]")


def edited(file, change):
    tensors = load_file(file)
    name = sorted(tensors)[0]
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def test_a_tensor_of_another_shape_is_named_with_its_file(sharded):
    def wider(tensors, name):
        tensors[name] = tensors[name].repeat_interleave(2, 0)

    name = edited(shards(sharded)[1], wider)
    refused(sharded, f"{name}.* has shape")


def test_a_tensor_that_the_index_puts_in_another_shard_is_named(sharded):
    """As after one shard of another model, or of an older save, was copied over."""
    name = edited(shards(sharded)[1], lambda tensors, name: tensors.pop(name))
    refused(sharded, rf"{shards(sharded)[1].name} lacks 1 tensors .*{name}")


def test_a_shard_of_another_model_is_named(sharded):
    other = shards(sharded)[1]

    def renamed(tensors, name):
        tensors["model.layers.77.other.weight"] = tensors.pop(name)

    edited(other, renamed)
    refused(sharded, rf"{other.name}.*model.layers.77.other.weight")


def test_an_index_without_a_map_or_one_that_leaves_a_tensor_out_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text("utf-8"))
    first = sorted(content["weight_map"])[0]
    rest = {name: file for name, file in content["weight_map"].items() if name != first}
    index.write_text(json.dumps(content | {"weight_map": rest}), "utf-8")
    refused(sharded, first)
    index.write_text(json.dumps({"metadata": {}}), "utf-8")
    refused(sharded, "model.safetensors.index.json has no weight_map")
    index.write_text(json.dumps({"weight_map": {"a": "../a/model.safetensors"}}), "utf-8")
    refused(sharded, "model.safetensors.index.json has no weight_map of file names")
    index.write_text("{", "utf-8")
    refused(sharded, "model.safetensors.index.json is no JSON")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_tensor_that_is_missing_from_a_whole_file_is_named(family, tmp_path):
    save(tmp_path / "a", FAMILIES[family])
    name = edited(tmp_path / "a" / "model.safetensors", lambda tensors, name: tensors.pop(name))
    refused(tmp_path / "a", name)
    refused(tmp_path / "a", name, check="none")


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(sharded):
    many = "".join(chr(0x4E00 + number) for number in range(400))
    bigger = toy_tokenizer(merges_from=f"{many} {many}", special=tuple(f"<|{number}|>" for number in range(100)))
    bigger.save_pretrained(sharded)
    refused(sharded, r"tokenizer.json has \d+ ids, but the embedding of .* has 320 rows")


def test_a_tokenizer_with_fewer_ids_is_taken_as_padding_and_told(sharded, caplog):
    with caplog.at_level("INFO", logger="smolfactory"):
        convert(sharded, sharded.parent / "out", "hf", check="none")
    assert "tokenizer.json has 289 ids, the embedding 320 rows: the rest is padding" in caplog.text


@pytest.mark.parametrize("text", ["{}", "", "[1]", '{"version": "1.0", "model": {"type": "Odd"}}'])
def test_a_file_that_is_no_tokenizer_is_named(text, sharded):
    (sharded / "tokenizer.json").write_text(text, "utf-8")
    refused(sharded, "tokenizer.json is no tokenizer")


FULL = """
import resource, sys
from src.checkpoints.checkpoint import ReadOptions
from src.checkpoints.convert import convert
from utils.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]),) * 2)
tokenizer = sys.argv[5] if len(sys.argv) > 5 else None
from pathlib import Path
try:
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], reading=ReadOptions(tokenizer and Path(tokenizer)))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "target", ["hf", "llama2c", *(pytest.param(f"llama2c-v{version}", marks=pytest.mark.slow) for version in (1, 2))]
)  # others have tests of their own
def test_a_disk_that_fills_up_is_told_with_the_file_and_leaves_nothing(target, tmp_path):
    """A limit on the size of files stands for the disk: the kernel refuses the write in the same place."""
    model, tokenizer = made_up(tmp_path, tied=True)
    limit = {"hf": 20_000, "llama2c-v2": 6_000}.get(target, 16_000)  # the tokenizers take less
    command = [sys.executable, "-c", FULL, model, tmp_path / "out", target, limit, tokenizer]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ}
    )
    name = "model.safetensors" if target == "hf" else "model.bin"
    assert f"out was not written: {name} could not be" in done.stdout
    assert "free space on its disk" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "tokenizer.bin"]


def test_a_tied_llama_without_its_embedding_is_named(tmp_path):
    config = LlamaConfig(**FAMILIES["llama"].to_diff_dict() | {"tie_word_embeddings": True})
    save(tmp_path / "a", config)
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    refused(tmp_path / "a", "model.embed_tokens.weight")


def test_a_tokenizer_folder_without_its_file_is_named(sharded):
    (sharded.parent / "empty").mkdir()
    refused(sharded, "empty has no tokenizer.json", reading=ReadOptions(sharded.parent / "empty"))
