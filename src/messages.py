"""Messages as chat templates take them: roles, text content, tool calls, tools and what is not to be trained.

    parts = [{"type": "text", "text": "hi"}]
    checked_message({"role": "human", "content": parts}, "a.jsonl line 1", {"human": "user"})
    # {"role": "user", "content": "hi"}, True
    tool_schemas('[{"name": "f"}]', "a.jsonl line 1")    # ({"type": "function", "function": {"name": "f"}},)

Keys that are not named here, such as `name` or `tool_call_id`, are kept as they are, since templates may read them; a
key whose value is null is left out.
"""

from collections.abc import Mapping
from typing import Any

from src.files import shorten
from utils.errors import UserError
from utils.json_text import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
PLAIN_KEYS = {"role", "content"}
FUNCTION_CALL = "function_call"
"""The role of a ShareGPT turn whose value is an assistant's tool call, or a list of them, as JSON."""

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates read an assistant's reasoning; a row keeps the one that it has."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": FUNCTION_CALL,
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def checked_message(message: Any, where: str, roles: Mapping[str, str]) -> tuple[dict[str, Any], bool]:
    """A message as templates take it, and whether its turn may be trained.

    Args:
        message: an object with role and content; content is a text, or a list of text parts, which are joined. An
            assistant's `tool_calls` get the form {"type": "function", "function": {"name", "arguments"}} with the
            arguments as an object. `train: false`, or OpenAI's `weight: 0`, keeps its turn out of the loss; both keys
            are taken out of the message.
        roles: roles of names that the file has in their place; other names must be roles themselves.
    Raises:
        UserError: the role, the content or a tool call is not right; it names `where`.
    """
    if not isinstance(message, dict):
        raise UserError(f"{where} is of type {type(message).__name__}; it must be an object with role and content")
    given = message.get("role")
    role = roles.get(given, given) if isinstance(given, str) else given
    if message.keys() == PLAIN_KEYS and role in ROLES and isinstance(message["content"], str):
        return {**message, "role": role}, True  # most messages, which need none of what follows
    if role == FUNCTION_CALL:
        role, message = "assistant", {**message, "content": None, "tool_calls": _parsed_calls(message, where)}
    if role not in ROLES:
        raise UserError(f"{where} has role {given!r}; allowed are {', '.join((*ROLES, *roles))}; map others with roles")
    kept = {key: value for key, value in message.items() if value is not None}
    kept["role"] = role
    trained = _is_trained(kept, role, where)
    if kept.get("tool_calls"):
        kept["tool_calls"] = tool_calls(kept["tool_calls"], where)
        kept.setdefault("content", "")
    else:
        kept.pop("tool_calls", None)
    _check_reasoning(kept, where)
    if role == "assistant" and any(kept.get(name) for name in REASONING_FIELDS):
        kept.setdefault("content", "")
    kept["content"] = _text_content(kept.get("content"), f"{where} ({role})")
    return kept, trained


def sharegpt_message(turn: Any, where: str, roles: Mapping[str, str]) -> dict[str, Any]:
    """A ShareGPT turn {from, value} as a message, not checked yet; of its other keys those stay that have a meaning.

    Raises:
        UserError: it is no object, or is from nobody that `roles` or SHAREGPT_ROLES name.
    """
    if not isinstance(turn, dict):
        raise UserError(f"{where} is of type {type(turn).__name__}; it must be an object with from and value")
    speaker = turn.get("from")
    known = {**SHAREGPT_ROLES, **roles}
    if not isinstance(speaker, str) or speaker not in known:
        raise UserError(f"{where} is from {speaker!r}; allowed are {', '.join(known)}; map others with roles")
    meant = {key: turn[key] for key in ("tool_calls", "train", "weight", *REASONING_FIELDS) if key in turn}
    return {"role": known[speaker], "content": turn.get("value"), **meant}


def _is_trained(message: dict[str, Any], role: str, where: str) -> bool:
    """Take `train` and `weight` out of a message; False if one of them says that its turn is not to be trained."""
    trained = True
    for key, allowed in (("train", (True, False)), ("weight", (0, 1))):
        if key not in message:
            continue
        value = message.pop(key)
        if isinstance(value, str) or value not in allowed or (key == "train") != isinstance(value, bool):
            raise UserError(f"{where} has {key}={value!r}; it must be {allowed[0]} or {allowed[1]}")
        if value and role != "assistant":
            raise UserError(
                f"{where} ({role}) has {key}={value}, but only the assistant's turns can be trained; leave it out there"
            )
        trained = trained and bool(value)
    return trained


def _text_content(content: Any, where: str) -> str:
    """A text, or the joined texts of a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where} has content of type {type(content).__name__}; it must be a text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else part
        if (isinstance(part, dict) and kind != "text") or not isinstance(text, str):
            raise UserError(f"{where} has a content part of type {kind!r}; only text parts can be trained")
        texts.append(text)
    return "".join(texts)


def _check_reasoning(message: dict[str, Any], where: str) -> None:
    found = {name: message[name] for name in REASONING_FIELDS if name in message}
    for name, value in found.items():
        if not isinstance(value, str):
            raise UserError(f"{where} has {name} of type {type(value).__name__}; it must be a text")
    if len(set(found.values())) > 1:
        raise UserError(f"{where} has {' and '.join(found)} with different texts; keep the one that is meant")


def _parsed_calls(message: dict[str, Any], where: str) -> list[Any]:
    calls = parsed(message.get("content"), f"{where} ({FUNCTION_CALL})")
    return calls if isinstance(calls, list) else [calls]


def tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls in the form that templates take, with each call's arguments as an object.

    Raises:
        UserError: one has no name, or arguments that are neither an object nor the JSON of one.
    """
    calls = parsed(calls, f"{where}: `tool_calls`")
    if not isinstance(calls, list):
        raise UserError(f"{where} has `tool_calls` of type {type(calls).__name__}; it must be a list")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    call = parsed(call, f"{where}: a tool call")
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where} ({FUNCTION_CALL}) must be an object with name and arguments, or a list of them")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parsed(arguments or "{}", f"{where}: the arguments of {function['name']}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(
            f"{where}: the arguments of {function['name']} are of type {type(arguments).__name__}; they must be an "
            "object"
        )
    function = {**function, "arguments": arguments}
    if "function" in call:
        return {"type": "function", **call, "function": function}
    return {"type": "function", "function": function}


def tool_schemas(tools: Any, origin: str) -> tuple[dict[str, Any], ...]:
    """A row's tools, each in the form {"type": "function", "function": schema} that templates take.

    Args:
        tools: a list of schemas, each an object or its JSON; or the JSON of the list; or nothing.
    Raises:
        UserError: it is anything else.
    """
    if isinstance(tools, str):
        tools = parsed(tools, f"{origin}: `tools`") if tools.strip() else None
    if not tools:
        return ()
    if isinstance(tools, list):
        tools = [parsed(tool, f"{origin}: a tool") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{origin} has `tools` that are not a list of objects")
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str | None):
            raise UserError(f"{origin} has a tool that is no object with a text as its name: {shorten(str(tool))}")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def parsed(value: Any, what: str) -> Any:
    """The value that a text of JSON stands for; any other value as it is.

    Raises:
        UserError: the text is not JSON; it names `what`.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise UserError(f"{what} is not JSON ({error})") from error
