"""Rows of each format as one conversation type, and what each error says."""

import json

import pytest

from config.schema import SourceConfig
from src.files import Row
from src.formats import Conversation, TextRow, detect_format, require_assistant_turns, row_converter
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


def test_rows_without_an_assistant_turn_are_counted_and_the_first_named():
    rows = [Conversation(tuple(CHAT[: 1 + (n == 2)]), f"d.jsonl line {n}") for n in range(1, 7)]
    with pytest.raises(
        UserError, match=r"5 of 6 rows of d have no assistant turn.*line 1, .*line 3, .*line 4 \.\.\.;"
    ):
        require_assistant_turns(rows, "d")
