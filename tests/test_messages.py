"""Messages of every shape: tool calls, reasoning, parts, what is not to be trained, and what is refused."""

import json

import pytest

from src.messages import REASONING_FIELDS, checked_message, tool_schemas
from utils.errors import UserError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"days": 2}}}


def checked(message, **roles):
    return checked_message(message, "d line 1, message 1", roles)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"function": CALL["function"]},
        {"name": "f", "arguments": {"days": 2}},
        {"name": "f", "arguments": '{"days": 2}'},
        json.dumps({"name": "f", "arguments": {"days": 2}}),
    ],
)
def test_every_way_to_write_a_tool_call_gives_one_form(call):
    message, trained = checked({"role": "assistant", "content": None, "tool_calls": [call]})
    assert message == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert trained


def test_a_calls_id_and_other_keys_stay():
    call = {**CALL, "id": "c1"}
    assert checked({"role": "assistant", "content": "x", "tool_calls": [call]})[0]["tool_calls"] == [call]
    answer = {"role": "tool", "content": "3", "tool_call_id": "c1", "name": "f"}
    assert checked(answer) == (answer, True)


@pytest.mark.parametrize("name", REASONING_FIELDS)
def test_reasoning_stays_under_its_name(name):
    message = {"role": "assistant", "content": "Yes.", name: "Hm."}
    assert checked(message) == (message, True)
    assert checked({"role": "assistant", "content": None, name: "Hm."})[0]["content"] == ""


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}, "c"]
    assert checked({"role": "user", "content": parts})[0] == {"role": "user", "content": "a bc"}


@pytest.mark.parametrize(
    ("mark", "expected"),
    [({"train": False}, False), ({"train": True}, True), ({"weight": 0}, False), ({"weight": 1}, True), ({}, True)],
)
def test_marks_of_what_is_trained_are_read_and_taken_out(mark, expected):
    message = {"role": "assistant", "content": "x"}
    assert checked({**message, **mark}) == (message, expected)


def test_roles_of_the_file_are_mapped():
    assert checked({"role": "bot", "content": "x"}, bot="assistant")[0]["role"] == "assistant"
    assert checked({"role": "user", "content": "x"}, user="assistant")[0]["role"] == "assistant"


def test_tools_may_be_objects_texts_or_one_text():
    schema = {"name": "f", "parameters": {}}
    expected = ({"type": "function", "function": schema},)
    for tools in ([schema], [expected[0]], json.dumps([schema]), [json.dumps(schema)]):
        assert tool_schemas(tools, "d line 1") == expected
    assert tool_schemas("", "d line 1") == tool_schemas(None, "d line 1") == tool_schemas("[]", "d line 1") == ()


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, r"content part of type 'image'; only text"),
        ({"role": "user", "content": [5]}, r"content part of type 'int'"),
        ({"role": "user", "content": "x", "train": True}, r"\(user\) has train=True, but only the assistant's"),
        ({"role": "assistant", "content": "x", "train": "no"}, r"has train='no'; it must be True or False"),
        ({"role": "assistant", "content": "x", "train": 0}, r"has train=0; it must be True or False"),
        ({"role": "assistant", "content": "x", "weight": 0.5}, r"has weight=0\.5; it must be 0 or 1"),
        ({"role": "assistant", "content": "x", "thinking": ["a"]}, r"has thinking of type list; it must be a text"),
        (
            {"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"},
            r"has thinking and reasoning with different texts",
        ),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, r"must be an object with name and arguments"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "days"}]}, r"arguments of f is not JSON"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}, r"arguments of f are of type list"),
        ({"role": "assistant", "tool_calls": 5}, r"has `tool_calls` of type int"),
        ({"role": ["user"], "content": "x"}, r"has role \['user'\]"),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message, error):
    with pytest.raises(UserError, match=r"d line 1, message 1.*" + error):
        checked(message)
