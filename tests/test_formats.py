"""Rows of each format as one conversation type, and what each error says."""

import json

import pytest

from config.schema import SourceConfig
from src.files import Row
from src.formats import IdsRow, TextRow, detect_format, row_converter
from src.refusal import Refusal
from src.sources import SourceRows, open_source
from tests.toy_tokenizer import shared_file
from utils.errors import UserError


def source(*rows, roles=None):
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    head = [Row(f"d.jsonl line {n}", row) for n, row in enumerate(rows, start=1)]
    return SourceRows("data.train.0", "d.jsonl", columns, head, lambda: head, roles or {})


def converted(found, name="auto"):
    return list(map(row_converter(found, name), found))


def only_row(values, name="auto", **roles):
    [row] = converted(source(values, roles=roles), name)
    return row


def pairs(row):
    return [(message["role"], message["content"]) for message in row.messages]


HELLO = [("user", "hi"), ("assistant", "Hello.")]
CHAT = [{"role": role, "content": content} for role, content in HELLO]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("messages", {"messages": CHAT}),
        ("messages", {"conversations": CHAT, "id": "7"}),
        ("messages", {"prompt": "hi", "prompt_id": "1", "messages": CHAT}),
        ("sharegpt", {"conversations": SHAREGPT}),
        ("prompt_completion", {"prompt": "hi", "completion": "Hello."}),
        ("prompt_completion", {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        ("question_answer", {"question": "hi", "answer": "Hello."}),
        ("messages", {"messages": json.dumps(CHAT)}),
        ("alpaca", {"instruction": "hi", "input": "", "output": "Hello."}),
        ("alpaca", {"instruction": "hi", "output": "Hello."}),
    ],
)
def test_every_format_is_told_and_gives_the_same_conversation(name, values):
    assert detect_format(source(values)) == name
    assert pairs(only_row(values)) == HELLO


def test_text_rows_are_their_own_type():
    assert only_row({"text": "Once.", "url": "x"}) == TextRow("Once.", "d.jsonl line 1")


def test_alpaca_takes_input_system_and_history():
    row = only_row(
        {
            "instruction": "Add.",
            "input": "1 2",
            "output": "3",
            "system": "Be exact.",
            "history": [["a", "b"], ["c", "d"]],
        }
    )
    assert pairs(row) == [
        ("system", "Be exact."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
        ("user", "Add.\n1 2"),
        ("assistant", "3"),
    ]


def test_sharegpt_tool_calls_and_tools_get_the_templates_form():
    call = {"name": "look_up", "arguments": {"city": "Oslo", "days": 2}}
    turns = [
        {"from": "system", "value": "S."},
        {"from": "human", "value": "Cold?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": '{"c": 3}'},
        {"from": "gpt", "value": "3."},
    ]
    row = only_row({"conversations": turns, "tools": json.dumps([{"name": "look_up", "parameters": {}}])})
    assert [message["role"] for message in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"] == [{"type": "function", "function": call}]
    assert row.tools == ({"type": "function", "function": {"name": "look_up", "parameters": {}}},)
    assert row.assistant_turns() == [2, 4]


def test_empty_keys_of_a_message_are_left_out():
    turns = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": "", "tool_calls": []},
    ]
    assert only_row({"messages": turns}).messages == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": ""},
    )


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("llama_factory/alpaca_en_demo.json", 999, "alpaca"),
        ("llama_factory/identity.json", 91, "alpaca"),
        ("llama_factory/glaive_toolcall_en_demo.json", 300, "sharegpt"),
        ("llama_factory/c4_demo.jsonl", 300, "text"),
        ("gsm8k/train.jsonl", 7473, "question_answer"),
        ("sharegpt/dummy_conversation.json", 500, "sharegpt"),
    ],
)
def test_real_files_are_told_and_read_whole(name, rows, expected):
    found = open_source(SourceConfig(path=str(shared_file(f"datasets/{name}"))), "data.train.0")
    assert detect_format(found) == expected
    assert len(converted(found)) == rows


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "kto_en_demo.json"])
def test_preference_data_is_refused(name):
    found = open_source(SourceConfig(path=str(shared_file(f"datasets/llama_factory/{name}"))), "data.train.0")
    with pytest.raises(UserError, match=r"holds preferences .*data\.train\.0\.columns as in `completion: chosen`"):
        detect_format(found)


def test_unknown_columns_are_listed_with_what_each_format_expects():
    with pytest.raises(UserError) as error:
        detect_format(source({"frage": "hi", "antwort": "Hello."}))
    message = str(error.value)
    assert "d.jsonl has columns frage, antwort, which fit no format" in message
    assert "prompt_completion: `prompt` and `completion`" in message
    assert "alpaca: `instruction` and `output`" in message
    assert "data.train.0.columns, as in `prompt: question`" in message


def test_columns_of_two_formats_are_an_error():
    with pytest.raises(UserError, match=r"may be alpaca or text \(columns .*set data\.train\.0\.format"):
        detect_format(source({"instruction": "a", "output": "b", "text": "a b"}))


