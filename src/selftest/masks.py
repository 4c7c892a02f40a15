"""Check of what is supervised: a chat template's tokens against those written out by hand.

verdict = masks()      # or SelftestError
"""

import numpy as np
import torch
from datasets import Dataset
from tokenizers import pre_tokenizers

from src.formats import Conversation
from src.packing import IGNORED, PackCollator, PackedRows
from src.refusal import Refusal
from src.selftest.subjects import byte_tokenizer
from src.selftest.verdict import SelftestError, Verdict, judge
from src.tokenization import RowEncoder

CONVERSATIONS = (
    (("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And\n3+3?"), ("assistant", "It is 6.")),
    (("user", "Say nothing of <im_end>"), ("assistant", " user\nassistant\n")),
)
"""Turns of several kinds; the last one says words of the template."""

TURN, STOP, NEWLINE = "<|im_start|>", "<|im_end|>", "\n"


def masks() -> Verdict:
    """Each assistant's turn is supervised with the token that ends it, and nothing else is; end of turn is padding."""
    tokenizer = byte_tokenizer()
    rows = RowEncoder.of(tokenizer).encode_conversations(
        [
            Conversation(tuple({"role": role, "content": text} for role, text in turns), origin=f"row {index}")
            for index, turns in enumerate(CONVERSATIONS)
        ]
    )
    for row in rows:
        if isinstance(row, Refusal):
            raise SelftestError(
                f"a plain conversation is refused: {row.reason}; install transformers and tokenizers as "
                "requirements/base.txt has them"
            )
    table = Dataset.from_dict({"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]})
    packs = PackedRows(table, max_length=max(len(row.input_ids) for row in rows), packing=False)
    batch = PackCollator(tokenizer.pad_token_id)([packs[index] for index in range(len(packs))])
    ids, labels = _by_hand(tokenizer.get_vocab(), batch["input_ids"].shape[1])
    places = torch.from_numpy(np.flatnonzero(np.roll(labels, -1, axis=1) != IGNORED))
    wrong = int((batch["input_ids"].numpy() != ids).sum()) + int((batch["labels"].numpy() != labels).sum())
    if not torch.equal(places, batch["supervised_places"]):
        wrong = max(wrong, 1)
    return judge(
        "masks",
        wrong,
        bound=0,
        detail=f"wrong ids and labels of {len(rows)} conversations, by those written out by hand",
        meaning="The model would learn other tokens than the answers and their ends, such as never to stop; install "
        "transformers and tokenizers as requirements/base.txt has them, and look for changes in src/packing.py and "
        "src/turns.py",
    )


def _by_hand(vocabulary: dict[str, int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of the conversations in chatml, padded with the stop token to (2, length)."""
    ids = np.full((len(CONVERSATIONS), length), vocabulary[STOP])
    labels = np.full_like(ids, IGNORED)
    # GPT-2's bytes: a letter stands for itself, and for space and line feed the letters 256 above them.
    assert {"Ġ", "Ċ"} <= set(pre_tokenizers.ByteLevel.alphabet())

    def ids_of(text: str) -> list[int]:
        return [vocabulary[{" ": "Ġ", "\n": "Ċ"}.get(letter, letter)] for letter in text]

    for index, turns in enumerate(CONVERSATIONS):
        place = 0
        for role, text in turns:
            head = [vocabulary[TURN], *ids_of(role + NEWLINE)]
            body = [*ids_of(text), vocabulary[STOP]]
            written = [*head, *body, *ids_of(NEWLINE)]
            ids[index, place : place + len(written)] = written
            if role == "assistant":
                start = place + len(head)
                labels[index, start : start + len(body)] = body
            place += len(written)
    return ids, labels
