"""What fuzzing found: each damaged or odd input is refused with its place and cause, at once and in little memory."""

import json
import pickle
import struct
import time
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import torch

from config.constraints import ConfigError
from config.loader import read_command_line
from config.recipe import load_recipe
from config.schema import ModelConfig, OutputConfig, SourceConfig
from src.cache import _is_complete, read_account
from src.callbacks import MetricsFile
from src.chat import ChatTemplate
from src.checkpoints import hf, llama2c, llama2c_training, meta, nanogpt
from src.checkpoints.checkpoint import ReadOptions
from src.checkpoints.gguf import read as read_gguf
from src.checkpoints.gguf_tokenizer import _Parts
from src.checkpoints.pickles import read_plain, read_saved
from src.files import Row, file_rows
from src.formats import Conversation, RowConverter, row_converter
from src.model import load_settings, load_tokenizer
from src.run import Run, open_run
from src.sources import open_source
from src.streaming import Mark, Place, StreamFeed
from tests import llama2c_reference, meta_reference
from tests.test_checkpoints import made_up
from tests.test_llama2c_training import save_training
from tests.test_nanogpt_checkpoints import small  # noqa: F401 - a fixture
from tests.tiny_run import write_checkpoint
from tests.toy_tokenizer import toy_tokenizer
from utils.checkpoint_record import damage
from utils.digests import Digests
from utils.errors import UserError

SHORT = 4000
"""Characters of a message that a person still reads."""


def refused(read, match):
    """The message of a refusal, which comes within seconds of the processor's time: what it mends took hours."""
    started = time.process_time()
    with pytest.raises((UserError, ConfigError), match=match) as raised:
        read()
    assert time.process_time() - started < 10
    assert len(str(raised.value)) < SHORT
    return str(raised.value)


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, after in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "with its aliases written out, this holds more than 100,000 values"),
        ("model: &a [*a]\n", "an alias stands within its own anchor"),
        ("model: " + "[" * 900, "nested too deeply"),
        ("model: " + "{a: " * 900, "nested too deeply"),
        ("model: !!timestamp x\n", "not what its tag or form says"),
        ("model: !!bool x\n", "not what its tag or form says"),
        ("model: !!int x\n", "not what its tag or form says"),
        ("model: !!float x\n", "not what its tag or form says"),
        ("model: " + "9" * 5000 + "\n", "not what its tag or form says"),
        ('model: "\\U00110000"\n', "not what its tag or form says"),
    ],
)
def test_a_recipe_that_is_odd_yaml_is_refused(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    refused(lambda: load_recipe(path), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.train.²", "x"], "is no option"),
        (["--data.train.²path", "x"], "is no option"),
        (["--data.train." + "9" * 30 + ".path", "x"], "is no option"),
        (["--adapter.rank", "9" * 9000], "--adapter.rank was given 999.*; it takes a whole number"),
        (["--model.architecture.a", "[" * 900], "is no YAML"),
    ],
)
def test_an_odd_option_is_refused(arguments, message):
    refused(lambda: read_command_line(["--config", "config/smol.py", *arguments]), message)


DEEP = '{"messages": ' + "[" * 3000


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", DEEP, "is not JSON at line 1: lists and objects are nested too deeply"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", "is not JSON at line 1: Exceeds the limit"),
        ("a.json", "[" + DEEP, "is not JSON at line 1, column 2: maximum recursion depth"),
        ("a.json", '[{"text": ' + "9" * 5000 + "}]", "is not JSON at line 1, column 2: Exceeds the limit"),
    ],
)
def test_json_that_python_does_not_read_is_named_by_its_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    refused(lambda: list(file_rows(tmp_path / name, name)), message)


