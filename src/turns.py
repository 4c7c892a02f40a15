"""Where the assistant's turns are in a rendered skeleton, told by the prompts that the template gives for them.

    layout = read_layout(template, skeleton, owners, cut(text))
    layout.turns[1].start                  # characters of the template's own, and texts of the row, before the turn

A turn begins where the prompt ends that the template writes for it. It ends where the template would begin to ask for
another turn right after it, and of what stands there, with its stop token.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from src.chat import CALL_STOPS, ChatTemplate
from src.formats import Conversation
from src.refusal import Kind, RowRefusedError
from src.skeletons import STAND_IN, Pieces, cut, stand_in

TURNS_READ_WHOLE = 8
"""Turns of a conversation whose prompts are rendered each; of a longer one, these many first, the last, and one of each
kind, and the others must read as a turn of their kind does. So the cost stays linear in the number of turns."""

REASONING_OPENER = re.compile(r"(?:<think>|<\|channel>thought).*$", re.DOTALL)


class Cause(NamedTuple):
    """Why a row of a shape is refused: the kind, and what the template does; it has stand-ins for the row's texts.

    Of the kind `untrained_stop`, `does` is what the template writes in the turn.
    """

    kind: Kind
    does: str


@dataclass(frozen=True)
class Turn:
    """One assistant message: `start` and `end` as `Pieces.place` gives them, or the `cause` why they do not show.

    `rewritten`: up to its end the template writes another text than where this message is the last.
    """

    start: tuple[int, int] = (0, 0)
    end: tuple[int, int] = (0, 0)
    cause: Cause | None = None
    unlike_served: str = ""
    lost_reasoning: bool = False
    rewritten: bool = False


@dataclass(frozen=True)
class Layout:
    """The pieces of a shape and its supervised turns by message; `lost` names what the template leaves out, if any."""

    pieces: Pieces
    turns: dict[int, Turn]
    lost: Cause | None = None


def read_layout(
    template: ChatTemplate, skeleton: Conversation, owners: Sequence[int], pieces: Pieces, wanted: Sequence[int]
) -> Layout:
    """Find turns of a rendered skeleton.

    Args:
        owners: for each stand-in, the message that it belongs to.
        wanted: the assistant's messages to find, in order.
    """
    reader = _Reader(template, skeleton, owners, pieces)
    return Layout(pieces, reader.turns(wanted), reader.lost())


@dataclass
class _Reader:
    """A skeleton's rendering beside those of its beginnings."""

    template: ChatTemplate
    skeleton: Conversation
    owners: Sequence[int]
    pieces: Pieces
    rendered: dict[tuple[int, bool], str | None] = field(default_factory=dict)

    def turns(self, indices: Sequence[int]) -> dict[int, Turn]:
        turns: dict[int, Turn] = {}
        known: dict[str, tuple[str, str, str]] = {}
        for count, index in enumerate(indices):
            kind = self._kind(index)
            whole = count < TURNS_READ_WHOLE or index == indices[-1]
            turn = None if whole or kind not in known else self._alike(index, *known[kind])
            if turn is None:
                turn, around = self._read(index)
                if around:
                    known[kind] = around
            turns[index] = turn
        return turns

    def lost(self) -> Cause | None:
        """What the template does not write of the messages and the tools; reasoning is no part of it."""
        written = set(self.pieces.numbers)
        shown = {self.owners[number] for number in written}
        for number, owner in enumerate(self.owners):
            message = self.skeleton.messages[owner]
            if number in written:
                continue
            if message["role"] == "assistant":
                missing = self._missing(owner, self.pieces.text, written)
                if missing:
                    return Cause("content_lost", missing)
            elif owner in shown:
                return Cause("content_lost", f"it leaves out a part of message {owner + 1}")
            else:
                does = f"it leaves out message {owner + 1}, of role {message['role']}, when an answer follows"
                return Cause("role_order", does)
        names = [tool.get("function", tool).get("name", "") for tool in self.skeleton.tools]
        first = self.pieces.borders[0][0] if self.pieces.borders else len(self.pieces.text)
        if names and not any(name and name in self.pieces.text for name in names) and first:
            return Cause("content_lost", "it leaves out the tools")
        return None

    def _kind(self, index: int) -> str:
        """What is the same for turns that a template writes alike: the messages around them without their texts."""
        around = self.skeleton.messages[max(0, index - 1) : index + 2]
        return STAND_IN.sub("", repr([sorted(m.items(), key=lambda item: item[0]) for m in around]))

    def _prefix(self, count: int, generation_prompt: bool) -> str | None:
        """The first messages as the template writes them; None where it refuses them."""
        key = (count, generation_prompt)
        if key not in self.rendered:
            beginning = replace(self.skeleton, messages=self.skeleton.messages[:count])
            try:
                self.rendered[key] = self.template.render([beginning], generation_prompt=generation_prompt)[0]
            except RowRefusedError:
                self.rendered[key] = None
        return self.rendered[key]

    def _generation_prompt(self) -> str | None:
        """What the template adds to ask for a turn; None where that does not show."""
        for index in self.skeleton.assistant_turns():
            asked, told = self._prefix(index, True), self._prefix(index, False)
            if index and asked is not None and told is not None:
                at = 0
                for a, b in zip(asked, told, strict=False):
                    if a != b:
                        break
                    at += 1
                inside = (m for m in self.template.special_token.finditer(asked) if m.start() < at < m.end())
                return asked[next((m.start() for m in inside), at) :]
        return None

    @cached_property
    def _owned(self) -> dict[int, list[tuple[int, int]]]:
        """The borders of each message's stand-ins in the text."""
        owned: dict[int, list[tuple[int, int]]] = {}
        for number, borders in self._numbered():
            owned.setdefault(self.owners[number], []).append(borders)
        return owned

    def _own(self, index: int) -> list[tuple[int, int]]:
        return self._owned.get(index, [])

    def _gap(self, index: int) -> tuple[int, int]:
        """From the last text of earlier messages to the first one of the turn, or of what follows it."""
        floor, ceiling = 0, len(self.pieces.text)
        for number, (start, end) in zip(self.pieces.numbers, self.pieces.borders, strict=True):
            if self.owners[number] < index:
                floor = max(floor, end)
            else:
                ceiling = min(ceiling, start)
        return floor, ceiling

    def _read(self, index: int) -> tuple[Turn, tuple[str, str, str] | None]:
        """A turn, and what the template writes before, around and after it where turns of its kind can be told so."""
        text, own = self.pieces.text, self._own(index)
        start, unlike = self._start(index, own)
        if start is None:
            return Turn(cause=Cause("unaligned", unlike)), None
        end = self._end(index, own)
        if end is None and not own:
            return self._read_empty(index, start, unlike), None
        if end is None:
            return Turn(cause=Cause("unaligned", "it writes the turn in another way once more messages follow")), None
        within = {number for number, (a, _) in self._numbered() if start <= a < end}
        missing = self._missing(index, text[start:end], within)
        if missing:
            return Turn(cause=Cause("content_lost", missing)), None
        stop = self._stop(index, own, start, end)
        if stop is None:
            return Turn(cause=Cause("untrained_stop", text[start:end])), None
        if any(start <= a < stop and self.owners[n] != index for n, (a, _) in self._numbered()):
            return Turn(cause=Cause("unaligned", "it writes another message within the turn")), None
        if any(not start <= a < stop for a, _ in own):
            return Turn(cause=Cause("unaligned", "it writes parts of the turn outside of it")), None
        turn = Turn(
            self.pieces.place(start),
            self.pieces.place(stop),
            unlike_served=unlike,
            lost_reasoning=any(owner == index and n not in within for n, owner in enumerate(self.owners)),
            rewritten=self._rewritten(index, stop),
        )
        floor, _ = self._gap(index)
        around = (text[floor:start], text[start : own[0][0]], text[own[-1][1] : stop]) if own and floor else None
        return turn, around if len(own) == 1 else None

    def _read_empty(self, index: int, start: int, unlike: str) -> Turn:
        """A turn without a text: what the template writes around one that is put there."""
        text, messages = self.pieces.text, list(self.skeleton.messages)
        cause = Cause("unaligned", "it writes a turn without content in a way of its own")
        if messages[index].get("content") or messages[index].get("tool_calls"):
            return Turn(cause=cause)
        messages[index] = {**messages[index], "content": stand_in(len(self.owners))}
        filled = replace(self.skeleton, messages=tuple(messages))
        try:
            pieces = cut(self.template.render([filled])[0])
        except RowRefusedError:
            return Turn(cause=cause)
        reader = _Reader(self.template, filled, [*self.owners, index], pieces)
        turn, _ = reader._read(index)
        own = reader._own(index)
        if turn.cause or len(own) != 1:
            return Turn(cause=turn.cause or cause)
        written = pieces.text[pieces.position(turn.start) : own[0][0]]
        around = written + pieces.text[own[0][1] : pieces.position(turn.end)]
        if not text.startswith(around, start):
            return Turn(cause=cause)
        stop = start + len(around)
        return Turn(
            self.pieces.place(start),
            self.pieces.place(stop),
            unlike_served=unlike,
            rewritten=self._rewritten(index, stop),
        )

    def _rewritten(self, index: int, stop: int) -> bool:
        """Whether the text up to `stop`, a turn's end, is another than where the turn's message is the last."""
        if index + 1 == len(self.skeleton.messages):
            return False
        alone = self._prefix(index + 1, False)
        if alone is None:  # the template does not take the message as the last one
            return False
        return not alone.startswith(self.pieces.text[:stop]) or self._with_eos(alone, stop, len(alone)) != stop

    def _numbered(self) -> list[tuple[int, tuple[int, int]]]:
        return list(zip(self.pieces.numbers, self.pieces.borders, strict=True))

    def _alike(self, index: int, before: str, opening: str, closing: str) -> Turn | None:
        """A turn with one text, where the template writes the same around it as around another of its kind."""
        text, own = self.pieces.text, self._own(index)
        if len(own) != 1:
            return None
        at = own[0][0] - len(opening)
        earlier = bisect_left(self.pieces.borders, own[0])
        previous = self.pieces.borders[earlier - 1][1] if earlier else 0
        if text[previous : own[0][0]] != before + opening or not text.startswith(closing, own[0][1]):
            return None
        return Turn(self.pieces.place(at), self.pieces.place(own[0][1] + len(closing)))

    def _start(self, index: int, own: Sequence[tuple[int, int]]) -> tuple[int | None, str]:
        """Where the turn begins, and why a server's prompt would be another; or None, and why it does not show."""
        text = self.pieces.text
        prompt = self._prefix(index, True) if index else None
        if prompt is not None and text.startswith(prompt):
            return len(prompt), ""
        floor, ceiling = self._gap(index)
        gap = text[floor:ceiling]
        why = "it refuses the messages before the turn"
        if prompt is not None:
            why = f"its prompt for message {index + 1} ends in {prompt[-40:]!r}, where the row has {gap[-40:]!r}"
            last = list(STAND_IN.finditer(prompt))
            closing = prompt[last[-1].end() :] if last else ""
            if closing and self.owners[int(last[-1][1])] == index - 1 and gap.startswith(closing):
                return floor + len(closing), why
        asked = self._generation_prompt() or ""
        short = REASONING_OPENER.sub("", asked)
        for header in (asked, short, short.rstrip()):
            if header.strip() and gap.count(header) == 1:
                return floor + gap.index(header) + len(header), why if index else ""
        if index == 0 and own:
            return own[0][0], ""
        return None, f"its generation prompt is not what it writes before the turn: {why}"

    def _end(self, index: int, own: Sequence[tuple[int, int]]) -> int | None:
        """Where the template has closed the turn; None where that does not show."""
        text = self.pieces.text
        if index + 1 == len(self.skeleton.messages):
            return len(text)
        asked, again = self._generation_prompt(), self._prefix(index + 1, True)
        if asked is not None and again is not None and again.endswith(asked):
            closed = again[: len(again) - len(asked)]
            if text.startswith(closed):
                return len(closed)
            last = list(STAND_IN.finditer(closed))
            if own and last and self.owners[int(last[-1][1])] == index:
                tail = closed[last[-1].end() :]
                if tail and text.startswith(tail, own[-1][1]):
                    return own[-1][1] + len(tail)
        closed = self._prefix(index + 1, False)
        return len(closed) if closed is not None and text.startswith(closed) else None

    def _missing(self, index: int, written: str, shown: Set[int]) -> str:
        """What `written`, with the stand-ins `shown`, lacks of a message of the assistant; empty: nothing.

        Its reasoning is no part of that.
        """
        message = self.skeleton.messages[index]
        if not _numbers(str(message.get("content")).rsplit("</think>", 1)[-1]) <= shown:
            return f"it leaves out the content of message {index + 1}"
        calls = message.get("tool_calls") or ()
        for call in calls:
            name = str(call.get("function", call).get("name", ""))
            if name not in written or not _numbers(repr(call)) <= shown:
                return f"it leaves out the call of {name} in message {index + 1}"
        return ""

    def _stop(self, index: int, own: Sequence[tuple[int, int]], start: int, end: int) -> int | None:
        """The end of the turn's stop token; None where it has none."""
        text = self.pieces.text
        tail = max(start, own[-1][1]) if own else start
        if own and not self.skeleton.messages[index].get("tool_calls"):
            stop = self.template.stop_after(text, tail)
            if stop is not None and stop <= end:
                return self._with_eos(text, stop, end)
        run = re.search(rf"(?:\s*{self.template.special_token.pattern})+\s*$", text[tail:end])
        if run is None:
            return None
        closers = {self.template.tokenizer.eos_token, *CALL_STOPS, *self._plain_stops()}
        for special in self.template.special_token.finditer(text, tail + run.start(), end):
            if special.group() in closers:
                return self._with_eos(text, special.end(), end)
        return None

    def _with_eos(self, text: str, stop: int, end: int) -> int:
        """The end of the eos token where it follows a stop token at once: generation runs on until it."""
        eos = self.template.tokenizer.eos_token
        if not eos or text.endswith(eos, 0, stop):
            return stop
        closed = re.compile(rf"(?:{self.template.special_token.pattern})*?{re.escape(eos)}").match(text, stop, end)
        return closed.end() if closed else stop

    def _plain_stops(self) -> set[str]:
        """The tokens that the template ends a plain answer with, as the last message and before others."""
        turns = [("user", "1"), ("assistant", '"xq7'), ("user", "2"), ("assistant", '"xq7')]
        messages = tuple({"role": role, "content": content} for role, content in turns)
        stops = set()
        for count in (2, 4):
            try:
                text = self.template.render([Conversation(messages[:count], "probe")])[0]
            except RowRefusedError:
                continue
            for answer in re.finditer('"xq7', text):
                stop = self.template.stop_token.match(text, answer.end())
                stops |= {stop.group().strip()} if stop else set()
        return stops


def _numbers(text: str) -> set[int]:
    """The numbers of the stand-ins in a text, which may be JSON."""
    return {int(number) for number, _ in STAND_IN.findall(text)}
