"""Spans found by the bytes of tokens are those found by offsets, token for token, or offsets are asked for."""

import base64
import dataclasses
import functools
import re

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from src.checkpoints.llama2c_tokenizer import read_pieces
from src.refusal import Refusal
from src.token_bytes import TokenBytes
from src.token_spans import ByteTokens, OffsetTokens
from src.tokenization import RowEncoder
from tests.test_chat import talk
from tests.toy_tokenizer import CHATML, shared_file, toy_tokenizer

PLAIN_TEXTS = (
    "What is 2 + 2?",
    "  leading and trailing  \n",
    "\n\nTwo lines\r\nof Windows\r\n",
    "tabs\tand    runs of     spaces",
    "naïve café, Ωmega, Привет, 日本語, 한국어, ไทย",
    "😀👩‍👩‍👧🇩🇪 done",
    "\u200f\u202eright to left\u200b\ufeff",
    "a\u00a0b\u3000c",
    "zero\0byte and \x7f",
    "def f(x):\n    return x ** 2  # code\n",
    "0123456789" * 9,
)
COMPOSED = ("cafe\u0301 au lait", "\u1112\u1161\u11ab", "\u212b and \u2126")
MARK = ("an ▁ of its own",)


def llama2(scheme="prepend"):
    """Llama 2's vocabulary with the three ways in which its tokenizers put a space in front."""
    pieces = read_pieces(shared_file("tokenizers/llama2/tokenizer.bin"), vocab_size=32_000)
    backend = pieces.to_tokenizer()
    if scheme != "prepend":
        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return backend, "<s>", "</s>"


def byte_level(name, bos, eos):
    tokenizer = AutoTokenizer.from_pretrained(shared_file(f"tokenizers/{name}"))
    tokenizer.add_special_tokens({"additional_special_tokens": [bos, eos]})
    return tokenizer.backend_tokenizer, bos, eos