@pytest.mark.parametrize("columns", [["c" * 9000], [f"column {number}" for number in range(3000)]])
def test_columns_are_told_in_few_words_where_they_are_many(columns, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(dict.fromkeys(columns, 1)), encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    refused(lambda: row_converter(open_source(source, "data.train.0")), "fit no format")


def arrow(path, *, indexed):
    table = pyarrow.table({"text": ["first text", "second text", "third"]})
    with (pyarrow.ipc.new_file if indexed else pyarrow.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table)
    return path.read_bytes()


@pytest.mark.parametrize("indexed", [True, False])
def test_offsets_beyond_an_arrow_file_are_not_followed(indexed, tmp_path):
    """Arrow itself reads what the memory holds there, or ends the process."""
    content = arrow(tmp_path / "a.arrow", indexed=indexed)
    offsets = struct.pack("<4i", 0, 10, 21, 26)
    assert content.count(offsets) == 1
    (tmp_path / "a.arrow").write_bytes(content.replace(offsets, struct.pack("<4i", 0, 10, 2**30, 2**30 + 9)))
    refused(lambda: list(file_rows(tmp_path / "a.arrow", "a.arrow")), "a.arrow cannot be read as arrow")


@pytest.mark.parametrize("indexed", [True, False])
def test_text_of_an_arrow_file_that_is_no_utf_8_is_refused(indexed, tmp_path):
    content = arrow(tmp_path / "a.arrow", indexed=indexed)
    (tmp_path / "a.arrow").write_bytes(content.replace(b"second", b"sec\xffnd"))
    refused(lambda: list(file_rows(tmp_path / "a.arrow", "a.arrow")), "a.arrow cannot be read as arrow")


@pytest.mark.parametrize("state", [{"_data_files": [{}]}, {"_data_files": 1.5}, [], {"_data_files": [{"filename": 1}]}])
def test_a_saved_data_set_with_an_odd_state_is_refused(state, tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}", encoding="utf-8")
    (tmp_path / "state.json").write_text(json.dumps(state), encoding="utf-8")
    refused(lambda: open_source(SourceConfig(path=str(tmp_path)), "data.train.0"), "cannot be read as a saved data set")


@pytest.mark.parametrize("tool", [{"name": ["f"]}, {"function": "f"}, {"function": {"name": 7}}])
def test_a_tool_without_a_text_for_a_name_is_refused(tool):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    convert = RowConverter("messages", "messages")
    refusal = convert.checked(Row("line 1", {"messages": turns, "tools": [tool]}))
    assert "line 1 has a tool that is no object with a text as its name" in refusal.reason


QUESTION = Conversation(({"role": "user", "content": "hi"},), "line 1")


@pytest.mark.parametrize(
    "text",
    [
        "{{ 1 / 0 }}",
        "{{ range(1000000000) | list }}",
        "{{ [1] | sum(start='a') }}",
        "{{ '\ud800' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_in_its_own_way_refuses_the_row(text):
    [refusal] = ChatTemplate.of(toy_tokenizer(text)).render_each([QUESTION])
    assert "line 1: the chat template refuses these messages" in refusal.reason


def test_a_template_that_does_not_end_is_told(monkeypatch):
    monkeypatch.setattr("src.chat.PROBE_S", 0.2)
    text = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    refused(lambda: ChatTemplate.of(toy_tokenizer(text)), "has a loop that does not end")


# Checkpoints


def test_a_header_that_claims_millions_of_layers_is_refused_at_once(tmp_path):
    model, tokenizer = made_up(tmp_path, tied=True)
    content = bytearray(model.read_bytes())
    content[8:12] = struct.pack("<i", 2**24 - 1)
    model.write_bytes(content)
    refused(lambda: llama2c.read(model, ReadOptions(tokenizer)), "too few for the 16777215 layers of its header")


def test_settings_that_claim_more_layers_than_tensors_are_refused_at_once(small, tmp_path):  # noqa: F811
    content = torch.load(small, weights_only=True)
    content["model_args"]["n_layer"] = 2**40
    torch.save(content, small)
    refused(lambda: nanogpt.read(small, ReadOptions()), f"n_layer={2**40}, but 1[0-9] tensors are stored")
    model, tokenizer = made_up(tmp_path, tied=True)
    save_training(tmp_path / "llama.pt", *llama2c_reference.read_legacy(model), n_layers=2**40)
    refused(lambda: llama2c_training.read(tmp_path / "llama.pt", ReadOptions(tokenizer)), f"n_layers={2**40}, but")
    meta_reference.write(tmp_path / "meta", "2")
    params = tmp_path / "meta" / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text("utf-8")) | {"n_layers": 2**40}), "utf-8")
    refused(lambda: meta.read(tmp_path / "meta", ReadOptions(meta_version="2")), f"n_layers={2**40}, but")


