"""Formats: what a row of a data file holds -> one conversation type, a text, or ids.

    convert = row_converter(found)             # told from the columns and the first values
    convert.format                             # "alpaca"
    convert(row)                               # Conversation(messages=({"role": "user", ...}, ...), ...)
    convert.checked(row)                       # the same, or a Refusal where the row is not what the format says

| format            | columns                                                                             |
|-------------------|-------------------------------------------------------------------------------------|
| messages          | `messages` or `conversations`: a list of {role, content}, or its JSON               |
| sharegpt          | `conversations` or `messages`: a list of {from, value}, or its JSON                 |
| prompt_completion | `prompt` and `completion`: each a text, or a list of {role, content}                |
| question_answer   | `question` and `answer`: texts                                                      |
| alpaca            | `instruction` and `output`; optional `input`, `history` ([[user, assistant], ...])  |
| text              | `text`                                                                              |
| tokenized         | `input_ids`; optional `labels` (unshifted; -100: not supervised), `attention_mask`  |

Every format but text and tokenized may also have `system` (a text, put first) and `tools` (a list of JSON schemas, or
its JSON). `src.messages` says what a message may hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from src.files import shown_names
from src.messages import checked_message, parsed, sharegpt_message, tool_schemas
from src.refusal import Refusal
from src.sources import Row, SourceRows
from utils.errors import UserError

EXPECTED = {
    "messages": "`messages` or `conversations`, a list of {role, content}",
    "sharegpt": "`conversations` or `messages`, a list of {from, value}",
    "prompt_completion": "`prompt` and `completion`",
    "question_answer": "`question` and `answer`",
    "alpaca": "`instruction` and `output`, optionally `input`, `system`, `history`",
    "text": "`text`",
    "tokenized": "`input_ids`, optionally `labels`",
}
REQUIRED = {
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "tokenized": ("input_ids",),
}
OPTIONAL = {"alpaca": ("input", "history"), "tokenized": ("labels", "attention_mask")}
TURN_COLUMNS = ("messages", "conversations")
IGNORED = -100


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, and the place they were read from.

    Each message has a `role` of src.messages.ROLES and a `content` text; an assistant's may have `tool_calls` and one
    of REASONING_FIELDS. `tools` are the JSON schemas offered to the model; empty: none. `untrained` are the indices of
    the assistant's messages that the file marks as not to be trained. `completion_start` is the index of the first
    message of the completion, where the format parts it from the prompt; None: it does not.
    """

    messages: tuple[dict[str, Any], ...]
    origin: str
    tools: tuple[dict[str, Any], ...] = ()
    untrained: tuple[int, ...] = ()
    completion_start: int | None = None

    def assistant_turns(self) -> list[int]:
        """Indices of the assistant's messages."""
        return [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]

    def ends_with_answer(self) -> bool:
        """Whether the last message is the assistant's, with something before it to answer."""
        return len(self.messages) > 1 and self.messages[-1]["role"] == "assistant"

    def has_empty_answer(self) -> bool:
        """Whether the assistant says nothing in one of its trained turns, and calls no tool."""
        return any(
            message["role"] == "assistant"
            and not message["content"].strip()
            and not message.get("tool_calls")
            and turn not in self.untrained
            for turn, message in enumerate(self.messages)
        )


@dataclass(frozen=True)
class TextRow:
    """One document of plain text, and the place it was read from."""

    text: str
    origin: str


@dataclass(frozen=True)
class IdsRow:
    """A row that is tokenized already: `labels` is as long as `input_ids`, -100 or the id of its own token, and -100
    at the first. `first_label_dropped`: the file supervised the first token, which no token comes before.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    origin: str
    first_label_dropped: bool = False


Sample = Conversation | TextRow | IdsRow


@dataclass(frozen=True)
class RowConverter:
    """Turns one row of a source at a time into a sample; it can be sent to another process.

    `turns` is the column of the messages, for the formats that have one; `roles` maps names in the file to roles.
    """

    format: str
    turns: str | None = None
    roles: Mapping[str, str] = field(default_factory=dict)

    def columns(self) -> tuple[str, ...]:
        """The columns that are read, if they are there."""
        own = (*REQUIRED.get(self.format, (self.turns,)), *OPTIONAL.get(self.format, ()))
        return own if self.format in ("text", "tokenized") else (*own, "system", "tools")

    def __call__(self, row: Row) -> Sample:
        """The row as a sample.

        Raises:
            UserError: a value is not what the format says; it names the row.
        """
        if self.format == "text":
            return TextRow(_text(row, "text"), row.origin)
        if self.format == "tokenized":
            return _ids(row)
        turns, completion_start = self._turns(row)
        return _conversation(row, turns, completion_start, self.roles)

    def checked(self, row: Row) -> Sample | Refusal:
        """The row as a sample, or why it is none."""
        try:
            return self(row)
        except UserError as error:
            return Refusal(row.origin, "malformed", str(error))

    def _turns(self, row: Row) -> tuple[list[Any], int | None]:
        """The messages, not checked yet, and the index of the completion's first."""
        if self.format == "messages":
            return _list(row, self.turns), None
        if self.format == "sharegpt":
            turns = enumerate(_list(row, self.turns), start=1)
            return [sharegpt_message(turn, f"{row.origin}, message {n}", self.roles) for n, turn in turns], None
        if self.format == "alpaca":
            messages = _alpaca(row)
            return messages, len(messages) - 1
        columns, roles = REQUIRED[self.format], ("user", "assistant")
        prompt, completion = (_side(row, column, role) for column, role in zip(columns, roles, strict=True))
        return [*prompt, *completion], len(prompt)


