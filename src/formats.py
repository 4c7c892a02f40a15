"""Formats: what a row of a data file holds -> one conversation type, or a text.

    name = detect_format(found)                # "alpaca", told from the columns and the first values
    rows = to_rows(found, name)                # [Conversation(messages=({"role": "user", ...}, ...)), ...]

| format            | columns                                                                           |
|-------------------|-----------------------------------------------------------------------------------|
| messages          | `messages` or `conversations`: a list of {role, content}                          |
| sharegpt          | `conversations` or `messages`: a list of {from, value}                            |
| prompt_completion | `prompt` and `completion`: each a text, or a list of {role, content}              |
| alpaca            | `instruction` and `output`; optional `input`, `history` ([[user, assistant], ...]) |
| text              | `text`                                                                            |

Every format but text may also have `system` (a text, put first) and `tools` (a list of JSON schemas, or its JSON).
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from src.sources import Row, SourceRows
from utils.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
EXPECTED = {
    "messages": "`messages` or `conversations`, a list of {role, content}",
    "sharegpt": "`conversations` or `messages`, a list of {from, value}",
    "prompt_completion": "`prompt` and `completion`",
    "alpaca": "`instruction` and `output`, optionally `input`, `system`, `history`",
    "text": "`text`",
}


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and the place they were read from.

    Each message has a `role` of ROLES and a `content` text; an assistant's may have `tool_calls`. `tools` are the JSON
    schemas offered to the model; empty: none.
    """

    messages: tuple[dict[str, Any], ...]
    origin: str
    tools: tuple[dict[str, Any], ...] = ()

    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def ends_with_answer(self) -> bool:
        """Whether the last message is the assistant's, with something before it to answer."""
        return len(self.messages) > 1 and self.messages[-1]["role"] == "assistant"

    def has_empty_answer(self) -> bool:
        """Whether the assistant says nothing in one of its turns, and calls no tool."""
        turns = (self.messages[turn] for turn in self.assistant_turns())
        return any(not turn["content"].strip() and not turn.get("tool_calls") for turn in turns)


@dataclass(frozen=True)
class TextRow:
    """One document of plain text, and the place it was read from."""

    text: str
    origin: str


def detect_format(found: SourceRows) -> str:
    """The one format whose columns `found` has.

    Raises:
        UserError: no format fits, more than one does, or the columns are those of preference data.
    """
    columns = ", ".join(found.columns)
    if {"chosen", "rejected"} <= set(found.columns) or isinstance(_first_value(found, "label"), bool):
        raise UserError(
            f"{found.path} holds preferences (columns {columns}), good and bad answers, which supervised training "
            f"would learn alike; to train on it all the same, set {found.name}.format, and {found.name}.columns as in "
            "`completion: chosen`"
        )
    fitting = [name for name in EXPECTED if _fits(found, name)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{found.path} may be {' or '.join(fitting)} (columns {columns}); set {found.name}.format to the one meant"
        )
    raise UserError(
        f"{found.path} has columns {columns}, which fit no format. Expected: {_expectations()}. "
        f"Rename columns with {found.name}.columns, as in `prompt: question`"
    )


def _expectations() -> str:
    return "; ".join(f"{name}: {columns}" for name, columns in EXPECTED.items())


def _first_value(found: SourceRows, column: str) -> Any:
    """The first value of a column that is not empty."""
    return next((row.values[column] for row in found.rows if row.values.get(column)), None)


def _turns_column(found: SourceRows, key: str) -> str | None:
    """The column with lists of dicts that have `key`."""
    for column in ("messages", "conversations"):
        value = _first_value(found, column)
        if isinstance(value, list) and isinstance(value[0], dict) and key in value[0]:
            return column
    return None


def _fits(found: SourceRows, name: str) -> bool:
    if name == "messages":
        return _turns_column(found, "role") is not None
    if name == "sharegpt":
        return _turns_column(found, "from") is not None
    required = {"prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output"), "text": ("text",)}
    return all(column in found.columns for column in required[name])


