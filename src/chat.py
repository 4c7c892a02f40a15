"""Chat templates as their tokenizers ship them: rendered with a fixed date, and their special tokens known.

    template = ChatTemplate.of(tokenizer)
    [text] = template.render([conversation])
    [prompt] = template.render([question], generation_prompt=True)   # what a server feeds the model

The template that serves is the template that trains: nothing in it is replaced. Which characters of its output are
supervised is for `src.alignment` to find.
"""

import contextlib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from config.schema import DataConfig
from src.formats import Conversation
from src.refusal import Kind, Refusal, RowRefusedError
from utils.errors import UserError
from utils.logging import get_logger
from utils.time_limit import time_limit

log = get_logger(__name__)

CALL_STOPS = frozenset({"<|call|>", "<|eom_id|>"})
"""Tokens that end a turn which calls a tool, in families where no other turn ends with them."""

CLOCK_PROBES = (datetime(2001, 2, 3, 4, 5, 6), datetime(2020, 12, 25, 16, 17, 18))
"""Moments that differ in each part of a date and a time."""

CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")

PROBE_S = 10
"""Seconds that a template may take for what others write in a millisecond."""

RENDER_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's own calculations raise, beside what it says itself: it may divide by 0 or ask for a key."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with its chat template, and what finding spans needs of them.

    `sources` are the template's texts for rows without and with tools, `date_string` the date that it is given;
    `special_token` matches the text of any special token; `stop_token` matches the text of one that can end a turn,
    with white space before it, and `stop_ids` are their ids; `has_marks` says whether the template has
    {% generation %} marks.
    """

    tokenizer: PreTrainedTokenizerBase
    sources: tuple[str, str]
    date_string: str | None
    special_token: re.Pattern[str]
    stop_token: re.Pattern[str]
    stop_ids: frozenset[int]
    has_marks: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, day: str | None = DataConfig.template_date) -> "ChatTemplate":
        """Look at a tokenizer once.

        Args:
            day: the date that the template is to write, as YYYY-MM-DD; None: the clock's.
        Raises:
            UserError: it has no chat template, one that is no Jinja or asks the clock in a way that cannot be answered,
                or `day` is no date.
        """
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, which conversations need, and which one its model knows cannot be "
                "told from it: for a base model add --model.chat_template chatml; else give the model's own as a Jinja "
                "file in model.chat_template, or a tokenizer that has one as model.tokenizer"
            )
        fixed = None if day is None else _parsed_day(day)
        own = (tokenizer.get_chat_template(), _source_with_tools(tokenizer))
        if fixed is None and any("strftime_now" in source for source in own):
            log.warning(
                "data.template_date is not set and the chat template writes today's date into every row, so the same "
                "data differs from day to day"
            )
        special = _special_tokens(tokenizer)
        no_stop = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token}
        template = cls(
            tokenizer=tokenizer,
            sources=own if fixed is None else (_with_clock_at(own[0], fixed), _with_clock_at(own[1], fixed)),
            date_string=None if fixed is None else fixed.strftime("%d %b %Y"),
            special_token=_any_of(special),
            stop_token=re.compile(rf"\s*{_any_of(special - no_stop).pattern}"),
            stop_ids=frozenset(tokenizer.convert_tokens_to_ids(sorted(special - no_stop))),
            has_marks=re.search(r"\{%-?\s*generation\s*-?%\}", own[0]) is not None,
        )
        template._check_syntax()
        return template

    def _check_syntax(self) -> None:
        """Let the template write a question of one letter, without and with a tool.

        Raises:
            UserError: it is no Jinja, does not come to an end, or has a power.
        """
        for source in self.sources:
            _refuse_powers(source)
        try:
            with time_limit(PROBE_S):
                self._probe()
        except TimeoutError as error:
            raise UserError(
                f"the chat template takes more than {PROBE_S} s to write a question of one letter, so it has a loop "
                "that does not end; mend it where it stands (model.chat_template names a file, or the tokenizer has it)"
            ) from error

    def _probe(self) -> None:
        tool = {"type": "function", "function": {"name": "probe", "parameters": {"type": "object", "properties": {}}}}
        for tools in ((), (tool,)):
            error = self._complaint(Conversation(({"role": "user", "content": "x"},), "probe", tools=tools))
            if isinstance(error, TemplateSyntaxError):
                raise UserError(
                    f"the chat template is no Jinja: line {error.lineno}: {error.message} Mend it where it stands "
                    "(model.chat_template names a file, or the tokenizer has it)"
                )

    def sha256(self) -> str:
        """The SHA-256 of the template's text."""
        return hashlib.sha256(self.tokenizer.get_chat_template().encode()).hexdigest()

    def follows_clock(self, conversation: Conversation) -> bool:
        """Whether the template writes the clock's date into a conversation, told by its output at two moments.

        Where it asks the clock in a form that is not written out, it is taken to do so.
        """
        source = self.sources[bool(conversation.tools)]
        if self.date_string is not None or "strftime_now" not in source:
            return False
        try:
            clocks = [_with_clock_at(source, moment) for moment in CLOCK_PROBES]
        except UserError:
            return True
        texts = [replace(self, sources=(clock, clock)).render_each([conversation])[0] for clock in clocks]
        return texts[0] != texts[1]

    def writes_date(self) -> bool:
        """Whether the template knows a date, so that rows depend on the one it is given."""
        return any(name in source for source in self.sources for name in ("strftime_now", "date_string"))

    def render(self, conversations: Sequence[Conversation], *, generation_prompt: bool = False) -> list[str]:
        """The template's output for each conversation, ended with the prompt of a new turn if `generation_prompt`.

        Raises:
            RowRefusedError: the template refuses one of them; it names the row.
        """
        texts = self.render_each(conversations, generation_prompt=generation_prompt)
        for text in texts:
            if isinstance(text, Refusal):
                raise RowRefusedError(text)
        return texts

    def render_each(
        self, conversations: Sequence[Conversation], *, generation_prompt: bool = False
    ) -> list[str | Refusal]:
        """As `render`, with a refusal at the place of each conversation that the template refuses."""
        plain = [conversation for conversation in conversations if not conversation.tools]
        try:
            texts = iter(self._apply(plain, generation_prompt))
        except RENDER_ERRORS:
            texts = (self._render_one(conversation, generation_prompt) for conversation in plain)
        return [
            self._render_one(conversation, generation_prompt) if conversation.tools else next(texts)
            for conversation in conversations
        ]

    def _apply(self, conversations: Sequence[Conversation], generation_prompt: bool) -> list[str]:
        if not conversations:
            return []
        texts = self.tokenizer.apply_chat_template(
            [list(conversation.messages) for conversation in conversations],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **self.variables(conversations[0]),
        )
        for text in texts:
            text.encode()  # raises at half of a surrogate pair, which a template can write and no tokenizer takes
        return texts

    def variables(self, conversation: Conversation) -> dict[str, object]:
        """What the template is given beside the messages, and its text, as arguments of `apply_chat_template`."""
        given = {} if self.date_string is None else {"date_string": self.date_string}
        tools = list(conversation.tools) or None
        return {"tools": tools, "chat_template": self.sources[tools is not None], **given}

    def _render_one(self, conversation: Conversation, generation_prompt: bool) -> str | Refusal:
        error = self._complaint(conversation, generation_prompt)
        if isinstance(error, str):
            return error
        reason = (
            f"{conversation.origin}: the chat template refuses these messages: {error}; change the row, or give "
            "another template as model.chat_template"
        )
        return Refusal(conversation.origin, self._kind_of(error, conversation), reason)

    def _complaint(self, conversation: Conversation, generation_prompt: bool = False) -> str | Exception:
        """The template's output, or the error with which it refuses the conversation."""
        try:
            return self._apply([conversation], generation_prompt)[0]
        except RENDER_ERRORS as error:
            return error

    def _kind_of(self, error: Exception, conversation: Conversation) -> Kind:
        """`role_order` where the template says the same of plain texts in these roles, but not of every conversation.

        What a template says itself (`raise_exception` in it) is a plain TemplateError; others are mishaps within it.
        """
        if type(error) is not TemplateError:
            return "unaligned"
        roles = (message["role"] for message in conversation.messages)
        complaints = (
            self._complaint(Conversation(tuple({"role": role, "content": "x"} for role in probe), "probe"))
            for probe in (tuple(roles), ("user", "assistant"))
        )
        own, usual = (type(complaint) is TemplateError and str(complaint) == str(error) for complaint in complaints)
        return "role_order" if own and not usual else "unaligned"

    def token_ids(self, conversation: Conversation) -> list[int]:
        """The ids that the tokenizer itself gives for a conversation, as a server would feed them."""
        return self.tokenizer.apply_chat_template(
            list(conversation.messages),
            return_dict=True,
            tokenizer_kwargs={"verbose": False},
            **self.variables(conversation),
        )["input_ids"]

    def marked_spans(self, conversation: Conversation) -> list[tuple[int, int]]:
        """The characters between the template's {% generation %} marks."""
        encoded = self.tokenizer.apply_chat_template(
            list(conversation.messages),
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True, "verbose": False},
            **self.variables(conversation),
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


