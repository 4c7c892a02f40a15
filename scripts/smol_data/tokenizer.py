"""The embedded default's tokenizer: byte-level BPE, learned from the training rows, that can spell any text."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from scripts.smol_data.facts import Row

PAD, TURN_START, TURN_END = SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(rows: Iterable[Row], vocabulary: int) -> Tokenizer:
    """Learn merges from what the rows say and from the names of their roles.

    Args:
        vocabulary: tokens in all, of which 256 are the bytes and three the special ones.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}" for row in rows for message in row["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_text(tokenizer: Tokenizer) -> str:
    """The tokenizer's JSON, on one line."""
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":")) + "\n"
