"""Which characters of a rendered conversation are supervised, told by the template's own output.

    finder = TurnFinder(template)
    [chat] = finder.find([conversation])
    chat.text[slice(*chat.spans[0])]   # "Paris.<|eot_id|>": what the model is to write in its first turn

The template is asked about skeletons, one for each shape of conversations (`src.skeletons`): what it writes as the
prompt of each turn, and what it writes to close it. That gives a turn's borders between the texts of the row, and no
text of a row can move them. Each row is then rendered itself, and must read as its skeleton with the row's texts put
in; so a row costs one rendering. A row that cannot be trained on exactly has a `Refusal` at its place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

from src.chat import ChatTemplate
from src.formats import Conversation
from src.refusal import Refusal, RowRefusedError
from src.skeletons import REASONING_TAG, STAND_IN, Shape, cut, skeleton_of, take_apart
from src.turns import Cause, Layout, read_layout

FORMS_KEPT = 4096
LOST_WAY_OUT = "change the row, or give a template that writes it as model.chat_template"
WAY_OUT = "as model.chat_template give one that does, or one with {% generation %} marks; or set data.supervise=all"


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the template writes it.

    `spans` are the supervised characters as (start, end), one pair a supervised assistant turn, in order and apart;
    each ends with the turn's stop token. `contents` are the characters of the row's own texts. `unlike_served` says
    why the text before a supervised turn is not what a server would give; empty: it is. `lost_reasoning` counts the
    supervised turns whose reasoning the template leaves out. `rewritten`: up to the end of a supervised turn it writes
    another text than where that turn is the last message. `clock_dependent`: it writes the clock's date.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    contents: tuple[tuple[int, int], ...] = ()
    unlike_served: str = ""
    lost_reasoning: int = 0
    rewritten: bool = False
    clock_dependent: bool = False


def supervised_turns(conversation: Conversation, supervise: str) -> list[int]:
    """Indices of the assistant's messages that `data.supervise` names, without those marked `train: false`."""
    turns = conversation.assistant_turns()
    if supervise == "last_turn":
        turns = turns[-1:]
    elif supervise == "completion":
        start = conversation.completion_start
        if start is None:
            users = (index for index, message in enumerate(conversation.messages) if message["role"] == "user")
            start = max(users, default=-1) + 1
        turns = [turn for turn in turns if turn >= start]
    untrained = frozenset(conversation.untrained)
    return [turn for turn in turns if turn not in untrained]


@dataclass(frozen=True)
class Form:
    """What is known of a shape: its layout or why there is none, whether the template writes the clock's date into it,
    and the text of a special token that it has outside of its texts, such as in a tool's description, or nothing.
    """

    layout: Layout | Cause
    clock_dependent: bool
    special: str


