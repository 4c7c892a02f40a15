"""Rows that come tokenized, and why one is refused."""

import pytest

from src.formats import IdsRow
from src.pretokenized import IdsChecker
from src.refusal import Refusal
from tests.toy_tokenizer import CHATML, toy_tokenizer

BOS, EOS = "<|bos|>", "<|endoftext|>"


@pytest.fixture
def tokenizer():
    """Turns end with <|im_end|>, texts with another token."""
    return toy_tokenizer(CHATML, bos=BOS, eos=EOS, special=("<|im_start|>", "<|im_end|>"), adds_bos=True)


def judged(tokenizer, ids, labels):
    """The kind of refusal that a row meets, ids given by their tokens' text or as numbers; None: it is kept."""
    ids = tuple(tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else token for token in ids)
    labels = tuple(token if keep else -100 for token, keep in zip(ids, labels, strict=True))
    [row] = IdsChecker.of(tokenizer).checked([IdsRow(ids, labels, "d.jsonl line 1")])
    if isinstance(row, Refusal):
        assert row.reason.startswith("d.jsonl line 1 ")
        return row.kind
    assert (row.input_ids.tolist(), row.labels.tolist()) == (list(ids), list(labels))
    return None


@pytest.mark.parametrize(
    ("ids", "labels", "kind"),
    [
        ((BOS, "a", "b", "<|im_end|>"), (0, 0, 1, 1), None),
        ((BOS, "a", "b", EOS), (0, 0, 1, 1), None),
        ((BOS, "a", "b", "c"), (0, 1, 1, 1), None),  # a piece of a text: every token but the first is supervised
        ((BOS, "a", "b", "c"), (0, 0, 1, 1), "untrained_stop"),
        ((BOS, "a", "<|im_end|>", "b", EOS), (0, 1, 0, 0, 1), "untrained_stop"),
        ((BOS, "a", "<|im_end|>", "b", EOS), (0, 1, 1, 0, 1), None),
        ((BOS, "a", "<|im_start|>"), (0, 0, 1), "untrained_stop"),
        ((BOS, BOS, "a", EOS), (0, 0, 1, 1), "doubled_bos"),
        (("a", "b", EOS), (0, 1, 1), "missing_bos"),
        ((BOS, "a", EOS), (0, 0, 0), "masked"),
        ((BOS, 9999), (0, 1), "malformed"),
        ((BOS, -1), (0, 1), "malformed"),
    ],
)
def test_a_row_of_ids_is_kept_or_refused_by_kind(tokenizer, ids, labels, kind):
    assert judged(tokenizer, ids, labels) == kind


def test_bos_is_asked_for_only_where_the_tokenizer_or_its_template_puts_it():
    silent = toy_tokenizer(CHATML, bos=BOS)
    assert judged(silent, ("a", "<|im_end|>"), (0, 1)) is None
    by_template = toy_tokenizer(BOS + CHATML, bos=BOS)
    assert judged(by_template, ("a", "<|im_end|>"), (0, 1)) == "missing_bos"
    assert judged(toy_tokenizer(None), ("a", "<|im_end|>"), (0, 1)) is None