def to_rows(found: SourceRows, name: str) -> list[Conversation] | list[TextRow]:
    """Turn every row into a conversation, or into a text where `name` is "text".

    Raises:
        UserError: the source has not the format's columns, or a row's value is not what the format says; it names the
            row.
    """
    if not _fits(found, name):
        raise UserError(
            f"{found.name}.format={name} expects {EXPECTED[name]}; {found.path} has {', '.join(found.columns)}. "
            f"Rename columns with {found.name}.columns, or set another format"
        )
    if name == "text":
        return [TextRow(_text(row, "text"), row.origin) for row in found.rows]
    key = {"messages": "role", "sharegpt": "from"}.get(name)
    turns = _turns_column(found, key) if key else None
    readers: dict[str, Callable[[Row], Iterable[dict[str, Any]]]] = {
        "messages": lambda row: _messages(row, turns),
        "sharegpt": lambda row: _sharegpt(row, turns),
        "prompt_completion": _prompt_completion,
        "alpaca": _alpaca,
    }
    return [_conversation(row, readers[name](row)) for row in found.rows]


def require_assistant_turns(rows: Iterable[Conversation], path: str) -> None:
    """Refuse conversations in which nothing would be supervised.

    Raises:
        UserError: some have no assistant turn; it names the first ones and their number.
    """
    rows = list(rows)
    without = [row.origin for row in rows if not row.assistant_turns()]
    if without:
        raise UserError(
            f"{len(without)} of {len(rows)} rows of {path} have no assistant turn, so nothing in them would be "
            f"trained: {', '.join(without[:3])}{' ...' if len(without) > 3 else ''}; remove them, or set "
            "data.supervise=all"
        )


def _conversation(row: Row, turns: Iterable[dict[str, Any]]) -> Conversation:
    messages = [_checked(message, number, row) for number, message in enumerate(turns, start=1)]
    system = _text(row, "system", default="")
    if system:
        if messages and messages[0]["role"] == "system":
            raise UserError(f"{row.origin} has a `system` column and a system message; remove one of them")
        messages.insert(0, {"role": "system", "content": system})
    if not messages:
        raise UserError(f"{row.origin} has no messages; remove the row")
    return Conversation(tuple(messages), row.origin, _tools(row))


def _checked(message: Any, number: int, row: Row) -> dict[str, Any]:
    """A message without its empty keys, once its role and content are found right."""
    where = f"{row.origin}, message {number}"
    if not isinstance(message, dict):
        raise UserError(f"{where} is of type {type(message).__name__}; it must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise UserError(f"{where} has role {role!r}; allowed are {', '.join(ROLES)}")
    kept = {key: value for key, value in message.items() if value is not None}
    if kept.get("tool_calls"):
        kept.setdefault("content", "")
    else:
        kept.pop("tool_calls", None)
    content = kept.get("content")
    if not isinstance(content, str):
        raise UserError(f"{where} ({role}) has content of type {type(content).__name__}; it must be a text")
    return kept


def _text(row: Row, column: str, default: str | None = None) -> str:
    value = row.values.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(f"{row.origin} has `{column}` of type {type(value).__name__}; it must be a text")
    return value


def _list(row: Row, column: str) -> list[Any]:
    value = row.values.get(column)
    if not isinstance(value, list):
        raise UserError(f"{row.origin} has `{column}` of type {type(value).__name__}; it must be a list")
    return value


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{what} is not JSON ({error})") from error


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The row's tools, each in the form {"type": "function", "function": schema} that templates take."""
    tools = row.values.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, f"{row.origin}: `tools`") if tools.strip() else None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{row.origin} has `tools` that are not a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _messages(row: Row, column: str) -> list[Any]:
    return _list(row, column)


def _sharegpt(row: Row, column: str) -> Iterable[dict[str, Any]]:
    for number, turn in enumerate(_list(row, column), start=1):
        where = f"{row.origin}, message {number}"
        if not isinstance(turn, dict):
            raise UserError(f"{where} is of type {type(turn).__name__}; it must be an object with from and value")
        speaker = turn.get("from")
        if speaker not in SHAREGPT_ROLES:
            raise UserError(f"{where} is from {speaker!r}; allowed are {', '.join(SHAREGPT_ROLES)}")
        message = {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}
        if speaker == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": _tool_calls(turn.get("value"), where)}
        yield message


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = _parsed(value, f"{where} (function_call)") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f"{where} (function_call) must be an object with name and arguments, or a list of them")
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def _prompt_completion(row: Row) -> list[Any]:
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.values.get(column)
        messages += value if isinstance(value, list) else [{"role": role, "content": _text(row, column)}]
    return messages


def _alpaca(row: Row) -> list[dict[str, Any]]:
    """Instruction and input are one user message, a line feed between them."""
    messages = []
    for pair in row.values.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{row.origin} has a `history` that is not a list of [user, assistant] pairs")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(part for part in (_text(row, "instruction"), _text(row, "input", default="")) if part)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]
