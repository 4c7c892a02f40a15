"""Facts with the ways to ask for them, and the rows that ask: every choice is made by a hash of what is chosen from.

So the same facts give the same rows on every machine and Python version, and a fact that comes or goes leaves the other
facts' rows as they are.

    rows = training_rows(facts)
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from scripts.smol_data.wordings import OPENINGS_EVAL, OPENINGS_TRAIN, SYSTEM_PROMPTS, VERBS, Wordings

Item = TypeVar("Item")
_LONGEST_PAIR = 500  # characters of two exchanges with their marks: well below 128 tokens
Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Fact:
    """One answer and what asks for it."""

    kind: str
    """What is asked of the key, such as its default."""

    keys: tuple[str, ...]
    """Names of what the question is about, all of the same meaning."""

    wordings: Wordings
    """Ways to ask, with `{key}` and the keys of `parts` in them."""

    answer: str
    """The reference answer."""

    parts: dict[str, str] = field(default_factory=dict)
    """More that the wordings name."""

    asks: int = 8
    """Training rows that ask for it."""


def by_hash(items: Iterable[Item], salt: str) -> list[Item]:
    """The items in an order that only their text and `salt` decide."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}|{item!r}".encode()).digest())


def one_in(n: int, *texts: str) -> bool:
    """Whether the hash of the texts falls into one of `n` equal parts."""
    return int.from_bytes(hashlib.sha256("|".join(texts).encode()).digest()[:8]) % n == 0


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if one_in(8, "system", question):
        messages.insert(0, {"role": "system", "content": by_hash(SYSTEM_PROMPTS, question)[0]})
    return messages


def politely(wording: str) -> list[str]:
    """The same wording as a request, where it is one: `Explain it.` with `Please` or `Could you`; else none."""
    verb, _, rest = wording.partition(" ")
    if verb not in VERBS:
        return []
    request = f"{verb.lower()} {rest}"
    return [f"Please {request}", *(f"{start} {request.removesuffix('.')}?" for start in ("Could you", "Can you"))]


def _ask(fact: Fact, wording: str, openings: Sequence[str]) -> str:
    """The question; one in five has an opening such as a greeting."""
    salt = f"{fact.kind}|{fact.answer}|{wording}"
    if one_in(2, "politely", salt):
        wording = next(iter(by_hash(politely(wording), salt)), wording)
    question = wording.format(key=by_hash(fact.keys, salt)[0], **fact.parts)
    if one_in(5, "opening", salt):
        question = by_hash(openings, salt)[0].format(question=question)
    return question


def training_rows(facts: Sequence[Fact]) -> list[Row]:
    """Rows that ask for each fact in some of its training wordings; one in ten continues another.

    Some questions come without capital and final mark, as people type them.
    """
    conversations = {}
    for fact in facts:
        for wording in by_hash(fact.wordings.train, f"{fact.kind}|{fact.answer}|{fact.keys}")[: fact.asks]:
            question = _ask(fact, wording, OPENINGS_TRAIN)
            if one_in(6, "typed", question):
                question = question[0].lower() + question[1:].rstrip(".?")
            conversations.setdefault(question, _conversation(question, fact.answer))
    rows: list[Row] = []
    for messages in by_hash(conversations.values(), "order"):
        continues = one_in(10, "continue", str(messages)) and messages[0]["role"] == "user"
        if continues and rows and len(rows[-1]["messages"]) == 2 and len(f"{rows[-1]}{messages}") <= _LONGEST_PAIR:
            rows[-1]["messages"].extend(messages)
        else:
            rows.append({"messages": list(messages)})
    return rows


def evaluation_rows(facts: Sequence[Fact], rows_per_kind: int, avoid: Iterable[str]) -> list[Row]:
    """Rows that ask in wordings kept from training, at most `rows_per_kind` of each kind of fact.

    Args:
        avoid: questions that must not be asked.
    """
    taken = set(avoid)
    rows: list[Row] = []
    for kind in dict.fromkeys(fact.kind for fact in facts):
        asked = [(fact, wording) for fact in facts if fact.kind == kind for wording in fact.wordings.eval]
        asked = by_hash(asked, f"evaluation|{kind}")
        for fact, wording in asked[:rows_per_kind]:
            question = _ask(fact, wording, OPENINGS_EVAL)
            if question not in taken:
                taken.add(question)
                rows.append({"messages": _conversation(question, fact.answer)})
    return by_hash(rows, "order")


def questions(rows: Iterable[Row]) -> set[str]:
    """All that users say in the rows."""
    return {message["content"] for row in rows for message in row["messages"] if message["role"] == "user"}