def detect_format(found: SourceRows) -> str:
    """The one format whose columns `found` has.

    Raises:
        UserError: no format fits, more than one does, or the columns are those of preference data.
    """
    columns = shown_names(found.columns)
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
    """The first value of a column that is not empty, in the rows that were looked at."""
    return next((row.values[column] for row in found.head if row.values.get(column) not in (None, "", [])), None)


def _turns_columns(found: SourceRows, key: str) -> list[str]:
    """The columns with lists of dicts that have `key`, or their JSON."""
    fitting = []
    for column in TURN_COLUMNS:
        value = _first_value(found, column)
        if isinstance(value, str) and value.lstrip().startswith("[{"):
            value = parsed(value, f"{found.path}: the first `{column}`")
        if isinstance(value, list) and isinstance(value[0], dict) and value[0].get(key) is not None:
            fitting.append(column)
    return fitting


def _fits(found: SourceRows, name: str) -> bool:
    if name in REQUIRED:
        return all(column in found.columns for column in REQUIRED[name])
    return bool(_turns_columns(found, "role" if name == "messages" else "from"))


def row_converter(found: SourceRows, name: str = "auto") -> RowConverter:
    """What turns the rows of `found` into samples; `auto` tells the format from the columns.

    Raises:
        UserError: as `detect_format`; or the source has not the columns of the format `name`, or has two columns of
            messages.
    """
    name = detect_format(found) if name == "auto" else name
    if not _fits(found, name):
        raise UserError(
            f"{found.name}.format={name} expects {EXPECTED[name]}; {found.path} has {shown_names(found.columns)}. "
            f"Rename columns with {found.name}.columns, or set another format"
        )
    if name in REQUIRED:
        return RowConverter(name, roles=found.roles)
    turns = _turns_columns(found, "role" if name == "messages" else "from")
    if len(turns) > 1:
        raise UserError(
            f"{found.path} has {name} in two columns, {' and '.join(turns)} (columns {shown_names(found.columns)}); "
            f"say which is meant: with {found.name}.columns, `messages: conversations` takes the second one"
        )
    return RowConverter(name, turns[0], found.roles)


def _conversation(row: Row, turns: list[Any], completion_start: int | None, roles: Mapping[str, str]) -> Conversation:
    messages, untrained = [], []
    for number, turn in enumerate(turns, start=1):
        message, trained = checked_message(turn, f"{row.origin}, message {number}", roles)
        if not trained and message["role"] == "assistant":
            untrained.append(len(messages))
        messages.append(message)
    system = _text(row, "system", default="")
    if system:
        if messages and messages[0]["role"] == "system":
            raise UserError(f"{row.origin} has a `system` column and a system message; remove one of them")
        messages.insert(0, {"role": "system", "content": system})
        untrained = [index + 1 for index in untrained]
        completion_start = None if completion_start is None else completion_start + 1
    if not messages:
        raise UserError(f"{row.origin} has no messages; remove the row")
    tools = tool_schemas(row.values.get("tools"), row.origin)
    return Conversation(tuple(messages), row.origin, tools, tuple(untrained), completion_start)


def _text(row: Row, column: str, default: str | None = None) -> str:
    value = row.values.get(column)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise UserError(f"{row.origin} has `{column}` of type {type(value).__name__}; it must be a text")
    return value


def _list(row: Row, column: str) -> list[Any]:
    value = parsed(row.values.get(column), f"{row.origin}: `{column}`")
    if not isinstance(value, list):
        raise UserError(f"{row.origin} has `{column}` of type {type(value).__name__}; it must be a list")
    return value


def _side(row: Row, column: str, role: str) -> list[Any]:
    """A prompt or a completion as messages."""
    value = row.values.get(column)
    return value if isinstance(value, list) else [{"role": role, "content": _text(row, column)}]


def _alpaca(row: Row) -> list[dict[str, Any]]:
    """Instruction and input are one user message, a line feed between them."""
    messages = []
    history = parsed(row.values.get("history") or [], f"{row.origin}: `history`")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{row.origin} has a `history` that is not a list of [user, assistant] pairs")
    for pair in history:
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(part for part in (_text(row, "instruction"), _text(row, "input", default="")) if part)
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]


def _ids(row: Row) -> IdsRow:
    """A tokenized row, once its ids and labels are found right; without `labels`, all but the first are supervised."""
    ids = _integers(row, "input_ids")
    mask = None if row.values.get("attention_mask") is None else _list(row, "attention_mask")
    if mask is not None and (len(mask) != len(ids) or 0 in mask):
        raise UserError(f"{row.origin} is padded (its attention_mask holds 0); give rows without padding")
    if row.values.get("labels") is None:
        return IdsRow(tuple(ids), (IGNORED, *ids[1:]), row.origin)
    labels = _integers(row, "labels")
    if len(labels) != len(ids):
        raise UserError(f"{row.origin} has {len(ids)} input_ids and {len(labels)} labels; give one label an id")
    wrong = next((at for at, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (IGNORED, a)), None)
    if wrong is not None:
        raise UserError(
            f"{row.origin}: label {labels[wrong]} at position {wrong} is neither -100 nor the id there, {ids[wrong]}; "
            "labels are not shifted here: each stands where its own token stands"
        )
    return IdsRow(tuple(ids), (IGNORED, *labels[1:]), row.origin, labels[0] != IGNORED)


def _integers(row: Row, column: str) -> list[int]:
    """A list of whole numbers, or its JSON, with at least one."""
    values = _list(row, column)
    if not values or not all(type(value) is int for value in values):
        raise UserError(f"{row.origin} has `{column}` that is not a list of at least one whole number")
    return values