@pytest.mark.parametrize("odd", ["\ud800", None, float("nan"), 10**400, True])
def test_odd_numbers_among_the_settings_of_a_training_are_refused(odd, small, tmp_path):  # noqa: F811
    content = torch.load(small, weights_only=True)
    content["model_args"]["dropout"] = odd
    torch.save(content, small)
    refused(lambda: nanogpt.read(small, ReadOptions()), r"model_args\['dropout'\]")
    model, tokenizer = made_up(tmp_path, tied=True)
    save_training(tmp_path / "llama.pt", *llama2c_reference.read_legacy(model), hidden_dim=24, norm_eps=odd)
    refused(lambda: llama2c_training.read(tmp_path / "llama.pt", ReadOptions(tokenizer)), r"model_args\['norm_eps'\]")


def with_settings(folder, **changes):
    """A checkpoint whose config.json has other settings."""
    write_checkpoint(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | changes), "utf-8")
    return ModelConfig(path=str(folder))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2**40},
        {"model_type": "qwen2", "num_hidden_layers": 2**40},  # whose config lists the kind of each layer
        {"text_config": {"num_hidden_layers": 2**40}},
        {"tie_word_embeddings": None},
        {"rope_parameters": [1]},
        {"num_attention_heads": 0},
        {"dtype": "no such dtype"},
    ],
)
def test_odd_settings_of_a_checkpoint_are_refused_in_conversion_and_training(changes, tmp_path):
    config = with_settings(tmp_path / "base", **changes)
    refused(lambda: hf.read(tmp_path / "base", ReadOptions()), "config.json")
    refused(lambda: load_settings(config, load_tokenizer(config)), str(tmp_path / "base"))


def test_an_index_that_names_a_file_beyond_any_file_system_is_refused(tmp_path):
    config = with_settings(tmp_path / "base")
    index = tmp_path / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys("abc", "a" * 5000)}), "utf-8")
    refused(lambda: hf.read(tmp_path / "base", ReadOptions()), "base lacks")
    refused(lambda: load_settings(config, load_tokenizer(config)), "is incomplete: 1 of 1 weight files")


def test_odd_settings_of_generation_are_refused(tmp_path):
    write_checkpoint(tmp_path / "base")
    for odd in ({"eos_token_id": "a"}, {"eos_token_id": [None]}, {"bos_token_id": 1.5}, []):
        (tmp_path / "base" / "generation_config.json").write_text(json.dumps(odd), "utf-8")
        refused(lambda: hf.read(tmp_path / "base", ReadOptions()), "generation_config.json")


@pytest.mark.parametrize("changes", [{"eos_token": 3}, {"tie_word_embeddings": None}, {"model_max_length": {}}])
def test_odd_settings_of_a_tokenizer_are_refused(changes, tmp_path):
    config = with_settings(tmp_path / "base")
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    if "tie_word_embeddings" in changes:
        config = with_settings(tmp_path / "base", **changes)
    refused(lambda: load_tokenizer(config), "no tokenizer could be loaded from")


def test_an_odd_template_or_token_of_a_tokenizer_is_no_crash_on_the_way_to_gguf():
    parts = _Parts("tokenizer.json", {"added_tokens": [], "model": {"vocab": {}}}, {"eos_token": ["a"]}, None)
    assert parts.named == {}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch tells that quantized tensors will go
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
)
def test_tensors_that_are_not_plain_numbers_are_refused(make, tmp_path):
    meta_reference.write(tmp_path / "meta", "2")
    shard = tmp_path / "meta" / "consolidated.00.pth"
    torch.save(torch.load(shard, weights_only=True) | {"norm.weight": make()}, shard)
    refused(lambda: meta.read(tmp_path / "meta", ReadOptions(meta_version="2")), "consolidated.00.pth")


def test_tensors_without_a_text_for_a_name_are_refused(tmp_path):
    meta_reference.write(tmp_path / "meta", "2")
    shard = tmp_path / "meta" / "consolidated.00.pth"
    torch.save(torch.load(shard, weights_only=True) | {("a", 1): torch.ones(1)}, shard)
    refused(lambda: meta.read(tmp_path / "meta", ReadOptions(meta_version="2")), r"\('a', 1\) is a Tensor")


def rewritten(path, change):
    """A file of torch.save whose pickle was changed in place."""
    content = path.read_bytes()
    start = content.index(b"\x80\x02}")
    path.write_bytes(content[:start] + change(content[start : start + 60]) + content[start + 60 :])


