"""Rows that come tokenized: what can be checked of them without their text.

checker = IdsChecker.of(tokenizer)
rows = checker.checked([IdsRow((1, 5, 2), (-100, 5, 2), "rows.parquet row 1")])   # token rows, or refusals
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from src.chat import CALL_STOPS, ChatTemplate
from src.formats import IGNORED, Conversation, IdsRow
from src.refusal import Kind, Refusal, RowRefusedError
from src.tokenization import TokenRow

ANSWER = "xq7"
"""A text after which a probe finds how the template ends a turn."""


@dataclass(frozen=True)
class IdsChecker:
    """What the tokenizer says of rows that others have tokenized.

    `vocabulary` is the number of ids it has; `bos_id` is its BOS, None where it has none; `begins_with_bos` says
    whether it or its chat template puts that first; `stop_ids` end a turn. `names` are the tokens of these ids.
    """

    vocabulary: int
    bos_id: int | None
    begins_with_bos: bool
    stop_ids: frozenset[int]
    names: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "IdsChecker":
        """Look at a tokenizer, and at its chat template if it has one."""
        stops = {tokenizer.eos_token} - {None} | CALL_STOPS & tokenizer.get_vocab().keys()
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        for text, ends in _probes(tokenizer):
            stops |= ends
            begins = begins or (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))
        names = tuple(sorted(stops))
        ids = frozenset(tokenizer.convert_tokens_to_ids(list(names)))
        return cls(len(tokenizer), tokenizer.bos_token_id, begins, ids, names)

    def checked(self, rows: Sequence[IdsRow]) -> list[TokenRow | Refusal]:
        """A token row for each, or why it cannot be trained on."""
        return [self._refusal(row) or _token_row(row) for row in rows]

    def _refusal(self, row: IdsRow) -> Refusal | None:
        def refused(kind: Kind, found: str) -> Refusal:
            return Refusal(row.origin, kind, f"{row.origin} {found}")

        wrong = next((token for token in row.input_ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            return refused(
                "malformed",
                f"has id {wrong}, and the tokenizer's are 0 to {self.vocabulary - 1}; the row was made with another "
                "tokenizer: give that one as model.tokenizer, or rows of text",
            )
        if row.labels.count(IGNORED) == len(row.labels):
            return refused("masked", "has no label but -100, so nothing in it would be learned; remove it")
        if self.begins_with_bos and row.input_ids[0] != self.bos_id:
            return refused("missing_bos", f"does not begin with id {self.bos_id}, the tokenizer's BOS; put it first")
        if self.begins_with_bos and row.input_ids[1:2] == (self.bos_id,):
            return refused("doubled_bos", f"begins with id {self.bos_id}, the tokenizer's BOS, twice; take one away")
        unended = None if IGNORED not in row.labels[1:] else self._unended(row.labels)
        if unended is not None:
            return refused(
                "untrained_stop",
                f"has a run of labels that ends at position {unended} with id {row.labels[unended]}, which is no stop "
                f"token ({', '.join(self.names)}), so that the model would not learn to stop; label the stop token too",
            )
        return None

    def _unended(self, labels: Sequence[int]) -> int | None:
        """Where a run of labels ends without a stop token; None: nowhere."""
        for at, (label, following) in enumerate(zip(labels, (*labels[1:], IGNORED), strict=True)):
            if label != IGNORED and following == IGNORED and label not in self.stop_ids:
                return at
        return None


def _token_row(row: IdsRow) -> TokenRow:
    return TokenRow(np.array(row.input_ids, dtype=np.int32), np.array(row.labels, dtype=np.int32), row.origin)


def _probes(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, set[str]]]:
    """What the chat template writes of short conversations, each with the tokens that end its answers."""
    if not tokenizer.chat_template:
        return []
    template, found = ChatTemplate.of(tokenizer), []
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER})
    for messages in (turns, turns * 2):
        try:
            [text] = template.render([Conversation(messages, "probe")])
        except RowRefusedError:
            continue
        places = [at + len(ANSWER) for at in range(len(text)) if text.startswith(ANSWER, at)]
        ends = [template.stop_after(text, place) for place in places]
        stops = {text[place:end].strip() for place, end in zip(places, ends, strict=True) if end}
        found.append((text, stops))
    return found
