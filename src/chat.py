"""Chat templates, and which characters of a rendered conversation are supervised.

    template = ChatTemplate.of(tokenizer)
    [chat] = supervised_spans(template, [conversation])
    chat.text[slice(*chat.spans[0])]   # "Paris.<|eot_id|>": what the model is to write in its first turn

The template that serves is the template that trains: it is rendered as the tokenizer has it, and the span of a turn is
found from its own output. A turn begins where the prompt ends that the template itself gives for it, and ends with the
stop token that the template writes after it. Where the output does not show this, the row is refused, never guessed.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from src.formats import Conversation
from utils.errors import UserError
from utils.logging import get_logger

log = get_logger(__name__)

DATE_STRING = "26 Jul 2024"
"""The date that templates get which ask for one, so that a row is the same on every day. It is the one that the
Llama 3.1 and 3.2 templates write themselves where they know of no clock."""

WHITE_SPACE = re.compile(r"\s*")
WAY_OUT = "as model.chat_template give one that does, or one with {% generation %} marks; or set data.supervise=all"


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the template writes it.

    `spans` are the supervised characters as (start, end), one pair an assistant turn, in order and apart; each ends
    with the turn's stop token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with its chat template, and what finding spans needs of them.

    `special_token` matches the text of any special token; `stop_token` matches the text of one that can end a turn,
    with white space before it, and `stop_ids` are their ids; `has_marks` says whether the template has
    {% generation %} marks.
    """

    tokenizer: PreTrainedTokenizerBase
    special_token: re.Pattern[str]
    stop_token: re.Pattern[str]
    stop_ids: frozenset[int]
    has_marks: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
        """Look at a tokenizer once.

        Raises:
            UserError: it has no chat template.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, which conversations need; give a Jinja file as "
                "model.chat_template, or a tokenizer that has one as model.tokenizer"
            )
        source = tokenizer.get_chat_template()
        if "strftime_now" in source and "date_string" not in source:
            log.warning(
                "the chat template writes today's date into every row, so the same data differs from day to day; give "
                "a copy with a fixed date as model.chat_template"
            )
        special = _special_tokens(tokenizer)
        no_stop = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token}
        return cls(
            tokenizer=tokenizer,
            special_token=_any_of(special),
            stop_token=re.compile(rf"\s*{_any_of(special - no_stop).pattern}"),
            stop_ids=frozenset(tokenizer.convert_tokens_to_ids(sorted(special - no_stop))),
            has_marks=re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None,
        )

    def sha256(self) -> str:
        """The SHA-256 of the template's text."""
        return hashlib.sha256(self.tokenizer.get_chat_template().encode()).hexdigest()

    def render(self, conversations: Sequence[Conversation], *, generation_prompt: bool = False) -> list[str]:
        """The template's output for each conversation, ended with the prompt of a new turn if `generation_prompt`.

        Raises:
            UserError: the template refuses one of them; it names the row.
        """
        plain = [conversation for conversation in conversations if not conversation.tools]
        try:
            texts = iter(self._apply(plain, generation_prompt))
        except (TemplateError, TypeError, ValueError):
            texts = (self._render_one(conversation, generation_prompt) for conversation in plain)
        return [
            self._render_one(conversation, generation_prompt) if conversation.tools else next(texts)
            for conversation in conversations
        ]

    def _apply(self, conversations: Sequence[Conversation], generation_prompt: bool) -> list[str]:
        if not conversations:
            return []
        return self.tokenizer.apply_chat_template(
            [list(conversation.messages) for conversation in conversations],
            tools=list(conversations[0].tools) or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            date_string=DATE_STRING,
        )

    def _render_one(self, conversation: Conversation, generation_prompt: bool) -> str:
        try:
            return self._apply([conversation], generation_prompt)[0]
        except (TemplateError, TypeError, ValueError) as error:
            raise UserError(
                f"{conversation.origin}: the chat template refuses these messages: {error}; change the row, or give "
                "another template as model.chat_template"
            ) from error

    def token_ids(self, conversation: Conversation) -> list[int]:
        """The ids that the tokenizer itself gives for a conversation, as a server would feed them."""
        return self.tokenizer.apply_chat_template(
            list(conversation.messages),
            tools=list(conversation.tools) or None,
            return_dict=True,
            date_string=DATE_STRING,
        )["input_ids"]

    def marked_spans(self, conversation: Conversation) -> list[tuple[int, int]]:
        """The characters between the template's {% generation %} marks."""
        encoded = self.tokenizer.apply_chat_template(
            list(conversation.messages),
            tools=list(conversation.tools) or None,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
            date_string=DATE_STRING,
        )
        spans: list[tuple[int, int]] = []
        inside = False
        for marked, (start, end) in zip(encoded["assistant_masks"], encoded["offset_mapping"], strict=True):
            if marked and inside:
                spans[-1] = (spans[-1][0], end)
            elif marked:
                spans.append((start, end))
            inside = bool(marked)
        return spans

    def stop_after(self, text: str, position: int) -> int | None:
        """The end of the stop token that follows `position`, white space between them allowed; None: another text."""
        match = self.stop_token.match(text, position)
        return match.end() if match else None


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens)


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("(?:" + "|".join(re.escape(text) for text in longest_first) + ")" if longest_first else "(?!)")