def llama3():
    """Llama 3's ranks as a byte-level BPE: each token may be joined from any two that are shorter."""
    letters = bytes_to_unicode()
    lines = shared_file("tokenizers/llama3/tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in ranks
        for _, cut in sorted(
            (max(ranks[token[:cut]], ranks[token[cut:]]), cut)
            for cut in range(1, len(token))
            if token[:cut] in ranks and token[cut:] in ranks
        )
    ]
    backend = Tokenizer(models.BPE({written[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    names = ("<|begin_of_text|>", "<|eot_id|>")
    backend.add_special_tokens(list(names))
    return (backend, *names)


def toy():
    return toy_tokenizer().backend_tokenizer, "<|im_start|>", "<|im_end|>"


TOKENIZERS = {
    "gpt2": lambda: byte_level("gpt2", "<|im_start|>", "<|im_end|>"),
    "qwen2": lambda: byte_level("qwen2", "<|im_start|>", "<|im_end|>"),
    "llama2": llama2,
    "llama2, first": lambda: llama2("first"),
    "llama2, always": lambda: llama2("always"),
    "llama2, never": lambda: llama2("never"),
    "llama3": llama3,
    "toy": toy,
}
LEFT_TO_OFFSETS = {  # rows that the tokenizer changes
    "qwen2": "|".join(COMPOSED),  # NFC
    "llama2": "▁",
    "llama2, never": "▁",
    "llama2, first": "▁|^ ",  # no space is put where there is one
    "llama2, always": "▁|^ |(<s>|</s>) ",
}
NOTHING = "(?!)"


@functools.cache
def description(name):
    backend, bos, eos = TOKENIZERS[name]()
    return backend.to_str(), bos, eos


def tokenizer_of(name):
    """A fresh copy of a tokenizer, its begin and its end token."""
    described, bos, eos = description(name)
    return Tokenizer.from_str(described), bos, eos


def by_offsets(encoding, text, start, end):
    """A stretch's tokens, each looked up by its character in the tokenizer's own encoding."""
    while (first := encoding.char_to_token(start)) is None:
        start += 1
    last = encoding.char_to_token(end - 1)
    if encoding.token_to_chars(last)[1] > end:
        return None
    joined = encoding.token_to_chars(first)[0] < start
    while first <= last and encoding.token_to_chars(first)[0] < start:
        first += 1
    return first, last + 1, joined


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_by_bytes_are_those_by_offsets(name):
    backend, bos, eos = tokenizer_of(name)
    backend.post_processor = None
    table = TokenBytes.of(backend)
    texts = []
    for text in (*PLAIN_TEXTS, *COMPOSED, *MARK):
        texts += [text, f"{bos}user\n{text}{eos}\n{bos}assistant\n{text}{eos}", f"{bos}{text}{eos}{text}"]
    encodings = backend.encode_batch(texts, add_special_tokens=False)
    placed = table.place(texts, [encoding.ids for encoding in encodings])
    left = {text for text, tokens in zip(texts, placed, strict=True) if tokens is None}
    assert left == {text for text in texts if re.search(LEFT_TO_OFFSETS.get(name, NOTHING), text)}
    compared = reaching = 0
    for text, encoding, tokens in zip(texts, encodings, placed, strict=True):
        if tokens is None:
            continue
        assert tokens.ids.tolist() == encoding.ids
        for start in range(0, len(text), 3):
            for end in (start + 1, start + 4, text.find(eos, start) + len(eos), len(text)):
                if start < end <= len(text) and last_character_is_whole(encoding, end):
                    expected = by_offsets(encoding, text, start, end)
                    found = tokens.spans(text, [(start, end)])
                    assert found == (None if expected is None else [expected]), (text, text[start:end])
                    if expected is not None and expected[0] < expected[1]:
                        assert OffsetTokens.of(encoding).spans(text, [(start, end)], "row") == found
                    compared += expected is not None
                    reaching += expected is None
    assert compared > 500
    assert reaching > 100


def last_character_is_whole(encoding, end):
    """Whether one token stands for the whole of the character before `end`, as one does for that of a stop token."""
    last = encoding.char_to_token(end - 1)
    return last is not None and (
        last + 1 == len(encoding.ids) or encoding.token_to_chars(last + 1)[0] >= encoding.token_to_chars(last)[1]
    )


def rows_of(name, conversations, template=CHATML):
    """The encoder of a tokenizer, and its rows of conversations by bytes and by offsets."""
    backend, bos, eos = tokenizer_of(name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, additional_special_tokens=[bos])
    tokenizer.chat_template = template.replace("<|im_start|>", bos).replace("<|im_end|>", eos)
    encoder = RowEncoder.of(tokenizer, unlike_served="drop")  # a row each
    table = encoder._token_bytes
    assert table is not None
    by_bytes = encoder.encode_conversations(conversations)
    encoder.__dict__["_token_bytes"] = None
    by_offsets = encoder.encode_conversations(conversations)
    encoder.__dict__["_token_bytes"] = table
    return encoder, by_bytes, by_offsets


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_are_the_same_as_with_offsets(name):
    conversations = [talk("plain", "Yes.", "more", "No.")]
    conversations += [talk(text, text, "again", f"{text} and {text}") for text in (*PLAIN_TEXTS, *COMPOSED, *MARK)]
    _, bos, eos = tokenizer_of(name)
    conversations += [talk(f"say {bos}", f"it is {eos} or {bos}"), talk("a", "\n\nb\n\n"), talk("a", " b ")]
    encoder, found, expected = rows_of(name, conversations)
    chats = encoder.finder.find(conversations)
    tokens = encoder._encoded([chat.text for chat in chats])
    by_bytes = sum(isinstance(each, ByteTokens) for each in tokens)
    assert 0.6 * len(tokens) < by_bytes < len(tokens) + (name not in LEFT_TO_OFFSETS)
    for row, other in zip(found, expected, strict=True):
        if isinstance(row, Refusal):  # text of a special token, where a row's start is read in a way of its own
            assert (row, name) == (other, "llama2, first")
            continue
        assert row.input_ids.tolist() == other.input_ids.tolist()
        assert row.labels.tolist() == other.labels.tolist()
        assert (row.unlike_served, row.special_text) == (other.unlike_served, other.special_text)


def test_a_wrong_byte_anywhere_leaves_a_row_to_the_offsets():
    backend, bos, eos = tokenizer_of("llama2")
    table = TokenBytes.of(backend)
    text = f"{bos}the cat sat{eos} 😀"
    ids = backend.encode(text, add_special_tokens=False).ids
    assert table.place([text], [ids])[0] is not None
    for place in range(len(ids)):
        other = [*ids[:place], backend.token_to_id("▁dog"), *ids[place + 1 :]]
        assert table.place([text], [other]) == [None]
        assert table.place([text], [ids[:place] + ids[place + 1 :]]) == [None]
    damaged = table.joined.copy()
    damaged[table.starts[backend.token_to_id("▁cat")] + 1] ^= 1
    assert dataclasses.replace(table, joined=damaged).place([text, f"{bos}dog{eos}"], [ids, ids]) == [None, None]


def test_moved_borders_give_other_spans():
    backend, _, eos = tokenizer_of("toy")
    text = f"hello world{eos}"
    [tokens] = TokenBytes.of(backend).place([text], [backend.encode(text).ids])
    moved = dataclasses.replace(tokens, borders=tokens.borders + (np.arange(len(tokens.borders)) > 0))
    assert moved.spans(text, [(6, len(text))]) != tokens.spans(text, [(6, len(text))])


def test_white_space_that_a_special_token_takes_in_is_left_to_the_offsets():
    backend, _, _ = tokenizer_of("toy")
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, special=True)])
    table = TokenBytes.of(backend)
    texts = ["hello<|end|>world", "hello<|end|>\nworld"]
    placed = table.place(texts, [backend.encode(text).ids for text in texts])
    assert [tokens is None for tokens in placed] == [False, True]


def test_a_tokenizer_of_another_kind_is_left_to_the_offsets():
    words = Tokenizer(models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert TokenBytes.of(words) is None
    words.decoder = decoders.WordPiece()
    assert TokenBytes.of(words) is None


def test_every_token_reads_as_its_bytes_say():
    """The decoder of the tokenizer itself reads each token alone, where its bytes are whole characters."""
    for name in ("gpt2", "llama2"):
        backend, _, _ = tokenizer_of(name)
        table = TokenBytes.of(backend)
        backend.decoder = (
            decoders.ByteLevel()
            if name == "gpt2"
            else decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        )
        compared = 0
        for number in range(backend.get_vocab_size()):
            start, size = table.starts[number], table.sizes[number]
            try:
                expected = table.joined[start : start + size].tobytes().decode()
            except UnicodeDecodeError:
                continue
            assert backend.decode([number], skip_special_tokens=False) == expected
            compared += 1
        assert compared > 0.95 * backend.get_vocab_size()