def test_a_format_without_its_columns_is_an_error():
    with pytest.raises(
        UserError, match=r"format=alpaca expects `instruction` and `output`.*d\.jsonl has instruction, response"
    ):
        only_row({"instruction": "a", "response": "b"}, "alpaca")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": [*CHAT, {"role": "robot", "content": "x"}]}, r"line 1, message 3 has role 'robot'; allowed are"),
        ({"messages": [*CHAT, {"role": "user", "content": 5}]}, r"line 1, message 3 \(user\) has content of type int"),
        ({"messages": [*CHAT, {"role": "user"}]}, r"line 1, message 3 \(user\) has content of type NoneType"),
        ({"messages": [*CHAT, "x"]}, r"line 1, message 3 is of type str"),
        (
            {"conversations": [*SHAREGPT, {"from": "me", "value": "x"}]},
            r"line 1, message 3 is from 'me'; allowed are human|system",
        ),
        ({"prompt": "hi", "completion": 5}, r"line 1 has `completion` of type int; it must be a text"),
        ({"messages": CHAT, "tools": "no"}, r"line 1: `tools` is not JSON"),
        (
            {"messages": [{"role": "system", "content": "S."}, *CHAT], "system": "T."},
            r"line 1 has a `system` column and",
        ),
    ],
)
def test_a_bad_row_is_named(values, message):
    with pytest.raises(UserError, match=message):
        only_row(values)


ODD = (
    None,
    True,
    5,
    1.5,
    "",
    "x",
    "[",
    "[1]",
    "{}",
    [],
    {},
    [5],
    [None],
    [[]],
    [{}],
    [{"role": 1}],
    {"a": [1]},
    [[1, 2]],
)
"""Values that some column of some format does not allow."""


@pytest.mark.parametrize(
    "values",
    [
        {"messages": CHAT},
        {"conversations": SHAREGPT},
        {"prompt": "hi", "completion": "Hello."},
        {"question": "hi", "answer": "Hello."},
        {"instruction": "hi", "output": "Hello.", "input": "", "history": []},
        {"text": "Once."},
        {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_row_that_is_not_what_its_format_says_is_refused_and_never_ends_the_run(values):
    convert = row_converter(source(values))
    assert not isinstance(convert.checked(Row("d.jsonl line 1", values)), Refusal)
    refused = 0
    for column in (*convert.columns(), "system", "tools"):
        for odd in ODD:
            read = convert.checked(Row("d.jsonl line 7", {**values, column: odd}))
            if isinstance(read, Refusal):
                refused += 1
                assert (read.origin, read.kind) == ("d.jsonl line 7", "malformed")
                assert "line 7" in read.reason
    assert refused >= 10


def test_turns_that_are_not_to_be_trained_keep_their_place_behind_a_system_column():
    turns = [*CHAT, {"role": "user", "content": "more"}, {"role": "assistant", "content": "No.", "train": False}]
    row = only_row({"messages": turns, "system": "S."})
    assert row.untrained == (4,)
    assert row.messages[4] == {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"prompt": "hi", "completion": "Hello."}, 1),
        ({"prompt": "hi", "completion": "Hello.", "system": "S."}, 2),
        ({"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]}, 3),
        ({"question": "hi", "answer": "Hello."}, 1),
        ({"instruction": "hi", "output": "Hello.", "history": [["a", "b"]]}, 3),
        ({"messages": CHAT}, None),
    ],
)
def test_the_completion_starts_after_the_prompt(values, start):
    assert only_row(values).completion_start == start


def test_roles_of_the_config_name_speakers():
    turns = [{"from": "Ask", "value": "hi"}, {"from": "Bot", "value": "Hello."}]
    assert pairs(only_row({"conversations": turns}, Ask="user", Bot="assistant")) == HELLO
    with pytest.raises(UserError, match=r"is from 'Bot'; allowed are .*Ask; map others with roles"):
        only_row({"conversations": turns}, Ask="user")
    call = {"from": "call", "value": '{"name": "f", "arguments": {}}'}
    row = only_row({"conversations": [*SHAREGPT[:1], call]}, call="function_call")
    assert row.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_two_columns_of_messages_are_an_error_that_a_rename_mends():
    found = source({"messages": CHAT, "conversations": CHAT, "id": 1})
    with pytest.raises(UserError, match=r"messages in two columns, messages and conversations \(columns .*id\)"):
        row_converter(found)


def test_tokenized_rows_keep_their_labels():
    assert only_row({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}) == IdsRow(
        (5, 6, 7), (-100, -100, 7), "d.jsonl line 1"
    )
    assert only_row({"input_ids": "[5, 6]", "attention_mask": [1, 1]}).labels == (-100, 6)
    row = only_row({"input_ids": [5, 6], "labels": [5, 6]})
    assert (row.labels, row.first_label_dropped) == ((-100, 6), True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, r"line 1 has 2 input_ids and 1 labels"),
        (
            {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
            r"label 2 at position 0 is neither -100 nor the id there, 1",
        ),
        ({"input_ids": [1, 0], "attention_mask": [1, 0]}, r"line 1 is padded"),
        ({"input_ids": [], "labels": []}, r"`input_ids` that is not a list of at least one whole number"),
        ({"input_ids": [1.5]}, r"`input_ids` that is not a list of at least one whole number"),
    ],
)
def test_tokenized_rows_that_cannot_be_right_are_named(values, message):
    with pytest.raises(UserError, match=message):
        only_row(values)