def supervised_spans(template: ChatTemplate, conversations: Sequence[Conversation]) -> list[RenderedChat]:
    """Render conversations and find what the assistant says in them.

    The whole and, for each assistant turn, the prompt before it are rendered; so a conversation of n turns costs n + 1
    renderings, all in one call.

    Raises:
        UserError: the template refuses a conversation, writes no stop token after a turn, or its output does not show
            where a turn is; it names the row, the template's behaviour and what to do.
    """
    texts = template.render(conversations)
    prefixes = [
        replace(conversation, messages=conversation.messages[:turn])
        for conversation in conversations
        for turn in conversation.assistant_turns()
        if turn > 0
    ]
    prompts = iter(_prompts(template, prefixes))
    chats = []
    for conversation, text in zip(conversations, texts, strict=True):
        found = [
            _turn_span(template, conversation, turn, text, next(prompts) if turn > 0 else "")
            for turn in conversation.assistant_turns()
        ]
        reasons = [span for span in found if isinstance(span, str)]
        if reasons:
            found = _spans_from_marks(template, conversation, text, reasons[0])
        chats.append(RenderedChat(text, tuple(found)))
    return chats


def _prompts(template: ChatTemplate, prefixes: Sequence[Conversation]) -> list[str | None]:
    """Each prefix with the prompt of the turn after it; None where the template refuses the prefix."""
    try:
        return list(template.render(prefixes, generation_prompt=True))
    except UserError:
        return [_rendered_or_none(template, prefix, generation_prompt=True) for prefix in prefixes]


def _rendered_or_none(template: ChatTemplate, prefix: Conversation, *, generation_prompt: bool) -> str | None:
    try:
        return template.render([prefix], generation_prompt=generation_prompt)[0]
    except UserError:
        return None


def _turn_span(
    template: ChatTemplate, conversation: Conversation, turn: int, text: str, prompt: str | None
) -> tuple[int, int] | str:
    """The supervised characters of one turn in `text`, or the reason why they cannot be told."""
    body = conversation.messages[turn]["content"].strip()
    if prompt is None:
        return "it refuses the messages before the turn"
    if not text.startswith(prompt):
        return f"its generation prompt is not what it writes before the turn: {_difference(prompt, text)}"
    start = len(prompt)
    if body and turn > 0:
        # The usual template: after the prompt come the content, bare or trimmed, and the stop token.
        at = WHITE_SPACE.match(text, start).end()
        if text.startswith(body, at):
            end = template.stop_after(text, at + len(body))
            if end is not None and not _is_next_header(template, conversation, turn, text[:end]):
                return start, end
    return _span_in_closed_turn(template, conversation, turn, text, start)


def _is_next_header(template: ChatTemplate, conversation: Conversation, turn: int, written: str) -> bool:
    """Whether the special token at the end of `written` belongs to the message after the turn, not to the turn.

    Only a last turn with other messages after it is looked at: where a later turn shows no stop token, it is refused.
    """
    if turn != conversation.assistant_turns()[-1] or turn + 1 == len(conversation.messages):
        return False
    until_turn = replace(conversation, messages=conversation.messages[: turn + 1])
    closed = _rendered_or_none(template, until_turn, generation_prompt=False)
    return closed is None or not closed.startswith(written)