@dataclass(frozen=True)
class TurnFinder:
    """A template with what has been learned of it: the forms of the shapes and supervised turns met so far.

    `special_tokens_in_content`: the text of a special token in a row may become that token.
    """

    template: ChatTemplate
    supervise: str = "assistant"
    special_tokens_in_content: bool = False
    forms: dict[tuple[Shape, tuple[int, ...]], Form] = field(default_factory=dict)

    def find(self, conversations: Sequence[Conversation]) -> list[RenderedChat | Refusal]:
        """Render conversations and find the supervised turns.

        A refusal stands in the place of a conversation that has no turn to supervise, that the template refuses or does
        not write whole, in which it writes no stop token after a turn, or where its output does not show a turn.
        """
        texts = self.template.render_each(conversations)
        return [self._found(conversation, text) for conversation, text in zip(conversations, texts, strict=True)]

    def _found(self, conversation: Conversation, text: str | Refusal) -> RenderedChat | Refusal:
        wanted = () if self.supervise == "all" else tuple(supervised_turns(conversation, self.supervise))
        if self.supervise != "all" and not wanted:
            return Refusal(
                conversation.origin,
                "masked",
                f"{conversation.origin} has no turn of the assistant that data.supervise={self.supervise} would train, "
                "so nothing in it would be learned; remove the row, or set data.supervise=all",
            )
        if isinstance(text, Refusal):
            return text
        try:
            return self._align(conversation, text, wanted)
        except RowRefusedError as error:
            return error.refusal

    def _align(self, conversation: Conversation, text: str, wanted: tuple[int, ...]) -> RenderedChat:
        """
        Args:
            wanted: the supervised turns.
        Raises:
            RowRefusedError: the row cannot be trained on exactly.
        """
        shape, slots = take_apart(conversation)
        form = self.forms.get((shape, wanted))
        if form is None:
            if len(self.forms) >= FORMS_KEPT:
                self.forms.clear()
            form = self.forms[shape, wanted] = Form(
                self._learn(shape, wanted), self.template.follows_clock(conversation), self._special_in(shape)
            )
        special = self.template.special_token.search("\0".join(slots))
        layout, mismatch, written, lengths = form.layout, None, "", []
        if isinstance(layout, Cause):
            mismatch = layout
        else:
            written, lengths = layout.pieces.filled(slots)
            if written != text:
                does = f"it writes these texts in a way of its own: {_difference(text, written)}"
                mismatch = Cause("unaligned", does)
        if not self.special_tokens_in_content and (form.special or (special and mismatch)):
            raise _special_text(conversation, form.special or special.group())
        if mismatch:
            chat = self._from_marks(conversation, text, mismatch)
        else:
            contents = _contents(layout, lengths) if special else ()
            chat = self._chat(conversation, text, layout, lengths, contents, slots)
        return replace(chat, clock_dependent=True) if form.clock_dependent else chat

    def _special_in(self, shape: Shape) -> str:
        """The text of a special token in the tools, or in what a message has beside its texts."""
        parts = (REASONING_TAG.sub("", part) for part in shape if part[:1] in ("[", "{"))
        found = next(filter(None, map(self.template.special_token.search, parts)), None)
        return found.group() if found else ""

    def _chat(
        self,
        conversation: Conversation,
        text: str,
        layout: Layout,
        lengths: Sequence[int],
        contents: tuple[tuple[int, int], ...],
        slots: Sequence[str],
    ) -> RenderedChat:
        if self.supervise == "all" and not layout.lost:
            return RenderedChat(text, (), contents)
        spans, unlike, lost, rewritten = [], "", 0, False
        for index, turn in layout.turns.items():
            if turn.cause:
                cause = turn.cause._replace(does=_with_texts(turn.cause.does, slots))
                if cause.kind == "untrained_stop":
                    raise without_stop(conversation, index, cause.does)
                if layout.lost:
                    raise refused(conversation, layout.lost if cause.kind == "unaligned" else cause)
                return self._from_marks(conversation, text, cause)
            spans.append((turn.start[0] + lengths[turn.start[1]], turn.end[0] + lengths[turn.end[1]]))
            unlike = unlike or _with_texts(turn.unlike_served, slots)
            lost += turn.lost_reasoning
            rewritten = rewritten or turn.rewritten
        if layout.lost:
            raise refused(conversation, layout.lost)
        return RenderedChat(text, tuple(spans), contents, unlike, lost, rewritten)

    def _learn(self, shape: Shape, wanted: Sequence[int]) -> Layout | Cause:
        """The layout of a shape, or why there is none."""
        skeleton, owners = skeleton_of(shape)
        [text] = self.template.render_each([skeleton])
        if isinstance(text, Refusal):
            return Cause("unaligned", f"it refuses a row of this form with other texts ({text.reason})")
        return read_layout(self.template, skeleton, owners, cut(text), wanted)

    def _from_marks(self, conversation: Conversation, text: str, cause: Cause) -> RenderedChat:
        """The spans between the template's marks, each made to end with its stop token."""
        if self.supervise == "all":
            return RenderedChat(text, ())
        turns = conversation.assistant_turns()
        if not self.template.has_marks:
            raise refused(conversation, cause)
        marked = self.template.marked_spans(conversation)
        if len(marked) != len(turns):
            reason = (
                f"{conversation.origin}: the template's {{% generation %}} marks hold {len(marked)} texts for "
                f"{len(turns)} assistant turns; mend the marks in model.chat_template, or set data.supervise=all"
            )
            raise RowRefusedError(Refusal(conversation.origin, "unaligned", reason))
        wanted = set(supervised_turns(conversation, self.supervise))
        spans, unlike = [], ""
        for turn, (start, end) in zip(turns, marked, strict=True):
            tail = re.search(rf"(?:\s*{self.template.special_token.pattern})+\s*$", text[start:end])
            stop = self.template.stop_after(text, start + tail.start() if tail else end)
            if stop is None:
                raise without_stop(conversation, turn, text[start:end])
            if turn in wanted:
                spans.append((start, stop))
                unlike = unlike or self._other_prompt(conversation, turn, text[:start])
        return RenderedChat(text, tuple(spans), unlike_served=unlike)

    def _other_prompt(self, conversation: Conversation, turn: int, before: str) -> str:
        """Why a server's prompt for a turn is not the text before it in the row; empty: it is."""
        if turn == 0:
            return ""
        asked = replace(conversation, messages=conversation.messages[:turn])
        [prompt] = self.template.render_each([asked], generation_prompt=True)
        if isinstance(prompt, Refusal):
            return "it refuses the messages before the turn"
        if prompt == before:
            return ""
        return f"its prompt for message {turn + 1} ends in {prompt[-40:]!r}, where the row has {before[-40:]!r}"