@pytest.mark.parametrize("opcode", [b"1", b"R", b"h\x63", b"e", b"u", b"s", b"Q", b"\x94"])
def test_a_pickle_with_an_opcode_out_of_place_is_refused(opcode, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    rewritten(tmp_path / "a.pt", lambda start: start[:2] + opcode + start[2 + len(opcode) :])
    refused(lambda: read_saved(tmp_path / "a.pt"), "a.pt")
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + opcode + b".")
    refused(lambda: read_plain(tmp_path / "a.pkl"), "a.pkl is no pickle of plain values")


def test_a_plain_pickle_that_claims_more_than_memory_holds_is_refused(tmp_path):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", 2**46) + b"x.")
    refused(lambda: read_plain(tmp_path / "a.pkl"), "a.pkl is no pickle of plain values")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps([1])[:-1])
    refused(lambda: read_plain(tmp_path / "b.pkl"), "b.pkl is no pickle of plain values")


def test_a_gguf_file_of_a_few_bytes_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40))
    refused(lambda: read_gguf(tmp_path / "a.gguf", ReadOptions()), "a.gguf")


# Records that a run reads back


@pytest.mark.parametrize(
    "record",
    [
        "[" * 3000,
        '{"step": 2, "files": {"a": {"bytes": "many", "sha256": "x"}}}',
        '{"step": 2, "files": {"a": {"bytes": 1, "sha256": 7}}}',
        '{"step": 2, "files": []}',
        "7",
    ],
)
def test_an_odd_record_of_a_checkpoint_is_damage(record, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "a").write_text("1")
    (checkpoint / "checkpoint.json").write_text(record, "utf-8")
    assert "its checkpoint.json" in damage(checkpoint)


@pytest.mark.parametrize("text", ["{", "[" * 3000, "\udcff"])
def test_a_damaged_record_of_a_run_is_named_on_resuming(text, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}", "utf-8")
    (tmp_path / "run" / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    run = open_run(OutputConfig(folder=str(tmp_path), name="run"), resume=True)
    assert isinstance(run, Run)
    refused(lambda: run.record("config.json", {"a": 1}, matters=("",)), "config.json is no JSON")


@pytest.mark.parametrize("line", ['{"loss": 1}', "7", '{"step": "a"}', "[" * 3000, '{"step": 3', "[]"])
def test_metrics_are_cut_at_a_line_that_is_none(line, tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n', "utf-8")
    MetricsFile(file).on_train_begin(None, SimpleNamespace(is_world_process_zero=True, global_step=4), None)
    assert file.read_text("utf-8") == '{"step": 1}\n'


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": 1, "given": 0, "place": 3, "tallies": []}', "[" * 3000])
def test_a_place_in_a_stream_that_is_none_is_refused(content, tmp_path):
    feed = StreamFeed.__new__(StreamFeed)
    (tmp_path / "stream.json").write_text(content, "utf-8")
    refused(lambda: feed.load_state_from(tmp_path / "stream.json"), "stream.json")


def test_a_place_in_a_stream_comes_back_as_it_was_told(tmp_path):
    feed, other = StreamFeed.__new__(StreamFeed), StreamFeed.__new__(StreamFeed)
    row = (np.arange(3, dtype=np.int32), np.arange(3, dtype=np.int32))
    feed.mark = Mark(7, 2, Place(1, 2, (30,), (), (row,)), ())
    (tmp_path / "stream.json").write_text(json.dumps(feed.state()), "utf-8")
    other.load_state_from(tmp_path / "stream.json")
    assert other.state() == feed.state()


@pytest.mark.parametrize("content", ["{", "[]", "7", '{"shards": 7}', '{"shards": [7]}', "[" * 3000, "\udcff"])
def test_a_damaged_token_cache_counts_as_absent(content, tmp_path):
    data = content.encode("utf-8", "surrogateescape")
    for name in ("complete.json", "account.json", "digests.json"):
        (tmp_path / name).write_bytes(data)
    assert not _is_complete(tmp_path)
    assert read_account(tmp_path) is None
    digests = Digests(tmp_path / "digests.json")
    assert len(digests.sha256(tmp_path / "account.json")) == 64


@pytest.mark.parametrize("entry", ["abcdefgh", [1, 2, 3, 4, 5, 6], {"a": 1}, [1]])
def test_digests_that_are_none_are_taken_anew(entry, tmp_path):
    (tmp_path / "digests.json").write_text(json.dumps({str(tmp_path / "a"): entry}), "utf-8")
    (tmp_path / "a").write_text("b")
    assert Digests(tmp_path / "digests.json").sha256(tmp_path / "a").startswith("3e23e8160039594a")  # sha256sum