def _span_in_closed_turn(
    template: ChatTemplate, conversation: Conversation, turn: int, text: str, start: int
) -> tuple[int, int] | str:
    """The span of a turn that opens with more than its content, told by a rendering that ends with this turn."""
    message, messages = conversation.messages[turn], conversation.messages
    closed: str | None = text
    if turn + 1 < len(messages):
        closed = _rendered_or_none(
            template, replace(conversation, messages=messages[: turn + 1]), generation_prompt=False
        )
    if closed is None or not text.startswith(closed):
        return "it writes the turn in another way once more messages follow" + (
            f": {_difference(closed, text)}" if closed else ""
        )
    window = text[start : len(closed)]
    body = message["content"].strip()
    if turn > 0 and not body and not message.get("tool_calls"):
        return _span_of_empty_turn(template, conversation, turn, text, start)
    calls = [call.get("function", call)["name"] for call in message.get("tool_calls", ())]
    last_line = body.rsplit("\n", 1)[-1].strip()
    missing = [name for name in (last_line, *calls) if name not in window]
    if missing:
        return f"it leaves out {missing[0]!r} of the turn"
    if turn == 0:
        if not body or window.count(body) != 1:
            return "no prompt comes before the conversation's first message, which is the assistant's"
        start += window.index(body)
    found = window.rfind(body) if body and not calls else -1
    if found >= 0:
        end = template.stop_after(window, found + len(body))
    else:
        tail = re.search(rf"(?:\s*{template.special_token.pattern})+\s*$", window)
        end = template.stop_after(window, tail.start()) if tail else None
    if end is None or len(closed) - len(window) + end <= start:
        refuse_without_stop(conversation, turn, window)
    return start, len(closed) - len(window) + end


def _span_of_empty_turn(
    template: ChatTemplate, conversation: Conversation, turn: int, text: str, start: int
) -> tuple[int, int] | str:
    """The span of a turn without content: what the template writes around a letter that stands in for it."""
    messages = list(conversation.messages)
    messages[turn] = {**messages[turn], "content": "x"}
    filled = replace(conversation, messages=tuple(messages))
    written = template.render([filled])[0]
    span = _turn_span(template, filled, turn, written, text[:start])
    if isinstance(span, str):
        return span
    before, _, stop = written[slice(*span)].rpartition("x")
    around = before + conversation.messages[turn]["content"] + stop
    if not text.startswith(around, start):
        around = before + stop
    if not text.startswith(around, start):
        return "it writes a turn without content in a way of its own"
    return start, start + len(around)


def _spans_from_marks(
    template: ChatTemplate, conversation: Conversation, text: str, reason: str
) -> list[tuple[int, int]]:
    """The spans between the template's marks, each made to end with its stop token."""
    turns = conversation.assistant_turns()
    if not template.has_marks:
        raise UserError(
            f"{conversation.origin}: the chat template does not show where an assistant turn is: {reason}; {WAY_OUT}"
        )
    marked = template.marked_spans(conversation)
    if len(marked) != len(turns):
        raise UserError(
            f"{conversation.origin}: the template's {{% generation %}} marks hold {len(marked)} texts for "
            f"{len(turns)} assistant turns; mend the marks in model.chat_template, or set data.supervise=all"
        )
    spans = []
    for turn, (start, end) in zip(turns, marked, strict=True):
        tail = re.search(rf"(?:\s*{template.special_token.pattern})+\s*$", text[start:end])
        stop = template.stop_after(text, start + tail.start() if tail else end)
        if stop is None:
            refuse_without_stop(conversation, turn, text[start:end])
        spans.append((start, stop))
    return spans


def refuse_without_stop(conversation: Conversation, turn: int, written: str) -> NoReturn:
    raise UserError(
        f"{conversation.origin}, message {turn + 1}: the chat template writes no stop token after an assistant turn, "
        f"which ends in {written[-40:]!r}; a model trained so never learns to stop. A stop token must be a special "
        "token of the tokenizer: name it in model.special_tokens, as in `eos_token: <|im_end|>`, or give a template "
        "that writes the tokenizer's own as model.chat_template"
    )


def _difference(first: str, second: str) -> str:
    """Where two texts part, with what each has there."""
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return f"{first[max(0, at - 20) : at + 30]!r} against {second[max(0, at - 20) : at + 30]!r}"