def _parsed_day(day: str) -> date:
    try:
        return date.fromisoformat(day)
    except ValueError as error:
        raise UserError(
            f"data.template_date={day!r} is no date; give one as YYYY-MM-DD, or null for the clock's"
        ) from error


def _source_with_tools(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template for rows with tools, which a few tokenizers keep beside the default one."""
    return tokenizer.get_chat_template(tools=[{}])


def _with_clock_at(source: str, day: date) -> str:
    """The template with a macro before it that answers `strftime_now` with `day`, for each format that it asks for.

    Templates take variables, but `strftime_now` is a function of the environment, which only a macro of the same name
    in the template itself can stand in for. The line feed after the macro is the one that its block swallows.

    Raises:
        UserError: a format is not written out where `strftime_now` is called.
    """
    calls = CLOCK.findall(source)
    if len(calls) != len(re.findall(r"strftime_now\s*\(", source)):
        raise UserError(
            "the chat template asks the clock for a date in a form that is not written out, so data.template_date "
            "cannot be given to it; set data.template_date=null, or give a copy with a fixed date as "
            "model.chat_template"
        )
    if not calls:
        return source
    answers = {form: day.strftime(form) for _, form in calls}
    return f"{{%- macro strftime_now(form) -%}}{{{{- {answers!r}[form] -}}}}{{%- endmacro %}}\n{source}"


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens)


def _refuse_powers(source: str) -> None:
    """Refuse `9**9**9`, which no signal interrupts: it is one operation, which Jinja carries out as it compiles.

    Raises:
        UserError: the template has a power outside of its texts and comments.
    """
    with contextlib.suppress(TemplateSyntaxError):  # told when it is compiled
        for line, kind, text in Environment().lex(source) if "**" in source else ():
            if (kind, text) == ("operator", "**"):
                raise UserError(
                    f"line {line} of the chat template has a power (**), which may take without end; write its value "
                    "where it stands (model.chat_template names a file, or the tokenizer has it)"
                )


def _any_of(texts: set[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("(?:" + "|".join(re.escape(text) for text in longest_first) + ")" if longest_first else "(?!)")