def supervised_spans(template: ChatTemplate, conversations: Sequence[Conversation]) -> list[RenderedChat | Refusal]:
    """Render conversations and find all that the assistant says in them; see `TurnFinder.find`."""
    return TurnFinder(template).find(conversations)


def refused(conversation: Conversation, cause: Cause) -> RowRefusedError:
    """The error of a row that the template does not write so that it can be trained on exactly."""
    if cause.kind == "unaligned":
        reason = f"the chat template does not show where an assistant turn is: {cause.does}; {WAY_OUT}"
    else:
        reason = f"the chat template does not write the whole row: {cause.does}; {LOST_WAY_OUT}"
    return RowRefusedError(Refusal(conversation.origin, cause.kind, f"{conversation.origin}: {reason}"))


def without_stop(conversation: Conversation, turn: int, written: str) -> RowRefusedError:
    """The error of a row with a turn that ends without a stop token."""
    reason = (
        f"{conversation.origin}, message {turn + 1}: the chat template writes no stop token after an assistant turn, "
        f"which ends in {written[-40:]!r}; a model trained so never learns to stop. A stop token must be a special "
        "token of the tokenizer: name it in model.special_tokens, as in `eos_token: <|im_end|>`, or give a template "
        "that writes the tokenizer's own as model.chat_template"
    )
    return RowRefusedError(Refusal(conversation.origin, "untrained_stop", reason))


def _contents(layout: Layout, lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The characters of the row's own texts.

    Args:
        lengths: how long the first 0, 1, ... of them are.
    """
    starts = accumulate(len(literal) for literal in layout.pieces.literals[:-1])
    return tuple(
        (start + before, start + after) for start, before, after in zip(starts, lengths[:-1], lengths[1:], strict=True)
    )


def _special_text(conversation: Conversation, token: str) -> RowRefusedError:
    """The error of a row in which a text would become a special token."""
    reason = (
        f"{conversation.origin} holds {token!r}, the text of a special token, where the chat template does not show "
        "which part of its output is the row's own, such as in a tool; change the row, or set "
        "data.allow_special_tokens_in_content=true to train on the token itself"
    )
    return RowRefusedError(Refusal(conversation.origin, "unaligned", reason))


def _with_texts(reason: str, slots: Sequence[str]) -> str:
    """What is told of a skeleton, told of the row."""
    return STAND_IN.sub(lambda match: slots[int(match[1])], reason)


def _difference(first: str, second: str) -> str:
    """Where two texts part, with what each has there."""
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    return f"{first[max(0, at - 20) : at + 30]!r} against {second[max(0, at - 20) : at + 30]!r}"
